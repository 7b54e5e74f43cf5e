"""What kernels that hold one gradient estimator have in common."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Estimate, Key, Position, PyTree


class AbstractGradientKernel(AbstractKernel):
    """A kernel whose probe, posterior and noise are those of its field ``gradient``; its states have one too."""

    gradient: eqx.AbstractVar[AbstractGradientEstimator]

    def probe(self, key: Key, state: Any) -> Estimate | None:
        """Estimate the gradient at the chain's position, independently of the chain."""
        return self.gradient.probe(key, state.position, state.gradient)

    @property
    def posterior(self) -> Any:
        """The posterior that the gradient estimator holds."""
        return self.gradient.posterior

    @property
    def batch_source(self) -> Any:
        """What draws the gradient estimator's batches."""
        return self.gradient.batch_source

    @property
    def exact_gradient(self) -> bool:
        """Whether the gradient carries no noise (the law may be biased by the step all the same)."""
        return self.gradient.exact


def check_gradient(gradient: Any) -> AbstractGradientEstimator:
    """Return a gradient estimator; raise where it is none."""
    return check.instance("gradient", gradient, AbstractGradientEstimator, "such as Minibatch(posterior, batch_size)")


def coordinatewise(name: str, value: PyTree, position: Position) -> PyTree:
    """Give a setting, a scalar or a tree with one value a coordinate, in the structure and dtypes of the position."""
    if jax.tree.structure(value) == jax.tree.structure(position):
        return jax.tree.map(lambda v, x: tree.cast_like(v, x), value, position)
    if jax.tree_util.all_leaves([value]) and jnp.ndim(value) == 0:
        return jax.tree.map(lambda x: tree.cast_like(value, x), position)
    raise ValueError(
        f"{name} must be a scalar or have the structure of the position, {jax.tree.structure(position)}; "
        f"got {jax.tree.structure(value)}."
    )
