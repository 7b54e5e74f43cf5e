"""Arguments of a NumPyro model: arrays as leaves of a pytree, all else static."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.types import PyTree


class _ArrayHere:
    """Stands among the static arguments where an array belongs."""


class Arguments(eqx.Module):
    """Keyword arguments of a model: arrays are leaves, all else is static."""

    arrays: list[Array]
    others: tuple = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __init__(self, keyword: dict[str, Any]) -> None:
        leaves, self.treedef = jax.tree_util.tree_flatten_with_path(keyword)
        self.arrays, others = [], []
        for path, leaf in leaves:
            if is_array_like(leaf):
                self.arrays.append(to_jax(jax.tree_util.keystr(path), leaf))
                others.append(_ArrayHere)
            else:
                others.append(_hashable(jax.tree_util.keystr(path), leaf))
        self.others = tuple(others)

    def keyword(self) -> dict[str, Any]:
        """Put the arguments together again."""
        arrays = iter(self.arrays)
        return self.treedef.unflatten([next(arrays) if x is _ArrayHere else x for x in self.others])


def is_array_like(x: Any) -> bool:
    """Whether an argument is an array (NumPy scalars are plain numbers: sizes, for instance)."""
    return hasattr(x, "__array__") and not isinstance(x, np.generic)


def to_jax(name: str, x: Any) -> Array:
    """Convert to a JAX array; raise where the dtype has no place in one."""
    try:
        return x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x))
    except TypeError as error:
        raise TypeError(
            f"The model argument {name} must be an array of numbers; got dtype {np.asarray(x).dtype}. Code labels as integers."
        ) from error


def to_rows(name: str, value: Any) -> PyTree:
    """Convert one entry of ``data=``: an array, a list of numbers, or a tree of arrays."""
    if isinstance(value, list | tuple):
        value = np.asarray(value)
    return jax.tree.map(lambda x: to_jax(f"data[{name!r}]", x), value)


def _hashable(name: str, x: Any) -> Any:
    try:
        hash(x)
    except TypeError as error:
        raise TypeError(
            f"The model argument {name} must be an array or hashable; got {type(x).__name__}. "
            "Make it an array or a tuple, or bind it by functools.partial(model, ...)."
        ) from error
    return x
