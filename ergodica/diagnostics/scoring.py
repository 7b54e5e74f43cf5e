"""Scores of predictions as formulas, arrays in and arrays out; `calibration` puts them in one table.

Proper scores (Brier, CRPS, the log density) reward sharp and calibrated predictions alike. Calibration error and coverage
look at calibration alone: predicting the frequencies of the labels for every datum passes both, and says nothing.
"""

from typing import Literal, NamedTuple

import numpy as np

from ergodica.core import check


class Reliability(NamedTuple):
    """Expected calibration error of labels, and what it would be without miscalibration.

    Attributes
    ----------
    ece : float
    calibrated_mean, calibrated_low, calibrated_high : float
        Of a calibrated predictor with the same confidences: mean, 2.5% and 97.5% quantile of the error, by simulation.
    confidence, accuracy : array (num_bins,)
        Means in each bin; NaN in empty ones.
    count : int array (num_bins,)
    """

    ece: float
    calibrated_mean: float
    calibrated_low: float
    calibrated_high: float
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    r"""Brier score of each datum, :math:`\sum_c (p_c - 1\{y = c\})^2`, from 0 to 2; smaller is better.

    Parameters
    ----------
    probabilities : array (N, C)
        Mean over draws of the probabilities, one row a datum.
    labels : int array (N,)
        0 to C - 1.

    Returns
    -------
    array (N,)

    Notes
    -----
    For two classes twice the score in one probability. Probabilities estimated as frequencies among S simulated labels add
    :math:`\sum_c p_c (1 - p_c) / S`: use the mean of the probabilities themselves.

    References
    ----------
    Brier (1950), Verification of forecasts expressed in terms of probability, Monthly Weather Review 78.

    Examples
    --------
    >>> brier_score(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 0])).tolist()
    [0.0, 0.5]
    """
    p, y = check_classes(probabilities, labels)
    return np.sum(p**2, axis=1) - 2 * p[np.arange(len(y)), y] + 1


def expected_calibration_error(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    num_null: int = 1000,
) -> Reliability:
    r"""Gap between confidence and accuracy, averaged over bins of the confidence (ECE).

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N}\,\bigl|\mathrm{acc}_b - \mathrm{conf}_b\bigr|

    with the confidence the largest probability of a datum, and the accuracy the share of data whose most probable label
    is right.

    Parameters
    ----------
    probabilities : array (N, C)
    labels : int array (N,)
    num_bins : int
    binning : {"width", "mass"}
        Bins :math:`((b-1)/B,\ b/B]` of the confidence, or of as many data each.
    num_null : int
        Simulations of the labels by the predicted probabilities.

    Returns
    -------
    Reliability

    Notes
    -----
    Biased upwards: an absolute value of a noisy difference is not zero on average, so that a calibrated predictor has an
    error of about :math:`\sum_b \sqrt{2 n_b\,\mathrm{conf}_b (1 - \mathrm{conf}_b) / \pi} / N`, more with more bins and fewer
    data. ``calibrated_mean``, ``calibrated_low`` and ``calibrated_high`` say how much that is here, and comparing two
    predictors by this number is fair only where theirs agree. It is biased downwards by bins in which gaps of both signs
    cancel. It looks at the most probable label alone.

    References
    ----------
    Naeini, Cooper and Hauskrecht (2015); Guo, Pleiss, Sun and Weinberger (2017); the resampling is that of Bröcker and
    Smith (2007).

    Examples
    --------
    >>> sure = np.tile([0.9, 0.1], (10, 1))
    >>> found = expected_calibration_error(sure, np.array([0] * 6 + [1] * 4))
    >>> round(found.ece, 6), round(found.calibrated_mean, 2)
    (0.3, 0.07)
    """
    p, y = check_classes(probabilities, labels)
    num_bins, num_null = check.integer("num_bins", num_bins), check.integer("num_null", num_null)
    check.one_of("binning", binning, ("width", "mass"))
    confidence, correct = p.max(1), p.argmax(1) == y
    if binning == "width":
        bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    else:
        bins = np.empty(len(y), int)
        bins[np.argsort(confidence, kind="stable")] = np.arange(len(y)) * num_bins // len(y)
    count = np.bincount(bins, minlength=num_bins)
    hits, total = (np.bincount(bins, values, num_bins) for values in (correct, confidence))
    draws = np.random.default_rng(0)
    null = [
        np.abs(np.bincount(bins, draws.uniform(size=len(y)) < confidence, num_bins) - total).sum() / len(y)
        for _ in range(num_null)
    ]
    with np.errstate(invalid="ignore"):
        means = total / count, hits / count
    low, high = np.quantile(null, [0.025, 0.975])
    ece = float(np.abs(hits - total).sum() / len(y))
    return Reliability(ece, float(np.mean(null)), float(low), float(high), *means, count)


def crps_gaussian_mixture(means: np.ndarray, sds: np.ndarray, observed: np.ndarray) -> np.ndarray:
    r"""CRPS of each datum for the equal mixture of Gaussians, one a draw, in closed form.

    .. math::

        \frac{1}{S}\sum_s A(y - \mu_s, \sigma_s^2) - \frac{1}{2 S^2}\sum_{s,t} A(\mu_s - \mu_t, \sigma_s^2 + \sigma_t^2), \qquad
        A(m, v) = 2\sqrt{v}\,\varphi\!\left(\tfrac{m}{\sqrt v}\right) + m\left[2\Phi\!\left(\tfrac{m}{\sqrt v}\right) - 1\right]

    Parameters
    ----------
    means, sds : array (S, N)
        Of each draw's law of each datum; the deviations above 0.
    observed : array (N,)

    Returns
    -------
    array (N,)

    Notes
    -----
    Exact for the mixture of these S laws, at :math:`O(S^2 N)`: thin to some hundred draws. It has no error of simulated
    observations, as `crps` from draws has. Where the mixture stands for the predictive law of a posterior, of which these
    are S independent draws, it is too large by about 1/S of the spread between them (pairs of a draw with itself are
    counted). ``S = 1`` is the CRPS of a Gaussian.

    References
    ----------
    Grimit, Gneiting, Berrocal and Johnson (2006), Quarterly Journal of the Royal Meteorological Society 132.

    Examples
    --------
    >>> float(crps_gaussian_mixture(np.zeros((1, 1)), np.ones((1, 1)), np.zeros(1))[0].round(6))  # (√2 - 1) / √π
    0.233695
    """
    means, sds, observed = check_gaussians(means, sds, observed)
    variances = sds**2
    first = _mean_distance(observed - means, variances).mean(0)
    second = np.mean(
        [_mean_distance(means - m, variances + v).mean(0) for m, v in zip(means, variances, strict=True)], axis=0
    )
    return first - second / 2


def gaussian_mixture_pit(means: np.ndarray, sds: np.ndarray, observed: np.ndarray) -> np.ndarray:
    r"""Probability integral transform of each datum under the equal mixture, :math:`\frac1S\sum_s \Phi((y - \mu_s)/\sigma_s)`."""
    from scipy.stats import norm

    means, sds, observed = check_gaussians(means, sds, observed)
    return norm.cdf((observed - means) / sds).mean(0)


def gaussian_mixture_log_density(means: np.ndarray, sds: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Log density of each datum under the equal mixture of one Gaussian a draw: (S, N), (S, N), (N,) to (N,)."""
    means, sds, observed = check_gaussians(means, sds, observed)
    log_density = -0.5 * ((observed - means) / sds) ** 2 - np.log(sds) - 0.5 * np.log(2 * np.pi)
    return np.logaddexp.reduce(log_density, axis=0) - np.log(len(means))


def rank_pit(draws: np.ndarray, observed: np.ndarray) -> np.ndarray:
    r"""Probability integral transform from draws (S, N), :math:`(r + 1/2)/(S + 1)` with :math:`r` the rank of the datum.

    Where the datum is a draw like the others, the rank is uniform on 0 to S. Ties count half.
    """
    below = np.mean(draws < observed, axis=0) + np.mean(draws == observed, axis=0) / 2
    size = len(draws)
    return (below * size + 0.5) / (size + 1)


def binomial_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of Clopper and Pearson (1934) for a share, from independent trials: it covers at least as often as it says.

    Examples
    --------
    >>> [round(end, 4) for end in binomial_interval(0, 10)]
    [0.0, 0.3085]
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = beta.ppf(tail, count, total - count + 1) if count > 0 else 0.0
    high = beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def check_classes(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities (N, C) as float and labels (N,) as int; raise where they are none."""
    p, y = np.asarray(probabilities, float), np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or len(p) == 0:
        raise ValueError(
            f"probabilities must be of shape (N, C) and labels of shape (N,); got {p.shape} and {y.shape}. Average "
            "probabilities over draws first."
        )
    if np.any(p < 0) or not np.allclose(p.sum(1), 1, atol=1e-3):
        sums = p.sum(1)
        raise ValueError(
            f"probabilities must be at least 0 and each row sum to 1; got rows with sums from {sums.min():.4g} to {sums.max():.4g}."
        )
    if not np.array_equal(y, y.astype(int)) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(
            f"labels must be whole numbers from 0 to {p.shape[1] - 1}; got values from {y.min()} to {y.max()}."
        )
    return p, y.astype(int)


def check_gaussians(
    means: np.ndarray, sds: np.ndarray, observed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means and deviations of shape (S, N) and observations (N,) as float; raise where they are none."""
    means, observed = np.asarray(means, float), np.asarray(observed, float)
    sds = np.broadcast_to(np.asarray(sds, float), means.shape) if np.ndim(sds) == 0 else np.asarray(sds, float)
    if means.ndim != 2 or sds.shape != means.shape or observed.shape != means.shape[1:]:
        raise ValueError(
            "means and sds must be of shape (S, N), one row a draw, and observed of shape (N,); got "
            f"{means.shape}, {sds.shape} and {observed.shape}."
        )
    if not np.all(sds > 0):
        raise ValueError(f"sds must be above 0; got {sds.min():.4g}.")
    return means, sds, observed


def _mean_distance(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mean of the absolute value of a Gaussian."""
    from scipy.stats import norm

    sd = np.sqrt(variance)
    return 2 * sd * norm.pdf(mean / sd) + mean * (2 * norm.cdf(mean / sd) - 1)
