"""Figures of `bayesian_networks.py`."""

from typing import Any

import numpy as np

TITLES = {
    "auto_mpg": "cars (regression)",
    "digits": "digits, prior 4/√fan-in",
    "digits_unit": "digits, prior N(0, 1)",
    "mnist": "MNIST, prior 4/√fan-in",
}
LABELS = {
    "nll": "NLL (nats a datum)",
    "crps": "CRPS (sd of the output)",
    "coverage90": "coverage of 90% intervals",
    "ece": "ECE",
    "brier": "Brier score",
}
METHODS = {
    "ensemble": ("deep ensemble", "C3", "--"),
    "swag": ("SWAG", "C2", "-."),
    "laplace": ("Laplace", "C4", (0, (5, 1))),
    "single": ("one network", "0.5", ":"),
}


def temperatures(problem: dict[str, Any]) -> list[str]:
    """Names of the cells that hold chains, from cold to warm."""
    names = {name for cells in problem["seeds"].values() for name in cells if name not in (*METHODS, "long")}
    return sorted(names, key=float)


def complete_seeds(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """Seeds for which everything was run: means are over these."""
    wanted = {*temperatures(problem), *METHODS}
    return [seed for seed in problem["seeds"].values() if wanted <= seed.keys()]


def over_seeds(problem: dict[str, Any], name: str, score: str, column: int = 0) -> np.ndarray:
    """A score of a cell in every seed that is complete."""
    cells = [seed[name]["scores"] for seed in complete_seeds(problem)]
    return np.array([cell[score][column] for cell in cells if score in cell], float)


def standard_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Of the mean difference over seeds: all cells of a seed share its split, of which most of the spread comes."""
    if len(values) != len(reference) or len(values) < 2:
        return 0.0
    return float((values - reference).std(ddof=1) / np.sqrt(len(values)))


def draw_scores(results: dict[str, Any], problems: tuple[str, ...] = ("auto_mpg", "digits", "digits_unit")) -> Any:
    """Draw scores against the temperature, with the other methods as lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(problems), figsize=(11, 8.5), layout="constrained", squeeze=False)
    for column, name in zip(axes.T, problems, strict=True):
        problem = results["problems"][name]
        wanted = ("nll", "crps", "coverage90") if name == "auto_mpg" else ("nll", "brier", "ece")
        for ax, score in zip(column, wanted, strict=True):
            _draw_score(ax, problem, score)
            ax.set_ylabel(LABELS[score])
        column[0].set_title(TITLES[name])
        column[-1].set_xlabel("temperature $T$")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    extra = [pair for pair in zip(*axes[2, 0].get_legend_handles_labels(), strict=True) if pair[1] not in labels]
    handles, labels = handles + [h for h, _ in extra], labels + [label for _, label in extra]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _draw_score(ax: Any, problem: dict[str, Any], score: str) -> None:
    names = temperatures(problem)
    x = np.array([float(name) for name in names])
    found, warm = [over_seeds(problem, name, score) for name in names], over_seeds(problem, "1", score)
    errors = [standard_error(values, warm) for values in found]
    ax.errorbar(
        x,
        [values.mean() for values in found],
        yerr=errors,
        color="C0",
        marker="o",
        ms=4,
        capsize=2,
        label="four chains",
        zorder=3,
    )
    for method, (label, colour, style) in METHODS.items():
        values = over_seeds(problem, method, score)
        if len(values):
            ax.axhline(values.mean(), color=colour, ls=style, lw=1.3, label=label)
    low, high = (np.mean([over_seeds(problem, name, score, c).mean() for name in names]) for c in (3, 4))
    if np.isfinite(low):
        ax.axhspan(low, high, color="0.88", zorder=0, label="95% range if calibrated (one split)")
    ax.set(xscale="log")
    ax.set_xticks(x, [f"{t:g}" for t in x])
    ax.minorticks_off()
    ax.grid(alpha=0.25)


def draw_chains(results: dict[str, Any], problems: tuple[str, ...] = ("auto_mpg", "digits", "digits_unit")) -> Any:
    """Draw how far chains disagree, and what temperature was measured."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for i, name in enumerate(problems):
        problem = results["problems"][name]
        names = temperatures(problem)
        x, style = np.array([float(t) for t in names]), {"color": f"C{i}", "marker": "osD"[i], "ms": 4, "capsize": 2}

        def drawn(ax: Any, group: str, key: str, x: np.ndarray = x, names: list[str] = names, **look: Any) -> None:
            seeds = complete_seeds(results["problems"][look.pop("name")])
            values = np.array([[s[t][group][key] for t in names] for s in seeds])
            spread = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * values[0]
            ax.errorbar(x, values.mean(0), yerr=spread, **look)

        drawn(axes[0], "chains", "share", name=name, label=TITLES[name], **style)
        drawn(axes[1], "chains", "rhat_median", name=name, label=TITLES[name], **style)
        drawn(axes[1], "chains", "weight_rhat_median", name=name, ls=":", mfc="none", **style)
        drawn(axes[2], "temperature", "kinetic", name=name, label=TITLES[name], **style)
        drawn(axes[2], "temperature", "mean", name=name, ls=":", mfc="none", **style)
    axes[0].set(ylabel="share of predictive variance\nbetween chains", ylim=(0, 1))
    axes[1].set(ylabel="median R-hat: solid of the function,\ndotted of the weights")
    axes[2].set(ylabel="measured temperature / $T$: solid\nof the momenta, dotted of the weights")
    axes[1].axhline(1, color="0.6", lw=0.8)
    axes[2].axhline(1, color="0.6", lw=0.8)
    for ax in axes:
        ax.set(xscale="log", xlabel="temperature $T$")
        ax.set_xticks(x, [f"{t:g}" for t in x])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    return figure


def table(results: dict[str, Any], problem: str, score: str) -> dict[str, str]:
    """Mean over seeds of a score, and its difference from temperature 1 ± standard error, for every temperature and method."""
    cells, shown = results["problems"][problem], {}
    warm = over_seeds(cells, "1", score)
    for name in [*temperatures(cells)[::-1], *METHODS]:
        values = over_seeds(cells, name, score)
        if 0 < len(values) == len(warm):
            difference, error = float((values - warm).mean()), standard_error(values, warm)
            title = METHODS[name][0] if name in METHODS else f"T = {name}"
            spread = f" ± {error:.3f}" if len(values) > 1 else ""
            shown[title] = f"{values.mean():.3f}" + ("" if name == "1" else f" ({difference:+.3f}{spread})")
    return shown
