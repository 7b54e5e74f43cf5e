"""Several runs side by side: which to believe."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.diagnostics import page
from ergodica.diagnostics.diagnosis import Diagnosis, Status

if TYPE_CHECKING:
    import xarray as xr

BELIEF = {"yes": "Believe", "no": "Do not believe", "open": "Open"}
REFERENCE_COLUMNS = (
    "Mean error: difference of the means in standard deviations of the reference. sd ratio: 1 is right. b²: squared error of "
    "the second moment over its variance; n independent exact draws have about 1/n. The columns with MCSE, and the floor of "
    "b², are what Monte Carlo error alone explains."
)


def comparison(
    runs: Mapping[str, "xr.DataTree"], diagnoses: Mapping[str, Diagnosis], errors: Mapping[str, Any]
) -> list[str]:
    """Say at the top which runs to believe."""
    parts = [page.heading(2, "Which run to believe")]
    for belief, style in (("yes", "yes"), ("open", "open"), ("no", "no")):
        names = [name for name in runs if diagnoses[name].belief == belief]
        if names:
            parts.append(page.verdict(style, f"{BELIEF[belief]}: {', '.join(names)}", _why(belief, names, diagnoses)))
    columns = ["run", "verdict", "temperature", "R-hat", "ESS (bulk, tail)", "gradients of single data", "seconds"]
    with_reference = any(error is not None for error in errors.values())
    if with_reference:
        columns += ["largest mean error", "sd ratios", "largest b²"]
    rows = []
    for name, run in runs.items():
        diagnosis = diagnoses[name]
        row: list[Any] = [name, (diagnosis.belief, BELIEF[diagnosis.belief])]
        row += [_verdict_cell(diagnosis, check_name) for check_name in ("temperature", "R-hat", "ESS")]
        row += [_attribute(run, "num_gradients"), _attribute(run, "wall_time")]
        rows.append(row + (_error_cells(errors[name]) if with_reference else []))
    parts.append(page.table(columns, rows))
    if with_reference:
        parts.append(page.paragraph("Errors are against the reference run. " + REFERENCE_COLUMNS, "faint"))
    links = " ".join(f'<a href="#run{i}">{page.escape(name)}</a>' for i, name in enumerate(runs))
    return [*parts, f"<nav>In detail: {links}</nav>"]


def _why(belief: str, names: list[str], diagnoses: Mapping[str, Diagnosis]) -> str:
    if belief == "yes":
        return "Every check ran and found no problem."
    status: tuple[Status, ...] = ("failed",) if belief == "no" else ("undecided", "not run")
    reasons = []
    for name in names:
        found = [f"{one.name}: {one.verdict}" for one in diagnoses[name].by_status(*status)]
        reasons.append(f"{name} ({'; '.join(found)}).")
    return " ".join(reasons)


def _verdict_cell(diagnosis: Diagnosis, name: str) -> tuple[str, str]:
    one = diagnosis[name]
    return one.status.replace(" ", "-"), one.verdict


def _error_cells(errors: Any) -> list[Any]:
    if errors is None or isinstance(errors, str):
        return ["reference" if errors and "itself" in errors else "–", "", ""]
    low, high = errors["sd_ratio"].min(), errors["sd_ratio"].max()
    return [float(errors["mean_error"].abs().max()), f"{low:.2f} to {high:.2f}", float(errors.attrs["b2_max"])]


def _attribute(run: "xr.DataTree", name: str) -> Any:
    value = run.attrs.get(name, "–")
    if name == "num_gradients" and isinstance(value, int | float | np.number):
        return f"{float(value):.3g}"
    return f"{float(value):.1f}" if isinstance(value, int | float | np.number) else value
