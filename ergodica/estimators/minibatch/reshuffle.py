"""The order in which blocks are visited: a fresh random permutation an epoch, evaluated at the cursor.

Nothing is sorted, scattered or branched upon, so a vmapped chain costs what a single one does, and the whole state is
two words and a cursor.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.permutation import permutation_at as permutation_at
from ergodica.core.types import Key


class Cursor(NamedTuple):
    """Where an epoch stands: ``words`` (2,) uint32 that name its permutation, ``position`` int32 within it."""

    words: Array
    position: Array


def start(key: Key) -> Cursor:
    """Open the first epoch."""
    return Cursor(jax.random.bits(key, (2,), jnp.uint32), jnp.zeros((), jnp.int32))


def advance(key: Key, cursor: Cursor, num_blocks: int, *, symmetric: bool = False) -> tuple[Array, Cursor]:
    """Give the block at the cursor (int32 scalar) and the cursor of the next call.

    With ``symmetric`` an epoch goes through its permutation there and back, so it has twice as many calls.
    """
    length = 2 * num_blocks if symmetric else num_blocks
    place = jnp.minimum(cursor.position, length - 1 - cursor.position) if symmetric else cursor.position
    block = permutation_at(cursor.words, place, num_blocks)
    following = cursor.position + 1
    ended = following == length
    # the key of a call is fresh random words itself: no need to hash it again at each step, for use once an epoch
    words = jnp.where(ended, jax.random.key_data(key)[:2], cursor.words)
    # without the barrier the compiler fuses the permutation into the slice and evaluates it once an element
    block = jax.lax.optimization_barrier(block)
    return block, Cursor(words, jnp.where(ended, 0, following))
