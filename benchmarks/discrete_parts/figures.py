"""Tables and figures of `discrete_latents.py`, as the documentation shows them."""

from typing import Any

import numpy as np
import pandas as pd

from discrete_parts.methods import BASELINES, METHODS, OURS, PAPER

TASKS = {
    "vae_categories": "VAE, categories",
    "vae_bits": "VAE, bits",
    "half_bits": "lower half, bits",
    "half_categories": "lower half, categories",
    "deep_bits": "belief network of two layers",
}
JANG = {  # table 1 of the paper: nats, lower is better
    "half_bits": (72.0, 59.7, 58.9, 58.9, 58.7, 58.5, 59.3),
    "half_categories": (73.1, 67.9, 63.0, 61.8, 61.1, 59.0, 59.7),
    "vae_bits": (112.2, 110.9, 109.7, 116.0, 111.5, 105.0, 111.5),
    "vae_categories": (110.6, 128.8, 107.0, 110.9, 107.8, 101.5, 107.8),
}
COLUMNS = ("score", "darn", "muprop", "straight_through", "annealed", "gumbel", "gumbel_hard")
"""Of the paper's table."""


def nats(results: dict[str, Any], task: str, method: str) -> np.ndarray:
    """Negative bound of each seed that is there."""
    found = results["cells"].get(f"{task}:{method}", {})
    return np.array([-found[seed]["bound"] for seed in sorted(found, key=int) if found[seed]["bound"] is not None])


def mean_and_spread(values: np.ndarray) -> str:
    """The mean, half the range, and how many seeds."""
    if not len(values):
        return "–"
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def beside_the_paper(results: dict[str, Any]) -> pd.DataFrame:
    """A row for each task here, and under it the paper's."""
    rows = {}
    for task, theirs in JANG.items():
        number = max((len(nats(results, task, name)) for name in COLUMNS), default=0)
        ours = [mean_and_spread(nats(results, task, name)) if name in METHODS else "–" for name in COLUMNS]
        rows[TASKS[task], f"here ({number} seeds)"] = ours
        rows[TASKS[task], "Jang et al."] = [f"{x:.1f}" for x in theirs]
    titles = [METHODS[name].title if name in METHODS else "DARN" for name in COLUMNS]
    return pd.DataFrame.from_dict(rows, orient="index", columns=titles)


def others(results: dict[str, Any]) -> pd.DataFrame:
    """Estimators that the paper does not have, beside its best."""
    names = ("gumbel", *OURS)
    rows = {TASKS[task]: [mean_and_spread(nats(results, task, name)) for name in names] for task in JANG}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[METHODS[name].title for name in names])


def baselines(results: dict[str, Any]) -> pd.DataFrame:
    """The score function with two particles under its baselines."""
    names = (*BASELINES, "leave_one_out", "disarm")
    rows = {TASKS[t]: [mean_and_spread(nats(results, t, name)) for name in names] for t in ("vae_bits", "deep_bits")}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[METHODS[name].title for name in names])


def costs(results: dict[str, Any], task: str = "vae_bits") -> pd.DataFrame:
    """Runs of the program and milliseconds of a step."""
    rows = {}
    for name in (*PAPER, *OURS, *BASELINES):
        found = results["cells"].get(f"{task}:{name}", {})
        if found:
            times = [cell["step_ms"] for cell in found.values()]
            rows[METHODS[name].title] = [results["runs"][f"{task}:{name}"], round(float(np.median(times)), 1)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["runs a step", "ms a step"])


def draw_bars(results: dict[str, Any]) -> Any:
    """Test bounds by estimator: bars are means, dots seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(JANG), figsize=(11, 4), layout="constrained", sharey=True)
    names = (*PAPER, *OURS)[::-1]
    for ax, task in zip(axes, ("vae_categories", "vae_bits", "half_categories", "half_bits"), strict=True):
        for y, name in enumerate(names):
            values = nats(results, task, name)
            if not len(values):
                continue
            colour = "C0" if not _biased(name) else "C1"
            ax.plot(values, np.full(len(values), y), "o", color=colour, ms=4, alpha=0.8)
            ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=colour, lw=2)
            theirs = dict(zip(COLUMNS, JANG[task], strict=True)).get(name)
            if theirs is not None:
                ax.plot(theirs, y, "|", color="0.4", ms=10, mew=1.5)
        ax.set(title=TASKS[task], xlabel="nats (lower is better)", yticks=range(len(names)))
        ax.set_yticklabels([METHODS[name].title for name in names])
        ax.grid(axis="x", alpha=0.3)
    handles = [
        plt.Line2D([], [], color="C0", marker="o", ls="", label="unbiased (a dot a seed)"),
        plt.Line2D([], [], color="C1", marker="o", ls="", label="biased"),
        plt.Line2D([], [], color="0.4", marker="|", ls="", ms=10, mew=1.5, label="Jang et al."),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _biased(name: str) -> bool:
    return name in ("straight_through", "annealed", "gumbel", "gumbel_hard", "reinmax", "darn")


def draw_curves(results: dict[str, Any], tasks: tuple[str, ...] = ("vae_categories", "vae_bits")) -> Any:
    """Validation bounds of 10 draws after each epoch, the mean over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 4), layout="constrained")
    styles = {name: f"C{i}" for i, name in enumerate((*PAPER, *OURS))}
    for ax, task in zip(axes, tasks, strict=True):
        for name, colour in styles.items():
            found = results["cells"].get(f"{task}:{name}", {})
            if found:
                curves = -np.array([cell["curve"] for cell in found.values()])
                epochs = 1 + np.arange(curves.shape[1])
                line = "--" if _biased(name) else "-"
                ax.plot(epochs, curves.mean(0), line, color=colour, label=METHODS[name].title)
        ax.set(title=TASKS[task], xlabel="epoch", ylabel="nats, validation, 10 draws")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
