r"""Monotone rational-quadratic splines on an interval, with identity outside.

Between knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})` with slopes :math:`d_k, d_{k+1}`, let :math:`w, h` be the bin's
width and height, :math:`s = h/w` and :math:`\xi = (x - x_k)/w`. Then (Durkan, Bekasov, Murray and Papamakarios, 2019)

.. math::
    f &= y_k + \frac{h\,(s\xi^2 + d_k\xi(1-\xi))}{q}, \qquad q = s + (d_k + d_{k+1} - 2s)\,\xi(1-\xi) \\
    f' &= \frac{s^2 r}{q^2}, \qquad r = d_{k+1}\xi^2 + 2s\xi(1-\xi) + d_k(1-\xi)^2

Tables of raw parameters have shape (3K - 1, n), for n points at once, each with its own spline of K bins: K rows for
widths, K for heights (softmax of each), K - 1 for the slopes at inner knots (softplus). Zeros give the identity. The bin of a
point is found by K - 1 comparisons, and what belongs to it is taken by masked sums: no gather, no search, and derivatives that
are masked sums too.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check

SMALLEST = 1e-3
"""Smallest width and height of a bin, as a fraction of the box, and smallest slope at a knot."""
_AT_ONE = math.log(math.expm1(1 - SMALLEST))


def check_bins(num_bins: int) -> int:
    """Return a number of bins; raise unless it lies between 2 and 500."""
    return check.integer("num_bins", num_bins, least=2, most=500, hint="One bin is a line: take an affine layer.")


def num_parameters(num_bins: int) -> int:
    """Rows of a table of raw parameters: 3K - 1."""
    return 3 * num_bins - 1


def spline(x: Array, table: Array, bound: float) -> tuple[Array, Array, Array]:
    r"""Splines at points.

    Parameters
    ----------
    x : array (n,)
    table : array (3K - 1, n)
        Raw parameters.
    bound : float
        The box is :math:`[-\text{bound}, \text{bound}]`.

    Returns
    -------
    y, log_slope, bend : arrays (n,)
        :math:`f(x)`, :math:`\ell = \log f'(x)` and :math:`\partial_x \ell`.
    """
    widths, heights, slopes = _shares(table)
    inside = jnp.abs(x) < bound
    unit = _to_unit(x, bound, inside)
    beyond, here = _bins(unit, widths)
    start, width = _pick(widths, beyond, here)
    base, height = _pick(heights, beyond, here)
    left, right = _slopes(slopes, here)
    ratio = height / width
    xi = (unit - start) / width
    rest = 1 - xi
    mixed = xi * rest
    excess = left + right - 2 * ratio
    below = ratio + excess * mixed
    above = right * xi**2 + 2 * ratio * mixed + left * rest**2
    y = base + height * (ratio * xi**2 + left * mixed) / below
    log_slope = jnp.log(ratio**2 * above / below**2)
    d_above = 2 * (right * xi + ratio * (rest - xi) - left * rest)
    bend = (d_above / above - 2 * excess * (rest - xi) / below) / (2 * bound * width)
    zero = jnp.zeros_like(x)
    return (
        jnp.where(inside, bound * (2 * y - 1), x),
        jnp.where(inside, log_slope, zero),
        jnp.where(inside, bend, zero),
    )


def spline_inverse(y: Array, table: Array, bound: float) -> tuple[Array, Array]:
    r"""The points where splines take given values, and the log slopes there.

    The root of :math:`a\xi^2 + b\xi + c` in [0, 1] as :math:`2c/(-b - \sqrt{b^2 - 4ac})`, with :math:`\eta = y - y_k`,
    :math:`a = h(s - d_k) + \eta e`, :math:`b = h d_k - \eta e`, :math:`c = -s\eta` and :math:`e = d_k + d_{k+1} - 2s`.

    Parameters
    ----------
    y : array (n,)
    table : array (3K - 1, n)
        Raw parameters.
    bound : float
        The box is :math:`[-\text{bound}, \text{bound}]`.

    Returns
    -------
    x, log_slope : arrays (n,)
        With :math:`f(x) = y`, and :math:`\log f'(x)`.
    """
    widths, heights, slopes = _shares(table)
    inside = jnp.abs(y) < bound
    unit = _to_unit(y, bound, inside)
    beyond, here = _bins(unit, heights)
    start, width = _pick(widths, beyond, here)
    base, height = _pick(heights, beyond, here)
    left, right = _slopes(slopes, here)
    ratio = height / width
    excess = left + right - 2 * ratio
    gain = unit - base
    a = height * (ratio - left) + gain * excess
    b = height * left - gain * excess
    c = -ratio * gain
    # at the ends of a bin rounding can take the discriminant below zero
    square = jnp.maximum(b**2 - 4 * a * c, jnp.finfo(y.dtype).tiny)
    xi = jnp.clip(2 * c / (-b - jnp.sqrt(square)), 0, 1)
    rest = 1 - xi
    below = ratio + excess * xi * rest
    above = right * xi**2 + 2 * ratio * xi * rest + left * rest**2
    x = bound * (2 * (start + width * xi) - 1)
    log_slope = jnp.log(ratio**2 * above / below**2)
    return jnp.where(inside, x, y), jnp.where(inside, log_slope, jnp.zeros_like(y))


def _to_unit(x: Array, bound: float, inside: Array) -> Array:
    return jnp.where(inside, (x / bound + 1) / 2, jnp.full_like(x, 0.5))


def _shares(table: Array) -> tuple[Array, Array, Array]:
    """Widths and heights (K, n) that sum to 1, and raw slopes (K - 1, n)."""
    num_bins = (table.shape[0] + 1) // 3
    widths, heights = table[:num_bins], table[num_bins : 2 * num_bins]
    free = 1 - SMALLEST * num_bins
    share = [SMALLEST + free * jax.nn.softmax(raw, axis=0) for raw in (widths, heights)]
    return share[0], share[1], table[2 * num_bins :]


def _bins(unit: Array, shares: Array) -> tuple[Array, Array]:
    """Masks (K - 1, n): whether the point lies beyond inner knot k, and (K, n): whether in bin k. They carry no derivative."""
    shares = jax.lax.stop_gradient(shares)
    knots = [shares[0]]
    for share in shares[1:-1]:
        knots.append(knots[-1] + share)
    beyond = jax.lax.stop_gradient(unit)[None] >= jnp.stack(knots)
    edge = jnp.ones_like(beyond[:1])
    here = jnp.concatenate([edge, beyond]) & ~jnp.concatenate([beyond, ~edge])
    return beyond, here


def _pick(shares: Array, beyond: Array, here: Array) -> tuple[Array, Array]:
    """Where the point's bin starts, and its size."""
    zeros = jnp.zeros_like(shares)
    return jnp.sum(jnp.where(beyond, shares[:-1], zeros[:-1]), axis=0), jnp.sum(jnp.where(here, shares, zeros), axis=0)


def _slopes(raw: Array, here: Array) -> tuple[Array, Array]:
    """Slopes at both ends of the point's bin: 1 at the ends of the box."""
    zeros = jnp.zeros_like(raw)
    left = jnp.sum(jnp.where(here[1:], raw, zeros), axis=0)
    right = jnp.sum(jnp.where(here[:-1], raw, zeros), axis=0)
    return _slope(left), _slope(right)


def _slope(raw: Array) -> Array:
    return SMALLEST + jax.nn.softplus(raw + _AT_ONE)
