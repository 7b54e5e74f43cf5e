"""The order in which blocks are visited: a fresh random permutation an epoch, evaluated at the cursor.

Nothing is sorted, scattered or branched upon, so a vmapped chain costs what a single one does, and the whole state is
two words and a cursor.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key

NUM_ROUNDS = 32
_ODD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)


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


@functools.partial(jax.jit, static_argnames="size")
def permutation_at(words: Array, position: Array, size: int) -> Array:
    """Evaluate a keyed permutation of ``0 … size-1`` at one position.

    A swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs ``x`` with ``k - x`` (mod ``size``) for a
    random ``k`` and swaps the pair or not, by a bit that depends on the pair alone. The order is then reversed or not
    by one more bit, which makes the probability that ``i`` comes before ``j`` one half for every pair, whatever the
    rounds do: what the order of two blocks does to first order then cancels on average.
    """
    if size == 1:
        return jnp.zeros((), jnp.int32)
    words = _mix(words[0] ^ jnp.arange(1, NUM_ROUNDS + 2, dtype=jnp.uint32) * jnp.uint32(_ODD[3]), words[1])
    x, n = position.astype(jnp.uint32), jnp.uint32(size)
    x = jnp.where(words[NUM_ROUNDS] >> 31 == 0, x, n - 1 - x)
    shifts = words[:NUM_ROUNDS] % n
    for i in range(NUM_ROUNDS):
        partner = shifts[i] + n - x
        partner = jnp.where(partner >= n, partner - n, partner)
        swap = _mix(jnp.maximum(x, partner) + jnp.uint32(1), words[i]) >> 31
        x = jnp.where(swap == 1, partner, x)
    return x.astype(jnp.int32)


def _mix(x: Array, word: Array) -> Array:
    """Hash a word (uint32) under another, by multiply, rotate and xor-shift."""
    x = (x * jnp.uint32(_ODD[0])) ^ word
    x = (x ^ (x >> 16)) * jnp.uint32(_ODD[1])
    x = (x ^ (x >> 13)) * jnp.uint32(_ODD[2])
    return x ^ (x >> 16)
