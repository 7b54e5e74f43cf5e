r"""The configurational temperature: a bias diagnostic that R-hat and the effective sample size cannot replace.

For draws from a density :math:`\pi` on unconstrained space, any constant :math:`c` and any coordinate,
:math:`T_i = -E[(\theta_i - c_i)\,\partial_i\log\pi(\theta)] = 1`. Draws from :math:`\pi^{1/T}` have :math:`T_i = T`. On a
Gaussian the mean of the :math:`T_i` is the mean ratio of sampled to true variance, :math:`\mathrm{tr}(S^{-1}\Sigma)/D`.
The gradient may be a minibatch one if its batch is independent of the position. The sampler's own gradient is not where
batches are reshuffled, hence the probes that a run stores.

What it does not see: modes that were never visited, and errors of the mean inside a well-sampled scale.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np

from ergodica.diagnostics.diagnosis import Check, not_run
from ergodica.diagnostics.scalars import listed, variable

if TYPE_CHECKING:
    import xarray as xr

NAME = "temperature"


@dataclass(frozen=True)
class Temperatures:
    """Measured temperatures over that of the run, with Monte Carlo standard errors (MCSE).

    Attributes
    ----------
    mean, mean_mcse : float
        Over coordinates.
    names : tuple of str
    values, mcse : array (D,)
        For each coordinate.
    """

    mean: float
    mean_mcse: float
    names: tuple[str, ...]
    values: np.ndarray
    mcse: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether every value is a number and every error a positive one."""
        errors = np.append(self.mcse, self.mean_mcse)
        values = np.append(self.values, self.mean)
        return bool(np.all(np.isfinite(values)) and np.all(np.isfinite(errors)) and np.all(errors > 0))


@dataclass(frozen=True)
class Judgement:
    """A verdict on temperatures (see `judge`).

    Attributes
    ----------
    verdict : {"biased", "consistent", "undecided"}
    mean_off : bool
        Whether the mean is significantly off by more than the tolerance.
    off : array of int
        The coordinates that are, the farthest first.
    within_mean, within_coordinates : float
        Farthest ends of the simultaneous intervals from 1: the bias that cannot be excluded.
    factor : float
        About how many times as many draws would decide.
    """

    verdict: Literal["biased", "consistent", "undecided"]
    mean_off: bool
    off: np.ndarray
    within_mean: float
    within_coordinates: float
    factor: float


def measure(temperature: "xr.DataArray", run_temperature: float = 1.0) -> Temperatures:
    r"""Average temperatures over draws, with errors that allow for autocorrelation (ArviZ's, from the ESS).

    Parameters
    ----------
    temperature : DataArray (chain, draw, coordinate)
        :math:`-(\theta_i - c_i) g_i` with an independent gradient.
    run_temperature : float
        The temperature that the sampler was asked for.

    Returns
    -------
    Temperatures
        All NaN if a single entry is not finite.
    """
    import arviz_stats

    ratio = temperature.transpose("chain", "draw", "coordinate").astype(float) / run_temperature
    names = tuple(str(name) for name in ratio["coordinate"].values)
    if not np.all(np.isfinite(ratio.values)):
        nothing = np.full(len(names), np.nan)
        return Temperatures(np.nan, np.nan, names, nothing, nothing)
    overall = ratio.mean("coordinate").values
    return Temperatures(
        mean=float(overall.mean()),
        mean_mcse=float(arviz_stats.mcse(overall, method="mean")),
        names=names,
        values=ratio.mean(("chain", "draw")).values,
        mcse=arviz_stats.mcse(ratio, method="mean").values,
    )


def judge(
    measured: Temperatures,
    *,
    tolerance: float = 0.05,
    coordinate_tolerance: float = 0.25,
    alpha: float = 0.01,
) -> Judgement:
    r"""Decide between biased, consistent and undecided.

    Tests are made for the mean and for every coordinate, since hot and cold coordinates can cancel in the mean.

    ``"biased"``
        Some :math:`T` differs from 1 significantly, *and* its estimate is off by more than ``tolerance``. Significance
        is two-sided with Holm's correction: a run without bias is called biased with probability at most ``alpha``,
        whatever the number of coordinates.
    ``"consistent"``
        Otherwise, if the simultaneous (Bonferroni, level ``alpha``) interval of the mean lies within
        :math:`1 \pm` ``tolerance``, ends included, and that of every coordinate within :math:`1 \pm`
        ``coordinate_tolerance``. The farthest ends are reported: they are what can be vouched for.
    ``"undecided"``
        Otherwise: the errors are too large to tell.

    A deviation that is significant but within the tolerance, such as 1.004 ± 0.001, is therefore consistent within 1%.

    Parameters
    ----------
    measured : Temperatures
        Finite (see `Temperatures.finite`).
    tolerance : float
        Relative error of the variance that does not matter, above 0; 0.05 is 2.5% in standard deviations.
    coordinate_tolerance : float
        The same for what must be excluded in single coordinates. It is coarser since one coordinate has about
        :math:`\sqrt{D}` times the error of the mean: 4,000 independent draws give an MCSE of 2.2% and an interval of
        :math:`\pm` 8%.
    alpha : float
        Family-wise error rate.
    """
    if len(measured.names) > 1:
        values, errors = np.append(measured.values, measured.mean), np.append(measured.mcse, measured.mean_mcse)
    else:  # the mean is the coordinate: one test, not two
        values, errors = np.array([measured.mean]), np.array([measured.mean_mcse])
    deviation = np.abs(values - 1)
    off = holm(two_sided_p(deviation / errors), alpha) & (deviation > tolerance)
    quantile = NormalDist().inv_cdf(1 - alpha / (2 * len(values)))
    reach = deviation + quantile * errors
    within_mean, within_coordinates = float(reach[-1]), float(reach.max())
    if off.any():
        verdict = "biased"
    elif within_mean <= tolerance and within_coordinates <= coordinate_tolerance:
        verdict = "consistent"
    else:
        verdict = "undecided"
    # the half-width of the intervals that would do: half the tolerance
    half_widths = 2 * quantile * errors / np.append(np.full(len(values) - 1, coordinate_tolerance), tolerance)
    coordinates = np.flatnonzero(off[: len(measured.names)])
    return Judgement(
        verdict=verdict,
        mean_off=bool(off[-1]),
        off=coordinates[np.argsort(-deviation[coordinates])],
        within_mean=within_mean,
        within_coordinates=within_coordinates,
        factor=float(max(half_widths.max() ** 2, 2.0)),
    )


def two_sided_p(z: np.ndarray) -> np.ndarray:
    """Two-sided p-values of standard normal scores."""
    return np.array([math.erfc(abs(float(score)) / math.sqrt(2)) for score in z])


def holm(p: np.ndarray, alpha: float) -> np.ndarray:
    """Reject hypotheses at a family-wise error rate (Holm 1979): the boolean mask of the rejected."""
    order = np.argsort(p)
    passed = p[order] <= alpha / np.arange(len(p), 0, -1)
    first_kept = len(p) if passed.all() else int(np.argmin(passed))
    rejected = np.zeros(len(p), bool)
    rejected[order[:first_kept]] = True
    return rejected


def run_temperature(dt: "xr.DataTree") -> float | None:
    """Temperature that the sampler was asked for: 1 where nothing is stored, ``None`` where it changed between draws."""
    stored = variable(dt, "sample_stats", "temperature")
    if stored is None:
        return 1.0
    first = float(stored.values.flat[0])
    return first if np.allclose(stored.values, first, rtol=1e-5) else None


def check_temperature(
    dt: "xr.DataTree",
    series: "xr.DataArray | None",
    *,
    tolerance: float,
    coordinate_tolerance: float,
    alpha: float,
) -> Check:
    """Run the check on the stored probes, or on a series computed for the purpose."""
    series = variable(dt, "probe", "temperature") if series is None else series
    if series is None:
        why = (
            "the run stored no probe gradients. Sample with probes=True, or give the posterior to diagnose (with two "
            "chains or more)."
        )
        return not_run(NAME, why)
    asked = run_temperature(dt)
    if asked is None:
        return not_run(NAME, "the temperature changed between stored draws, so that they have no common law.")
    if not asked > 0:
        return not_run(NAME, f"the run was made at temperature {asked:g}: that optimises and does not sample.")
    measured = measure(series, asked)
    values = {
        "mean": measured.mean,
        "mcse": measured.mean_mcse,
        "run_temperature": asked,
        "tolerance": tolerance,
        "coordinate_names": list(measured.names),
        "coordinates": measured.values,
        "coordinate_mcse": measured.mcse,
    }
    if not measured.finite:
        return not_run(
            NAME,
            "the temperature or its Monte Carlo error came out as NaN or zero (draws that are not finite, constant, or too few).",
            **values,
        )
    judgement = judge(measured, tolerance=tolerance, coordinate_tolerance=coordinate_tolerance, alpha=alpha)
    values |= {"within_mean": judgement.within_mean, "within_coordinates": judgement.within_coordinates}
    values["off"] = [measured.names[i] for i in judgement.off]
    if judgement.verdict == "biased":
        status, (verdict, sentence) = "failed", _say_biased(measured, judgement)
    elif judgement.verdict == "consistent":
        status, (verdict, sentence) = "passed", _say_consistent(measured, judgement)
    else:
        status, verdict = "undecided", "undecided"
        sentence = _say_undecided(measured, judgement, series.sizes["draw"], tolerance)
    if not math.isclose(asked, 1.0, rel_tol=1e-5):
        sentence += (
            f" All this is relative to T = {asked:g}, at which the run was made: its law is the posterior to the power "
            f"1/{asked:g}, whose standard deviations are about {math.sqrt(asked):.2g} times the posterior's, and not the posterior."
        )
        verdict += f", relative to T = {asked:g}"
        if status == "passed":
            status = "noted"
    return Check(NAME, status, verdict, sentence, values)


def _say_biased(measured: Temperatures, judgement: Judgement) -> tuple[str, str]:
    entries = [
        _with_error(float(measured.values[i]), float(measured.mcse[i]), measured.names[i]) for i in judgement.off
    ]
    mean = _with_error(measured.mean, measured.mean_mcse)
    if judgement.mean_off:
        hot, change = measured.mean > 1, abs(measured.mean - 1)
        if measured.mean >= 2:
            amount, size = f"a factor of {measured.mean:.2g}", f"{measured.mean:.2g} times too large"
        else:
            amount, size = f"{change:.0%}", f"{change:.0%} too {'large' if hot else 'small'}"
        sentence = (
            f"The draws are too {'hot' if hot else 'cold'}: the mean temperature is {mean} where 1 is right. Posterior "
            f"variances come out about {size} on average; standard deviations are off by a factor of about √T = "
            f"{_root(measured.mean)}. "
        )
        verdict = f"biased: {'hot' if hot else 'cold'} by {amount}"
    else:
        sentence = f"The mean temperature, {mean}, hides single coordinates that are off. "
        verdict = f"biased in {len(entries)} coordinate{'s' if len(entries) > 1 else ''}"
    if entries and len(measured.names) > 1:
        hot = [entry for entry, i in zip(entries, judgement.off, strict=True) if measured.values[i] > 1]
        cold = [entry for entry, i in zip(entries, judgement.off, strict=True) if measured.values[i] < 1]
        parts = [f"{word}: {listed(some)}" for word, some in (("hot", hot), ("cold", cold)) if some]
        sentence += (
            f"Significantly off in {len(entries)} of {len(measured.names)} coordinates ({'; '.join(parts)}); the standard "
            "deviation of each is off by about √T. "
        )
    return verdict, sentence + "Take a smaller step, larger batches or a control variate."


def _say_consistent(measured: Temperatures, judgement: Judgement) -> tuple[str, str]:
    mean, worst = _ceil_percent(judgement.within_mean), _ceil_percent(judgement.within_coordinates)
    single = f" and within {worst} in each of {len(measured.names)} coordinates" if len(measured.names) > 1 else ""
    sentence = (
        f"The mean temperature is {_with_error(measured.mean, measured.mean_mcse)} where 1 is right. The variances can be "
        f"vouched for within {mean} on average{single}; standard deviations go with √T and so within about half of that."
    )
    return f"consistent within {mean}", sentence


def _say_undecided(measured: Temperatures, judgement: Judgement, num_draws: int, tolerance: float) -> str:
    mean, worst = _ceil_percent(judgement.within_mean), _ceil_percent(judgement.within_coordinates)
    single = f" ({worst} in a single coordinate)" if len(measured.names) > 1 else ""
    needed = _round_up(judgement.factor * num_draws)
    return (
        f"The mean temperature is {_with_error(measured.mean, measured.mean_mcse)} where 1 is right: no significant bias "
        f"beyond the tolerance of {tolerance:.3g}, but a bias of {mean} in the variances{single} cannot be excluded, and "
        f"standard deviations go with √T. About {needed:,} draws a chain in place of {num_draws:,} would decide."
    )


def _with_error(value: float, error: float, name: str = "") -> str:
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{name} {value:.{digits}f} ± {error:.{digits}f}".strip()


def _root(temperature: float) -> str:
    return f"{math.sqrt(temperature):.2f}" if temperature > 0 else "a value that no temperature below zero has"


def _ceil_percent(x: float) -> str:
    """Percentage rounded up, to tenths below 1%."""
    return f"{math.ceil(100 * x - 1e-9):d}%" if x > 0.01 else f"{math.ceil(1000 * x - 1e-9) / 10:.1f}%"


def _round_up(x: float) -> int:
    """Round up to two digits."""
    unit = 10 ** max(math.floor(math.log10(x)) - 1, 0)
    return math.ceil(x / unit) * unit
