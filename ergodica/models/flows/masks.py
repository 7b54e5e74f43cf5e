"""Which coordinates a coupling moves, and how a point is taken apart and put together without scatters."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check

_SLICES = 4


def half_mask(dim: int, parity: int = 0) -> tuple[int, ...]:
    """Indices of the second half of the coordinates (``parity`` 0) or of the first (1)."""
    half = check.integer("dim", dim, least=2) // 2
    return tuple(range(half, dim)) if check.integer("parity", parity, least=0, most=1) == 0 else tuple(range(half))


def alternating_mask(dim: int, parity: int = 0) -> tuple[int, ...]:
    """Indices of every second coordinate: the odd ones (``parity`` 0) or the even ones (1)."""
    check.integer("dim", dim, least=2)
    return tuple(range(1 - check.integer("parity", parity, least=0, most=1), dim, 2))


def checkerboard_mask(shape: Sequence[int], parity: int = 0) -> tuple[int, ...]:
    """Indices, in a raveled lattice, of the sites whose coordinates have an odd sum (``parity`` 0) or an even one (1)."""
    shape = tuple(check.integer("shape", size) for size in shape)
    check.integer("parity", parity, least=0, most=1)
    sums = sum(np.indices(shape)) if shape else np.zeros(())
    sites = tuple(int(i) for i in np.flatnonzero(np.asarray(sums).ravel() % 2 != parity))
    if not 0 < len(sites) < np.prod(shape):
        raise ValueError(f"shape must have at least two sites; got {shape}.")
    return sites


MASKS = {"halves": half_mask, "alternating": alternating_mask}


class Split(eqx.Module):
    """Takes points apart into the coordinates that are kept and those that are moved; static.

    Halves and other few runs of indices become slices, masks with one member in each pair (2i, 2i + 1) selections, as for lattices
    of even width: both have cheap derivatives. What is left over becomes a gather, the derivative of which is a scatter.

    Parameters
    ----------
    dim : int
        D, at least 2.
    moved : sequence of int
        Indices of the coordinates that are moved, each once; neither none nor all.
    """

    dim: int = eqx.field(static=True)
    moved: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, dim: int, moved: Sequence[int]) -> None:
        self.dim = check.integer("dim", dim, least=2, hint="A coupling needs a coordinate to move and one to keep.")
        try:
            self.moved = tuple(int(i) for i in moved)
            integers = all(int(i) == i for i in moved) and not any(isinstance(i, bool | np.bool) for i in moved)
        except (TypeError, ValueError) as error:
            raise TypeError(f"moved must be a sequence of indices; got {moved!r}.") from error
        if not integers:
            raise TypeError(
                f"moved must hold indices (not a mask of booleans: numpy.flatnonzero makes them); got {moved!r}."
            )
        if not (0 < len(self.moved) < dim and sorted(set(self.moved)) == sorted(self.moved)):
            raise ValueError(
                f"moved must name at least one of the {dim} coordinates, each once, and leave at least one; got {self.moved}."
            )
        if min(self.moved) < 0 or max(self.moved) >= dim:
            raise ValueError(f"moved must hold indices from 0 to {dim - 1}; got {self.moved}.")

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the other coordinates."""
        return tuple(i for i in range(self.dim) if i not in set(self.moved))

    def apart(self, x: Array) -> tuple[Array, Array]:
        """The coordinates that are kept, and those that are moved."""
        if x.shape != (self.dim,):
            raise ValueError(
                f"A coupling of {self.dim} coordinates moves one point ({self.dim},); got shape {x.shape}."
            )
        pairs = self._pairs()
        if pairs is None:
            return take(x, self.kept), take(x, self.moved)
        first, second = x[0::2], x[1::2]
        return jnp.where(pairs, first, second), jnp.where(pairs, second, first)

    def together(self, kept: Array, moved: Array) -> Array:
        """The point with given coordinates that are kept and moved."""
        pairs = self._pairs()
        if pairs is None:
            return take(jnp.concatenate([kept, moved]), invert(self.kept + self.moved))
        both = jnp.stack([jnp.where(pairs, kept, moved), jnp.where(pairs, moved, kept)], axis=-1)
        return both.reshape(self.dim)

    def _pairs(self) -> Any:
        """Whether the second of each pair is moved, if one of each is and halves are not slices already; else None."""
        in_order = self.dim % 2 == 0 and [i // 2 for i in self.moved] == list(range(self.dim // 2))
        if not in_order or self.dim == 2:
            return None
        return np.asarray(self.moved) % 2 == 1


def invert(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(int(i) for i in np.argsort(np.asarray(permutation)))


def take(x: Array, indices: Sequence[int]) -> Array:
    """Entries of a vector at static indices, each once: slices where they are few, else a gather."""
    runs = _runs(indices)
    if len(runs) > _SLICES:
        return x.at[np.asarray(indices)].get(unique_indices=True, mode="promise_in_bounds")
    pieces = [_slice(x, start, step, length) for start, step, length in runs]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Arithmetic runs (start, step, length) with steps of 1 or -1."""
    runs: list[tuple[int, int, int]] = []
    for now in indices:
        if runs:
            start, step, length = runs[-1]
            move = now - (start + step * (length - 1))
            if abs(move) == 1 and (length == 1 or move == step):
                runs[-1] = (start, move, length + 1)
                continue
        runs.append((now, 1, 1))
    return runs


def _slice(x: Array, start: int, step: int, length: int) -> Array:
    if step == 1:
        return x if length == len(x) else x[start : start + length]
    return jnp.flip(x[start - length + 1 : start + 1])
