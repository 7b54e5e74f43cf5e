"""Options that several commands share."""

import pathlib
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:MODEL",
        help="A NumPyro model (a function) or an ergodica.Posterior in a Python file; the name 'model' may be left out.",
    ),
]
Data = Annotated[
    pathlib.Path | None,
    typer.Option(help="Data file, .npz or .csv. Arrays and columns go to the model's arguments of the same name."),
]
Columns = Annotated[
    list[str],
    typer.Option(
        metavar="ARG=COL,COL,…",
        help="Which columns (arrays) an argument of the model gets, such as x=age,height; again for each argument. Several "
        "columns make a matrix, as does a trailing comma. By default, in a csv file, one argument without a column of "
        "its name takes all columns that are left.",
    ),
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="NAME=VALUE", help="Another argument of the model, such as degree=3.")
]
Subsampled = Annotated[
    bool,
    typer.Option(
        "--subsampled", help="The model has its own plate with subsample_size, and picks rows by its indices."
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def check_can_be_written(path: pathlib.Path) -> None:
    """Raise before a long run rather than after it."""
    from ergodica.cli.errors import CallError

    if path.is_dir():
        raise CallError(f"{path} is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise CallError(f"The folder {path.parent} of {path.name} does not exist; make it first.")
