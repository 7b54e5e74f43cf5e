"""Nodes and weights for the mean over a sample site: Gauss–Hermite for normals, the trapezoidal rule for other laws of numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints

from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.facts import Distribution, base, unmasked

_SEARCH = 256
_ROUNDS = 5
_WIDEST, _REACH = 12.0, 40.0


def is_normal(fn: Distribution) -> bool:
    """Whether draws are a function of as many independent normals: normal laws, and elementwise transformations of them."""
    fn = base(fn)
    if isinstance(fn, dist.TransformedDistribution):
        same = base(fn.base_dist).event_shape == fn.event_shape
        return same and is_normal(fn.base_dist)
    return isinstance(fn, dist.Normal | dist.MultivariateNormal | dist.LowRankMultivariateNormal)


def is_number(fn: Distribution) -> bool:
    """Whether each element is a continuous number of its own, whose density can be evaluated."""
    fn = base(fn)
    return fn.event_shape == () and not fn.support.is_discrete and not isinstance(fn, dist.Delta)


def normal_nodes(num_nodes: int, dtype: Any) -> tuple[Array, Array]:
    """Gauss–Hermite nodes of a standard normal (M,), and the logarithms of their weights, which sum to one."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return jnp.asarray(nodes, dtype), jnp.asarray(np.log(weights / weights.sum()), dtype)


def from_normals(fn: Distribution, normals: Array) -> Any:
    """Draw of a law that `is_normal`, as a differentiable function of standard normals of its shape."""
    fn = base(fn)
    if isinstance(fn, dist.TransformedDistribution):
        value = from_normals(fn.base_dist, normals)
        for transform in fn.transforms:
            value = transform(value)
        return value
    normal: Any = fn
    if isinstance(fn, dist.Normal):
        return normal.loc + normal.scale * normals
    factor = jnp.linalg.cholesky(normal.covariance_matrix)
    return normal.loc + jnp.squeeze(factor @ normals[..., None], -1)


def number_nodes(fn: Distribution, shape: tuple[int, ...], num_nodes: int) -> tuple[Array, Array]:
    r"""Nodes (M, \*shape) for each element of a law that `is_number`, and logarithms of their weights without the density.

    The mean of a function is :math:`\sum_j W_j\, q(x_j)\, f(x_j)`. Nodes are held still in unconstrained space, so that the
    derivative by parameters is that of the density and of the function: no reparameterisation is needed. They move with a support
    that parameters move, as of a uniform law.

    In unconstrained space :math:`y`, with :math:`y = c + s \sinh u` and :math:`c`, :math:`s` the median and half the range of
    the quartiles, the trapezoidal rule in :math:`u` covers all that is above rounding. Its error falls exponentially with ``M``
    for smooth functions. On the circle it is uniform.
    """
    element = base(unmasked(fn))
    if element.support is constraints.circular:
        angles = jnp.linspace(-jnp.pi, jnp.pi, num_nodes, endpoint=False).reshape(-1, *[1] * len(shape))
        nodes = jnp.broadcast_to(angles, (num_nodes, *shape))
        return nodes, jnp.full_like(nodes, np.log(2 * np.pi / num_nodes))
    to_support = biject_to(element.support)

    def log_weight(y: Array) -> Array:
        """Logarithm of the density of y; minus infinity beyond what can be computed."""
        x = to_support(y)
        value = log_density(element, x) + to_support.log_abs_det_jacobian(y, x)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def line(low: Array, high: Array, number: int) -> Array:
        steps = jnp.linspace(0.0, 1.0, number).reshape(-1, *[1] * len(shape))
        return low + (high - low) * steps

    def spread(u: Array, centre: Array, scale: Array) -> tuple[Array, Array]:
        y = centre + scale * jnp.sinh(u)
        return y, log_weight(y) + jnp.log(scale * jnp.cosh(u))

    zero, one = jnp.zeros(shape), jnp.ones(shape)
    widest = line(-_WIDEST * one, _WIDEST * one, _SEARCH)

    def narrow(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
        return _median_and_spread(*spread(widest, *found))

    centre, scale = jax.lax.fori_loop(0, _ROUNDS, narrow, (zero, one))
    u = line(-_REACH * one, _REACH * one, 2 * _SEARCH)
    _, log_mass = spread(u, centre, scale)
    kept = log_mass > jnp.max(log_mass, axis=0) + jnp.log(jnp.finfo(log_mass.dtype).eps)
    step = u[1] - u[0]
    low = jnp.min(jnp.where(kept, u, jnp.inf), axis=0) - step
    high = jnp.max(jnp.where(kept, u, -jnp.inf), axis=0) + step
    u = line(low, high, num_nodes)
    widths = jnp.log((high - low) / (num_nodes - 1)) + jnp.log(scale * jnp.cosh(u))
    y, widths = jax.lax.stop_gradient((centre + scale * jnp.sinh(u), widths))
    x = to_support(y)
    return x, widths + to_support.log_abs_det_jacobian(y, x)


def mixture_nodes(fn: Distribution, shape: tuple[int, ...], num_nodes: int) -> tuple[Array, Array]:
    """Nodes of every component of a mixture of numbers (M C, ...), and logarithms of their weights with the density."""
    mixture = base(unmasked(fn))
    components, count = mixture.component_distribution, mixture.mixture_size
    nodes, widths = number_nodes(components, (*shape, count), num_nodes)
    share = jax.nn.log_softmax(mixture.mixing_distribution.logits, axis=-1)
    log_prob = share + log_density(base(components), nodes) + widths
    points, weights = (jnp.moveaxis(x, -1, 1).reshape(num_nodes * count, *shape) for x in (nodes, log_prob))
    return points, weights


def _median_and_spread(y: Array, log_mass: Array) -> tuple[Array, Array]:
    """Median, and half the range of the quartiles, but no less than the distance of nodes there."""
    share = jnp.cumsum(jax.nn.softmax(log_mass, axis=0), axis=0)

    def quantile(p: float) -> Array:
        return jnp.argmax(share >= p, axis=0)

    def at(i: Array) -> Array:
        return jnp.take_along_axis(y, jnp.clip(i, 0, y.shape[0] - 1)[None], axis=0)[0]

    low, middle, high = quantile(0.25), quantile(0.5), quantile(0.75)
    return at(middle), 0.5 * jnp.maximum(at(high) - at(low), at(middle + 1) - at(middle - 1))
