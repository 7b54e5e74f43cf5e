"""Coefficients of controls that have the shape of the gradient: each entry has controls of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.regression import pooled_leave_one_out, pooled_moments, solve_moments
from ergodica.core.stein import diagonal_controls, vector_controls
from ergodica.core.types import Draws, PyTree
from ergodica.estimators.stein.shared import Moments, fewest_remembered, remembered


def matched_controls(draws: Draws, controls: Any, params: PyTree, dtype: jnp.dtype) -> Array:
    """Controls (n, R, P) for the entries of the raveled gradient; zero where an entry has no point of its own."""
    if controls == "linearised":
        return jax.vmap(tree.ravel)(draws.linearised)[:, None, :].astype(dtype)
    x, score = draws.points.astype(dtype), draws.score.astype(dtype)
    if not isinstance(controls, str):
        own = vector_controls(controls, x, score)
    else:
        own = diagonal_controls(x, score, 1 if controls == "linear" else 2)
        own = own / jnp.sqrt(jnp.arange(1, own.shape[1] + 1, dtype=dtype))[None, :, None]
    dim, leaves = x.shape[1], jax.tree.leaves(params)
    if tree.size(params) == dim:
        return own
    if not any(leaf.size == dim for leaf in leaves):
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(
            f"per='coordinate', 'block' and 'all' match entries of the gradient to points: the parameters, or some of their "
            f"leaves, must have {dim} entries, as the points have. Got leaves of shape {shapes}. Use per='matrix' or "
            "controls='linearised'."
        )
    nothing = [jnp.zeros((*own.shape[:2], leaf.size), dtype) for leaf in leaves]
    parts = [own if leaf.size == dim else zero for leaf, zero in zip(leaves, nothing, strict=True)]
    return jnp.concatenate(parts, axis=2)


def groups_of(params: PyTree, per: str) -> np.ndarray:
    """Group (P,) that each entry of the raveled parameters shares its coefficients with."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    if per == "coordinate":
        return np.arange(sum(sizes))
    return np.repeat(np.arange(len(sizes)), sizes) if per == "block" else np.zeros(sum(sizes), int)


def left_over(controls: Array, f: Array, coefficients: Array, groups: np.ndarray) -> Array:
    """Mean (P,) of a function (n, P) less controls (n, R, P) times coefficients (G, n, R)."""
    return jnp.mean(f - jnp.einsum("pkr,krp->kp", coefficients[groups], controls), axis=0)


def leave_one_out_coefficients(controls: Array, f: Array, groups: np.ndarray, ridge: float) -> Array:
    """Coefficients (G, n, R) from all other draws."""
    gram, cross = grouped_moments(controls, f, groups)
    penalty = ridge * f.shape[0] * group_sizes(groups, f.dtype)
    return jax.vmap(pooled_leave_one_out)(gram, cross, penalty)


def split_coefficients(controls: Array, f: Array, groups: np.ndarray, ridge: float) -> Array:
    """Coefficients (G, n, R) from the other half of the draws."""
    n, half = f.shape[0], f.shape[0] // 2
    fits = []
    for own in (slice(half, None), slice(half)):
        gram, cross = (jnp.sum(x, axis=1) for x in grouped_moments(controls[own], f[own], groups))
        length = n - half if own.start else half
        penalty = ridge * length * group_sizes(groups, f.dtype)
        fits.append(_repeat(jax.vmap(solve_moments)(gram, cross, penalty), n - length))
    return jnp.concatenate(fits, axis=1)


def remembered_coefficients(
    controls: Array, f: Array, groups: np.ndarray, memory: Moments, ridge: float, decay: float
) -> tuple[Array, Moments]:
    """Coefficients (G, n, R) from earlier calls, and what is remembered from now on."""
    n = f.shape[0]
    penalty = ridge * memory.seen * group_sizes(groups, f.dtype)
    fitted = jax.vmap(solve_moments)(memory.gram, memory.cross, penalty)
    if ridge == 0:
        fitted = jnp.where(memory.seen >= fewest_remembered(controls.shape[1]), fitted, 0.0)
    gram, cross = (jnp.sum(x, axis=1) for x in grouped_moments(controls, f, groups))
    return _repeat(fitted, n), remembered(memory, gram, cross, n, decay)


def grouped_moments(controls: Array, f: Array, groups: np.ndarray) -> tuple[Array, Array]:
    """Moments of `pooled_moments`, group by group: (G, n, R, R) and (G, n, R)."""
    num = int(groups[-1]) + 1
    if num == len(groups):
        each: Callable = jax.vmap(lambda h, g: pooled_moments(h[..., None], g[..., None]), in_axes=(2, 1))
        return each(controls, f)
    ends = np.cumsum(np.bincount(groups, minlength=num))
    starts = np.concatenate([[0], ends[:-1]])
    parts = [pooled_moments(controls[:, :, a:b], f[:, a:b]) for a, b in zip(starts, ends, strict=True)]
    return jnp.stack([gram for gram, _ in parts]), jnp.stack([cross for _, cross in parts])


def group_sizes(groups: np.ndarray, dtype: jnp.dtype) -> Array:
    """Number of entries in each group (G,)."""
    return jnp.asarray(np.bincount(groups), dtype)


def _repeat(coefficients: Array, num: int) -> Array:
    shape = (coefficients.shape[0], num, coefficients.shape[1])
    return jnp.broadcast_to(coefficients[:, None, :], shape)
