"""A comparison of gradient estimators in words, and as Markdown."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_table import GradientComparison

COLUMNS = {
    "bias": "verdict",
    "below": "bias_bound",
    "control": "control",
    "variance": "variance",
    "ratio": "variance_ratio",
    "SNR": "snr_median",
    "runs": "datum_gradients",
    "time": "time_ratio",
}


def notes_of(table: "GradientComparison") -> list[str]:
    """Sentences on what the figures do not say by themselves."""
    notes = [_of_reference(table)]
    for j in range(table.sizes["point"]):
        for name in table["estimator"].values:
            cell = table.isel(point=j).sel(estimator=name)
            where = f"{name} at {_the(table, j)}"
            notes += [f"{where}: {text}." for text in _of_cell(cell, table.attrs["bias_tolerance"])]
    return notes


def _of_cell(cell: "GradientComparison", bias_tolerance: float) -> list[str]:
    needed, repeats, found = float(cell["repeats_needed"]), int(cell["repeats"]), []
    missed = str(cell["control"].values) == "missed"
    if needed > repeats:
        wanted = (
            f"{_number(needed)} are needed" if np.isfinite(needed) else "no number is enough, as the gradient is zero,"
        )
        found.append(
            f"{repeats:,} repeats were taken, and {wanted} to find a bias of {bias_tolerance / 2:.0%} and to know the "
            "variance to 10%"
        )
    if missed:
        found.append(
            f"the same gradient shrunk by {bias_tolerance / 2:.0%} was not found biased; {_shrinkage(float(cell['detectable']))}"
        )
    if not bool(cell["trustworthy"]):
        found.append(
            f"the interval of the variance is not to be trusted (kurtosis {float(cell['kurtosis']):.0f}); "
            f"{_number(float(cell['repeats_for_variance']))} repeats would bring its standard error to 5%"
        )
    return found


def markdown_of(table: "GradientComparison") -> str:
    """Tables with one row an estimator, and the notes."""
    columns = {title: name for title, name in COLUMNS.items() if name in table}
    blocks = []
    for j in range(table.sizes["point"]):
        lines = [f"**{table.point_name(j)}**", "", "| estimator | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---|" * len(columns))
        for name in table["estimator"].values:
            cell = table.isel(point=j).sel(estimator=name)
            texts = [_text(cell, column) for column in columns.values()]
            lines.append(f"| {str(name).replace('|', chr(92) + '|')} | " + " | ".join(texts) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes_of(table))]) + "\n"


def _text(cell: "GradientComparison", column: str) -> str:
    value = cell[column].values.item()
    if isinstance(value, str):
        return value
    if column == "bias_bound":
        return f"{value:.2g}"
    if column == "variance":
        return f"{value:.3g} ({float(cell['variance_lower']):.3g} to {float(cell['variance_upper']):.3g})"
    if column == "variance_ratio" and np.isfinite(value):
        return f"{value:.3g} ({float(cell['variance_ratio_lower']):.3g} to {float(cell['variance_ratio_upper']):.3g})"
    return f"{value:.3g}" if np.isfinite(value) else "–"


def _of_reference(table: "GradientComparison") -> str:
    reference = table.attrs["reference"]
    if reference == "exact":
        return "The reference is exact."
    if reference == "pooled":
        return "The reference is the mean of all estimators: it shows whether they agree, not which of them is right."
    return f"The reference is the mean of {reference}: a bias that it has itself is not seen."


def _the(table: "GradientComparison", j: int) -> str:
    name = table.point_name(j)
    return name if name.startswith("point ") else f"the {name}"


def _number(x: float) -> str:
    return f"{float(f'{x:.2g}'):,.0f}"


def _shrinkage(x: float) -> str:
    return (
        f"one by {x:.0%} would have been, with probability 95%"
        if x < 1
        else "any shrinkage at all would have been missed"
    )
