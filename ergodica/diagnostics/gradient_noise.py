r"""How much heat the gradient noise of a Langevin sampler adds, and what that predicts for its bias.

With noise that is independent between steps, of variance :math:`s^2` in a coordinate, the stationary temperature is
raised, to leading order in the step, by :math:`h s^2/(2T)` for SGLD and by :math:`h s^2 \kappa/(2\gamma M T)` for the
splittings, :math:`\kappa = \sum_g (k_g/m)^2` with :math:`k_g` of the scheme's :math:`m` kicks sharing gradient :math:`g`.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.diagnostics.diagnosis import Check, not_run
from ergodica.diagnostics.scalars import has_group, scalar_draws, variable
from ergodica.diagnostics.temperature import run_temperature

if TYPE_CHECKING:
    import xarray as xr

NAME = "gradient noise"
BLOCK_BIAS = ((0.1, 0.03), (0.3, 0.09), (1.0, 0.27), (3.0, 0.55), (10.0, 0.82))
r"""Noise bias of SGLD under reshuffled blocks over that under independent batches, at values of :math:`K h \lambda`."""


def settings_of(dt: "xr.DataTree") -> dict[str, Any]:
    """Read the sampler's settings from the attributes of a result; empty where there are none."""
    return json.loads(dt.attrs.get("settings", "{}"))


def check_gradient_noise(dt: "xr.DataTree", *, tolerance: float) -> Check:
    """Compare the heat that gradient noise adds with the temperature of the run."""
    settings = settings_of(dt)
    minibatch = minibatch_of(settings)
    if dt.attrs.get("exact") == "exact" or minibatch.get("scheme") == "full":
        return Check(NAME, "passed", "none", "The sampler's gradients use all data and carry no noise.", {"ratio": 0.0})
    grad_noise = variable(dt, "sample_stats", "grad_noise")
    steps = variable(dt, "sample_stats", "step_size")
    if grad_noise is None:
        return not_run(
            NAME, "the run stored no variance of its gradients (probes=True stores it, for noisy gradients)."
        )
    if "class" not in settings or steps is None:
        return not_run(NAME, "the run does not say which sampler it used (attribute settings) with which step sizes.")
    asked, noise = run_temperature(dt), float(grad_noise.mean())
    step_size = float(steps.mean())
    if asked is None or not asked > 0:
        return not_run(NAME, "it is relative to a constant temperature above zero, and the run had none.")
    heat = heat_per_variance(settings, step_size)
    if heat is None:
        return not_run(NAME, f"no law is known here for the sampler {settings['class']!r}.")
    ratio = heat * noise / asked
    values = {"ratio": ratio, "noise_variance": noise, "step_size": step_size}
    if not np.isfinite(ratio):
        return not_run(NAME, "the variance of the gradients came out as NaN or infinite.", **values)
    law = (
        f"One gradient has a variance of {noise:.3g} a coordinate; the noise it puts into a step is {ratio:.2g} of the "
        f"noise that the dynamics at T = {asked:g} put in. "
    )
    verdict = "small" if ratio <= tolerance else "large"
    if minibatch.get("scheme") in ("blocks", "symmetric"):
        sentence, more = _say_blocks(dt, settings, minibatch, step_size, ratio)
        return Check(NAME, "noted", verdict, law + sentence, values | more)
    sentence = (
        f"If batches are independent between steps, the temperature rises by about {ratio:.2g} of itself (leading order in "
        "the step). The temperature check measures what it is."
    )
    return Check(NAME, "noted" if verdict == "large" else "passed", verdict, law + sentence, values)


def minibatch_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Find the settings of the Minibatch that an estimator is or wraps; empty if there is none."""
    if settings.get("class") == "Minibatch":
        return settings
    for value in settings.values():
        if isinstance(value, dict) and (found := minibatch_of(value)):
            return found
    return {}


def heat_per_variance(settings: dict[str, Any], step_size: float) -> float | None:
    """Leading-order rise of the temperature for one unit of gradient variance; ``None`` for an unknown sampler."""
    if settings["class"] == "SGLD":
        return step_size / 2
    if settings["class"] == "Splitting" and _number(settings.get("friction")) and _number(settings.get("mass", 1.0)):
        shares = kick_shares(settings["scheme"], reuse_gradient=settings.get("reuse_gradient", True))
        friction = settings["friction"] * settings.get("mass", 1.0)
        return step_size * sum(share**2 for share in shares) / (2 * friction)
    return None


def kick_shares(scheme: str, *, reuse_gradient: bool) -> list[float]:
    """Fractions of the step that are kicked by one gradient each; with reuse, kicks between two moves share it.

    Examples
    --------
    >>> kick_shares("BAOAB", reuse_gradient=True), kick_shares("ABOBA", reuse_gradient=False)
    ([1.0], [0.5, 0.5])
    """
    kicks = scheme.count("B")
    if not reuse_gradient:
        return [1 / kicks] * kicks
    first_move = min(i for i, letter in enumerate(scheme) if letter in "AU")
    cycle = (scheme[first_move:] + scheme[:first_move]).replace("U", "A")
    return [point.count("B") / kicks for point in cycle.split("A") if "B" in point]


def _say_blocks(
    dt: "xr.DataTree", settings: dict[str, Any], minibatch: dict[str, Any], step_size: float, ratio: float
) -> tuple[str, dict[str, float]]:
    """Say how far the noise of reshuffled blocks cancels."""
    rates = relaxation_rates(dt, settings)
    num_blocks = int(minibatch["num_blocks"])
    upper = (
        f"Were the batches independent, the temperature would rise by about {ratio:.2g} of itself. They are {num_blocks} "
        "reshuffled blocks, whose noise cancels over an epoch as far as the epoch is short against relaxation"
    )
    if rates is None:
        return f"{upper}; how far cannot be said here, since no finite variances could be taken from the draws.", {}
    low, high = (float(num_blocks * step_size * rate) for rate in (rates.min(), rates.max()))
    table = ", ".join(f"{bias:g} at {epoch:g}" for epoch, bias in BLOCK_BIAS)
    what = (
        "K·h·λ/γ (λ/γ: overdamped relaxation, approximate; with weak friction the noise cancels further)"
        if settings["class"] == "Splitting"
        else "K·h·λ"
    )
    sentence = (
        f"{upper}: {what} goes from {low:.2g} to {high:.2g} over the coordinates (λ from the marginal variances of the "
        f"draws; correlated directions can be stiffer). The bias of SGLD is about K·h·λ/3 of the independent one while "
        f"that is small, and in general {table}. No formula is applied to your run: the temperature check measures the bias."
    )
    return sentence, {"epoch_low": low, "epoch_high": high, "num_blocks": num_blocks}


def relaxation_rates(dt: "xr.DataTree", settings: dict[str, Any]) -> np.ndarray | None:
    r"""Rough relaxation rate of each unconstrained coordinate.

    It is :math:`\lambda = T/\mathrm{Var}`, and :math:`\lambda/(\gamma M)` for splittings, which holds for strong friction.
    The temperature is the measured one where there is one, since a hot run has variances that are too large.
    """
    group = "unconstrained_posterior" if has_group(dt, "unconstrained_posterior") else "posterior"
    variances = scalar_draws(dt, group).var(("chain", "draw")).values
    series = variable(dt, "probe", "temperature")
    measured = (run_temperature(dt) or 1.0) if series is None else float(series.mean())
    if not (np.all(np.isfinite(variances)) and np.all(variances > 0) and measured > 0):
        return None
    damping = settings["friction"] * settings.get("mass", 1.0) if settings["class"] == "Splitting" else 1.0
    return measured / variances / damping


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
