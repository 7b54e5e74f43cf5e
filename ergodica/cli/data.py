"""Data files: read, checked, and given to the arguments of a model by name."""

import inspect
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ergodica.cli.errors import CallError, did_you_mean, listed


class Table(NamedTuple):
    """What a data file holds, by name: arrays of an npz file, or columns of a csv file."""

    arrays: dict[str, np.ndarray]
    is_csv: bool


def read_table(path: pathlib.Path) -> Table:
    """Read an npz or csv file."""
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CallError(f"There is no file '{path}'.{did_you_mean(path.name, near)}")
    suffixes = "".join(path.suffixes[-2:])
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return Table({name: file[name] for name in file.files}, is_csv=False)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise CallError(f"{path} could not be read as npz: {error}") from error
    if path.suffix == ".csv" or suffixes.endswith((".csv.gz", ".csv.bz2", ".csv.xz")):
        import pandas as pd

        try:
            frame = pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise CallError(f"{path} could not be read as csv: {error}") from error
        return Table({str(name): frame[name].to_numpy() for name in frame.columns}, is_csv=True)
    raise CallError(
        f"{path} must be a .npz or .csv file (numpy.savez writes the former); got the ending {path.suffix!r}."
    )


def columns_of(options: list[str]) -> dict[str, list[str]]:
    """Read ``ARGUMENT=column,column,…``."""
    chosen = {}
    for option in options:
        name, equals, columns = option.partition("=")
        if not equals or not columns:
            raise CallError(
                f"--columns expects ARGUMENT=column,column,… such as --columns x=age,height; got {option!r}."
            )
        chosen[name.strip()] = [column.strip() for column in columns.split(",")]
    return chosen


def arguments(model: Callable) -> dict[str, inspect.Parameter]:
    """Arguments of a model that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(model).parameters.items() if p.kind in kinds}


def required_arguments(model: Callable) -> list[str]:
    """Those among them without a default."""
    return [name for name, p in arguments(model).items() if p.default is inspect.Parameter.empty]


def select(
    table: Table,
    chosen: Mapping[str, list[str]],
    model: Callable,
    path: pathlib.Path,
    given: set[str],
) -> dict[str, np.ndarray]:
    """Give each argument of the model its array.

    Arrays (columns) go to the argument of their name, unless ``chosen`` says otherwise. In a csv file, one argument
    without a default that is still left takes all columns that are left, as a matrix.
    """
    names, kind = arguments(model), "column" if table.is_csv else "array"
    for name in chosen:
        if name not in names:
            raise CallError(
                f"--columns names {name!r}, which is no argument of the model.{did_you_mean(name, names)} "
                f"The model's arguments: {listed(names)}."
            )
    picked = {name: _pick(table, columns, path, kind) for name, columns in chosen.items()}
    used = {column for columns in chosen.values() for column in columns}
    for name in names:
        if name in table.arrays and name not in picked and name not in used and name not in given:
            picked[name] = [name]
            used.add(name)
    open_arguments = [name for name in required_arguments(model) if name not in picked and name not in given]
    rest = [column for column in table.arrays if column not in used]
    if table.is_csv and len(open_arguments) == 1 and rest:
        picked[open_arguments[0]] = [*rest, ""]
        open_arguments = []
    if open_arguments:
        near = did_you_mean(open_arguments[0], rest)
        fix = "Name them by --columns ARGUMENT=" + ("column,column,…" if table.is_csv else "array") + "."
        raise CallError(
            f"The model's argument{'s' if len(open_arguments) > 1 else ''} {listed(open_arguments)} found no {kind} of that name "
            f"in {path.name}.{near} It has: {listed(table.arrays)}. {fix}"
        )
    if not picked:
        raise CallError(
            f"No {kind} of {path.name} bears the name of an argument of the model. Arguments: {listed(names)}. "
            f"{kind.capitalize()}s: {listed(table.arrays)}."
        )
    return {name: _assemble(table, columns, path, kind) for name, columns in picked.items()}


def _pick(table: Table, columns: list[str], path: pathlib.Path, kind: str) -> list[str]:
    for column in columns:
        if column and column not in table.arrays:
            raise CallError(
                f"{path.name} has no {kind} {column!r}.{did_you_mean(column, table.arrays)} It has: {listed(table.arrays)}."
            )
    return columns


def _assemble(table: Table, columns: list[str], path: pathlib.Path, kind: str) -> np.ndarray:
    """One array as it is, or several as the columns of a matrix (a trailing comma makes a matrix of one)."""
    arrays = [_numbers(table.arrays[c], c, path, kind, table.is_csv) for c in columns if c]
    if len(columns) == 1:
        return arrays[0]
    return np.stack([array.astype(np.float32) for array in arrays], axis=1)


def _numbers(array: np.ndarray, name: str, path: pathlib.Path, kind: str, is_csv: bool) -> np.ndarray:
    """Cast to the types that JAX uses; raise where a value is no finite number."""
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int32) if np.issubdtype(array.dtype, np.integer) else array
    if not np.issubdtype(array.dtype, np.floating):
        example = next((value for value in array.ravel() if not isinstance(value, int | float)), array.ravel()[0])
        raise CallError(
            f"The {kind} {name!r} of {path.name} holds what is no number, such as {example!r}. Code it by numbers, or choose "
            "others by --columns."
        )
    bad = ~np.isfinite(array)
    if bad.any():
        first = int(np.argwhere(bad)[0][0]) if array.ndim else 0
        line = f", line {first + 2} of the file" if is_csv else ""
        raise CallError(
            f"The {kind} {name!r} of {path.name} has {bad.sum():,} value{'s' if bad.sum() > 1 else ''} that "
            f"{'are' if bad.sum() > 1 else 'is'} missing, NaN or infinite, the first in row {first} (counted from 0{line}). "
            "Drop these rows or fill them in."
        )
    return array.astype(np.float32)
