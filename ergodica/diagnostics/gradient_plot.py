"""The figure of a comparison of gradient estimators."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

    from ergodica.diagnostics.gradient_table import GradientComparison

MARKERS = {"unbiased": "o", "undecided": "s", "biased": "X"}
_FLOOR = 1e-4


def draw(table: "GradientComparison") -> Any:
    """Variance times cost on the left, bias as a fraction of the gradient on the right, with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    num_points = table.sizes["point"]
    figure = Figure(figsize=(9, 1.9 + 0.45 * table.sizes["estimator"]), layout="constrained")
    work_axes, bias_axes = figure.subplots(1, 2, sharey=True)
    rows = np.arange(table.sizes["estimator"])
    for j in range(num_points):
        height = rows + 0.14 * (j - (num_points - 1) / 2)
        at_point = table.isel(point=j)
        _draw_work(work_axes, at_point, height, table.point_name(j), f"C{j}")
        _draw_bias(bias_axes, at_point, height, f"C{j}")
    work_axes.set(xscale="log", xlabel=f"variance × {_cost_name(table)}")
    work_axes.set_yticks(rows, [str(name) for name in table["estimator"].values])
    work_axes.invert_yaxis()
    tolerance = table.attrs["bias_tolerance"]
    bias_axes.axvline(tolerance, color="0.5", linestyle="--", linewidth=1)
    bias_axes.set(
        xscale="log", xlim=(_FLOOR, None), xlabel=f"norm of the bias / norm of the gradient (dashed: {tolerance:.0%})"
    )
    if num_points > 1:
        work_axes.legend(fontsize="small")
    shown = [v for v in MARKERS if (table["verdict"] == v).any()]
    handles = [Line2D([], [], marker=MARKERS[v], color="0.3", linestyle="", label=v) for v in shown]
    bias_axes.legend(handles=handles, fontsize="small", loc="best")
    return figure


def _cost_name(table: "GradientComparison") -> str:
    return "datum gradients" if bool(table["datum_gradients"].notnull().all()) else "cost (uncounted: 1)"


def _draw_work(axes: Any, at_point: "xr.Dataset", height: np.ndarray, label: str, colour: str) -> None:
    """Draw variance times cost with its interval; an estimator without noise is named instead, at the margin."""
    cost = at_point["datum_gradients"].fillna(1.0)
    middle, lower, upper = ((at_point[name] * cost).values for name in ("variance", "variance_lower", "variance_upper"))
    noisy = middle > float(at_point["rounding_variance"])
    axes.errorbar(
        middle[noisy],
        height[noisy],
        xerr=[(middle - lower)[noisy], (upper - middle)[noisy]],
        fmt="o",
        markersize=4,
        capsize=3,
        color=colour,
        label=label,
    )
    for y in height[~noisy]:
        axes.annotate("no noise", (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize="small")


def _draw_bias(axes: Any, at_point: "xr.Dataset", height: np.ndarray, colour: str) -> None:
    """Draw the bias with its interval; one that may be zero is drawn from the left margin, its marker at the upper end."""
    middle, lower, upper = (
        np.maximum(at_point["relative_bias" + end].values, _FLOOR) for end in ("", "_lower", "_upper")
    )
    for x, low, high, y, verdict in zip(middle, lower, upper, height, at_point["verdict"].values, strict=True):
        if not np.isfinite(high):
            continue
        axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
        axes.plot(x if low > _FLOOR else high, y, MARKERS[str(verdict)], color=colour, markersize=5)
