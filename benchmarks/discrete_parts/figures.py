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
    """The mean over seeds, and half their range if there are several."""
    if not len(values):
        return "–"
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def beside_the_paper(results: dict[str, Any]) -> pd.DataFrame:
    """A row for each task here, and under it the paper's."""
    rows = {}
    for task, theirs in JANG.items():
        ours = [mean_and_spread(nats(results, task, name)) if name in METHODS else "–" for name in COLUMNS]
        rows[TASKS[task], "here"] = ours
        rows[TASKS[task], "Jang et al."] = [f"{x:.1f}" for x in theirs]
    titles = [METHODS[name].title if name in METHODS else "DARN" for name in COLUMNS]
    return pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(rows), titles)


def others(results: dict[str, Any]) -> pd.DataFrame:
    """Estimators that the paper does not have, beside its best."""
    names = ("gumbel", *OURS, "ten_particles")
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
    for name in (*PAPER, *OURS, "ten_particles", *BASELINES):
        found = results["cells"].get(f"{task}:{name}", {})
        if found:
            times = [cell["step_ms"] for cell in found.values()]
            rows[METHODS[name].title] = [results["runs"][f"{task}:{name}"], round(float(np.median(times)), 1)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["runs a step", "ms a step"])


def draw_bars(results: dict[str, Any]) -> Any:
    """Test bounds by estimator: bars are means, dots seeds."""
    import matplotlib.pyplot as plt

    names = (*PAPER, *OURS, "ten_particles")[::-1]
    tasks = [task for task in JANG if any(len(nats(results, task, name)) for name in names)][::-1]
    figure, axes = plt.subplots(1, len(tasks), figsize=(11, 4), layout="constrained", sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
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


FROZEN = {
    "score": "score function, constant",
    "darn": "DARN",
    "muprop": "MuProp",
    "straight_through": "straight-through",
    "gumbel_1.0": "Gumbel-Softmax(1)",
    "gumbel_0.5": "Gumbel-Softmax(0.5)",
    "gumbel_hard_1.0": "ST Gumbel-Softmax(1)",
    "gumbel_hard_0.5": "ST Gumbel-Softmax(0.5)",
    "reinmax": "ReinMax",
    "leave_one_out": "leave-one-out",
    "disarm": "DisARM",
}


def frozen(everything: dict[str, Any], part: str, point: str) -> pd.DataFrame:
    """Bias and noise of a gradient, over its norm, at a frozen point; a bias that is not seen is given as its bound."""
    found, rows = everything["frozen"][part]["points"][point], {}
    for name, title in FROZEN.items():
        if name in found:
            guide, model = found[name]["guide"], found[name]["model"]
            noise = f"{guide['sd']:.1f}"
            rows[title] = [_bias(guide), noise, f"{guide['cosine']:.2f}", _bias(model), f"{model['sd']:.2f}"]
    columns = ["guide: bias", "noise", "cosine", "model: bias", "noise "]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _bias(entry: dict[str, float]) -> str:
    seen = entry["bias"] ** 2 > 0.5 * entry["bias_below"] ** 2  # at least two standard errors
    return f"{entry['bias']:.2f}" if seen else f"< {entry['bias_below']:.2f}"


def settled(everything: dict[str, Any]) -> pd.DataFrame:
    """Exact bounds at which the estimators end, in nats below that of the exact gradient."""
    columns = {}
    for task in ("vae_categories", "vae_bits", "half_bits"):
        part = everything["frozen"].get(f"ends {task}")
        if part:
            ends = part["ends"]
            columns[TASKS[task]] = {FROZEN[k]: round(ends["exact"] - v, 2) for k, v in ends.items() if k in FROZEN}
    return pd.DataFrame(columns).reindex(list(FROZEN.values())).dropna(how="all")


LIKE = {"gumbel": "gumbel_0.5", "gumbel_hard": "gumbel_hard_0.5"}
"""The frozen temperature that is nearest to the course of training."""


def draw_reasons(everything: dict[str, Any]) -> Any:
    """Where training ends against the noise of the guide's gradient, for networks of full size; size shows the bias."""
    import matplotlib.pyplot as plt

    tasks = [task for task in ("vae_categories", "vae_bits") if f"full {task}" in everything["frozen"]]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        found = everything["frozen"][f"full {task}"]["points"]["after training"]
        for name in (*PAPER, *OURS):
            values, guide = nats(everything["mnist"], task, name), found.get(LIKE.get(name, name), {}).get("guide")
            if guide is None or not len(values):
                continue
            ax.plot(
                guide["sd"],
                values.mean(),
                "o",
                color="C1" if _biased(name) else "C0",
                ms=5 + 8 * guide["bias"] * _biased(name),
            )
            left = name in ("darn", "straight_through")
            offset = (-8 if left else 8, {"reinmax": 2, "disarm": -10, "leave_one_out": 2}.get(name, -3))
            at, side = (guide["sd"], values.mean()), "right" if left else "left"
            ax.annotate(METHODS[name].title, at, offset, textcoords="offset points", fontsize=8, ha=side)
        ax.set(xscale="log", xlim=(0.8, 200), title=TASKS[task], ylabel="nats after training (lower is better)")
        ax.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("noise of the guide's gradient / its norm")
        ax.grid(alpha=0.3)
    return figure
