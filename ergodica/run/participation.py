r"""Shares of steps that clients make, where their rates of taking part are not known.

A gradient at client :math:`s` is divided by :math:`f_s`, its share of the steps. If clients come and go, :math:`f_s` has to be
estimated, and it is :math:`1/f_s` that enters: :math:`E[1/\hat f_s] \ne 1/f_s` for a frequency :math:`\hat f_s`, the more so the
rarer the client. The mean number of steps between the starts of two successive visits is :math:`\tau_s / f_s`, so an
average of such intervals, over :math:`\tau_s`, estimates :math:`1/f_s` without bias for any fixed number of them.
"""

from typing import Any, NamedTuple

import numpy as np

from ergodica.core import check


class Intervals(NamedTuple):
    """What has been seen of who takes part.

    Attributes
    ----------
    total : float array (S,)
        Steps in completed intervals between visits at each client, over all chains.
    count : float array (S,)
        How many of these there are.
    last : int array (C, S)
        At which step of each chain its last visit at each client began; -1 where there was none.
    """

    total: np.ndarray
    count: np.ndarray
    last: np.ndarray


def no_intervals(num_chains: int, num_clients: int) -> Intervals:
    """Start with nothing seen."""
    return Intervals(np.zeros(num_clients), np.zeros(num_clients), np.full((num_chains, num_clients), -1, np.int64))


def observe(seen: Intervals, chain: int, client: int, first_step: int) -> Intervals:
    """Add a visit that began at a step of a chain; visits of a chain are added in their order."""
    total, count, last = (x.copy() for x in seen)
    if last[chain, client] >= 0:
        total[client] += first_step - last[chain, client]
        count[client] += 1
    last[chain, client] = first_step
    return Intervals(total, count, last)


def shares(seen: Intervals, local_steps: Any, prior: Any, weight: float = 1.0) -> np.ndarray:
    r"""Estimate the share of steps that is made at each client.

    .. math:: \frac{1}{\hat f_s} = \frac{1}{\tau_s}\,
        \frac{w\, \tau_s / f^0_s + \sum_{k=1}^{n_s} I_{s,k}}{w + n_s}

    with :math:`I_{s,k}` the steps between the starts of two successive visits of a chain at client :math:`s`.

    Parameters
    ----------
    seen : Intervals
    local_steps : int or int array (S,)
        :math:`\tau_s`.
    prior : array (S,)
        :math:`f^0_s`, assumed until something is known.
    weight : float
        :math:`w`, how many intervals the assumption is worth.

    Returns
    -------
    array (S,)
        They need not have the sum 1, and are not scaled to it: that would bring the bias of a ratio back.

    Notes
    -----
    Intervals of independent visits with probability :math:`p_s` are geometric with mean :math:`1/p_s`, in visits, so that with
    ``weight=0`` the estimate of :math:`1/f_s` from :math:`n` of them has mean :math:`1/f_s` and relative standard deviation
    :math:`\sqrt{(1 - p_s)/n}`. A client that has stopped taking part keeps its last estimate: no visit needs it then. The estimate
    is right for rates that do not depend on where the chain is, and that do not change; while it still moves, the chain is not
    homogeneous in time, so let it rest after the warm-up.

    References
    ----------
    Wang and Ji (2024), *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*, section 4,
    without its cut-off of long intervals, which bounds the weights at the price of a bias.

    Examples
    --------
    >>> seen = no_intervals(1, 2)
    >>> for first, client in [(0, 0), (10, 1), (20, 0), (30, 0), (40, 1)]:
    ...     seen = observe(seen, 0, client, first)
    >>> shares(seen, 10, [0.5, 0.5], weight=0).round(3).tolist()
    [0.667, 0.333]
    """
    weight = float(check.positive("weight", weight, allow_zero=True))
    prior = np.asarray(prior, np.float64)
    steps = np.broadcast_to(np.asarray(local_steps, np.float64), prior.shape)
    known = seen.count + weight
    mean = np.divide(weight * steps / prior + seen.total, known, out=steps / prior, where=known > 0)
    return steps / mean
