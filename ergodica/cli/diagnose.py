"""``ergodica diagnose``."""

import json
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from ergodica.cli.errors import RUN_PROBLEM, CallError, did_you_mean, wrong_calls
from ergodica.cli.options import check_can_be_written

if TYPE_CHECKING:
    import xarray


def diagnose(
    run: Annotated[
        pathlib.Path, typer.Argument(metavar="RUN.nc", help="Draws, from ergodica sample or saved by ArviZ.")
    ],
    html: Annotated[pathlib.Path | None, typer.Option(help="Write a page with all checks and plots.")] = None,
    reference: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="RUN.nc", help="A trusted run, such as one of NUTS, to compare moments with."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the checks as JSON.")] = False,
) -> None:
    """Say whether draws can be believed, and why.

    The exit code is 1 if a check found a problem.

    Examples
    --------
    - `ergodica diagnose run.nc --html report.html`

    - `ergodica diagnose run.nc --reference nuts.nc`
    """
    with wrong_calls():
        from ergodica.diagnostics.checks import diagnose as examine

        dt = open_run(run)
        trusted = None if reference is None else open_run(reference)
        if html is not None:
            check_can_be_written(html)
        diagnosis = examine(dt)
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2) if as_json else str(diagnosis))
        if trusted is not None:
            from ergodica.diagnostics.reference import reference_table

            table = reference_table(dt, trusted)
            typer.echo(f"\nAgainst {reference}:\n{table.round(3).to_string()}", err=as_json)
        if html is not None:
            from ergodica.diagnostics.report import report

            report(dt, html, reference=trusted)
            typer.echo(f"\nThe page is in {html}.", err=as_json)
    if diagnosis.belief == "no":
        raise typer.Exit(RUN_PROBLEM)


def open_run(path: pathlib.Path) -> "xarray.DataTree":
    """Read a netCDF file of draws into memory."""
    import xarray as xr

    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.nc")] if path.parent.is_dir() else []
        raise CallError(f"There is no file '{path}'.{did_you_mean(path.name, near)}")
    try:
        with xr.open_datatree(path, engine="h5netcdf") as dt:
            return dt.load()
    except (OSError, ValueError, KeyError) as error:
        raise CallError(f"{path} could not be read as netCDF: {error}") from error
