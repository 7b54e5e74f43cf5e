r"""Monotone maps of one number, or of one angle, whose inverse is found by iteration.

Mixtures of simple increasing maps are increasing, smooth and rich, but have no inverse in closed form. The root is bracketed by
closed forms, found by Newton steps kept inside the bracket, and differentiated by the implicit function theorem.
"""

import abc
import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import PyTree
from ergodica.models.lattice import wrap

type Monotone = Callable[[Array, PyTree], tuple[Array, Array]]
"""From numbers and their parameters to values and the logs of the slopes."""

MAX_STEPS = 200


def tolerance(dtype: jnp.dtype) -> float:
    """Size of a step, relative to ``1 + |x|``, at which a root counts as found: 1e-13 in double precision."""
    return 1e-13 if jnp.finfo(dtype).bits >= 64 else 8 * float(jnp.finfo(dtype).eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def invert(function: Monotone, y: Array, parameters: PyTree, low: Array, high: Array) -> Array:
    r"""Solve f(x) = y for increasing f, elementwise, by Newton's method kept inside a bracket.

    .. math:: x' = x - \frac{f(x) - y}{f'(x)}, \qquad
              \text{or the middle of the bracket where that leaves it or is more than half of the step before}

    Derivatives are those of the root, :math:`\mathrm{d}x = (\mathrm{d}y - \partial_\phi f\, \mathrm{d}\phi) / f'`, to any
    order.

    Parameters
    ----------
    function : callable
        ``function(x, parameters) -> (value, log_slope)``, elementwise; hashable, without arrays of its own.
    y : array
        Values to reach.
    parameters : pytree of arrays
    low, high : array
        Like ``y``; the root is between them.

    Returns
    -------
    array
        The roots, to a last step of 1e-13 (1e-6 in single precision) relative to ``1 + |x|``, or to where f(x) - y is rounding. NaN
        where an input is, or where neither is reached in 200 steps (bisection alone needs about 60).

    Notes
    -----
    Cost: about six evaluations of ``function`` where it is mild, on as many as the worst element of the batch needs. Rounding
    in ``f`` limits the root to about ``eps / f'``, whatever the method.

    References
    ----------
    Press, Teukolsky, Vetterling and Flannery (2007), Numerical Recipes, section 9.4.
    """
    eps, goal = float(jnp.finfo(y.dtype).eps), tolerance(y.dtype)

    def body(state: tuple) -> tuple:
        x, low, high, last, done, count = state
        value, log_slope = function(x, parameters)
        residual = value - y
        low, high = jnp.where(residual < 0, x, low), jnp.where(residual > 0, x, high)
        newton = x - residual * jnp.exp(-log_slope)
        good = (newton > low) & (newton < high) & (jnp.abs(newton - x) <= 0.5 * last)
        new = jnp.where(good, newton, low + 0.5 * (high - low))
        step = jnp.abs(new - x)
        rounding = jnp.abs(residual) <= 2 * eps * (1 + jnp.abs(y))
        x, last = jnp.where(done | rounding, x, new), jnp.where(done, last, step)
        return x, low, high, last, done | rounding | (step <= goal * (1 + jnp.abs(x))), count + 1

    def unfinished(state: tuple) -> Array:
        *_, done, count = state
        return (count < MAX_STEPS) & ~jnp.all(done)

    start = low + 0.5 * (high - low)
    state = (start, low, high, high - low, jnp.isnan(y), jnp.zeros((), jnp.int32))
    x, *_, done, _ = jax.lax.while_loop(unfinished, body, state)
    return jnp.where(done & ~jnp.isnan(function(x, parameters)[0] - y), x, jnp.nan)


@invert.defjvp
def _invert_jvp(function: Monotone, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y, parameters, low, high = primals
    x = invert(function, y, parameters, low, high)
    _, shift = jax.jvp(lambda p: function(x, p)[0], (parameters,), (tangents[1],))
    return x, (tangents[0] - shift) * jnp.exp(-function(x, parameters)[1])


def tan_mixture(x: Array, parameters: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    r"""Mixture of projected affine maps of the tangent of half an angle.

    .. math:: f(x) = \sum_k w_k\, 2 \arctan\!\left(\alpha_k \tan\frac{x}{2} + \beta_k\right), \qquad
              f'(x) = \sum_k \frac{w_k \alpha_k}{c^2 + (\alpha_k s + \beta_k c)^2}, \quad
              s = \sin\frac{x}{2},\; c = \cos\frac{x}{2}

    Each component takes the circle to itself once around and leaves :math:`\pm\pi` where it is, with the same slope on both
    sides.

    Parameters
    ----------
    x : array (...)
        Angles in [-pi, pi].
    parameters : tuple of arrays (K, ...)
        :math:`\log w` (normalised), :math:`\log \alpha`, :math:`\beta`.

    Returns
    -------
    value, log_slope : array (...)

    References
    ----------
    Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan and Cranmer (2020); Kanwar et al. (2020).
    """
    log_weight, log_alpha, beta = parameters
    s, c = jnp.sin(0.5 * x)[None], jnp.cos(0.5 * x)[None]
    u = jnp.exp(log_alpha) * s + beta * c
    value = 2 * jnp.sum(jnp.exp(log_weight) * jnp.arctan2(u, jnp.broadcast_to(c, u.shape)), axis=0)
    return value, jnp.log(jnp.sum(jnp.exp(log_weight + log_alpha) / (c**2 + u**2), axis=0))


def logistic_mixture(x: Array, parameters: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    r"""Log odds of the distribution function of a mixture of logistic laws.

    .. math:: f(x) = \mathrm{logit} \sum_k w_k\, \sigma(z_k), \qquad z_k = \frac{x - \mu_k}{s_k}

    It is onto the line, and :math:`f(x)` lies between the smallest and the largest :math:`z_k`.

    Parameters
    ----------
    x : array (...)
    parameters : tuple of arrays (K, ...)
        :math:`\log w` (normalised), :math:`\log s`, :math:`\mu`.

    Returns
    -------
    value, log_slope : array (...)

    References
    ----------
    Ho, Chen, Srinivas, Duan and Abbeel (2019).
    """
    log_weight, log_scale, mean = parameters
    z = (x[None] - mean) * jnp.exp(-log_scale)
    below, above = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    log_below = jax.nn.logsumexp(log_weight + below, axis=0)
    log_above = jax.nn.logsumexp(log_weight + above, axis=0)
    log_density = jax.nn.logsumexp(log_weight + below + above - log_scale, axis=0)
    return log_below - log_above, log_density - log_below - log_above


class AbstractMonotoneMap(eqx.Module):
    """A family of increasing maps of one number. Its parameters are an argument, so that a network can give them."""

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """P, the numbers that describe one map."""

    @abc.abstractmethod
    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        """From ``x`` (...) and unconstrained parameters (P, ...) to ``y`` (...) and the log of the slope dy/dx."""

    @abc.abstractmethod
    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        """From ``y`` to ``x`` by root finding, and the log of the slope dy/dx there."""


class CircularMixture(AbstractMonotoneMap):
    r"""A mixture of projected affine maps and a turn: a smooth map of the circle to itself.

    .. math:: y = t + \sum_k w_k\, 2 \arctan\!\left(\alpha_k \tan\frac{x}{2} + \beta_k\right) \mod 2\pi

    Parameters
    ----------
    num_components : int
        K. The map has 3K + 1 parameters: logits of ``w``, ``log(alpha)``, ``beta`` (beside fixed offsets between -1/2 and 1/2,
        which let components part in training) and ``t``.

    Notes
    -----
    Cost: K arcus tangents an element; the inverse takes root finding (see `invert`).

    References
    ----------
    Rezende et al. (2020); Kanwar et al. (2020), whose components have equal weights and ``beta`` 0.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> y, log_slope = CircularMixture(1).forward(jnp.array([0.0, 3.0]), jnp.zeros((4, 2)))
    >>> [round(float(v), 4) for v in y]
    [0.0, 3.0]
    """

    num_components: int = eqx.field(static=True)

    def __init__(self, num_components: int = 6) -> None:
        self.num_components = check.integer("num_components", num_components)

    @property
    def num_params(self) -> int:
        """3K + 1."""
        return 3 * self.num_components + 1

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        """From angles to angles in [-pi, pi) and the logs of the slopes."""
        mixture, shift = _mixture(params, self.num_components, 0.5)
        y, log_slope = tan_mixture(wrap(x), mixture)
        return wrap(y + shift[0]), log_slope

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        """Back, by root finding between -pi and pi."""
        mixture, shift = _mixture(params, self.num_components, 0.5)
        end = jnp.full_like(y, math.pi)
        x = invert(tan_mixture, wrap(y - shift[0]), mixture, -end, end)
        return wrap(x), tan_mixture(x, mixture)[1]


class LogisticMixture(AbstractMonotoneMap):
    r"""An affine map after the log odds of a mixture of logistic laws, on the line.

    .. math:: y = e^a\, \mathrm{logit} \sum_k w_k\, \sigma\!\left(\frac{x - \mu_k}{s_k}\right) + b

    Parameters
    ----------
    num_components : int
        K. The map has 3K + 2 parameters: logits of ``w``, ``log(s)``, ``mu`` (beside fixed offsets between -1 and 1, which let
        components part in training), ``a`` and ``b``.

    Notes
    -----
    Cost: 2K logistic functions an element; the inverse takes root finding (see `invert`). Tails are affine.

    References
    ----------
    Ho, Chen, Srinivas, Duan and Abbeel (2019), Flow++.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> y, log_slope = LogisticMixture(1).forward(jnp.array([0.0, 3.0]), jnp.zeros((5, 2)))
    >>> [round(float(v), 4) for v in y]
    [0.0, 3.0]
    """

    num_components: int = eqx.field(static=True)

    def __init__(self, num_components: int = 6) -> None:
        self.num_components = check.integer("num_components", num_components)

    @property
    def num_params(self) -> int:
        """3K + 2."""
        return 3 * self.num_components + 2

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        """From numbers to numbers and the logs of the slopes."""
        mixture, (log_gain, offset) = _mixture(params, self.num_components, 1.0)
        y, log_slope = logistic_mixture(x, mixture)
        return y * jnp.exp(log_gain) + offset, log_slope + log_gain

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        """Back, by root finding between the smallest and the largest of the components' own inverses."""
        mixture, (log_gain, offset) = _mixture(params, self.num_components, 1.0)
        u = (y - offset) * jnp.exp(-log_gain)
        _, log_scale, mean = mixture
        ends = mean + jnp.exp(log_scale) * u[None]
        x = invert(logistic_mixture, u, mixture, jnp.min(ends, axis=0), jnp.max(ends, axis=0))
        return x, logistic_mixture(x, mixture)[1] + log_gain


def _mixture(params: Array, count: int, spread: float) -> tuple[tuple[Array, Array, Array], Array]:
    """Log weights, log scales and locations of the components, and what is left of the parameters."""
    logits, log_scale, location = params[:count], params[count : 2 * count], params[2 * count : 3 * count]
    offsets = np.linspace(-spread, spread, count) if count > 1 else np.zeros(1)
    offsets = jnp.asarray(offsets, params.dtype).reshape(-1, *[1] * (params.ndim - 1))
    return (jax.nn.log_softmax(logits, axis=0), log_scale, location + offsets), params[3 * count :]
