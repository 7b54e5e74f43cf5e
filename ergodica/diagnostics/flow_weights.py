r"""What importance weights between a flow and its target estimate, and how far each draw moves the estimate.

Log weights are :math:`\ell = \log \tilde p(x) - \log q(x)`, with :math:`q` the flow and :math:`\tilde p = Z p` the target. Each
estimate comes with its *influences*: what a draw adds to it, to first order, times the number of draws. The variance of an estimate
is the variance of the mean of its influences. Functions take NumPy and JAX arrays alike.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BISECTIONS = 60


class Estimated(NamedTuple):
    """An estimate and its influences.

    Attributes
    ----------
    value : scalar
    flow : array (n,) or 0
        Influences of the flow's draws.
    target : array (m,) or 0
        Influences of the target's draws.
    """

    value: Any
    flow: Any = 0.0
    target: Any = 0.0


def importance_log_z(log_weights: Any) -> Estimated:
    r""":math:`\log \hat Z = \log \frac1n \sum_i w_i` over draws of the flow."""
    xp = _namespace(log_weights)
    largest, w = _scaled(xp, log_weights)
    mean = xp.mean(w)
    return Estimated(largest + xp.log(mean), flow=w / mean - 1)


def reverse_ess(log_weights: Any) -> Estimated:
    r"""Effective sample size of the flow's draws, a fraction: :math:`(\frac1n\sum w_i)^2 / \frac1n\sum w_i^2`."""
    xp = _namespace(log_weights)
    _, w = _scaled(xp, log_weights)
    mean, square = xp.mean(w), xp.mean(w**2)
    value = mean**2 / square
    return Estimated(value, flow=value * (2 * (w / mean - 1) - (w**2 / square - 1)))


def forward_ess(log_weights: Any) -> Estimated:
    r"""The same number from draws of the target: :math:`1 / (\frac1m\sum w_j \cdot \frac1m\sum 1/w_j)`.

    References
    ----------
    Nicoli et al. (2023).
    """
    xp = _namespace(log_weights)
    largest, w = _scaled(xp, log_weights)
    inverse, v = _scaled(xp, -log_weights)
    value = xp.exp(-largest - inverse) / (xp.mean(w) * xp.mean(v))
    return Estimated(value, target=-value * (w / xp.mean(w) + v / xp.mean(v) - 2))


def acceptance_of_pairs(of_flow: Any, of_target: Any) -> Estimated:
    r"""Acceptance rate of independence Metropolis: :math:`\frac{1}{mn}\sum_{ji} \min(1, w(y_i) / w(x_j))` over all pairs.

    Parameters
    ----------
    of_flow, of_target : array (n,), (m,)
        Log weights of the flow's draws :math:`y_i` and the target's :math:`x_j`.
    """
    xp = _namespace(of_flow)
    at_target, at_flow = mean_minimum(of_target, of_flow), mean_minimum(-of_flow, -of_target)
    value = xp.mean(at_target)
    return Estimated(value, at_flow - value, at_target - value)


def acceptance_of_flow(log_weights: Any) -> Estimated:
    r"""The same from draws of the flow alone, as target draws by their weights.

    .. math:: \frac{\frac{1}{n(n-1)} \sum_{i \ne j} \min(w_i, w_j)}{\frac1n \sum_i w_i}

    That is one minus the Gini coefficient of the weights.
    """
    xp, n = _namespace(log_weights), log_weights.shape[0]
    _, w = _scaled(xp, log_weights)
    relative = w / xp.mean(w)
    parts = relative * (n * mean_minimum(log_weights, log_weights) - 1) / (n - 1)
    value = xp.mean(parts)
    return Estimated(value, flow=2 * (parts - value) - value * (relative - 1))


def mean_minimum(own: Any, other: Any) -> Any:
    r""":math:`\frac1n \sum_i \min(1, e^{b_i - a_j})` for each :math:`a_j` of ``own``, over ``other`` (n,).

    Notes
    -----
    Cost: two sorts; no pair is looked at.
    """
    xp, n = _namespace(own), other.shape[0]
    ordered = xp.sort(other)
    sums = np.logaddexp.accumulate(ordered) if xp is np else jax.lax.cumlogsumexp(ordered)
    smaller = xp.searchsorted(ordered, own)
    some = smaller > 0
    below = xp.exp(xp.where(some, sums[xp.maximum(smaller - 1, 0)], -xp.inf) - xp.where(some, own, 0))
    return (below + (n - smaller).astype(own.dtype)) / n


def bridge_log_z(of_flow: Any, of_target: Any, num_effective: float | None = None) -> Estimated:
    r"""Logarithm of the target's normalising constant by the optimal bridge between the flow's and the target's draws.

    .. math:: \hat Z = \frac{\frac1n \sum_i \tilde p(y_i) h(y_i)}{\frac1m \sum_j q(x_j) h(x_j)}, \qquad
              h = \frac{1}{s_p\, \tilde p / \hat Z + s_q\, q}

    the fixed point of Meng and Wong's iteration, which is the root of a monotone function of :math:`\log \hat Z` (Bennett's
    acceptance ratio) and lies between the least and the largest log weight; it is found by bisection.

    Parameters
    ----------
    of_flow, of_target : array (n,), (m,)
        Log weights of the flow's draws :math:`y_i` and the target's :math:`x_j`.
    num_effective : float, optional
        Independent draws that the target's are worth, for :math:`s_p : s_q`; their number unless given. It changes the
        variance and not what is estimated.

    References
    ----------
    Meng and Wong (1996), equation 4.1; Bennett (1976).
    """
    xp = _namespace(of_flow)
    odds = (of_target.shape[0] if num_effective is None else num_effective) / of_flow.shape[0]
    shift, share = math.log(odds), odds / (1 + odds)

    def halves(log_z: Any) -> tuple[Any, Any]:
        point = log_z - shift
        return (1 - share) * _sigmoid(xp, of_flow - point), share * _sigmoid(xp, point - of_target)

    def bisect(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends
        middle = (low + high) / 2
        from_flow, from_target = halves(middle)
        above = xp.mean(from_target) > xp.mean(from_flow)
        return xp.where(above, low, middle), xp.where(above, middle, high)

    low, high = _repeat(xp, bisect, _bracket(xp, of_flow, of_target))
    value = (low + high) / 2
    u, v = halves(value)
    slope = xp.mean(u * (1 - u / (1 - share))) + xp.mean(v * (1 - v / share))
    return Estimated(value, (u - xp.mean(u)) / slope, -(v - xp.mean(v)) / slope)


def reverse_kl(log_weights: Any, log_z: Estimated) -> Estimated:
    r""":math:`\mathrm{KL}(q\|p) = \log Z - \mathrm{E}_q \ell`, from draws of the flow."""
    xp = _namespace(log_weights)
    mean = xp.mean(log_weights)
    return Estimated(log_z.value - mean, log_z.flow - (log_weights - mean), log_z.target)


def forward_kl(log_weights: Any, log_z: Estimated) -> Estimated:
    r""":math:`\mathrm{KL}(p\|q) = \mathrm{E}_p \ell - \log Z`, from draws of the target."""
    xp = _namespace(log_weights)
    mean = xp.mean(log_weights)
    return Estimated(mean - log_z.value, -log_z.flow, (log_weights - mean) - log_z.target)


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _scaled(xp: Any, log_weights: Any) -> tuple[Any, Any]:
    """The largest log weight, and weights as fractions of the largest."""
    largest = xp.max(log_weights)
    return largest, xp.exp(log_weights - largest)


def _sigmoid(xp: Any, x: Any) -> Any:
    """To full relative precision at either end."""
    return xp.exp(-xp.logaddexp(0.0, -x))


def _bracket(xp: Any, of_flow: Any, of_target: Any) -> tuple[Any, Any]:
    """Ends between which the root lies; draws of the flow where the target has no density lower the lower one."""
    inside = of_flow > -xp.inf
    least = xp.minimum(xp.min(xp.where(inside, of_flow, xp.inf)), xp.min(of_target))
    return least + xp.log(xp.mean(inside.astype(of_flow.dtype))), xp.maximum(xp.max(of_flow), xp.max(of_target))


def _repeat(xp: Any, body: Callable, ends: tuple[Any, Any]) -> tuple[Any, Any]:
    if xp is not np:
        return jax.lax.fori_loop(0, _BISECTIONS, body, ends)
    for i in range(_BISECTIONS):
        ends = body(i, ends)
    return ends
