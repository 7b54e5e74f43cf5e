"""The figure of a fit: objective, norms and metrics along the steps."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ergodica.core import check

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 400
_AXES = {"step": "steps", "wall_time": "seconds of steps", "n_grad": "gradient evaluations of single data"}
_OWN = ("value", "n_grad", "wall_time")


class Binned(NamedTuple):
    """A long series in bins: where they are, and mean, least and largest finite value in each (NaN where there is none)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def binned(x: np.ndarray, y: np.ndarray, num: int = _BINS) -> Binned:
    """Cut a series into at most ``num`` bins of nearly equal length."""
    edges = np.unique(np.linspace(0, len(y), min(num, len(y)) + 1).astype(int))
    rows = []
    for a, b in itertools.pairwise(edges):
        finite = y[a:b][np.isfinite(y[a:b])].astype(float)
        rows.append((x[a:b].mean(), *((finite.mean(), finite.min(), finite.max()) if len(finite) else 3 * (np.nan,))))
    return Binned(*np.asarray(rows, float).reshape(-1, 4).T)


def plot_fit(
    fit: Any, *, metrics: Sequence[str] | None = None, against: Literal["step", "wall_time", "n_grad"] = "step"
) -> "Figure":
    """Draw the history of a fit: the objective, the norms of gradient and update, and each metric.

    Parameters
    ----------
    fit : Fit or DataTree
        What `ergodica.run.fit` returned, or its history.
    metrics : sequence of str, optional
        Which to draw; all unless given.
    against : {"step", "wall_time", "n_grad"}
        The horizontal axis.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        For an unknown metric or axis, or a fit without steps.

    Notes
    -----
    Steps are drawn in bins, as their mean and the band from the least to the largest, so that a long fit can be drawn too. The
    axis of the objective leaves out what lies below the worst of the last nine tenths of the steps. Steps that the guard left out
    are marked. The dotted line is where the best parameters are.
    """
    from matplotlib.figure import Figure

    history: xr.DataTree = getattr(fit, "history", fit)
    check.one_of("against", against, _AXES)
    steps, evaluations = history["steps"].to_dataset(), history["evaluations"].to_dataset()
    if steps.sizes["step"] == 0:
        raise ValueError("The fit has made no step; there is nothing to draw.")
    known = [str(name) for name in evaluations.data_vars if name not in _OWN]
    names = known if metrics is None else [check.one_of("metrics", name, known) for name in metrics]
    figure = Figure(figsize=(8, 2.2 * (2 + len(names)) + 0.4), layout="constrained")
    panels = figure.subplots(2 + len(names), 1, sharex=True)
    x, at = steps[against].values, evaluations[against].values
    _objective(panels[0], x, at, steps, evaluations)
    _norms(panels[1], x, steps)
    for axes, name in zip(panels[2:], names, strict=True):
        values = evaluations[name].values
        axes.plot(at, values, marker="o", ms=2.5, lw=1, color="C0")
        if np.all(values > 0) and np.max(values) > 100 * np.min(values):
            axes.set_yscale("log")
        axes.set_ylabel(name)
    best = int(history.attrs["best_step"])
    for axes in panels:
        axes.axvline(_where(best, x, against), color="black", ls=":", lw=1)
        axes.margins(x=0.01)
    panels[-1].set_xlabel(_AXES[against])
    title = f"{history.attrs['gradient']}: {steps.sizes['step']:,} steps, {history.attrs['result'].replace('_', ' ')}"
    panels[0].set_title(f"{title}; best {history.attrs['monitored']} after {best:,} (dotted)", fontsize=10)
    return figure


def _where(step: int, x: np.ndarray, against: str) -> float:
    """Where an axis is after so many steps."""
    if against == "step":
        return float(step)
    return float(x[step - 1]) if step else 0.0


def _objective(axes: "Axes", x: np.ndarray, at: np.ndarray, steps: "xr.Dataset", evaluations: "xr.Dataset") -> None:
    values, status = steps["value"].values, steps["status"].values
    series = binned(x, np.where(status == 0, values, np.nan))
    axes.fill_between(series.x, series.low, series.high, color="C0", alpha=0.25, lw=0, label="steps, range")
    axes.plot(series.x, series.mean, color="C0", lw=0.8, label="steps, mean")
    means = evaluations["value"].values
    kept = np.isfinite(means)
    if kept.sum() > 1:
        axes.plot(at[kept], means[kept], color="C1", lw=1.2, label="mean up to an evaluation")
    late = slice(len(series.x) // 10, None)
    if np.isfinite(series.low[late]).any():
        low, high = np.nanmin(series.low[late]), np.nanmax(series.high)
        margin = 0.05 * (high - low) + 1e-12
        axes.set_ylim(low - margin, high + margin)
    for code, colour, label in ((1, "C3", "left out: not finite"), (2, "C4", "left out: spike")):
        if (status == code).any():
            places = x[status == code]
            axes.plot(
                places,
                np.full(len(places), 0.03),
                "|",
                ms=9,
                color=colour,
                label=label,
                transform=axes.get_xaxis_transform(),
            )
    axes.set_ylabel("objective")
    _legend(axes)


def _norms(axes: "Axes", x: np.ndarray, steps: "xr.Dataset") -> None:
    columns = {
        "grad_norm": ("gradient", "C0"),
        "update_norm": ("update", "C1"),
        "learning_rate": ("learning rate", "C2"),
    }
    for name, (label, colour) in columns.items():
        if name in steps:
            series = binned(x, np.where(steps[name].values > 0, steps[name].values, np.nan))
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.25, lw=0)
            axes.plot(series.x, series.mean, color=colour, lw=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("norm")
    _legend(axes)


def _legend(axes: "Axes") -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
