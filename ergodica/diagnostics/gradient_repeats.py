"""How many repeats a comparison needs, from a pilot."""

from typing import Any, NamedTuple

import numpy as np

from ergodica.diagnostics.gradient_bias import MOST_JOINT, POWER, Errors
from ergodica.diagnostics.gradient_statistics import RELATIVE_ERROR, Spread

PILOT = 1000
"""Repeats of the pilot, and of each lot after it."""


class Needs(NamedTuple):
    """Repeats that it takes to find a bias of the given size, to exclude one that matters, and to know the variance."""

    detect: float
    exclude: float
    variance: float

    @property
    def largest(self) -> float:
        """All three."""
        return max(self)


def repeats_needed(errors: Errors, spread: Spread, gradient: np.ndarray, level: float, bias_tolerance: float) -> Needs:
    r"""Estimate how many repeats are needed, given the variances, the skewness and the kurtosis in a pilot.

    With a critical value q and :math:`\kappa = q + 1.645` (a power of 95%):

    - a bias of half of ``bias_tolerance`` times the norm of the gradient g is found, whatever its direction, with
      :math:`R = \kappa^2\, \mathrm{tr} \Sigma / (\tfrac12 \tau |g|)^2` by some coordinate, or by the joint test with the
      noncentrality of its power over the largest eigenvalue of :math:`\Sigma`;
    - one of ``bias_tolerance`` times the largest entry is excluded with :math:`\kappa^2 \max \Sigma_{dd} / (\tau \max |g_d|)^2`;
    - so that the correction for skewness :math:`\gamma` leaves power on both sides, :math:`(2 \gamma q)^2`;
    - the variance is known to 10% with :math:`(\kappa_4 - 1) / 0.1^2`.

    Noise that is mere rounding needs nothing.

    The bias seen in the pilot is not used: looking at it would bend the error rates.
    """
    from scipy.stats import norm

    if errors.rows is None or spread.variance <= np.sum(errors.rounding**2):
        return Needs(0.0, 0.0, 0.0)
    variance_needs = max(spread.kurtosis - 1, 0.0) / RELATIVE_ERROR**2
    variances, quantile = errors.rows.var(axis=0, ddof=1), float(norm.isf(level / 2))
    kappa = quantile + float(norm.ppf(POWER))
    length, largest = np.linalg.norm(gradient), np.max(np.abs(gradient))
    if length == 0:
        return Needs(np.inf, np.inf, variance_needs)
    detect = kappa**2 * variances.sum() / (bias_tolerance / 2 * length) ** 2
    if 1 < len(variances) <= MOST_JOINT:
        greatest = np.linalg.eigvalsh(np.cov(errors.rows, rowvar=False))[-1]
        detect = min(detect, _noncentrality(level, len(variances)) * greatest / (bias_tolerance / 2 * length) ** 2)
    centred = np.where(
        variances > 0, (errors.rows**3).mean(axis=0) / np.where(variances > 0, variances, 1.0) ** 1.5, 0.0
    )
    skewed = (2 * quantile * np.max(np.abs(centred))) ** 2
    exclude = kappa**2 * variances.max() / (bias_tolerance * largest) ** 2
    return Needs(float(max(detect, skewed)), float(exclude), variance_needs)


def _noncentrality(level: float, dimensions: int) -> float:
    """Of a chi-squared that exceeds the critical value with the power."""
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    critical = chi2.isf(level, dimensions)
    root: Any = brentq(lambda c: ncx2.sf(critical, dimensions, c) - POWER, 1e-6, 4 * critical + 100)
    return float(root)


def in_lots(needed: float, most: int) -> int:
    """Repeats to take: whole lots of the pilot's size, no more than ``most``."""
    wanted = PILOT * np.ceil(min(needed, 1e15) / PILOT)
    return int(min(max(wanted, PILOT), most))
