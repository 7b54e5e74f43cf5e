"""Exact laws of kernels whose step is linear on a Gaussian target, for the settings that the scripts of this folder run.

Plain NumPy, for the interpreters that old packages need as well as for new ones.
"""

import numpy as np


def redrawn(F, Q, momentum_variance, num_inner, pushed=None, noise=0.0):
    """Variance of the position of a chain that redraws its momentum, then makes ``num_inner`` steps ``z <- F z + N(0, Q)``.

    ``pushed`` (2,) is what the noise of a gradient, of variance ``noise`` and held for all inner steps, adds at each of them.
    The position alone is a chain ``x <- a x + b p + w``, so that its variance is ``(b**2 Var p + Var w) / (1 - a**2)``; infinite
    if it is unstable.
    """
    F, Q = np.asarray(F, float), np.asarray(Q, float)
    pushed = np.zeros(2) if pushed is None else np.asarray(pushed, float)
    power, added, moved = np.eye(2), np.zeros((2, 2)), np.zeros(2)
    for _ in range(num_inner):
        power, added, moved = F @ power, F @ added @ F.T + Q, F @ moved + pushed
    a, b = power[0]
    if abs(a) >= 1:
        return float("inf")
    return float((b**2 * momentum_variance + added[0, 0] + noise * moved[0] ** 2) / (1 - a**2))


def explicit_euler(h, friction, temperature, lam=1.0):
    """One step of the SGHMC of BlackJAX, and of SGMCMCJax in the same variables: both updates from the old state."""
    F = [[1.0, h], [-h * lam, 1.0 - friction * h]]
    return F, [[0.0, 0.0], [0.0, 2.0 * friction * h * temperature]]


def new_position_euler(h, friction, noise_factor, lam=1.0):
    """Chen, Fox and Guestrin (2014), Algorithm 2: gradient at the new position; ``noise_factor**2 * 2 h`` is injected."""
    F = [[1.0, h], [-h * lam, 1.0 - friction * h - h**2 * lam]]
    return F, [[0.0, 0.0], [0.0, 2.0 * h * noise_factor**2]]


def with_error(values):
    """Mean of independent replicates and its standard error."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def row(kernel, settings, should_be, law, replicates, what):
    """One finding: the variance that the target has, that the kernel's exact law has, and that was sampled."""
    finite = np.all(np.isfinite(replicates))
    sampled, error = with_error(replicates) if finite else (None, None)
    return {
        "kernel": kernel,
        "settings": settings,
        "target": should_be,
        "law": law if law is None or np.isfinite(law) else "unstable",
        "sampled": sampled,
        "error": error,
        "what": what,
    }


def show(name, versions, rows):
    """Print the findings."""
    print(name, versions)
    for r in rows:
        sampled = "not finite" if r["sampled"] is None else f"{r['sampled']:.4f} +- {r['error']:.4f}"
        law = r["law"] if isinstance(r["law"], (str, type(None))) else f"{r['law']:.4f}"
        print(f"  {r['kernel']} ({r['settings']}): target {r['target']:g}, exact law {law}, sampled {sampled}")
