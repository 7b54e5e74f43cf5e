"""Tests of gradient estimates for bias: by coordinate, jointly, and of a control that is biased on purpose."""

from typing import Any, NamedTuple

import numpy as np

from ergodica.diagnostics.gradient_statistics import Replicates, hall, inverse_hall

MOST_JOINT = 32
"""Coordinates, at most, that are tested jointly too."""
_REPEATS_PER_COORDINATE = 20
_SMALLEST_EIGENVALUE = 0.01
_PAIRS = 256
POWER = 0.95
_TINY = 1e-200
"""Keeps precisions finite where there is neither noise nor anything to round."""


class Target(NamedTuple):
    """What means are held against.

    ``gradient`` (D,), what ``rounding`` may do to it (D,), the ``weights`` (by estimator, each (D,)) with which the
    estimators' own means enter it, and the error of ``quadrature`` (D,).
    """

    gradient: np.ndarray
    rounding: np.ndarray
    weights: dict[str, np.ndarray]
    quadrature: np.ndarray | float = 0.0


class Errors(NamedTuple):
    """Of an estimator's mean: its ``bias`` (D,), what each repeat adds to that, ``rows`` (R, D) or ``None`` without noise.

    ``rounding`` (D,) includes the error of quadrature.
    """

    bias: np.ndarray
    rows: np.ndarray | None
    rounding: np.ndarray

    @property
    def standard_error(self) -> np.ndarray:
        """Of the bias (D,), rounding included."""
        noise = 0.0 if self.rows is None else self.rows.var(axis=0, ddof=1) / len(self.rows)
        return np.sqrt(noise + self.rounding**2)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return np.inf if self.rows is None else len(self.rows) - 1

    @property
    def skewness(self) -> np.ndarray:
        """Of the bias (D,), as a random variable."""
        if self.rows is None:
            return np.zeros_like(self.bias)
        error = self.standard_error
        third = (self.rows**3).mean(axis=0) / len(self.rows) ** 2
        return np.where(error > 0, third / np.where(error > 0, error, 1.0) ** 3, 0.0)


class Tested(NamedTuple):
    """Studentised biases ``z`` (D,), their p-values (D,), and that of all coordinates jointly (NaN if there is no such test)."""

    z: np.ndarray
    p: np.ndarray
    joint: float


def without_own_share(errors: Errors, target: Target, name: str) -> Errors:
    """Bias against the other means in a pooled target: of its own bias a mean shows only the share that is not its own weight.

    Unchanged where the target does not contain the estimator's mean, or nothing else.
    """
    weight = target.weights.get(name)
    if weight is None or np.all(weight == 1):
        return errors
    others = np.maximum(1 - weight, np.finfo(float).eps)
    rows = None if errors.rows is None else errors.rows / others
    return Errors(errors.bias / others, rows, errors.rounding / others)


class Size(NamedTuple):
    """How large the bias is: fractions of the norm of the reference, with an interval; mean squared error; cosine."""

    relative: float
    lower: float
    upper: float
    mse: float
    cosine: float


def weigh_by_precision(replicates: dict[str, Replicates], unit: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights (by estimator) of a mean pooled by precision, and the rounding of the means; ``unit`` is that of one."""
    rounding = unit * np.max([np.abs(r.mean) for r in replicates.values()], axis=0)
    precision = {
        n: 1 / (r.gradients.var(axis=0, ddof=1) / len(r.gradients) + rounding**2 + _TINY) for n, r in replicates.items()
    }
    total = np.sum(list(precision.values()), axis=0)
    return {name: p / total for name, p in precision.items()}, rounding


def errors_of(name: str, replicates: dict[str, Replicates], target: Target) -> Errors:
    """Hold an estimator's mean against the target, which may contain the means of several, its own among them."""
    rows: np.ndarray | None = None
    for other, those in replicates.items():
        share = float(other == name) - target.weights.get(other, np.zeros_like(target.gradient))
        if those.exact or not np.any(share):
            continue
        part = share * (those.gradients - those.mean)
        rows = part if rows is None else rows + part
    return Errors(replicates[name].mean - target.gradient, rows, target.rounding + target.quadrature)


def look_for_bias(errors: Errors, shift: np.ndarray | float = 0.0) -> Tested:
    """Test whether the bias, plus a ``shift``, is zero.

    By coordinate Student's test, corrected for skewness (see `hall`). Jointly, Hotelling's for the corrected z, over the
    directions in which their correlation is no less than a hundredth.
    """
    from scipy.stats import t as student

    bias, error = errors.bias + shift, errors.standard_error
    certain = np.where(bias == 0, 0.0, np.where(bias > 0, np.inf, -np.inf))
    z = np.where(error > 0, bias / np.where(error > 0, error, 1.0), certain)
    finite = np.isfinite(z)
    z = np.where(finite, hall(np.where(finite, z, 0.0), errors.skewness), z)
    return Tested(z, 2 * student.sf(np.abs(z), errors.freedom), _joint(z, errors))


def _joint(z: np.ndarray, errors: Errors) -> float:
    from scipy.stats import f as fisher

    d, rows = len(z), errors.rows
    if not 1 < d <= MOST_JOINT or rows is None or len(rows) < _REPEATS_PER_COORDINATE * d or not np.all(np.isfinite(z)):
        return np.nan
    covariance = np.cov(rows, rowvar=False) / len(rows) + np.diag(errors.rounding**2)
    error = np.sqrt(np.diag(covariance))
    if np.any(error == 0):
        return np.nan
    values, vectors = np.linalg.eigh(covariance / np.outer(error, error))
    kept = values > _SMALLEST_EIGENVALUE
    squares = (vectors[:, kept].T @ z) ** 2 / values[kept]
    rank, freedom = int(kept.sum()), len(rows) - 1
    statistic = squares.sum() * (freedom - rank + 1) / (freedom * rank)
    return float(fisher.sf(statistic, rank, freedom - rank + 1))


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p-values for their number (Holm, 1979); those that are NaN are no tests."""
    flat = p.ravel()
    order = np.argsort(flat, kind="stable")[: np.sum(np.isfinite(flat))]
    steps = flat[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.reshape(p.shape)


def largest_bias(errors: Errors, level: float) -> np.ndarray:
    """Bound of each coordinate's bias (D,): the far end of an interval of that level, corrected for skewness."""
    from scipy.stats import t as student

    quantile, error = student.isf(level / 2, errors.freedom), errors.standard_error
    ends = [errors.bias - error * inverse_hall(sign * quantile, errors.skewness) for sign in (-1, 1)]
    return np.max(np.abs(ends), axis=0)


def size_of_bias(errors: Errors, target: Target, variance: float, confidence: float) -> Size:
    r"""Measure the bias as a vector.

    The squared norm of the measured bias is too large by the trace of its covariance, which is subtracted. The interval is the
    measured norm give or take a quantile of the norm of the error, whose square is taken as a multiple of chi-squared with the same
    two moments (Satterthwaite).
    """
    from scipy.stats import chi2

    scale, norm = np.linalg.norm(target.gradient), np.linalg.norm(errors.bias)
    trace = float(np.sum(errors.standard_error**2))
    radius = 0.0
    if trace > 0:
        of_squares = min(max(_trace_of_square(errors), trace**2 / len(errors.bias)), trace**2)
        multiple, freedom = of_squares / trace, trace**2 / of_squares
        radius = np.sqrt(multiple * chi2.ppf(confidence, freedom))
    squared = max(norm**2 - trace, 0.0)
    mean = target.gradient + errors.bias
    length = np.sqrt(max(np.sum(mean**2) - trace, 0.0)) * scale
    cosine = float(np.clip(mean @ target.gradient / length, -1, 1)) if length > 0 else np.nan

    def fraction(x: Any) -> float:
        return float(x / scale) if scale > 0 else 0.0 if x == 0 else np.inf

    middle, lower, upper = np.sqrt(squared), max(norm - radius, 0.0), norm + radius
    return Size(fraction(middle), fraction(lower), fraction(upper), float(squared + variance), cosine)


def _trace_of_square(errors: Errors) -> float:
    """Of the covariance of the bias, from pairs of repeats: the mean of (x · y)² is the trace of the square."""
    if errors.rows is None:
        return float(np.sum(errors.rounding**4))
    rows = errors.rows[:_PAIRS]
    products = (rows @ rows.T) ** 2
    np.fill_diagonal(products, 0.0)
    n = len(rows)
    return float(products.sum() / (n * (n - 1))) / len(errors.rows) ** 2


def detectable(errors: Errors, gradient: np.ndarray, level: float) -> float:
    """The least uniform shrinkage of a gradient that its test finds with probability 95%, by one coordinate (infinite: none)."""
    from scipy.stats import norm, t

    quantile = t.isf(level / 2, errors.freedom) + norm.ppf(POWER)
    size = np.abs(gradient)
    return float(np.min(np.where(size > 0, quantile * errors.standard_error / np.where(size > 0, size, 1.0), np.inf)))
