"""The program ``ergodica``.

Exit codes: 0, all went well; 1, the run or what was looked at has a problem (a chain became NaN, draws not to be
believed, a biased estimator); 2, the call was wrong (a file, column, name or number).
"""

from typing import Annotated

import typer

from ergodica.cli.compare import compare as compare_command
from ergodica.cli.demo import demo as demo_command
from ergodica.cli.diagnose import diagnose as diagnose_command
from ergodica.cli.errors import show_tracebacks
from ergodica.cli.sample import sample as sample_command

app = typer.Typer(
    name="ergodica",
    help="Sampling and gradient estimation on JAX, with diagnostics that can be believed.",
    epilog="New here? Run: ergodica demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("demo")(demo_command)
app.command("sample")(sample_command)
app.command("diagnose")(diagnose_command)
app.command("compare")(compare_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ergodica import __version__

        typer.echo(f"ergodica {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    traceback: Annotated[bool, typer.Option(help="Show where in the code an error arose.")] = False,
) -> None:
    """Sampling and gradient estimation on JAX, with diagnostics that can be believed."""
    show_tracebacks(traceback)


__all__ = ["app"]
