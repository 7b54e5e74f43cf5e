"""The exactly solvable parts of Langevin dynamics: pure functions of trees, a time, and given noise.

``mass`` has the structure and dtypes of the position, its leaves broadcast against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.tree import axpy, cast_like
from ergodica.core.types import Position, PyTree


def drift(position: Position, momentum: PyTree, mass: PyTree, time: Array) -> Position:
    r"""A: :math:`\theta + t M^{-1} p`."""
    return jax.tree.map(lambda x, p, m: x + cast_like(time, x) * p / m, position, momentum, mass)


def kick(momentum: PyTree, gradient: PyTree, time: Array) -> PyTree:
    r"""B: :math:`p + t\,\hat g`."""
    return axpy(time, gradient, momentum)


def friction_and_noise(
    momentum: PyTree, mass: PyTree, noise: PyTree, time: Array, friction: Array, temperature: Array
) -> PyTree:
    r"""O: the Ornstein–Uhlenbeck flow, :math:`e^{-\gamma t} p + \sqrt{T(1 - e^{-2\gamma t})}\,M^{1/2}\xi`."""
    decay = jnp.exp(-friction * time)
    spread = jnp.sqrt(-temperature * jnp.expm1(-2 * friction * time))
    return damped(momentum, mass, noise, decay, spread)


def thermostatted_friction(
    momentum: PyTree, mass: PyTree, noise: PyTree, time: Array, thermostat: Array, friction: Array, temperature: Array
) -> PyTree:
    r"""O under a thermostat: the flow of :math:`dp = -\xi p\,dt + \sqrt{2\gamma T}\,M^{1/2} dW` at fixed :math:`\xi`, of any sign.

    .. math:: e^{-\xi t} p + \sqrt{\gamma T\,\frac{1 - e^{-2\xi t}}{\xi}}\,M^{1/2}\eta

    (Leimkuhler and Shang 2016).
    """
    decay = jnp.exp(-thermostat * time)
    spread = jnp.sqrt(2 * friction * temperature * time * _phi1(2 * thermostat * time))
    return damped(momentum, mass, noise, decay, spread)


def euler_thermostat(
    momentum: PyTree, mass: PyTree, noise: PyTree, time: Array, thermostat: Array, friction: Array, temperature: Array
) -> PyTree:
    r"""E under a thermostat: one Euler step, :math:`(1 - \xi t) p + \sqrt{2\gamma T t}\,M^{1/2}\eta` (Ding et al. 2014)."""
    return damped(momentum, mass, noise, 1 - thermostat * time, jnp.sqrt(2 * friction * temperature * time))


def damped(momentum: PyTree, mass: PyTree, noise: PyTree, decay: Array, spread: Array) -> PyTree:
    r"""Return :math:`a p + b M^{1/2}\eta` for scalars :math:`a` and :math:`b`."""
    return jax.tree.map(
        lambda p, m, xi: cast_like(decay, p) * p + cast_like(spread, p) * jnp.sqrt(m) * xi, momentum, mass, noise
    )


def euler_friction(
    momentum: PyTree, mass: PyTree, noise: PyTree, time: Array, friction: Array, temperature: Array
) -> PyTree:
    r"""E: O by one Euler step, :math:`(1 - \gamma t) p + \sqrt{2\gamma T t}\,M^{1/2}\xi` (Chen, Fox and Guestrin 2014)."""
    decay, spread = 1 - friction * time, jnp.sqrt(2 * friction * temperature * time)
    return damped(momentum, mass, noise, decay, spread)


def free_flow(
    position: Position,
    momentum: PyTree,
    mass: PyTree,
    noise: tuple[PyTree, PyTree],
    time: Array,
    friction: Array,
    temperature: Array,
) -> tuple[Position, PyTree]:
    r"""U: Langevin dynamics without force, exactly (Alamo and Sanz-Serna 2016, section 3).

    With :math:`E = e^{-\gamma t}`, the mean is :math:`(\theta + \frac{1-E}{\gamma} M^{-1} p,\; E p)`; the noise has variances
    :math:`\frac{2T}{\gamma}\left(t - 2\frac{1-E}{\gamma} + \frac{1-E^2}{2\gamma}\right) M^{-1}` in the position and
    :math:`T(1-E^2) M` in the momentum, and covariance :math:`T\frac{(1-E)^2}{\gamma}`.
    """
    x = friction * time
    glide = time * _phi1(x)
    decay = jnp.exp(-x)
    momentum_sd = jnp.sqrt(-temperature * jnp.expm1(-2 * x))
    # covariance over the momentum's sd, then what is left of the position's variance
    shared = jnp.sqrt(temperature) * time * _phi1(x) * jnp.sqrt(jnp.tanh(x / 2))
    own = jnp.sqrt(temperature * time**2 * _own_variance(x))

    def move(q: Array, p: Array, m: Array, xi: Array, eta: Array) -> Array:
        return q + cast_like(glide, q) * p / m + (cast_like(shared, q) * eta + cast_like(own, q) * xi) / jnp.sqrt(m)

    def relax(p: Array, m: Array, eta: Array) -> Array:
        return cast_like(decay, p) * p + cast_like(momentum_sd, p) * jnp.sqrt(m) * eta

    position = jax.tree.map(move, position, momentum, mass, noise[0], noise[1])
    return position, jax.tree.map(relax, momentum, mass, noise[1])


def _phi1(x: Array) -> Array:
    """(1 - exp(-x)) / x, continued to x = 0."""
    safe = jnp.where(x == 0, 1.0, x)
    return jnp.where(x == 0, 1.0, -jnp.expm1(-safe) / safe)


def _own_variance(x: Array) -> Array:
    r"""Conditional variance of the position given the momentum's noise, over :math:`T t^2 / M`.

    It is :math:`\frac{2}{x^2}\left(x - 2\tanh\frac{x}{2}\right)`: small differences of large terms near 0, where the series
    of the hyperbolic tangent takes over.
    """
    safe = jnp.where(x > 0.3, x, 1.0)
    closed = 2 * (safe - 2 * jnp.tanh(safe / 2)) / safe**2
    terms = (1 / 6, -1 / 60, 17 / 10080, -31 / 181440, 691 / 39916800, -5461 / 3113510400, 929569 / 5230697472000)
    return jnp.where(x > 0.3, closed, x * jnp.polyval(jnp.array(terms[::-1], x.dtype), x * x))
