"""What independent estimates of a gradient say of its bias and variance."""

from typing import NamedTuple

import numpy as np

_TINY = 1e-200
"""Keeps precisions finite where there is neither noise nor anything to round."""


class Replicates(NamedTuple):
    """Independent estimates at one point: ``gradients`` (R, D) and mean cost in datum gradients (NaN where not counted)."""

    gradients: np.ndarray
    cost: float


class Moments(NamedTuple):
    """What the replicates say: ``mean`` and ``squared_error`` of the mean (D,); total variance with its interval."""

    mean: np.ndarray
    squared_error: np.ndarray
    num_repeats: int
    variance: float
    lower: float
    upper: float
    cost: float


class Target(NamedTuple):
    """What means are held against.

    ``gradient`` (D,), what ``rounding`` may do to it (D,), and the ``weights`` (by estimator) with which the estimators'
    own means enter it.
    """

    gradient: np.ndarray
    rounding: np.ndarray
    weights: dict[str, np.ndarray]
    squared_errors: dict[str, np.ndarray]


class BiasTest(NamedTuple):
    """The test of one estimator at one point; ``bias``, ``standard_error`` and ``z`` are (D,), ``p_value`` is the smallest."""

    bias: np.ndarray
    standard_error: np.ndarray
    z: np.ndarray
    p_value: float
    bias_bound: float
    verdict: str


def summarise(replicates: Replicates, confidence: float) -> Moments:
    """Mean, total variance, and a normal interval for the logarithm of the mean squared deviation."""
    from scipy.stats import t as student

    r = len(replicates.gradients)
    mean = replicates.gradients.mean(axis=0)
    squares = (replicates.gradients - mean) ** 2
    deviations = squares.sum(axis=1) * r / (r - 1)
    variance = float(deviations.mean())
    relative_error = deviations.std(ddof=1) / np.sqrt(r) / variance if variance > 0 else 0.0
    factor = np.exp(student.ppf(0.5 + confidence / 2, r - 1) * relative_error)
    return Moments(
        mean=mean,
        squared_error=squares.sum(axis=0) / (r - 1) / r,
        num_repeats=r,
        variance=variance,
        lower=float(variance / factor),
        upper=float(variance * factor),
        cost=replicates.cost,
    )


def weigh_by_precision(
    means: dict[str, np.ndarray], squared_errors: dict[str, np.ndarray], unit: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights (by estimator) of a mean pooled by precision, and the rounding of the means; ``unit`` is that of one."""
    rounding = unit * np.max([np.abs(mean) for mean in means.values()], axis=0)
    precision = {name: 1 / (v + rounding**2 + _TINY) for name, v in squared_errors.items()}
    total = np.sum(list(precision.values()), axis=0)
    return {name: p / total for name, p in precision.items()}, rounding


def judge_bias(name: str, moments: Moments, target: Target, level: float, bias_tolerance: float) -> BiasTest:
    """Test each coordinate's bias at a level that is corrected for the number of tests, and bound the largest."""
    from scipy.stats import t as student

    weights = {name: np.zeros_like(target.gradient)} | target.weights
    squared_error = sum(
        ((other == name) - weight) ** 2 * target.squared_errors[other] for other, weight in weights.items()
    )
    error = np.sqrt(squared_error + target.rounding**2)
    bias = moments.mean - target.gradient
    safe = np.where(error > 0, error, 1.0)
    z = np.where(error > 0, bias / safe, np.where(bias == 0, 0.0, np.inf))
    freedom = np.where(squared_error > 0, moments.num_repeats - 1, np.inf)
    smallest = float(np.min(2 * student.sf(np.abs(z), freedom)))
    quantile = student.isf(level / 2, freedom)
    bound, scale = float(np.max(np.abs(bias) + quantile * error)), float(np.max(np.abs(target.gradient)))
    relative = bound / scale if scale > 0 else (0.0 if bound == 0 else np.inf)
    mere_rounding = bound <= 2 * float(np.max(quantile * target.rounding))
    unbiased = relative <= bias_tolerance or mere_rounding
    verdict = "biased" if smallest < level else "unbiased" if unbiased else "undecided"
    return BiasTest(bias, error, z, smallest, relative, verdict)
