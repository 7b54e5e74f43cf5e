"""Running means that kernels learn from while they run, and freeze."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.types import PyTree


def check_adaptation(num_adapt: int | None, decay: Any) -> tuple[Array | None, Array]:
    """Return the number of steps to adapt in (``None``: for ever) and the decay as arrays; raise where they are out of range."""
    rate = check.positive("decay", decay)
    if check.is_concrete(rate) and not jnp.all(rate < 1):
        raise ValueError(f"decay must be below 1; got {decay!r}.")
    return None if num_adapt is None else jnp.asarray(check.integer("num_adapt", num_adapt), jnp.int32), rate


def adapted_mean(
    mean: PyTree, value: PyTree, count: Array, decay: Array, num_adapt: Array | None
) -> tuple[PyTree, PyTree]:
    r"""Take the ``count``-th value into a running mean that starts at 0, unless it is frozen by now.

    .. math:: m \leftarrow \alpha m + (1 - \alpha)\,x, \qquad \hat m = \frac{m}{1 - \alpha^k}

    with :math:`k` the number of values in :math:`m`.

    Returns
    -------
    mean, debiased : pytree
        What to keep, and the weighted mean of the values so far.
    """
    moved = jax.tree.map(lambda m, x: m + tree.cast_like(1 - decay, m) * (x - m), mean, value)
    if num_adapt is not None:
        moved = tree.select(count <= num_adapt, moved, mean)
        count = jnp.minimum(count, num_adapt)
    return moved, tree.scale(moved, 1 / total_weight(decay, count))


def total_weight(decay: Array, count: Array) -> Array:
    r"""Weight of all values so far in the running mean, :math:`1 - \alpha^k`."""
    return -jnp.expm1(count.astype(decay.dtype) * jnp.log(decay))
