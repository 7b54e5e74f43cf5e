"""From ``FILE.py:NAME`` and a data file to a posterior."""

import ast
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from ergodica.cli.data import columns_of, read_table, required_arguments, select
from ergodica.cli.errors import CallError, did_you_mean, listed
from ergodica.core.posterior import Posterior


def load_posterior(
    model: str,
    data: pathlib.Path | None,
    columns: list[str],
    settings: list[str],
    *,
    subsampled: bool,
    initial: str = "uniform",
) -> Posterior:
    """Load a model, give it its data by name, and make a posterior of both."""
    found = load_model(model)
    if isinstance(found, Posterior):
        if data is not None:
            raise CallError(f"{model} is a Posterior and holds its data; leave --data out.")
        return found
    from ergodica.models import from_numpyro

    options = dict(parse_setting(setting) for setting in settings)
    arrays = {}
    if data is not None:
        table = read_table(data)
        arrays = select(table, columns_of(columns), found, data, given=set(options))
    missing = [name for name in required_arguments(found) if name not in arrays and name not in options]
    if missing:
        raise CallError(
            f"The model's arguments {listed(missing)} got no value: give --data FILE (npz or csv), or --set NAME=VALUE "
            "for settings that are no data."
        )
    scalars = {name: value for name, value in arrays.items() if value.ndim == 0}
    rows = {name: value for name, value in arrays.items() if value.ndim > 0}
    if subsampled or not rows:
        return from_numpyro(found, initial=initial, **rows, **scalars, **options)
    return from_numpyro(found, data=rows, initial=initial, **scalars, **options)


def load_model(reference: str) -> Callable | Posterior:
    """Import the object ``NAME`` (``model`` unless given) from a Python file."""
    file, colon, name = reference.rpartition(":")
    if not colon:
        file, name = reference, "model"
    path = pathlib.Path(file)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise CallError(
            f"There is no file {file!r}.{did_you_mean(path.name, near)} A model is given as FILE.py:NAME, such as model.py:model."
        )
    module = _import(path)
    if not hasattr(module, name):
        names = [n for n, value in vars(module).items() if _is_own_model(value, module.__name__)]
        raise CallError(f"{path.name} has no {name!r}.{did_you_mean(name, names)} It defines: {listed(names)}.")
    found = getattr(module, name)
    if not isinstance(found, Posterior) and not callable(found):
        raise CallError(
            f"{reference} is a {type(found).__name__}; it must be a NumPyro model (a function) or an ergodica.Posterior."
        )
    return found


def _import(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CallError(f"{path} is no Python file; a model is given as FILE.py:NAME, such as model.py:model.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise CallError(f"{path} could not be imported: {type(error).__name__}: {error}{_line(error, path)}") from error
    finally:
        sys.path.pop(0)
    return module


def _line(error: BaseException, path: pathlib.Path) -> str:
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).name == path.name]
    return f" (line {frames[-1].lineno})" if frames else ""


def _is_own_model(value: Any, module_name: str) -> bool:
    return isinstance(value, Posterior) or (inspect.isfunction(value) and value.__module__ == module_name)


def parse_setting(setting: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as Python writes it, else as text."""
    name, equals, text = setting.partition("=")
    if not equals:
        raise CallError(f"--set expects NAME=VALUE, such as --set degree=3; got {setting!r}.")
    try:
        return name.strip(), ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name.strip(), text
