"""`diagnose`: every check on a run, in the order in which they are to be read."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.core.posterior import Posterior
from ergodica.diagnostics.diagnosis import Check, Diagnosis, not_run
from ergodica.diagnostics.full_gradient import temperature_series
from ergodica.diagnostics.gradient_noise import check_gradient_noise
from ergodica.diagnostics.scalars import has_group, listed, scalar_draws, variable, varying
from ergodica.diagnostics.temperature import check_temperature

if TYPE_CHECKING:
    import xarray as xr


def diagnose(
    dt: "xr.DataTree",
    posterior: Posterior | None = None,
    *,
    tolerance: float = 0.05,
    coordinate_tolerance: float = 0.25,
    alpha: float = 0.01,
    rhat_max: float = 1.01,
    ess_min: float = 100.0,
) -> Diagnosis:
    r"""Check whether draws can be believed.

    R-hat and the effective sample size say whether chains agree and how much they know of the law that they sample. They do
    not say whether that law is the posterior: a stochastic-gradient sampler with too large a step mixes very well. The
    temperature check does, by :math:`-E[(\theta_i - c_i)\,\partial_i\log\pi(\theta)] = 1`.

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`, or any with a group ``posterior`` (or ``ensemble``, for optimisers).
    posterior : Posterior, optional
        Used if ``dt`` holds no probes: the temperature is then computed from full gradients at every stored draw.
    tolerance, coordinate_tolerance, alpha : float
        Of the temperature check: relative error of variances that does not matter (mean, single coordinate), and the
        probability that a run without bias is called biased.
    rhat_max : float
        Largest acceptable rank-normalised split R-hat.
    ess_min : float
        Smallest acceptable effective sample size, for each chain.

    Returns
    -------
    Diagnosis
        Print it, or take `Diagnosis.to_dict`, `Diagnosis.to_datatree`, ``diagnosis["temperature"]``. Checks: finite,
        frozen, chains, (divergences,) R-hat, ESS, temperature, gradient noise.

    Raises
    ------
    ValueError, TypeError
        If ``dt`` is no DataTree, holds no draws, or ``posterior`` does not fit them.

    Notes
    -----
    Costs no gradient, except as said for ``posterior``. What it cannot see: modes that no chain visited. A check that
    did not run is never counted as passed.

    Examples
    --------
    >>> import arviz as az, numpy as np
    >>> draws = np.random.default_rng(0).normal(size=(1, 500))
    >>> print(diagnose(az.from_dict({"posterior": {"mu": draws}}))["R-hat"].sentence)
    Not run: it compares chains, and there is one. Sample with num_chains=4.
    """
    _require_tree(dt)
    for name, value in (
        ("tolerance", tolerance),
        ("coordinate_tolerance", coordinate_tolerance),
        ("alpha", alpha),
    ):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, both excluded; got {value!r}.")
    if not has_group(dt, "posterior"):
        return _diagnose_ensemble(dt)
    draws = scalar_draws(dt)
    finite = check_finite(dt, draws)
    checks = [finite, check_frozen(draws), check_chains(draws, shared=bool(dt.attrs.get("shared_batches", 0)))]
    diverging = variable(dt, "sample_stats", "diverging")
    if diverging is not None and dt.attrs.get("exact") != "approximate":
        checks.append(check_divergences(diverging))
    checks += [check_rhat(draws, rhat_max), check_ess(draws, ess_min)]
    series = None
    if posterior is not None and not has_group(dt, "probe"):
        series = temperature_series(dt, posterior)
    checks.append(
        check_temperature(dt, series, tolerance=tolerance, coordinate_tolerance=coordinate_tolerance, alpha=alpha)
    )
    checks.append(check_gradient_noise(dt, tolerance=tolerance))
    return Diagnosis(describe(dt), tuple(checks))


def describe(dt: "xr.DataTree") -> str:
    """Say what a result is in a few words."""
    name = json.loads(dt.attrs.get("settings", "{}")).get("scheme") or dt.attrs.get("sampler", "draws")
    if not has_group(dt, "posterior"):
        return f"{name} (an ensemble)"
    sizes = dt.children["posterior"].sizes
    return f"{name}, {sizes['chain']} chain{'s' if sizes['chain'] > 1 else ''} of {sizes['draw']:,} draws"


def check_finite(dt: "xr.DataTree", draws: "xr.DataArray") -> Check:
    """Look for NaN and infinity, chain by chain, and at how the run says it ended."""
    bad = ~np.isfinite(draws.values)
    chains = np.flatnonzero(bad.any(axis=(1, 2)))
    values = {"num_nonfinite": int(bad.sum()), "chains": chains}
    if len(chains):
        first = int(np.argmax(bad[chains[0]].any(axis=-1)))
        sentence = (
            f"{bad.sum():,} values are NaN or infinite, in chain{'s' if len(chains) > 1 else ''} "
            f"{listed([str(i) for i in chains])} (in chain {chains[0]} from draw {first} on). The usual cause is a step "
            "size above the limit of stability: try a tenth of it."
        )
        return Check("finite", "failed", "NaN or infinite", sentence, values)
    result, message = dt.attrs.get("result", "successful"), dt.attrs.get("result_message", "")
    if result == "nonfinite":
        return Check("finite", "failed", "run went wrong", f"The stored draws are finite, but: {message}", values)
    if result == "interrupted":
        return Check("finite", "noted", "interrupted", f"All stored draws are finite. {message}", values)
    return Check("finite", "passed", "finite", "All draws are finite.", values)


def check_frozen(draws: "xr.DataArray") -> Check:
    """Look for chains that do not move while others do, or that move nowhere at all."""
    if draws.sizes["draw"] < 2:
        return not_run("frozen", "there is one draw a chain.")
    with np.errstate(invalid="ignore"):
        still = np.ptp(draws.values, axis=1) == 0  # (chain, parameter)
    constant = still.all(axis=0) & (np.ptp(draws.values[:, 0], axis=0) == 0)
    frozen = np.flatnonzero((still & ~constant).any(axis=1))
    if constant.all():
        frozen = np.arange(draws.sizes["chain"])
    values = {"chains": frozen, "num_constant": int(constant.sum())}
    if len(frozen):
        sentence = (
            f"In chain{'s' if len(frozen) > 1 else ''} {listed([str(i) for i in frozen])} some parameter never moved. "
            "Every proposal was rejected, or the step size is zero to rounding."
        )
        return Check("frozen", "failed", "frozen", sentence, values)
    names = listed([str(name) for name in draws["parameter"].values[constant]])
    aside = f" Constant by the look of it, and left out below: {names}." if constant.any() else ""
    return Check("frozen", "passed", "moving", f"Every chain moves.{aside}", values)


def check_chains(draws: "xr.DataArray", *, shared: bool = False) -> Check:
    """Count the chains; say so where they see the same batches and are therefore not independent."""
    count = draws.sizes["chain"]
    values = {"num_chains": count}
    if count == 1:
        sentence = "One chain cannot show whether chains agree: a chain stuck in one region looks as good as any."
        return Check("chains", "undecided", "one chain", sentence, values)
    if shared:
        sentence = (
            f"{count} chains that see the same batch at each step: their gradient noise is common, and neither R-hat nor the "
            "spread between chains sees that part of the error."
        )
        return Check("chains", "noted", f"{count} chains, shared batches", sentence, values)
    if count < 4:
        sentence = f"{count} chains; with 4 or more, one that is stuck stands out reliably."
        return Check("chains", "noted", f"{count} chains", sentence, values)
    return Check("chains", "passed", f"{count} chains", f"{count} chains, enough to compare.", values)


def check_divergences(diverging: "xr.DataArray") -> Check:
    """Count divergent transitions of a sampler with a Metropolis correction."""
    count = int(diverging.values.sum())
    if count == 0:
        return Check("divergences", "passed", "none", "No transition diverged.", {"num_divergences": 0})
    sentence = (
        f"{count:,} of {diverging.size:,} transitions diverged: the integrator missed a region of strong curvature, and the "
        "draws there are too few. Reparameterise the model or take a smaller step."
    )
    return Check("divergences", "failed", f"{count:,} divergences", sentence, {"num_divergences": count})


def check_rhat(draws: "xr.DataArray", rhat_max: float) -> Check:
    """Compare the chains by rank-normalised split R-hat."""
    if draws.sizes["chain"] < 2:
        return not_run("R-hat", "it compares chains, and there is one. Sample with num_chains=4.")
    if draws.sizes["draw"] < 4:
        return not_run("R-hat", f"it needs at least 4 draws a chain, and there are {draws.sizes['draw']}.")
    if not np.all(np.isfinite(draws.values)):
        return not_run("R-hat", "some draws are NaN or infinite.")
    import arviz_stats

    moving = varying(draws)
    rhat = arviz_stats.rhat(moving, method="rank").values
    values = {"max": _extreme(np.max, rhat), "threshold": rhat_max}
    if not len(rhat) or not np.all(np.isfinite(rhat)):
        return not_run("R-hat", _undefined(moving, rhat), **values)
    worst = _worst(moving, rhat, rhat > rhat_max, reverse=True)
    if worst:
        sentence = (
            f"The chains disagree: R-hat is up to {rhat.max():.3f}, above {rhat_max:g} for {int((rhat > rhat_max).sum())} "
            f"of {len(rhat)} parameters (worst: {worst}). Run longer, from better starts, or with a larger step."
        )
        return Check("R-hat", "failed", f"{rhat.max():.3f}", sentence, values)
    sentence = (
        f"The chains agree: R-hat is at most {rhat.max():.3f} ({rhat_max:g} is allowed). It cannot see a bias that all "
        "share."
    )
    return Check("R-hat", "passed", f"{rhat.max():.3f}", sentence, values)


def check_ess(draws: "xr.DataArray", ess_min: float) -> Check:
    """Compare bulk and tail effective sample sizes with what estimates need."""
    if draws.sizes["draw"] < 4:
        return not_run("ESS", f"it needs at least 4 draws a chain, and there are {draws.sizes['draw']}.")
    if not np.all(np.isfinite(draws.values)):
        return not_run("ESS", "some draws are NaN or infinite.")
    import arviz_stats

    moving, needed = varying(draws), ess_min * draws.sizes["chain"]
    bulk = arviz_stats.ess(moving, method="bulk").values
    tail = arviz_stats.ess(moving, method="tail").values
    ess = np.minimum(bulk, tail)
    values = {"bulk_min": _extreme(np.min, bulk), "tail_min": _extreme(np.min, tail), "needed": needed}
    if not len(ess) or not np.all(np.isfinite(ess)):
        return not_run("ESS", _undefined(moving, ess), **values)
    worst = _worst(moving, ess, ess < needed, reverse=False)
    numbers = f"bulk {bulk.min():,.0f}, tail {tail.min():,.0f}"
    if worst:
        sentence = (
            f"Too few effective draws: the smallest are {numbers}, below {needed:g} for {int((ess < needed).sum())} of "
            f"{len(ess)} parameters (worst: {worst}). Run about {needed / ess.min():.1f} times as long."
        )
        return Check("ESS", "failed", numbers, sentence, values)
    sentence = (
        f"Enough effective draws: the smallest are {numbers} ({needed:g} are asked for). They say nothing about bias."
    )
    return Check("ESS", "passed", numbers, sentence, values)


def _diagnose_ensemble(dt: "xr.DataTree") -> Diagnosis:
    """Check what can be checked on the result of an optimiser of particles."""
    if not has_group(dt, "ensemble"):
        raise ValueError(
            f"dt must have a group 'posterior' or 'ensemble'; its groups are {sorted(dt.children)}. "
            "Was it made by ergodica.sample?"
        )
    finite = all(np.all(np.isfinite(v.values)) for v in dt.children["ensemble"].data_vars.values())
    ending = "All particles are finite." if finite else "Some particles are NaN or infinite."
    why = "the particles of an optimiser interact and follow no posterior law, so that {} has no meaning for them."
    checks = (
        Check("finite", "passed" if finite else "failed", "finite" if finite else "NaN or infinite", ending),
        *(not_run(name, why.format(name)) for name in ("R-hat", "ESS", "temperature")),
    )
    return Diagnosis(describe(dt), checks)


def _worst(draws: "xr.DataArray", values: np.ndarray, bad: np.ndarray, *, reverse: bool) -> str:
    order = np.argsort(-values if reverse else values)
    return listed([str(draws["parameter"].values[i]) for i in order if bad[i]], 3)


def _undefined(draws: "xr.DataArray", values: np.ndarray) -> str:
    names = [str(name) for name in draws["parameter"].values[~np.isfinite(values)]]
    return f"it came out as NaN for {listed(names) or 'every parameter'}; see the checks above."


def _extreme(of: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    return float(of(values)) if len(values) else float("nan")


def _require_tree(dt: object) -> None:
    import xarray as xr

    if not isinstance(dt, xr.DataTree):
        raise TypeError(
            f"dt must be an xarray.DataTree, as ergodica.sample returns; got {type(dt).__name__}. "
            "A file is opened by arviz.from_netcdf(path), a dictionary of draws converted by arviz.from_dict."
        )
