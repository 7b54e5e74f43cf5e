"""Curvature and gradient noise of a posterior around a point."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position, PyTree

NUM_POINTS = 16


class LargestCurvature(NamedTuple):
    """The largest eigenvalue of the negative Hessian.

    Attributes
    ----------
    value : float
    standard_error : float
        From the spread over the batches; 0 where all have the same curvature.
    direction : array (D,)
    """

    value: float
    standard_error: float
    direction: np.ndarray


def largest_curvature(
    key: Key,
    gradient: AbstractGradientEstimator,
    position: Position,
    *,
    num_steps: int = 100,
    num_batches: int = 8,
    scale: Any = 1.0,
) -> LargestCurvature:
    r"""Largest eigenvalue of :math:`D H D` by power iteration, :math:`H` the negative Hessian and :math:`D` a diagonal scale.

    Each Hessian-vector product is the mean over ``num_batches`` estimates of the gradient, differentiated with their keys held
    fixed. The value is the mean Rayleigh quotient over the second half of the iterations, each with the batches of its own step.

    Notes
    -----
    Cost: ``num_steps * num_batches`` gradient estimates and as many Jacobian-vector products. The eigenvalue converges as the
    square of the ratio of the two largest ones to the number of steps, and from below.
    """
    with_scale = jnp.broadcast_to(jnp.asarray(scale, jnp.result_type(float)), (tree.size(position),))
    values, spread, vector = _power_iteration(key, gradient, position, with_scale, num_steps, num_batches)
    late = np.asarray(values, np.float64)[num_steps // 2 :]
    return LargestCurvature(
        float(late.mean()),
        float(np.asarray(spread)[num_steps // 2 :].mean() / np.sqrt(len(late) * num_batches)),
        np.asarray(vector),
    )


@jax.jit(static_argnames=("num_steps", "num_batches"))
def _power_iteration(
    key: Key, gradient: Any, position: Position, scale: Array, num_steps: int, num_batches: int
) -> tuple[Array, Array, Array]:
    key_init, key_start, key_run = jax.random.split(key, 3)
    flat, unravel = ravel_pytree(position)
    scale = scale.astype(flat.dtype)
    state = gradient.init(key_init, position)

    def product(state: Any, key: Key, vector: Array) -> tuple[Array, Any]:
        def of(theta: Array) -> tuple[Array, Any]:
            estimate, after = gradient.estimate(key, unravel(theta), state)
            return ravel_pytree(estimate.gradient)[0], after

        _, along, after = jax.jvp(of, (flat,), (scale * vector,), has_aux=True)
        return after, -scale * along

    def iterate(carry: tuple, step: Array) -> tuple[tuple, tuple[Array, Array]]:
        state, vector = carry
        keys = jax.random.split(jax.random.fold_in(key_run, step), num_batches)
        state, products = jax.lax.scan(lambda s, k: product(s, k, vector), state, keys)
        quotients = products @ vector
        mean = products.mean(0)
        return (state, mean / jnp.linalg.norm(mean)), (quotients.mean(), quotients.std())

    start = jax.random.normal(key_start, flat.shape, flat.dtype)
    start = start / jnp.linalg.norm(start)
    (_, vector), (values, spread) = jax.lax.scan(iterate, (state, start), jnp.arange(num_steps))
    return values, spread, vector


@jax.jit
def hessian(posterior: Posterior, position: Position) -> Array:
    """Negative Hessian of the log density (D, D). Cost: ``D`` Hessian-vector products over all the data, one at a time."""
    product, size = _hessian_product(posterior, position)
    matrix = jax.lax.map(product, jnp.eye(size, dtype=tree.ravel(position).dtype))
    return (matrix + matrix.T) / 2


@jax.jit
def hessian_diagonal(posterior: Posterior, position: Position) -> Array:
    """Diagonal of `hessian` (D,), at the same cost in time, with memory for one vector."""
    product, size = _hessian_product(posterior, position)

    def entry(i: Array) -> Array:
        return product(jnp.zeros(size, tree.ravel(position).dtype).at[i].set(1))[i]

    return jax.lax.map(entry, jnp.arange(size))


def _hessian_product(posterior: Posterior, position: Position) -> tuple[Any, int]:
    flat, unravel = ravel_pytree(position)

    def gradient(theta: Array) -> Array:
        return ravel_pytree(jax.grad(posterior.log_density)(unravel(theta)))[0]

    return lambda vector: -jax.jvp(gradient, (flat,), (vector,))[1], flat.size


def noise_covariance(
    key: Key, gradient: AbstractGradientEstimator, points: PyTree, elsewhere: PyTree, num_probes: int, *, diagonal: bool
) -> np.ndarray:
    """Covariance (D, D), or variances (D,), of the noise of one gradient, averaged over points.

    Parameters
    ----------
    points, elsewhere : pytree
        Positions along a leading axis: where the gradients are taken, and where the estimator's state starts (snapshots).
    num_probes : int
        Independent gradients a point.

    Raises
    ------
    ValueError
        If the estimator gives no probes (streamed data).
    """
    if gradient.exact:
        size = tree.size(jax.tree.map(lambda x: x[0], points))
        return np.zeros(size if diagonal else (size, size))
    one = jax.tree.map(lambda x: x[0], points)
    state = jax.eval_shape(gradient.init, key, one)
    if jax.eval_shape(lambda g, k, p, s: g.probe(k, p, s), gradient, key, one, state) is None:
        raise ValueError(
            f"sampler's gradient, {type(gradient).__name__}, gives no probes (its data are streamed), so its noise cannot be "
            "measured. Give noise=, the covariance of one gradient."
        )
    found = _probe_covariance(
        gradient, jax.random.split(key, len(jax.tree.leaves(points)[0])), points, elsewhere, num_probes, diagonal
    )
    return np.asarray(found, np.float64)


@jax.jit(static_argnames=("num_probes", "diagonal"))
def _probe_covariance(
    gradient: Any,
    keys: Array,
    points: PyTree,
    elsewhere: PyTree,
    num_probes: int,
    diagonal: bool,  # noqa: FBT001
) -> Array:
    def at(args: tuple) -> Array:
        key, point, start = args
        key_init, key_probes = jax.random.split(key)
        state = gradient.init(key_init, start)
        gradients = jax.lax.map(
            lambda k: tree.ravel(gradient.probe(k, point, state).gradient), jax.random.split(key_probes, num_probes)
        )
        noise = gradients - gradients.mean(0, keepdims=True)
        total = jnp.sum(noise**2, 0) if diagonal else noise.T @ noise
        return total / (num_probes - 1)

    return jax.lax.map(at, (keys, points, elsewhere)).mean(0)


def num_blocks(gradient: AbstractGradientEstimator) -> int | None:
    """How many blocks an epoch visits in a fresh random order; ``None`` where batches are independent.

    Raises
    ------
    ValueError
        Where the order is another one, of which no law is known here.
    """
    if not gradient.reshuffles:
        return None
    found = [g for g in _estimators(gradient) if getattr(g, "scheme", None) == "blocks"]
    if len(found) != 1:
        raise ValueError(
            f"sampler's gradient, {type(gradient).__name__}, must draw by scheme='uniform', 'importance', 'full' or "
            "'blocks'; the law of another order (such as 'symmetric') is not predicted. "
            "Measure its bias after a run (ergodica.diagnose)."
        )
    return found[0].num_blocks  # pyright: ignore[reportAttributeAccessIssue]


def _estimators(gradient: AbstractGradientEstimator) -> list[AbstractGradientEstimator]:
    inner = [value for value in vars(gradient).values() if isinstance(value, AbstractGradientEstimator)]
    return [gradient, *(found for value in inner for found in _estimators(value))]


def check_cancels(
    key: Key, gradient: AbstractGradientEstimator, position: Position, noise: np.ndarray, blocks: int
) -> None:
    """Raise unless the noise of an epoch of blocks cancels: the means of two epochs at one point must agree."""
    means = _epoch_means(gradient, key, position, blocks)
    difference = float(np.sum(np.square(np.asarray(means[0] - means[1], np.float64))))
    independent = 2 * float(np.sum(noise if noise.ndim == 1 else np.trace(noise))) / blocks
    if difference > 0.01 * independent and independent > 0:
        raise ValueError(
            f"The noise of sampler's gradient, {type(gradient).__name__}, does not cancel over an epoch of its blocks (it has "
            f"{difference / independent:.2g} of the variance of independent batches), so the law of blocks does not hold and "
            "its bias is not predicted. Measure it after a run (ergodica.diagnose)."
        )


@jax.jit(static_argnames="blocks")
def _epoch_means(gradient: Any, key: Key, position: Position, blocks: int) -> Array:
    def epoch(key: Key) -> Array:
        key_init, key_run = jax.random.split(key)

        def call(state: Any, key: Key) -> tuple[Any, Array]:
            estimate, state = gradient.estimate(key, position, state)
            return state, tree.ravel(estimate.gradient)

        _, gradients = jax.lax.scan(call, gradient.init(key_init, position), jax.random.split(key_run, blocks))
        return gradients.mean(0)

    return jax.lax.map(epoch, jax.random.split(key))
