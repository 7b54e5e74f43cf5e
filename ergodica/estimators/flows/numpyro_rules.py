r"""Scores through NumPyro's transformations.

For :math:`y = T(x)` with Jacobian :math:`J` and log determinant :math:`\ell`, :math:`s' = J^{-\top}(s - \nabla_x \ell)`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array
from numpyro.distributions import flows as nf
from numpyro.distributions import transforms as nt

from ergodica.core.flow import pull_back, push_forward


@functools.singledispatch
def carry(transform: Any, x: Array, y: Array, score: Array) -> Array:
    """Score at ``y`` from the score at ``x``, to be taken as a constant.

    Register a rule for a transformation of your own with ``carry.register(TheClass)``; this one holds for any.

    Parameters
    ----------
    transform : numpyro.distributions.transforms.Transform
    x, y, score : array (batch …, event …)
        Old point, new point, and the score at the old one.

    Notes
    -----
    Cost: for elementwise transformations a derivative; for others the derivative of the inverse. Where there is no inverse, D
    derivatives of the transformation and an LU solve.
    """
    if not _event_dim(transform):
        return _elementwise(transform, x, score)
    try:
        return pull_back(lambda y: _inverse(transform, y), y, score)
    except NotImplementedError:
        return _by_vectors(functools.partial(_dense, transform), transform, x, score)


def _event_dim(transform: Any) -> int:
    return max(transform.domain.event_dim, transform.codomain.event_dim)


def _inverse(transform: Any, y: Array) -> tuple[Array, Array]:
    x = transform.inv(y)
    return x, -jnp.sum(transform.log_abs_det_jacobian(x, y))


def _elementwise(transform: Any, x: Array, score: Array) -> Array:
    y, pull = jax.vjp(transform, x)
    slope = jax.grad(lambda x: jnp.sum(transform.log_abs_det_jacobian(x, transform(x))))(x)
    return (score - slope) / pull(jnp.ones_like(y))[0]


def _by_vectors(solve: Callable, transform: Any, x: Array, score: Array) -> Array:
    """Batch dimensions mapped, events raveled."""
    event = x.shape[x.ndim - transform.domain.event_dim :]
    flat = (-1, math.prod(event))
    mapped = jax.vmap(lambda x, score: solve(event, x, score))(x.reshape(flat), score.reshape(flat))
    return mapped.reshape(score.shape)


def _dense(transform: Any, event: tuple[int, ...], x: Array, score: Array) -> Array:
    def direct(x: Array) -> tuple[Array, Array]:
        x = x.reshape(event)
        y, intermediates = transform.call_with_intermediates(x)
        return y.reshape(-1), jnp.sum(transform.log_abs_det_jacobian(x, y, intermediates=intermediates))

    return push_forward(direct, x, score)


@carry.register
def _composed(transform: nt.ComposeTransform, x: Any, y: Array, score: Array) -> Array:  # noqa: ARG001
    """One after the other."""
    for part in transform.parts:
        new = part(x)
        x, score = new, carry(part, x, new, score)
    return score


@carry.register
def _independent(transform: nt.IndependentTransform, x: Array, y: Array, score: Array) -> Array:
    """That of what is inside."""
    return carry(transform.base_transform, x, y, score)


@carry.register
def _identity(transform: nt.IdentityTransform, x: Array, y: Array, score: Array) -> Array:  # noqa: ARG001
    """The score stays."""
    return score


@carry.register
def _permuted(transform: nt.PermuteTransform, x: Array, y: Array, score: Array) -> Array:  # noqa: ARG001
    """The score goes as the point."""
    return score[..., transform.permutation]


@carry.register
def _reshaped(transform: nt.ReshapeTransform, x: Array, y: Array, score: Array) -> Array:  # noqa: ARG001
    """The score goes as the point."""
    return score.reshape(y.shape)


@carry.register
def _triangular(transform: nt.LowerCholeskyAffine, x: Array, y: Array, score: Array) -> Array:  # noqa: ARG001
    """A triangular solve with the transformation's own matrix."""
    matrix = jnp.broadcast_to(transform.scale_tril, (*score.shape, score.shape[-1]))
    return solve_triangular(matrix, score[..., None], trans=1, lower=True)[..., 0]


@carry.register
def _inverse_autoregressive(
    transform: nf.InverseAutoregressiveTransform,
    x: Array,
    y: Array,  # noqa: ARG001
    score: Array,
) -> Array:
    """A solve with the Jacobian of the map as it is, where log scales are cut off too.

    NumPyro differentiates through that cut as if it were not there, and a score by derivatives of its inverse is wrong there. The
    Jacobian is triangular in the order of the net, which the net does not tell: the solve is by LU.
    """

    def direct(x: Array) -> tuple[Array, Array]:
        mean, log_scale = transform.arn(x)
        log_scale = jnp.clip(log_scale, transform.log_scale_min_clip, transform.log_scale_max_clip)
        return jnp.exp(log_scale) * x + mean, jnp.sum(log_scale)

    return _by_vectors(lambda _, x, score: push_forward(direct, x, score), transform, x, score)


@carry.register
def _block_autoregressive(
    transform: nf.BlockNeuralAutoregressiveTransform,
    x: Array,
    y: Array,  # noqa: ARG001
    score: Array,
) -> Array:
    """A triangular solve; D derivatives for its matrix."""

    def solve(_: Any, x: Array, score: Array) -> Array:
        (out, log_det), pull = jax.vjp(transform.bn_arn, x)
        jacobian = jax.vmap(lambda row: pull((row, jnp.zeros_like(log_det)))[0])(jnp.eye(x.size, dtype=x.dtype))
        slope = pull((jnp.zeros_like(out), jnp.ones_like(log_det)))[0]
        return solve_triangular(jacobian, score - slope, trans=1, lower=True)

    return _by_vectors(solve, transform, x, score)
