"""Figure and tables of `gradients_to_accuracy.py`, for the page of the documentation and for the terminal."""

from typing import Any

import numpy as np

TITLES = {
    "gaussian": "mean of a Gaussian, N = 10,000, d = 10",
    "logistic": "logistic regression, N = 100,000, d = 50",
}
COLOURS = {"blackjax": "C1", "ours": "C0"}


def epochs(row: dict[str, Any], num_data: int) -> np.ndarray:
    """Datum-gradients of each replicate over the number of data; infinite where not reached."""
    return np.array([np.inf if v is None else v for v in row["gradients"]]) / num_data


def in_order(methods: dict[str, Any], num_data: int) -> list[str]:
    """Names, the fewest gradients first; those that never arrived at the end."""
    return sorted(methods, key=lambda name: (np.median(epochs(methods[name], num_data)), name))


def draw_gradients(record: dict[str, Any]) -> Any:
    """One panel a problem: each replicate, and the median, of each method."""
    import matplotlib.pyplot as plt

    problems = record["problems"]
    heights = [len(p["methods"]) for p in problems.values()]
    figure, axes = plt.subplots(
        len(problems),
        1,
        figsize=(9, 0.33 * sum(heights) + 2),
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    for ax, (name, problem) in zip(axes[:, 0], problems.items(), strict=True):
        draw_problem(ax, problem)
        ax.set_title(TITLES[name], loc="left")
    axes[-1, 0].set_xlabel("epochs (gradients of one datum's likelihood / N) until the error stays below 0.01")
    return figure


def draw_problem(ax: Any, problem: dict[str, Any]) -> None:
    """Fill one panel."""
    methods, n = problem["methods"], problem["num_data"]
    names = in_order(methods, n)[::-1]
    for y, name in enumerate(names):
        row, colour = methods[name], COLOURS["blackjax" if name.startswith("blackjax") else "ours"]
        values = epochs(row, n)
        reached = np.isfinite(values)
        ax.plot(values[reached], np.full(reached.sum(), y), "|", color=colour, ms=9, alpha=0.6)
        median = np.median(values)
        if np.isfinite(median):
            ax.plot(median, y, "o", color=colour, ms=6)
            ax.annotate(number(median), (median, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        else:
            ax.plot(row["budget"] / n, y, ">", color=colour, ms=8)
            ax.annotate(
                "not reached ", (row["budget"] / n, y), (-6, -3), textcoords="offset points", ha="right", fontsize=8
            )
    ax.set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(-0.7, len(names) - 0.2))
    ax.grid(axis="x", alpha=0.25)
    for label, name in zip(ax.get_yticklabels(), names, strict=True):
        label.set_color(COLOURS["blackjax" if name.startswith("blackjax") else "ours"])


def describe(row: dict[str, Any]) -> str:
    """Settings in words."""
    parts = [f"h = {row['step_size']:.3g}"]
    parts += [f"friction {row['friction']:g}"] if row["friction"] is not None else []
    parts += [f"{row['inner_steps']} inner steps"] if row["inner_steps"] is not None else []
    return ", ".join(parts)


def peer_of(name: str) -> str:
    """BlackJAX's SGLD, with control variates for methods with them."""
    return "blackjax.sgld, control variate" if "control variate" in name else "blackjax.sgld"


def number(value: float) -> str:
    """Three digits or whole numbers, or a word for infinity."""
    if not np.isfinite(value):
        return "not reached"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gradient_table(problem: dict[str, Any]) -> str:
    """Medians in epochs, quartiles, ratio to the peer, and the count by the largest error, as Markdown."""
    n, methods = problem["num_data"], problem["methods"]
    lines = [
        "| method | settings | epochs, median (quartiles) | set-up | fewer than blackjax.sgld | epochs, largest error < 0.05 |",
        "|---|---|---|---|---|---|",
    ]
    for name in in_order(methods, n):
        row = methods[name]
        values = epochs(row, n)
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75], method="nearest")
        fewer = "-"
        if peer_of(name) in methods:
            ratio = np.median(epochs(methods[peer_of(name)], n)) / np.median(values)
            fewer = f"{ratio:.2g}x" if ratio else f"> {number(row['budget'] / n)} epochs"
        largest = np.median([np.inf if v is None else v for v in row["gradients_max"]]) / n
        count = number(np.median(values)) + (f" ({number(low)} to {number(high)})" if np.isfinite(median) else "")
        setup = f"{row['setup'] / n:.2g}" if row["setup"] else ""
        lines.append(f"| {name} | {describe(row)} | {count} | {setup} | {fewer} | {number(largest)} |")
    return "\n".join(lines)


def seconds_table(problem: dict[str, Any]) -> str:
    """Time of a call beside the peer's, and time to accuracy: calls needed times the time of one."""
    n, methods, seconds = problem["num_data"], problem["methods"], problem["seconds"]
    per_call = {name: row["microseconds"] for name, row in seconds.items()}
    whole = {
        name: np.median(epochs(methods[name], n)) * n / methods[name]["gradients_a_call"] * per_call[name] * 1e-6
        for name in seconds
    }
    lines = [
        "| method | us a call | ratio to blackjax.sgld (quartiles) | seconds to accuracy, one chain | faster than blackjax.sgld |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(seconds, key=lambda name: whole[name]):
        row = seconds[name]
        low, high = row["ratio_quartiles"]
        faster = whole[peer_of(name)] / whole[name]
        lines.append(
            f"| {name} | {row['microseconds']:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {number(whole[name])} | "
            + (f"{faster:.2g}x |" if faster else "- |")
        )
    return "\n".join(lines)


def law_table(record: dict[str, Any]) -> str:
    """What a peer's kernels sample, beside the exact law of their step and the variance of the target."""
    lines = ["| kernel | settings | target | exact law of the step | sampled | |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        law = "" if row["law"] is None else row["law"] if isinstance(row["law"], str) else f"{row['law']:.4f}"
        sampled = "not finite" if row["sampled"] is None else f"{row['sampled']:.4f} ± {row['error']:.4f}"
        lines.append(
            f"| `{row['kernel']}` | {row['settings']} | {row['target']:g} | {law} | {sampled} | {row['what']} |"
        )
    return "\n".join(lines)
