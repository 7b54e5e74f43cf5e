r"""The exact gradient of a variational objective, by enumeration of discrete sites times quadrature over continuous ones.

Write :math:`q_g` for the probability of point :math:`g` of the grid and :math:`w_g` for its importance weight. The ELBO is
:math:`\sum_g q_g \log w_g`. Bounds of ``K`` particles, :math:`\frac1\beta \mathrm E \log \frac1K \sum_k w_k^\beta`, would be
sums over all K-tuples of points; with :math:`v = w^\beta / \mathrm E w^\beta` and
:math:`\log x = \int_0^\infty (e^{-t} - e^{-tx})\, \mathrm dt / t` they are one integral over :math:`t`, whatever ``K``:

.. math:: \mathrm E \log \sum_k v_k = \int_0^\infty \left( e^{-t} - M(t)^K \right) \frac{\mathrm dt}{t}, \qquad
    M(t) = \sum_g q_g e^{-t v_g}

In :math:`s = \log t` the integrand is analytic and falls fast on both sides, so the trapezoidal rule is exact to rounding. Either
way the gradient is :math:`\nabla \sum_g q_g h(\log w_g)` for a fixed function ``h``: the identity, or
:math:`h = \frac{K}{\beta} \int M(t)^{K-1} (1 - e^{-tv})\, \mathrm dt / t`. A constant is subtracted from ``h``, which changes
nothing but rounding, since the probabilities sum to one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import PyTree
from ergodica.estimators.variational.exact.grid import Grid, run_on_grid
from ergodica.estimators.variational.structure import Program

_CHUNK = 256
_TIMES = 1024
_WIDEST_STEP = 0.75
"""Of the rule in ``s``: its error is below 1e-5 there, and grows fast beyond; the result is NaN then."""
_TIMES_AT_ONCE = 32


class Bound(NamedTuple):
    """The objective: the mean of ``log(mean of w**power over num_particles) / power``; with one particle it is the ELBO."""

    power: Array | float
    num_particles: int

    @property
    def linear(self) -> bool:
        """Whether it is the ELBO."""
        return self.num_particles == 1


class OnGrid(NamedTuple):
    """Value and gradient, and by coordinate the sum of the absolute values that the gradient is the sum of."""

    value: Array
    gradient: PyTree
    absolute: PyTree
    mass: Array
    """Total probability of the grid: one, apart from the error of quadrature."""


def evaluate_on_grid(program: Program, grid: Grid, bound: Bound, params: dict, constrain: Callable) -> OnGrid:
    """Evaluate the objective and its gradient by the (unconstrained) parameters."""

    def at(params: dict, index: Array) -> tuple[Array, Array]:
        return run_on_grid(program, constrain(params), grid, index)

    indices = jnp.arange(grid.size)
    log_q, log_w = jax.lax.map(lambda i: at(params, i), indices, batch_size=min(_CHUNK, grid.size))
    cost, value = _cost(bound, log_q, log_w)

    def of_point(params: dict, index: Array) -> Array:
        log_prob, log_weights = at(params, index)
        return jnp.exp(log_prob) * jnp.sum(cost(log_weights))

    def chunk(sums: tuple, start: Array) -> tuple[tuple, None]:
        index = start + jnp.arange(min(_CHUNK, grid.size))
        inside = index < grid.size
        gradients = jax.vmap(jax.grad(of_point), (None, 0))(params, jnp.minimum(index, grid.size - 1))
        kept = jax.tree.map(lambda x: jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0), gradients)
        total, absolute = sums
        total = jax.tree.map(lambda t, x: t + jnp.sum(x, axis=0), total, kept)
        return (total, jax.tree.map(lambda t, x: t + jnp.sum(jnp.abs(x), axis=0), absolute, kept)), None

    zero = jax.tree.map(jnp.zeros_like, params)
    starts = jnp.arange(0, grid.size, _CHUNK)
    (gradient, absolute), _ = jax.lax.scan(chunk, (zero, zero), starts)
    return OnGrid(value, gradient, absolute, jnp.sum(jnp.exp(log_q)))


def _cost(bound: Bound, log_q: Array, log_w: Array) -> tuple[Callable[[Array], Array], Array]:
    """The function ``h`` of log weights (E,), held but for its argument, and the objective's value."""
    q = jnp.exp(log_q)[:, None]
    if bound.linear:
        mean = jnp.sum(q * log_w, axis=0)
        return lambda log_weights: log_weights - mean, jnp.sum(mean)
    k, power = bound.num_particles, bound.power
    powers = power * log_w
    log_mean = jax.nn.logsumexp(powers + log_q[:, None], axis=0)
    log_v, tiny = powers - log_mean, jnp.log(jnp.finfo(log_w.dtype).eps)
    smallest = jnp.min(jnp.where(log_q[:, None] > tiny, log_v, 0.0))
    s = jnp.linspace(tiny - jnp.log(k) - 3.0, jnp.log(-2 * tiny) - smallest, _TIMES)
    step = s[1] - s[0]
    step = jnp.where(step < _WIDEST_STEP, step, jnp.nan)
    means = jax.lax.map(lambda s: jnp.sum(q * jnp.exp(-jnp.exp(s + log_v)), axis=0), s, batch_size=_TIMES_AT_ONCE)
    of_sum = step * jnp.sum(jnp.exp(-jnp.exp(s))[:, None] - means**k, axis=0)
    weights = k * step * means ** (k - 1) / power

    def cost(log_weights: Array) -> Array:
        return jnp.sum(weights * -jnp.expm1(-jnp.exp(s[:, None] + power * log_weights - log_mean)), axis=0)

    at_grid = jax.lax.map(cost, log_w, batch_size=min(_CHUNK, log_w.shape[0]))
    mean = jnp.sum(q * at_grid, axis=0)
    value = (log_mean + of_sum - jnp.log(k)) / power
    return lambda log_weights: cost(log_weights) - mean, jnp.sum(value)
