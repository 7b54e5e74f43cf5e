"""How many samples to give to each datum, question or site, so that the variance of the whole is least."""

import heapq
from typing import Any

import numpy as np

from ergodica.core import check


def optimal_allocation(deviations: Any, total: int) -> np.ndarray:
    r"""Numbers of samples that minimise the variance of a sum of means, exactly and in integers (Neyman allocation).

    .. math:: \min_n \sum_i \frac{s_i^2}{n_i} \quad\text{subject to}\quad \sum_i n_i = N,\; n_i \ge 1 \text{ where } s_i > 0,

    which without the integers is :math:`n_i = N s_i/\sum_j s_j`.

    Parameters
    ----------
    deviations : array (m,)
        Standard deviation :math:`s_i` of one sample of each part, in any common unit; 0 for parts that need none.
    total : int
        N, at least the number of parts with a positive deviation.

    Returns
    -------
    numpy array of int (m,)
        With the sum ``total``.

    Raises
    ------
    ValueError
        For deviations that are negative, not finite or all 0, and totals that do not go round.

    Notes
    -----
    Samples are given one at a time where they reduce the variance most, by :math:`s_i^2/(n_i (n_i + 1))`, which is optimal since
    the terms are convex. The deviations must come from other samples than those that are then averaged: from a pilot, or from the
    steps before.

    Cost: ``total`` operations on a heap, on the host.

    References
    ----------
    Neyman (1934).

    Examples
    --------
    >>> optimal_allocation([1.0, 3.0, 0.0], 8).tolist()
    [2, 6, 0]
    """
    s = np.asarray(deviations, np.float64)
    if s.ndim != 1 or not np.all(np.isfinite(s)) or np.any(s < 0) or not np.any(s > 0):
        raise ValueError(
            "deviations must be one finite value of at least 0 for each part, some of them above 0; got "
            f"shape {s.shape} with values {s.ravel()[:4]}."
        )
    used = np.flatnonzero(s > 0)
    check.integer("total", total, least=len(used), hint=f"{len(used)} parts need at least one sample each.")
    numbers = (s > 0).astype(int)
    heap = [(-(s[i] ** 2) / 2, int(i)) for i in used]
    heapq.heapify(heap)
    for _ in range(total - len(used)):
        _, i = heap[0]
        numbers[i] += 1
        heapq.heapreplace(heap, (-(s[i] ** 2) / (numbers[i] * (numbers[i] + 1)), i))
    return numbers


def gradient_variance_allocation(
    gradient_norms: Any, acceptance_rates: Any, total: int, *, alpha: float = 1e-3, beta: float = 2.0
) -> np.ndarray:
    r"""Numbers of rejection samples a question that minimise the variance of the gradient (GVM; Yao et al. 2025).

    .. math:: s_i = \frac{G_i}{\sqrt{p_i + \alpha/p_i^{\beta - 1}}}

    as the deviations of `optimal_allocation`. With :math:`\alpha = 0` that is the variance :math:`G_i^2/p_i` of the mean of the
    accepted samples' gradients; :math:`\alpha > 0` takes samples away from questions that hardly ever succeed.

    Parameters
    ----------
    gradient_norms : array (m,)
        :math:`G_i`, the norm of the gradient of an accepted sample.
    acceptance_rates : array (m,)
        :math:`p_i`, from a pilot. Questions with 0 get nothing: nothing is known of them, and the pilot must be longer to
        tell.
    total : int
    alpha, beta : float

    Returns
    -------
    numpy array of int (m,)

    Examples
    --------
    >>> gradient_variance_allocation([1.0, 1.0, 1.0], [1.0, 0.25, 0.0], 30, alpha=0.0).tolist()
    [10, 20, 0]
    """
    norms, rates = np.asarray(gradient_norms, np.float64), np.asarray(acceptance_rates, np.float64)
    if norms.shape != rates.shape:
        raise ValueError(f"acceptance_rates must have the shape {norms.shape} of gradient_norms; got {rates.shape}.")
    if np.any(rates < 0) or np.any(rates > 1) or not np.all(np.isfinite(rates)):
        raise ValueError(f"acceptance_rates must be between 0 and 1; got {rates.ravel()[:4]}.")
    check.positive("alpha", alpha, allow_zero=True)
    check.positive("beta", beta)
    p = np.where(rates > 0, rates, 1.0)
    return optimal_allocation(np.where(rates > 0, norms / np.sqrt(p + alpha / p ** (beta - 1)), 0.0), total)
