"""Arithmetic on pytrees. Leaf by leaf, with dtypes kept; raveling to a vector happens here and nowhere else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core.types import PyTree


def cast_like(scalar: Array | float, leaf: Array) -> Array:
    """Give a scalar the dtype of a leaf, so that strict dtype promotion has nothing to object to."""
    return jnp.asarray(scalar).astype(leaf.dtype)


def scale(tree: PyTree, factor: Array | float) -> PyTree:
    """Multiply every leaf by a scalar."""
    return jax.tree.map(lambda x: x * cast_like(factor, x), tree)


def add(a: PyTree, b: PyTree) -> PyTree:
    """Add two trees of one structure."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """Subtract the second tree from the first."""
    return jax.tree.map(jnp.subtract, a, b)


def axpy(factor: Array | float, x: PyTree, y: PyTree) -> PyTree:
    """Return ``factor * x + y`` with the dtypes of ``y``."""
    return jax.tree.map(lambda xi, yi: cast_like(factor, yi) * xi.astype(yi.dtype) + yi, x, y)


def dot(a: PyTree, b: PyTree) -> Array:
    """Sum of the products of all entries."""
    products = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))
    return _total(products)


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all entries."""
    return jnp.sqrt(_total([jnp.sum(x * x) for x in jax.tree.leaves(tree)]))


def size(tree: PyTree) -> int:
    """Count the entries of all leaves."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))


def all_finite(tree: PyTree) -> Array:
    """Whether no entry is NaN or infinite (scalar bool)."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def ravel(tree: PyTree) -> Array:
    """All entries as one vector, in the order of the leaves."""
    return ravel_pytree(tree)[0]


def unravel(vector: Array, like: PyTree) -> PyTree:
    """The tree whose raveled form is a vector, in the structure, shapes and dtypes of another (or of its shapes)."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = [vector[end - math.prod(leaf.shape) : end] for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def select(condition: Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Choose between two trees by a scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)


def path_name(path: tuple, *, root: str = "position") -> str:
    """Name of a leaf from its key path: nested names are joined by dots, a bare array is called ``root``.

    Slashes, which xarray refuses, become dots too.
    """
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(parts).replace("/", ".") or root


def named_leaves(tree: PyTree, *, root: str = "position") -> dict[str, Array]:
    """Leaves by name (see `path_name`)."""
    return {path_name(path, root=root): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def coordinate_names(tree: PyTree, *, root: str = "position") -> list[str]:
    """Name of each entry in the order of `ravel`, such as ``beta[2]`` or ``w[0, 3]``; a scalar leaf has no bracket."""
    names = []
    for name, leaf in named_leaves(tree, root=root).items():
        shape = jnp.shape(leaf)
        names += [f"{name}[{', '.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
    return names


def _total(scalars: list[Array]) -> Array:
    if not scalars:
        return jnp.zeros(())
    dtype = jnp.result_type(*scalars) if len({s.dtype for s in scalars}) == 1 else jnp.result_type(float)
    return jnp.sum(jnp.stack([s.astype(dtype) for s in scalars]))
