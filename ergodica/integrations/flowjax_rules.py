r"""Scores through flowjax's bijections.

With :math:`y = T(x)` of Jacobian :math:`J` and log determinant :math:`\ell`, the score goes with the map as
:math:`s' = J^{-\top}(s - \nabla_x \ell)` and against it as :math:`s = J^\top s' + \nabla_x \ell`. Against it one derivative of
``transform`` is all that is needed, whatever the bijection and however ``inverse`` is found. With it, rules for each kind of
bijection are below; what has none takes a derivative of ``inverse``, or, where there is no inverse, a dense solve.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax import bijections as fb
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

from ergodica.core.flow import constant, pull_back, push_forward

type Carried = tuple[Array, Array, Array]


@functools.singledispatch
def carry(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """New point, log determinant and score, by the derivative of the way back.

    Register a rule for a bijection of your own with ``carry.register(TheClass)``; this one holds for any.

    Parameters
    ----------
    bijection : flowjax.bijections.AbstractBijection
        Unwrapped (``paramax.unwrap``).
    point, score : array
        Of the bijection's shape.
    condition : array or None
        As flowjax passes it.
    inverse : bool
        Whether to go by ``inverse`` instead of ``transform``.

    Returns
    -------
    tuple of array
        The point is differentiable in the bijection's arrays, in ``point`` and in ``condition``; the other two are constants as
        far as they depend on them here.

    Notes
    -----
    Cost: one evaluation of ``transform`` and its derivative for ``inverse=True``; else that of ``inverse``. Where ``inverse`` is
    not implemented: D derivatives of ``transform`` and an LU solve, O(D³).
    """
    if inverse:
        return _against(bijection, point, score, condition)
    if not bijection.shape:
        return _elementwise(bijection, point, score, condition)
    y, log_det = bijection.transform_and_log_det(point, condition)
    held, condition = constant((bijection, condition))
    try:
        return y, log_det, pull_back(lambda y: held.inverse_and_log_det(y, condition), y, score)
    except NotImplementedError:
        direct = _raveled(lambda x: held.transform_and_log_det(x, condition), bijection.shape)
        return y, log_det, push_forward(direct, point.reshape(-1), score.reshape(-1)).reshape(score.shape)


def _against(bijection: Any, point: Array, score: Array, condition: Array | None) -> Carried:
    """By ``inverse``: the score by the derivative of ``transform`` at the new point."""
    x, log_det = bijection.inverse_and_log_det(point, condition)
    held, condition = constant((bijection, condition))
    return x, log_det, pull_back(lambda x: held.transform_and_log_det(x, condition), x, score)


def _linearised(bijection: Any, point: Array, condition: Array | None) -> tuple[Carried, Callable]:
    """New point, log determinant, and products with the Jacobian's transpose and with the log determinant's slope."""
    held, condition_held = constant((bijection, condition))
    point_held = jax.lax.stop_gradient(point)
    (_, held_log_det), pull = jax.vjp(lambda x: held.transform_and_log_det(x, condition_held), point_held)
    y, log_det = bijection.transform_and_log_det(point, condition)

    def products(cotangent: Array, weight: float) -> Array:
        return pull((cotangent, jnp.full_like(held_log_det, weight)))[0]

    return (y, log_det, held_log_det), products


def _with(*kinds: type) -> Callable[[Callable], Callable]:
    """Register a rule for ``transform``; ``inverse`` has the rule of all."""

    def register(rule: Callable) -> Callable:
        def both(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
            return (_against if inverse else rule)(bijection, point, score, condition)

        for kind in kinds:
            carry.register(kind, both)
        return rule

    return register


# --- maps of their own ---------------------------------------------------------------------------------------------------


@_with(
    fb.Affine,
    fb.Scale,
    fb.Exp,
    fb.SoftPlus,
    fb.Tanh,
    fb.LeakyTanh,
    fb.Sigmoid,
    fb.Power,
    fb.RationalQuadraticSpline,
)
def _elementwise(bijection: Any, x: Array, score: Array, condition: Array | None) -> Carried:
    r""":math:`s' = (s - \partial \ell) / f'`, element by element."""
    (y, log_det, _), products = _linearised(bijection, x, condition)
    return y, log_det, (score - products(jnp.zeros_like(y), 1.0)) / products(jnp.ones_like(y), 0.0)


@_with(fb.Coupling)
def _coupling(bijection: Any, x: Array, score: Array, condition: Array | None) -> Carried:
    r"""Transformed entries one by one, then the others by one derivative of the conditioner.

    .. math:: s'_c = s_c - (\partial y_t/\partial x_c)^\top s'_t - \partial_c \ell
    """
    y, log_det = bijection.transform_and_log_det(x, condition)
    held, condition = constant((bijection, condition))
    parts = jnp.split(jax.lax.stop_gradient(x), [bijection.untransformed_dim])

    def transform(*parts: Array) -> tuple[Array, Array]:
        return held.transform_and_log_det(jnp.concatenate(parts), condition)

    # apart, so that the first two products leave the conditioner out
    (_, held_log_det), pull = jax.vjp(transform, *parts)
    one, zeros = jnp.ones_like(held_log_det), jnp.zeros_like(y)
    _, slope = pull((zeros, one))
    _, derivative = pull((zeros.at[bijection.untransformed_dim :].set(1.0), 0.0 * one))
    first, second = jnp.split(score, [bijection.untransformed_dim])
    second = (second - slope) / derivative
    through, _ = pull((zeros.at[bijection.untransformed_dim :].set(second), one))
    return y, log_det, jnp.concatenate([first - through, second])


@_with(fb.MaskedAutoregressive, fb.BlockAutoregressiveNetwork)
def _autoregressive(bijection: Any, x: Array, score: Array, condition: Array | None) -> Carried:
    """A triangular solve; D derivatives for its matrix."""
    (y, log_det, _), products = _linearised(bijection, x, condition)
    jacobian = jax.vmap(lambda row: products(row, 0.0))(jnp.eye(x.size, dtype=y.dtype))
    slope = products(jnp.zeros_like(y), 1.0)
    return y, log_det, solve_triangular(jacobian, score - slope, trans=1, lower=True)


@_with(fb.TriangularAffine)
def _triangular(bijection: Any, x: Array, score: Array, condition: Array | None) -> Carried:
    """A triangular solve with the layer's own matrix."""
    y, log_det = bijection.transform_and_log_det(x, condition)
    return y, log_det, solve_triangular(constant(bijection.triangular), score, trans=1, lower=bijection.lower)


@_with(fb.Planar)
def _planar(bijection: Any, x: Array, score: Array, condition: Array | None) -> Carried:
    r"""By the Jacobian's rank of one.

    .. math:: J = I + u \psi^\top, \qquad J^{-\top} r = r - \psi\, u^\top r / \det J, \qquad \psi\, u^\top r = J^\top r - r
    """
    (y, log_det, held_log_det), products = _linearised(bijection, x, condition)
    rest = score - products(jnp.zeros_like(y), 1.0)
    return y, log_det, rest - (products(rest, 0.0) - rest) / jnp.exp(held_log_det)


@carry.register(fb.Permute)
@carry.register(fb.Flip)
@carry.register(fb.Householder)
@carry.register(fb.DiscreteCosine)
def _orthogonal(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """The score goes as the point."""
    name = "inverse_and_log_det" if inverse else "transform_and_log_det"
    new, log_det = getattr(bijection, name)(point, condition)
    return new, log_det, getattr(constant(bijection), name)(score)[0]


@carry.register(fb.Identity)
@carry.register(fb.Loc)
@carry.register(fb.AdditiveCondition)
def _shift(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """The score stays."""
    new = bijection.inverse if inverse else bijection.transform
    return new(point, condition), jnp.zeros((), point.dtype), score


# --- maps of maps --------------------------------------------------------------------------------------------------------


@carry.register(fb.Chain)
def _chain(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """One after the other."""
    total = jnp.zeros((), point.dtype)
    for part in reversed(bijection.bijections) if inverse else bijection.bijections:
        point, log_det, score = carry(part, point, score, condition, inverse=inverse)
        total = total + jnp.sum(log_det)
    return point, total, score


@carry.register(fb.Scan)
def _scan(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """One after the other, in a compiled loop."""
    arrays, static = eqx.partition(bijection.bijection, eqx.is_array)

    def step(carried: Carried, arrays: Any) -> tuple[Carried, None]:
        point, total, score = carried
        point, log_det, score = carry(eqx.combine(arrays, static), point, score, condition, inverse=inverse)
        return (point, total + jnp.sum(log_det), jax.lax.stop_gradient(score)), None

    start = (point, jnp.zeros((), point.dtype), score)
    return jax.lax.scan(step, start, arrays, reverse=inverse)[0]


@carry.register(fb.Invert)
def _invert(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """The other way."""
    return carry(bijection.bijection, point, score, condition, inverse=not inverse)


@carry.register(fb.NumericalInverse)
def _numerical(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """With the map by its own rule, so that no root is found for the score; against it as any other."""
    if inverse:
        return _against(bijection, point, score, condition)
    return carry(bijection.bijection, point, score, condition, inverse=False)


@carry.register(fb.Sandwich)
def _sandwich(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """There, the inner map, and back."""
    parts = fb.Chain([bijection.outer, bijection.inner, fb.Invert(bijection.outer)])
    return _chain(parts, point, score, condition, inverse=inverse)


@carry.register(fb.Reshape)
def _reshape(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """Another shape."""
    inner = bijection.bijection
    if inner.cond_shape is not None and condition is not None:
        condition = condition.reshape(inner.cond_shape)
    new, log_det, score = carry(
        inner, point.reshape(inner.shape), score.reshape(inner.shape), condition, inverse=inverse
    )
    return new.reshape(bijection.shape), log_det, score.reshape(bijection.shape)


@carry.register(fb.Vmap)
def _vmap(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """Slice by slice."""
    axes, _, condition_axis = bijection.in_axes

    def one(bijection: Any, point: Array, score: Array, condition: Array | None) -> Carried:
        return carry(bijection, point, score, condition, inverse=inverse)

    mapped = eqx.filter_vmap(one, in_axes=(axes, 0, 0, condition_axis), axis_size=bijection.axis_size)
    new, log_det, score = mapped(bijection.bijection, point, score, condition)
    return new, jnp.sum(log_det), score


@carry.register(fb.Concatenate)
def _concatenate(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """Part by part."""
    points, scores = (jnp.split(x, bijection.split_idxs, axis=bijection.axis) for x in (point, score))
    new, total, score = _parts(bijection.bijections, points, scores, condition, inverse=inverse)
    return jnp.concatenate(new, bijection.axis), total, jnp.concatenate(score, bijection.axis)


@carry.register(fb.Stack)
def _stack(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """Part by part."""
    points, scores = (list(jnp.moveaxis(x, bijection.axis, 0)) for x in (point, score))
    new, total, score = _parts(bijection.bijections, points, scores, condition, inverse=inverse)
    return jnp.stack(new, bijection.axis), total, jnp.stack(score, bijection.axis)


def _parts(parts: Any, points: list, scores: list, condition: Array | None, *, inverse: bool) -> tuple:
    carried = [
        carry(part, point, score, condition, inverse=inverse)
        for part, point, score in zip(parts, points, scores, strict=True)
    ]
    new, log_dets, moved = zip(*carried, strict=True)
    return new, sum(jnp.sum(log_det) for log_det in log_dets), moved


@carry.register(fb.Indexed)
def _indexed(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """Some of the entries."""
    at = bijection.idxs
    new, log_det, moved = carry(bijection.bijection, point[at], score[at], condition, inverse=inverse)
    return point.at[at].set(new), log_det, score.at[at].set(moved)


@carry.register(fb.EmbedCondition)
def _embed(bijection: Any, point: Array, score: Array, condition: Array | None, *, inverse: bool) -> Carried:
    """At what the net makes of the condition."""
    return carry(bijection.bijection, point, score, bijection.embedding_net(condition), inverse=inverse)


def _raveled(map_: Callable, shape: tuple[int, ...]) -> Callable:
    def direct(x: Array) -> tuple[Array, Array]:
        y, log_det = map_(x.reshape(shape))
        return y.reshape(-1), jnp.sum(log_det)

    return direct
