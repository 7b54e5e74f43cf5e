"""Figures of `stochasticity_study.py`."""

from typing import Any

import numpy as np
from stochasticity_exact import NUM_BLOCKS, ORDERS, ROUNDING, STEPS

TITLES = {
    "full": "full gradients",
    "uniform": "independent batches",
    "blocks": "reshuffled blocks",
    "symmetric": "symmetric sweeps, one batch a step",
}
LOOK = {"ms": 5, "lw": 1.2}
STYLES = {  # laws that coincide are drawn so that both can be seen
    "SGLD": {"color": "C3", "marker": "o", "ls": "-"},
    "SGHMC": {"color": "C1", "marker": "s", "ls": "-"},
    "LieTrotter": {"color": "C0", "marker": "^", "ls": "-", "ms": 7},
    "OBABO": {"color": "C9", "marker": "v", "ls": "--", "ms": 4},
    "UBU": {"color": "C2", "marker": "D", "ls": "-"},
    "BAOA": {"color": "C4", "marker": "o", "ls": "-", "ms": 8, "mfc": "none"},
    "BAOAB": {"color": "C6", "marker": "x", "ls": "--"},
    "ABOBA": {"color": "0.2", "marker": "+", "ls": ":", "ms": 7},
    "ForceGradient": {"color": "C5", "marker": "*", "ls": "-", "ms": 7},
}


def panels(orders: tuple[str, ...], num_rows: int, ylabel: str) -> tuple[Any, dict[str, Any]]:
    """Make axes with a shared vertical scale, one for each batch order."""
    import matplotlib.pyplot as plt

    num_columns = len(orders) // num_rows
    figure, grid = plt.subplots(
        num_rows,
        num_columns,
        figsize=(10, 3.7 * num_rows),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    axes = dict(zip(orders, grid.flat, strict=True))
    for order, ax in axes.items():
        ax.set(xscale="log", title=TITLES[order])
        ax.grid(alpha=0.25)
    for ax in grid[-1]:
        ax.set_xlabel(r"step size $h$ (time)")
    for ax in grid[:, 0]:
        ax.set_ylabel(ylabel)
    return figure, axes


def guide(ax: Any, order: int, start: tuple[float, float], factor: float = 8.0) -> None:
    """Draw a line of given slope upwards from a point, over a factor in the step."""
    h, error = start
    ax.plot([h, factor * h], [error, factor**order * error], color="0.5", lw=1)
    ax.annotate(f"slope {order} ", start, ha="right", va="center", color="0.35", fontsize=8)


def add_legend(figure: Any, axes: dict[str, Any]) -> None:
    """Put one legend for all panels to their right."""
    pairs = [pair for ax in axes.values() for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    labels = [name for name in STYLES if name in handles]
    figure.legend([handles[name] for name in labels], labels, loc="outside right center", frameon=False)


def draw_gaussian(errors: dict, steps: tuple[float, ...] = STEPS) -> Any:
    """Draw the exact errors; those that are rounding are left out."""
    figure, axes = panels(ORDERS, 2, "relative error of the covariance")
    for order, ax in axes.items():
        for name, values in errors[order].items():
            shown = np.where(np.array(values) > ROUNDING, values, np.nan)
            if np.any(np.isfinite(shown)):
                ax.plot(steps, shown, label=name, **(LOOK | STYLES[name]))
        if order != "full":
            ax.axvline(1 / NUM_BLOCKS, color="0.6", ls="--", lw=0.8)
            ax.annotate("$K h = 1$ ", (1 / NUM_BLOCKS, 6e-8), ha="right", fontsize=8, color="0.35")
    axes["full"].set(yscale="log", ylim=(2e-8, 10))
    axes["full"].annotate("BAOA, BAOAB, ABOBA: exact", (0.03, 0.93), xycoords="axes fraction", fontsize=8, color="0.35")
    for order, slope, start in (
        ("full", 1, (2e-3, 2e-2)),
        ("full", 2, (2e-2, 3e-6)),
        ("uniform", 1, (2e-3, 1e-1)),
        ("blocks", 2, (2e-2, 1e-6)),
        ("symmetric", 2, (2e-2, 1e-6)),
    ):
        guide(axes[order], slope, start)
    add_legend(figure, axes)
    return figure


def draw_logistic(found: dict) -> Any:
    """Draw the sizes of the measured errors with two standard errors; those within two of zero are left out."""
    figure, axes = panels(ORDERS, 2, "relative error of the variance, size")
    for order, ax in axes.items():
        for name, points in found[order].items():
            kept = [p for p in points if abs(p["error"]) > 2 * p["se"]]
            step, error, se = (np.array([p[key] for p in kept]) for key in ("step", "error", "se"))
            ax.errorbar(step, abs(error), yerr=2 * se, label=name, **(LOOK | STYLES[name]))
    axes["full"].set(yscale="log", ylim=(1e-3, 10))
    guide(axes["uniform"], 1, (8e-2, 8e-2), 4)
    for order in ("full", "blocks", "symmetric"):
        guide(axes[order], 2, (1.2e-1, 3e-3), 3)
    add_legend(figure, axes)
    return figure


def draw_bnn(found: dict) -> Any:
    """Draw the predictive negative log likelihood with two standard errors."""
    figure, axes = panels(tuple(found), 1, "predictive NLL a datum (nats)")
    for order, ax in axes.items():
        for name, points in found[order].items():
            step, nll, se = (np.array([p[key] for p in points]) for key in ("step", "nll", "se"))
            ax.errorbar(step, nll, yerr=2 * se, label=name, **(LOOK | STYLES[name]))
        ax.set_yscale("log")
        ax.set_xticks(step, [f"{h:g}" for h in step])
        ax.set_yticks([0.4, 0.5, 0.7, 1.0, 1.5], ["0.4", "0.5", "0.7", "1.0", "1.5"])
        ax.minorticks_off()
    add_legend(figure, axes)
    return figure
