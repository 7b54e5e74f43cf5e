"""What independent estimates of a gradient say of its variance."""

from typing import NamedTuple

import numpy as np

RELATIVE_ERROR = 0.1
"""Standard error of a variance, as a fraction of it, up to which its interval is to be trusted."""
LARGEST_SHARE = 0.1
"""Of one repeat in the sum of squared deviations; above it the interval is not to be trusted."""
AIM = 0.05
"""Relative standard error that ``repeats_for_variance`` would bring."""
_BOOTSTRAPS = 400


class Replicates(NamedTuple):
    """Independent estimates at one point: ``gradients`` (R, D), and mean cost in datum gradients (NaN where not counted)."""

    gradients: np.ndarray
    cost: float
    exact: bool = False

    @property
    def mean(self) -> np.ndarray:
        """Mean (D,)."""
        return self.gradients.mean(axis=0)

    @property
    def deviations(self) -> np.ndarray:
        """Squared deviations from the mean, summed over the coordinates (R,), whose mean is the unbiased variance."""
        r = len(self.gradients)
        return ((self.gradients - self.mean) ** 2).sum(axis=1) * r / (r - 1)


class Spread(NamedTuple):
    r"""Total variance, its interval, and whether that is to be trusted.

    ``kurtosis`` is that of the deviation of the whole vector, three for a normal number; ``relative_error`` the standard error
    of the variance as a fraction of it, :math:`\sqrt{(\kappa - 1) / R}`.
    """

    num_repeats: int
    variance: float
    lower: float
    upper: float
    kurtosis: float
    relative_error: float
    trustworthy: bool
    repeats_for_variance: float
    cost: float


def hall(z: np.ndarray, skewness: np.ndarray | float) -> np.ndarray:
    r"""Correct a studentised mean for skewness.

    .. math:: z + \tfrac13 \lambda z^2 + \tfrac1{27} \lambda^2 z^3 + \tfrac16 \lambda

    where :math:`\lambda` is the skewness *of the mean*, that of one repeat over :math:`\sqrt R`. It takes away the error of
    order :math:`R^{-1/2}` of Student's law, is increasing in z, and has an inverse (Hall, 1992).
    """
    return z + skewness * z**2 / 3 + skewness**2 * z**3 / 27 + skewness / 6


def inverse_hall(y: np.ndarray | float, skewness: np.ndarray | float) -> np.ndarray:
    """Invert `hall` in its first argument."""
    small = np.abs(skewness) < 1e-8
    safe = np.where(small, 1.0, skewness)
    root = np.cbrt(1 + safe * (y - safe / 6))
    return np.where(small, y, 3 / safe * (root - 1))


def summarise(replicates: Replicates, confidence: float) -> Spread:
    """Total variance with an interval that is corrected for the skewness of squared deviations.

    On the score function of a quadratic (kurtosis 40 to 250, 1,000 to 16,000 repeats) intervals of 99% cover 98%; normal ones
    for the logarithm cover 91% to 98%.
    """
    from scipy.stats import t as student

    r, d = len(replicates.gradients), replicates.deviations
    variance = float(d.mean())
    if variance == 0:
        return Spread(
            r, 0.0, 0.0, 0.0, np.nan, 0.0, trustworthy=True, repeats_for_variance=np.nan, cost=replicates.cost
        )
    error, kurtosis = float(d.std(ddof=1) / np.sqrt(r)), float((d**2).mean() / variance**2)
    skewness = _skewness(d) / np.sqrt(r)
    quantile = float(student.ppf(0.5 + confidence / 2, r - 1))
    lower = variance - error * float(inverse_hall(quantile, skewness))
    upper = variance - error * float(inverse_hall(-quantile, skewness))
    relative = error / variance
    return Spread(
        num_repeats=r,
        variance=variance,
        lower=max(lower, variance * float(np.exp(-quantile * relative))),
        upper=upper,
        kurtosis=kurtosis,
        relative_error=relative,
        trustworthy=bool(relative <= RELATIVE_ERROR and d.max() <= LARGEST_SHARE * d.sum()),
        repeats_for_variance=float(np.ceil(max(kurtosis - 1, 0.0) / AIM**2)),
        cost=replicates.cost,
    )


def _skewness(x: np.ndarray) -> float:
    centred = x - x.mean()
    spread = np.sqrt((centred**2).mean())
    return float((centred**3).mean() / spread**3) if spread > 0 else 0.0


def variance_ratios(
    deviations: dict[str, np.ndarray], first: str, confidence: float, seed: int = 0
) -> dict[str, tuple]:
    """Ratio of each variance to that of ``first``, with lower and upper end: normal for the logarithm, by a paired bootstrap.

    Repeats with the same index are drawn together, so that common random numbers shorten the interval.
    """
    from scipy.stats import norm

    base = deviations[first]
    noisy = {name: d for name, d in deviations.items() if len(d) == len(base) and d.mean() > 0}
    found = dict.fromkeys(deviations, (np.nan, np.nan, np.nan))
    found |= {name: (0.0, 0.0, 0.0) for name, d in deviations.items() if d.mean() == 0 and base.mean() > 0}
    if first not in noisy:
        return found
    if len(noisy) == 1:
        return found | {first: (1.0, 1.0, 1.0)}
    stacked, rng = np.stack(list(noisy.values()), axis=1), np.random.default_rng(seed)
    r = len(base)
    logs = np.empty((_BOOTSTRAPS, len(noisy)))
    for b in range(_BOOTSTRAPS):
        counts = np.bincount(rng.integers(r, size=r), minlength=r)
        logs[b] = np.log(np.maximum(counts @ stacked / r, 1e-300))
    errors = (logs - logs[:, [list(noisy).index(first)]]).std(axis=0, ddof=1)
    for (name, d), error in zip(noisy.items(), errors, strict=True):
        ratio, factor = d.mean() / base.mean(), np.exp(norm.ppf(0.5 + confidence / 2) * error)
        found[name] = (float(ratio), float(ratio / factor), float(ratio * factor))
    return found


def signal_to_noise(gradient: np.ndarray, replicates: Replicates) -> np.ndarray:
    """Absolute value of the reference over the standard deviation of one estimate, by coordinate; infinite without noise."""
    spread = replicates.gradients.std(axis=0, ddof=1)
    safe = np.where(spread > 0, spread, 1.0)
    return np.where(spread > 0, np.abs(gradient) / safe, np.where(gradient == 0, 0.0, np.inf))
