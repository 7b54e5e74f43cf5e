"""A log density that remembers what it is the sum of."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

VALUE = "value"
"""What numbers without a site are called."""


class Origin(NamedTuple):
    """Where a part comes from.

    Attributes
    ----------
    label : str
        Such as ``"log p(x)"``.
    frames : tuple
        NumPyro's frames of the plates around it: name, dim, size.
    rank : int
        Batch dimensions, the last ones of the array.
    subsampled : tuple of str
        Plates that hold a random part of their elements.
    """

    label: str
    frames: tuple[Any, ...] = ()
    rank: int = 0
    subsampled: tuple[str, ...] = ()


@jax.tree_util.register_pytree_node_class
class LogDensity:
    """A log density, or a sum of multiples of some: a number that keeps its parts apart.

    Sums, differences and multiples by Python's numbers and constant arrays are sums of parts again, each in its plates. An
    objective that returns one has the cost of each draw reduced to the parts that depend on it, element by element along plates.
    A multiple by a value of the run, such as a weight, makes a number of it, since that value may depend on any draw. So does
    everything else: ``jnp.exp``, ``jnp.logaddexp``, ``jnp.stack`` and the like take it as it is, and ``jnp.asarray`` says so
    explicitly.

    Parameters
    ----------
    values : sequence of arrays
        The parts, each with the batch shape of its site.
    origins : sequence of Origin

    Raises
    ------
    ValueError
        When a part in a subsampled plate is made a number.

    Notes
    -----
    It is a pytree: ``jax.vmap`` and ``jax.lax.stop_gradient`` go through it. A JAX array on the left of an operator makes a
    number of it (``x * log_p``); write ``log_p * x`` to keep the parts.
    """

    __array_ufunc__ = None  # NumPy's numbers on the left leave the operation to this class

    def __init__(self, values: Any, origins: Any) -> None:
        self.values, self.origins = tuple(values), tuple(origins)

    # --- a number ------------------------------------------------------------------------------------------------------

    def __jax_array__(self) -> Array:
        """The sum of all parts."""
        subsampled = sorted({name for origin in self.origins for name in origin.subsampled})
        if subsampled:
            raise ValueError(
                f"A log density over a random part of plate {', '.join(map(repr, subsampled))} was made a number, of which "
                "only sums and multiples are right on average. Return a sum of multiples of log densities (write log_p * x, "
                "not x * log_p), or take the whole plate."
            )
        total = jnp.zeros((), jnp.result_type(float))
        for value, origin in zip(self.values, self.origins, strict=True):
            total = total + _summed(value, origin.rank).astype(total.dtype)
        return total

    def __repr__(self) -> str:
        return f"LogDensity({', '.join(origin.label for origin in self.origins)})"

    # --- a sum of parts ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Array, Origin]]:
        return iter(zip(self.values, self.origins, strict=True))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, LogDensity):
            return LogDensity(self.values + other.values, self.origins + other.origins)
        if jnp.ndim(other) > 0:
            return jnp.asarray(self) + other
        return LogDensity((*self.values, jnp.asarray(other, jnp.result_type(float))), (*self.origins, Origin(VALUE)))

    def __neg__(self) -> "LogDensity":
        return LogDensity([-value for value in self.values], self.origins)

    def __mul__(self, other: Any) -> Any:
        if _may_depend_on_draws(other):
            return jnp.asarray(self) * jnp.asarray(other)
        return LogDensity([value * jnp.asarray(other, value.dtype) for value in self.values], self.origins)

    def __truediv__(self, other: Any) -> Any:
        if _may_depend_on_draws(other):
            return jnp.asarray(self) / jnp.asarray(other)
        return LogDensity([value / jnp.asarray(other, value.dtype) for value in self.values], self.origins)

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    __radd__, __rmul__ = __add__, __mul__

    # --- a pytree ------------------------------------------------------------------------------------------------------

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Parts, and where they come from."""
        return self.values, self.origins

    @classmethod
    def tree_unflatten(cls, origins: tuple, values: tuple) -> "LogDensity":
        """The inverse of `tree_flatten`."""
        return cls(values, origins)


def _may_depend_on_draws(factor: Any) -> bool:
    """Whether a factor joins the elements of plates: a value of the run, or anything but a number."""
    return isinstance(factor, LogDensity | Tracer) or jnp.ndim(factor) > 0


def _summed(value: Any, rank: int) -> Array:
    value = jnp.asarray(value)
    return jnp.sum(value, axis=tuple(range(-rank, 0))) if rank else value
