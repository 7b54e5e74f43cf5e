"""Errors as sentences and exit codes in place of tracebacks."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer

RUN_PROBLEM = 1
WRONG_CALL = 2
_settings = {"traceback": False}


class CallError(Exception):
    """The call was wrong; the message says how, and what to do."""


def show_tracebacks(wanted: bool) -> None:
    """Let errors through with their tracebacks, or not."""
    _settings["traceback"] = wanted


def stop(message: str, code: int) -> typer.Exit:
    """Write an error to the error stream; raise what is returned."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(code)


@contextmanager
def wrong_calls(what: str = "") -> Iterator[None]:
    """Turn the errors by which the library objects to its input into a sentence and exit code 2."""
    try:
        yield
    except CallError as error:
        if _settings["traceback"]:
            raise
        raise stop(str(error), WRONG_CALL) from None
    except (ValueError, TypeError) as error:
        if _settings["traceback"]:
            raise
        hint = "\n(ergodica --traceback … shows where this arose.)"
        raise stop(f"{what}{': ' if what else ''}{error}{hint}", WRONG_CALL) from None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Suggest the option that is spelt most alike, or nothing."""
    options = list(options)
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Names in a row, or the word ``none``."""
    return ", ".join(names) or "none"
