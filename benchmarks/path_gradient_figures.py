"""Figures and tables of the page "Path gradients" from the results of `path_gradients.py` and `flow_training.py`."""

import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flow_training import NUM_POINTS, interval, summary

STANDARD, PATH = "tab:orange", "tab:blue"


def draw_variances(variance):
    """Variance of path over standard gradients along fits."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for (name, rows), marker in zip(variance.items(), "osD^v", strict=False):
        step = [row["step"] + 1 for row in rows]
        ratio, ends = [row["ratio"] for row in rows], np.array([row["interval"] for row in rows]).T
        bars = np.abs(ends - np.array(ratio))
        axes[0].errorbar(step, ratio, bars, marker=marker, ms=4, lw=1, capsize=2, label=name)
        axes[1].plot([row["ess"] for row in rows], ratio, marker, ms=5, label=name)
    for axis in axes:
        axis.axhline(1.0, color="0.4", lw=0.8)
        axis.set_yscale("log")
    axes[0].set_xscale("log")
    axes[0].set(xlabel="step of the fit, from 1", ylabel="variance of path / standard gradient")
    axes[1].set(xlabel="effective share of the flow's draws", xlim=(-0.03, 1.03))
    axes[0].annotate("path gradient noisier", (0.03, 1.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes[0].legend(title="target", fontsize=8, title_fontsize=8)
    return figure


def draw_training(problems):
    """Share of effective draws against processor time: medians over seeds, and their quartiles."""
    rows = math.ceil(len(problems) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.6 * rows), layout="constrained", sharex=True)
    for axis, (name, found) in zip(axes.flat, problems.items(), strict=False):
        seconds = found["seconds"] * np.arange(1, NUM_POINTS + 1) / NUM_POINTS
        for estimator, colour, label in (("standard", STANDARD, "standard"), ("path", PATH, "path")):
            ess = np.array([row[estimator]["ess"] for row in found["seeds"].values()])
            low, middle, high = np.quantile(ess, [0.25, 0.5, 0.75], axis=0)
            axis.plot(seconds, middle, color=colour, label=label)
            axis.fill_between(seconds, low, high, color=colour, alpha=0.25, lw=0)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(top=1.005)
    for axis in list(axes.flat)[len(problems) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8, title="gradient", title_fontsize=8)
    figure.supxlabel("seconds of one core", fontsize=10)
    figure.supylabel("effective share of the flow's draws", fontsize=10)
    return figure


def time_to_match(rows):
    """Share of the budget after which path gradients are where the standard gradient ends: median over seeds."""
    shares = []
    for row in rows:
        end, found = row["standard"]["ess"][-1], row["path"]["ess"]
        reached = [i for i, value in enumerate(found) if value >= end]
        shares.append((reached[0] + 1) / NUM_POINTS if reached else math.inf)
    return statistics.median(shares)


def training_table(problems):
    """Effective shares at the end and at a quarter of the time, and their ratio within seeds."""
    table = []
    for name, found in problems.items():
        rows = list(found["seeds"].values())
        share = time_to_match(rows)
        table.append(
            {
                "problem": name,
                "D": found["dim"],
                "standard": statistics.median(r["standard"]["ess"][-1] for r in rows),
                "path": statistics.median(r["path"]["ess"][-1] for r in rows),
                "ratio (95%)": interval(summary(rows)),
                "ratio at a quarter": interval(summary(rows, NUM_POINTS // 4 - 1)),
                "time to match": "never" if share == math.inf else f"{share:.0%}",
                "steps": f"{statistics.median(r['path']['steps'] / r['standard']['steps'] for r in rows):.2f}",
                "rates": f"{found['rates']['standard']:g}, {found['rates']['path']:g}",
            }
        )
    return pd.DataFrame(table).set_index("problem").round(3)


def time_table(times):
    """Ratios of times, with quartiles, and XLA's ratios of operations."""
    table = []
    for rows in times.values():
        for r in rows:
            a, b, c = r["to standard"], r["to two passes"], r["operations"]
            table.append(
                {
                    "layers": r["kind"],
                    "D": r["dim"],
                    "depth": r["layers"],
                    "batch": r["batch"],
                    "of standard": f"{a[0]:.2f} ({a[1]:.2f}–{a[2]:.2f})",
                    "of two passes": f"{b[0]:.2f} ({b[1]:.2f}–{b[2]:.2f})",
                    "operations": f"{c['standard']:.2f}, {c['two passes']:.2f}",
                }
            )
    return pd.DataFrame(table).set_index("layers")


def flowjax_table(rows):
    """Times beside flowjax's own losses."""
    return pd.DataFrame(
        [
            {
                "gradient": name,
                "ms": round(r["milliseconds"], 2),
                "of flowjax, standard": f"{r['ratio'][0]:.2f} ({r['ratio'][1]:.2f}–{r['ratio'][2]:.2f})",
            }
            for name, r in rows.items()
        ]
    ).set_index("gradient")
