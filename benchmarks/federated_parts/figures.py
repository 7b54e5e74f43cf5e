"""Figures and tables of `federated_experiments.py`, drawn from its results."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

LOCAL_STEPS = (1, 20, 200)
COLOURS = {
    "DSGLD": "C3",
    "FSGLD, exact": "C0",
    "FSGLD, Laplace": "C0",
    "FSGLD, Laplace, diagonal": "C0",
    "FSGLD, Laplace, rank 30": "C9",
    "FSGLD, Laplace, strength 0.8": "C9",
    "FSGLD, local Laplace": "C2",
    "FSGLD, local Laplace, diagonal": "C2",
    "FSGLD, 3,000 draws thinned": "C9",
    "FSGLD, 3,000 draws": "C1",
    "FSGLD, 3,000 draws uncorrected": "C5",
    "FSGLD, 3,000 draws, diagonal": "C5",
}


def methods(part: dict[str, Any]) -> list[str]:
    """Names of the methods, in the order in which they ran."""
    return list(
        dict.fromkeys(n.rsplit(", ", 1)[0] for n in part["cells"] if n.endswith(tuple([",", "1", "20", "200"][1:])))
    )


def get(part: dict[str, Any], method: str, steps: int) -> dict[str, Any] | None:
    """A cell, or None where the chain has no stationary law or left it."""
    found = part["cells"].get(f"{method}, {steps}")
    return None if found is None or "unstable" in found else found


def worst(cell: dict[str, Any]) -> tuple[float, float, float]:
    """The coordinate that is predicted to be inflated most: predicted, measured, and the standard error of that."""
    i = int(np.argmax(cell.get("predicted_sd", cell["measured_sd"])))
    predicted = cell["predicted_sd"][i] if "predicted_sd" in cell else float("nan")
    return predicted, cell["measured_sd"][i], cell["measured_sd_se"][i]


def draw_blobs(results: dict[str, Any]) -> Any:
    """Where chains are in the plane, for three lengths of visits."""
    part = results["blobs"]
    blobs = np.array(part["cells"]["about"]["blobs"])
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.0), sharex=True, sharey=True, layout="constrained")
    for axis, steps in zip(axes, LOCAL_STEPS, strict=True):
        axis.plot(*blobs.T, "k+", ms=9, mew=1.5, label="means of the clients' data")
        for method, size in (("DSGLD", 9), ("FSGLD, exact", 9)):
            x = np.array(part["cells"][f"{method}, {steps}"]["last_draws"])
            axis.plot(
                *x.T, ".", ms=size / 2, color=COLOURS[method], alpha=0.6, label=f"{method}: 128 chains at their end"
            )
        axis.set(title=f"{steps} local step{'s' * (steps > 1)}", xlabel=r"$\theta_1$", aspect="equal")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(r"$\theta_2$")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return figure


def draw_inflation(results: dict[str, Any], name: str) -> Any:
    """Sd over the posterior's, of the worst coordinate: predicted before the run (lines) and measured (dots)."""
    part = results[name]
    figure, axis = plt.subplots(figsize=(8.4, 3.8), layout="constrained")
    for method in methods(part):
        found = [(t, *worst(c)) for t in LOCAL_STEPS if (c := get(part, method, t))]
        if not found:
            continue
        steps, predicted, measured, error = np.array(found).T
        axis.plot(steps, predicted, color=COLOURS[method], lw=1.2, zorder=1)
        axis.errorbar(
            steps,
            measured,
            yerr=2 * error,
            color=COLOURS[method],
            ls="",
            marker="o",
            ms=8 if method == "FSGLD, exact" else 5,
            mfc="none" if method == "FSGLD, exact" else None,
            capsize=2,
            label=method,
        )
    axis.axhline(1, color="0.6", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="local steps a visit", ylabel="sd / posterior sd, worst coordinate")
    axis.set_xticks(LOCAL_STEPS, LOCAL_STEPS)
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axis.set_yticks(ticks, ticks)
    axis.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def table(results: dict[str, Any], name: str) -> str:
    """For each method and length of visits: predicted, measured, their ratio, the mean's error, held-out score."""
    part = results[name]
    scored = any("scores" in c for c in part["cells"].values())
    head = "| method | local steps | sd predicted | sd measured | mean predicted | mean measured | misfit |"
    lines = [head + (" NLL held out |" if scored else ""), "|---|---|---|---|---|---|---|" + ("---|" if scored else "")]
    for method in methods(part):
        for steps in LOCAL_STEPS:
            cell = get(part, method, steps)
            if cell is None:
                left = part["cells"][f"{method}, {steps}"]
                predicted = f"{max(left['predicted_sd']):.3g}" if "predicted_sd" in left else "no stationary law"
                fate = f"{left['lost']} of {left['chains']} chains lost" if "lost" in left else "not run"
                lines.append(f"| {method} | {steps} | {predicted} | {fate} |" + " |" * (4 if scored else 3))
                continue
            predicted, measured, error = worst(cell)
            j = int(np.argmax(np.abs(cell.get("predicted_shift", cell["measured_shift"]))))
            if "predicted_sd" in cell:
                words = [f"{predicted:.3g}", f"{cell['predicted_shift'][j]:+.2f}", f"{max(cell['misfit']):.2g}"]
            else:
                words = ["no stationary law", "", ""]
            row = f"| {method} | {steps} | {words[0]} | {measured:.3g} ± {error:.1g} | {words[1]} "
            row += f"| {cell['measured_shift'][j]:+.2f} ± {cell['measured_shift_se'][j]:.2f} | {words[2]} |"
            lines.append(row + (f" {cell['scores']['nll']:.4f} ± {cell['scores']['nll_mcse']:.4f} |" if scored else ""))
    return "\n".join(lines)


def largest_miss(results: dict[str, Any], name: str) -> float:
    """The largest relative error of a predicted sd, over all coordinates, methods and lengths of visits."""
    cells = [c for c in results[name]["cells"].values() if "predicted_sd" in c and "measured_sd" in c]
    return float(max(np.max(np.abs(np.divide(c["measured_sd"], c["predicted_sd"]) - 1)) for c in cells))


def rounds_table(results: dict[str, Any]) -> str:
    """What FSGLD needs to send: the blobs, exact surrogates."""
    part, lines = (
        results["blobs"],
        ["| local steps | visits (messages) a chain | sd measured | mean measured |", "|---|---|---|---|"],
    )
    for steps in LOCAL_STEPS:
        cell = part["cells"][f"FSGLD, exact, {steps}"]
        sd, shift = cell["measured_sd"], cell["measured_shift"]
        errors = cell["measured_sd_se"], cell["measured_shift_se"]
        lines.append(
            f"| {steps} | {cell['visits']:.0f} | {sd[0]:.3f} ± {errors[0][0]:.3f}, {sd[1]:.3f} ± {errors[0][1]:.3f} "
            f"| {shift[0]:+.3f} ± {errors[1][0]:.3f}, {shift[1]:+.3f} ± {errors[1][1]:.3f} |"
        )
    return "\n".join(lines)


def draw_network(results: dict[str, Any]) -> Any:
    """Held-out score and accuracy of the networks against the length of visits."""
    part = results["network"]
    about = part["cells"]["about"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
    for axis, name in zip(axes, ("nll", "accuracy"), strict=True):
        for method in methods(part):
            found = [(t, c["scores"][name]) for t in LOCAL_STEPS if (c := get(part, method, t))]
            if found:
                axis.plot(*np.array(found).T, "o-", color=COLOURS[method], ms=5, label=method)
        axis.axhline(about["pooled"][name], color="k", lw=1, label="SGLD, pooled data")
        axis.axhline(about["mode"][name], color="0.5", lw=1, ls="--", label="one mode, no sampling")
        axis.set(xscale="log", xlabel="local steps a visit")
        axis.set_xticks(LOCAL_STEPS, LOCAL_STEPS)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].axhline(about["guessing"]["nll"], color="0.5", lw=1, ls=":", label="guessing by frequencies")
    axes[0].set(ylabel="NLL of a held-out picture", yscale="log")
    axes[0].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    axes[0].minorticks_off()
    axes[1].set_ylabel("accuracy, held out")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def network_table(results: dict[str, Any]) -> str:
    """Scores at the clients, and norms of the weights."""
    part = results["network"]
    about = part["cells"]["about"]
    lines = [
        "| method | local steps | NLL held out | accuracy | norm of the weights | chains lost |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods(part):
        for steps in LOCAL_STEPS:
            cell = get(part, method, steps)
            if cell is None:
                left = part["cells"][f"{method}, {steps}"]
                lines.append(f"| {method} | {steps} | | | | {left['lost']} of {left['chains']} |")
                continue
            s = cell["scores"]
            lines.append(
                f"| {method} | {steps} | {s['nll']:.3f} ± {s['nll_mcse']:.3f} | {s['accuracy']:.3f} | {s['norm']:.3g} "
                f"| {cell['lost']} of {cell['chains']} |"
            )
    pooled, mode = about["pooled"], about["mode"]
    lines.append(
        f"| SGLD, pooled | | {pooled['nll']:.3f} ± {pooled['nll_mcse']:.3f} | {pooled['accuracy']:.3f} | {pooled['norm']:.3g} | |"
    )
    lines.append(f"| one mode | | {mode['nll']:.3f} | {mode['accuracy']:.3f} | {mode['norm']:.3g} | |")
    lines.append(f"| guessing | | {about['guessing']['nll']:.3f} | | | |")
    return "\n".join(lines)


def gradients_table(results: dict[str, Any]) -> str:
    """Between-client variance of the network's gradients over that of DSGLD."""
    cells = results["network"]["cells"]
    lines = ["| surrogates | at the mode | at draws of pooled SGLD | at starts of chains |", "|---|---|---|---|"]
    for name, cell in cells.items():
        if name.startswith("gradients, "):
            values = " | ".join(f"{cell[place]:.2g}" for place in ("mode", "draws", "starts"))
            lines.append(f"| {name.removeprefix('gradients, FSGLD, ')} | {values} |")
    return "\n".join(lines)


def draw_heterogeneity(results: dict[str, Any]) -> Any:
    """Variance of the gradient between clients against the skew of their labels."""
    cells = sorted(results["heterogeneity"]["cells"].values(), key=lambda c: c["distance"])
    distance = [c["distance"] for c in cells]
    figure, axis = plt.subplots(figsize=(8.8, 3.8), layout="constrained")
    kinds = (
        ("none", "C3", "no surrogates (DSGLD)"),
        ("Laplace at local modes", "C2", "Laplace at the clients' own modes"),
        ("Laplace at the mode, diagonal", "C9", "Laplace at the posterior's mode, diagonal"),
        ("Laplace at the mode", "C0", "Laplace at the posterior's mode"),
    )
    for name, colour, label in kinds:
        axis.plot(distance, [c[name]["between"] for c in cells], "o-", color=colour, ms=5, label=label)
    axis.plot(distance, [c["none"]["within"] for c in cells], "k--", lw=1, label="within clients, batches of 10")
    axis.set(
        yscale="log",
        xlabel="distance of a client's labels from all labels (total variation)",
        ylabel="variance between clients",
    )
    axis.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def heterogeneity_table(results: dict[str, Any]) -> str:
    """The numbers of the figure."""
    cells = results["heterogeneity"]["cells"]
    kinds = ("none", "Laplace at local modes", "Laplace at the mode, diagonal", "Laplace at the mode")
    lines = [
        "| concentration | distance | clients' sizes | within, batches of 10 | none | local modes | mode, diagonal | mode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, c in cells.items():
        between = " | ".join(f"{c[kind]['between']:.2g}" for kind in kinds)
        sizes = f"{min(c['sizes'])} to {max(c['sizes'])}"
        lines.append(f"| {name} | {c['distance']:.2f} | {sizes} | {c['none']['within']:.2g} | {between} |")
    return "\n".join(lines)
