"""Random numbers for pytrees, and the rules for keys.

A key is split once *or* only folded, never both: on current JAX ``split(key)[i]`` equals ``fold_in(key, i)``, and the
key-reuse checker does not see the collision. Only typed keys (`jax.random.key`) are taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree

_source: ContextVar[Callable[[PyTree], PyTree] | None] = ContextVar("source of normals", default=None)


@contextmanager
def normals_from(source: Callable[[PyTree], PyTree]) -> Iterator[None]:
    """Let `normal_like` return ``source(tree)`` inside the block (and in this thread alone).

    With noise handed in as an argument, a kernel's step can be differentiated with respect to it.
    """
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def check_key(key: Key, name: str = "key") -> None:
    """Raise unless ``key`` is one typed key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} must be a typed key made by jax.random.key(seed); got {type(key).__name__}"
            f"{'' if dtype is None else f' of dtype {dtype}'}. Old-style keys of jax.random.PRNGKey can be wrapped by "
            "jax.random.wrap_key_data."
        )
    if key.shape != ():
        raise ValueError(f"{name} must be a single key; got an array of keys of shape {key.shape}.")


def normal_like(key: Key, tree: PyTree) -> PyTree:
    """Independent standard normals in the structure, shapes and dtypes of ``tree``; splits ``key``."""
    source = _source.get()
    if source is not None:
        return source(tree)
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if len(leaves) > 1 else [key]
    draws = [jax.random.normal(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, draws)


def describe(key: Key) -> str:
    """Say a key in words that can be read back, for the attributes of a result."""
    words: Array = jax.random.key_data(key)
    return f"{jax.random.key_impl(key)}:{','.join(str(int(w)) for w in words.ravel())}"
