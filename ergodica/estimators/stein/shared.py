"""Coefficients of controls that all entries of a gradient share, each entry with coefficients of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.regression import decompose, leave_one_out_weights, transfer_weights
from ergodica.core.stein import polynomial_controls, vector_controls
from ergodica.core.types import Draws


class Moments(NamedTuple):
    """Products of controls with each other and with a function, summed over draws with weights that fall with age.

    Attributes
    ----------
    gram : array (..., q, q)
    cross : array (..., q, P) or (..., q)
    seen : scalar array
        Sum of the weights, less that of one draw a call.
    """

    gram: Array
    cross: Array
    seen: Array


def shared_controls(draws: Draws, controls: Any, dtype: jnp.dtype) -> Array:
    """Controls (n, q), of variance 1 where the points are standard normal and the controls polynomials."""
    x, score = draws.points.astype(dtype), draws.score.astype(dtype)
    if not isinstance(controls, str):
        return vector_controls(controls, x, score).reshape(len(x), -1)
    if controls == "linear":
        return polynomial_controls(x, score, 1)
    dim = x.shape[1]
    pairs = [8.0 if i == j else 2.0 for i in range(dim) for j in range(i, dim)]
    scale = np.concatenate([np.ones(dim), np.sqrt(pairs)])
    return polynomial_controls(x, score, 2) / jnp.asarray(scale, dtype)[None, :]


def split_estimate(controls: Array, f: Array, ridge: float, select: int | None) -> Array:
    """Mean (m,) of functions (n, m) less what coefficients from the other half of the draws take away."""
    half = controls.shape[0] // 2
    total = jnp.sum(f, axis=0)
    for own, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        fitted, used = controls[own], jnp.sum(controls[other], axis=0)
        if select is not None:
            chosen = largest(*centred_moments(fitted, f[own]), select)
            fitted, used = fitted[:, chosen], used[chosen]
        total = total - transfer_weights(decompose(fitted), ridge * fitted.shape[0], used) @ f[own]
    return total / controls.shape[0]


def leave_one_out_estimate(controls: Array, f: Array, ridge: float) -> Array:
    """Mean (m,) of functions (n, m) less what coefficients from all other draws take away, draw by draw."""
    return leave_one_out_weights(decompose(controls), ridge * controls.shape[0]) @ f


def remembered_estimate(
    controls: Array, f: Array, memory: Moments, ridge: float, decay: float, select: int | None
) -> tuple[Array, Moments]:
    """Mean (m,) of functions (n, m) less what coefficients from earlier calls take away; what is remembered from now on."""
    q = controls.shape[1]
    chosen = jnp.arange(q) if select is None else largest(memory.gram, memory.cross, select)
    gram, cross = memory.gram[chosen][:, chosen], memory.cross[chosen]
    ridged = gram + ridge * memory.seen * jnp.eye(len(chosen), dtype=gram.dtype)
    coefficients = jnp.linalg.pinv(ridged, hermitian=True) @ cross
    if ridge == 0:
        coefficients = jnp.where(memory.seen >= fewest_remembered(len(chosen)), coefficients, 0.0)
    estimate = jnp.mean(f, axis=0) - jnp.mean(controls[:, chosen], axis=0) @ coefficients
    gram, cross = centred_moments(controls, f)
    return estimate, remembered(memory, gram, cross, controls.shape[0], decay)


def remembered(memory: Moments, gram: Array, cross: Array, num_draws: int, decay: float) -> Moments:
    """Moments after those of a call, whose centring took one of its draws."""
    return Moments(decay * memory.gram + gram, decay * memory.cross + cross, decay * memory.seen + num_draws - 1)


def fewest_remembered(num_controls: int) -> int:
    """Draws that a fit without a ridge waits for."""
    return 2 * (num_controls + 1)


def centred_moments(controls: Array, f: Array) -> tuple[Array, Array]:
    """Centred sums of products (q, q) and (q, m)."""
    moved = controls - jnp.mean(controls, axis=0)[None]
    return moved.T @ moved, moved.T @ (f - jnp.mean(f, axis=0)[None])


def largest(gram: Array, cross: Array, num: int) -> Array:
    """Indices of the controls that take away most, each by itself, from the last axis but the last entry of ``cross``."""
    variance = jnp.diagonal(gram)
    gain = jnp.sum(cross[:, :-1] ** 2, axis=1) / jnp.where(variance > 0, variance, 1.0)
    return jax.lax.top_k(gain, num)[1]
