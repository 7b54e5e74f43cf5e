"""Checks of what a user hands in. Each error names the argument, what it got, what it expects and what to do."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ergodica.core.types import PyTree


def is_concrete(x: Any) -> bool:
    """Whether the value of ``x`` is known now (tracers and abstract shapes are not)."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def positive(name: str, value: Any, *, allow_zero: bool = False, hint: str = "") -> Array:
    """Return ``value`` as a strongly typed float array; raise where a concrete entry is not positive and finite."""
    try:
        array = jnp.asarray(value, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a number; got {value!r} of type {type(value).__name__}. {hint}".rstrip()
        ) from error
    if is_concrete(array):
        entries = np.asarray(array)
        if not np.all(np.isfinite(entries)) or np.any(entries < 0) or (not allow_zero and np.any(entries == 0)):
            expects = "finite and at least 0" if allow_zero else "finite and above 0"
            raise ValueError(f"{name} must be {expects}; got {value!r}. {hint}".rstrip())
    return array


def integer(name: str, value: Any, *, least: int = 1, most: float = math.inf, hint: str = "") -> int:
    """Return ``value`` as an int within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}. {hint}".rstrip())
    if not least <= value <= most:
        bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}; got {value}. {hint}".rstrip())
    return int(value)


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """Return ``value`` if it is among the options."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}.")
    return value


def instance[T](name: str, value: Any, kind: type[T], example: str) -> T:
    """Return ``value`` if it is of a kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an {kind.__name__}, {example}; got {value!r} of type {type(value).__name__}.")
    return value


def function(name: str, value: Any) -> Callable:
    """Return ``value`` if it can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {value!r} of type {type(value).__name__}.")
    return value


def position(name: str, tree: PyTree) -> PyTree:
    """Copy a position into arrays; raise unless its leaves are floating point and finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array; got {tree!r}.")
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        dtype = jnp.result_type(leaf) if not isinstance(leaf, str) else None
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} must be of floating point; got dtype {dtype or 'str'}. Gradient-based samplers move real numbers: "
                "cast counts with .astype(float), and marginalise discrete variables."
            )
        if is_concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"{where} must be finite; got {np.asarray(leaf).ravel()[:4]}… with NaN or infinity.")
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), tree)


def same_structure(name: str, tree: PyTree, other_name: str, other: PyTree) -> None:
    """Raise unless two trees have the same structure, shapes and dtypes."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(
            f"{name} must have the structure of {other_name}, {jax.tree.structure(other)}; got {jax.tree.structure(tree)}."
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have the shape {jnp.shape(y)} of {other_name}; got {jnp.shape(x)}."
            )


def leading_length(name: str, data: PyTree) -> int:
    """Return the common length of the leading axes; raise where the leaves disagree."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array; got {data!r}.")
    lengths = {}
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{where} must have a leading axis that runs over the data; got a scalar.")
        lengths[where] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{where} has {n}" for where, n in lengths.items())
        raise ValueError(f"All arrays of {name} must have one row a datum, so the same length; {listed}.")
    (length,) = set(lengths.values())
    if length == 0:
        raise ValueError(f"{name} must hold at least one row; got none.")
    return length
