"""Where chains start."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position


def starts(
    key: Key, num_chains: int, initial: Position | Callable[[Key], Position] | None, posterior: Posterior | None
) -> Position:
    """Positions of all chains, with a leading axis, copied and checked."""
    keys = jax.random.split(key, num_chains)
    own = None if posterior is None or posterior.initial is None else posterior.shape()
    if initial is None:
        if posterior is None or own is None:
            raise ValueError("Neither the posterior nor the call says where chains start; give initial=.")
        positions = jax.jit(jax.vmap(posterior.start))(keys)
        return check.position("initial", positions)
    if callable(initial):
        return check.position("initial", jax.vmap(initial)(keys))
    initial = check.position("initial", initial)
    if own is not None:
        stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((num_chains, *s.shape), s.dtype), own)
        if jax.tree.structure(initial) == jax.tree.structure(own) and all(
            x.shape == s.shape for x, s in zip(jax.tree.leaves(initial), jax.tree.leaves(stacked), strict=True)
        ):
            return initial
        check.same_structure("initial", initial, "a position", own)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_chains, *x.shape)) + 0, initial)
