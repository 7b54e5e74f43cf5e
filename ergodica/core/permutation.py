"""Random permutations and draws that are evaluated where they are needed: nothing is sorted, scattered or branched upon."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

NUM_ROUNDS = 32
_ODD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
_RANGE = 2**32


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


class AliasTable(eqx.Module):
    """Draws from a law on ``0 … n-1`` by one look-up, whatever ``n`` is (Walker 1977; built as by Vose 1991).

    Attributes
    ----------
    threshold : uint32 array (n,)
        A slot gives its own index where a random word is below this.
    alias : int32 array (n,)
        What it gives otherwise.
    """

    threshold: Array
    alias: Array

    def __init__(self, probabilities: np.ndarray) -> None:
        threshold, alias = _fill(np.asarray(probabilities, np.float64))
        self.threshold, self.alias = jnp.asarray(threshold, jnp.uint32), jnp.asarray(alias, jnp.int32)

    def draw(self, words: Array) -> Array:
        """Draw an index (int32 scalar) by two random words (uint32)."""
        size = self.alias.shape[0]
        slot = (words[0] % jnp.uint32(size)).astype(jnp.int32)
        return jnp.where(words[1] < self.threshold[slot], slot, self.alias[slot])

    def probabilities(self) -> np.ndarray:
        """Compute the law that the table draws from, in double precision (``n`` divides 2³² up to a rounding of 2⁻³² n)."""
        own = np.asarray(self.threshold, np.float64) / _RANGE
        size = own.size
        found = own / size
        np.add.at(found, np.asarray(self.alias), (1 - own) / size)
        return found


def _fill(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and aliases; full slots are their own alias."""
    size = probabilities.size
    scaled = probabilities / probabilities.sum() * size
    own, alias = np.ones(size), np.arange(size)
    small = [i for i in range(size) if scaled[i] < 1]
    large = [i for i in range(size) if scaled[i] >= 1]
    while small and large:
        less, more = small.pop(), large.pop()
        own[less], alias[less] = scaled[less], more
        scaled[more] -= 1 - scaled[less]
        (small if scaled[more] < 1 else large).append(more)
    return np.minimum(np.rint(own * _RANGE), _RANGE - 1).astype(np.uint32), alias
