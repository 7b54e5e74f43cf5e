"""Figures and tables of `pair_potential.py`, from what it stored."""

from typing import Any

import numpy as np

COLOURS = {"one chain": "C1", "four chains": "C0", "deep ensemble": "C2"}
STATE_TITLES = {
    "training": r"training ($\rho = 0.4$, $T = 1$)",
    "dense": r"dense ($\rho = 0.7$, $T = 1$)",
    "hot": r"hot ($\rho = 0.4$, $T = 5$)",
}
Z = 1.645  # half the width of a central 90% interval, in sd


def half_width(found: dict) -> np.ndarray:
    """Half the width of the intervals that were counted: spread of the draws and error of the runs."""
    return Z * np.hypot(found["sd"], found["error"])


def draw_potential(results: dict) -> Any:
    """Draw the fitted potential of the first data set, and how often its bands cover, by distance."""
    import matplotlib.pyplot as plt

    r, found = np.array(results["r"]), results["pairs"]
    truth, closest = np.array(found["u_true"]), found["closest"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for name, method in found["methods"].items():
        mean, sd = (np.array(v) for v in method["u"])
        for ax, shift in ((left, 0.0), (middle, truth)):
            ax.fill_between(r, mean - Z * sd - shift, mean + Z * sd - shift, color=COLOURS[name], alpha=0.3)
            ax.plot(r, mean - shift, color=COLOURS[name], lw=1, label=name)
        right.plot(r, method["u_coverage"], color=COLOURS[name], lw=1.3, marker=".", label=name)
    left.plot(r, truth, "k--", lw=1, label="truth")
    middle.axhline(0, color="k", ls="--", lw=1)
    right.axhline(results["settings"]["level"], color="k", ls="--", lw=1)
    for ax in (left, middle, right):
        ax.axvspan(min(closest), max(closest), color="0.85", zorder=0)
        ax.set_xlabel("distance r")
    left.set(xlim=(0.82, 1.15), ylim=(-2, 26), ylabel="pair energy u(r)", title="first data set, where it is steep")
    middle.set(xlim=(0.9, 2.2), ylim=(-0.4, 0.4), ylabel="u(r) less the truth", title="first data set, where data are")
    right.set(xlim=(0.8, 2.2), ylim=(-0.03, 1.03), ylabel="share of data sets covered", title="coverage of 90% bands")
    left.legend(fontsize=8)
    return figure


def draw_intervals(results: dict) -> Any:
    """Draw the intervals of energy and pressure of all data sets, for each method and state."""
    import matplotlib.pyplot as plt

    found = results["pairs"]
    figure, grid = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for row, (k, label) in zip(grid, (("energy", "energy a particle"), ("pressure", "pressure")), strict=True):
        for ax, (s, title) in zip(row, STATE_TITLES.items(), strict=True):
            for j, (name, method) in enumerate(found["methods"].items()):
                values = method["states"][s][k]
                x = np.arange(values["of"]) + j * (values["of"] + 2)
                style = {"color": COLOURS[name], "fmt": "o", "ms": 3, "lw": 1.5, "capsize": 2}
                ax.errorbar(x, values["mean"], half_width(values), label=name, **style)
            ax.axhline(found["truth"][s][k], color="k", ls="--", lw=1, label="truth")
            ax.set(xticks=[], title=title)
        row[0].set_ylabel(label)
    grid[1, 0].legend(fontsize=8)
    for ax in grid[1]:
        ax.set_xlabel("data sets")
    return figure


def draw_radial(results: dict) -> Any:
    """Draw g(r) at the three states, and bands of the first data set less the truth."""
    import matplotlib.pyplot as plt

    found, edges = results["pairs"], np.array(results["bins"])
    centre = (edges[1:] + edges[:-1]) / 2
    figure, grid = plt.subplots(2, 3, figsize=(12, 5.6), layout="constrained", sharex=True, height_ratios=(1, 1))
    for column, (s, title) in zip(grid.T, STATE_TITLES.items(), strict=True):
        truth = np.array(found["truth"][s]["g"])
        column[0].plot(centre, truth, "k", lw=1.2)
        column[0].set(title=title, ylim=(0, 3.3))
        for name, method in found["methods"].items():
            g = method["states"][s]["g"]
            mean, half = np.array(g["mean"]) - truth, half_width(g)
            column[1].fill_between(centre, mean - half, mean + half, color=COLOURS[name], alpha=0.35, label=name)
        column[1].axhline(0, color="k", ls="--", lw=1)
        column[1].axvspan(edges[0], float(np.median(found["closest"])), color="0.9", zorder=0)
        column[1].set(xlabel="distance r", ylim=(-0.45, 0.45))
    grid[0, 0].set_ylabel("g(r), truth")
    grid[1, 0].set_ylabel("g(r) less the truth")
    grid[1, 0].legend(fontsize=8)
    return figure


PARTS = {
    "pairs": "pairs alone",
    "wide_prior": "pairs alone, wider prior",
    "many_body": "with many-body energy",
}


def draw_misses(results: dict) -> Any:
    """Draw how far the means of four chains are off, in half widths of their intervals, for the three parts of the study."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    for ax, (part, title) in zip(axes, PARTS.items(), strict=True):
        found, ticks = results[part], {}
        for i, (s, k) in enumerate((s, k) for k in ("energy", "pressure") for s in STATE_TITLES):
            values = found["methods"]["four chains"]["states"][s][k]
            off = (np.array(values["mean"]) - found["truth"][s][k]) / half_width(values)
            ax.plot(i + np.linspace(-0.25, 0.25, len(off)), off, "o", ms=4, color="C0" if k == "energy" else "C3")
            ticks[i] = f"{s}\n{k}"
        ax.axhspan(-1, 1, color="0.88", zorder=0)
        ax.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        ax.set(title=title)
        ax.set_yscale("symlog", linthresh=2)
        ax.set_yticks(
            [-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20], ["–20", "–10", "–5", "–2", "–1", "0", "1", "2", "5", "10", "20"]
        )
        ax.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("(mean – truth) / half width")
    return figure


FIGURES = {
    "potential": draw_potential,
    "intervals": draw_intervals,
    "radial": draw_radial,
    "misses": draw_misses,
}


def table(results: dict, parts: tuple[str, ...] = tuple(PARTS)) -> str:
    """Make a Markdown table: intervals that cover the truth, with the exact 95% interval of the frequency."""
    lines = [
        "| | state | truth: energy | covered | half width | truth: pressure | covered | half width | g(r) covered |",
        "|---" * 9 + "|",
    ]
    for part in parts:
        found = results[part]
        for name, method in found["methods"].items():
            label = name if part == "pairs" else f"{PARTS[part]}: {name}"
            for s, values in method["states"].items():
                cells = [label, s]
                for k in ("energy", "pressure"):
                    of = values[k]
                    cells += [
                        f"{found['truth'][s][k]:.3f} ± {found['truth_se'][s][k]:.3f}",
                        f"**{of['hits']} of {of['of']}** ({of['low']:.2f}–{of['high']:.2f})",
                        f"{np.median(half_width(of)):.3f}",
                    ]
                g = values["g"]
                lines.append("| " + " | ".join([*cells, f"{100 * g['coverage']:.0f}% ± {100 * g['se']:.0f}%"]) + " |")
    return "\n".join(lines)
