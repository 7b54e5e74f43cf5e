"""Log likelihoods with their gradients: of many data, and of each one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.posterior import Posterior
from ergodica.core.types import Estimate, PyTree


class LogLikelihood(NamedTuple):
    """The log likelihood of some data at one position, or an estimate of it, and its gradient."""

    value: Array
    gradient: PyTree


def add_prior(posterior: Posterior, params: PyTree, likelihood: LogLikelihood, *, n_grad: int) -> Estimate:
    """Estimate the log posterior from what is known of the log likelihood."""
    value, gradient = jax.value_and_grad(posterior.log_prior)(params)
    value = value + likelihood.value.astype(value.dtype)
    return Estimate(jax.tree.map(jnp.add, gradient, likelihood.gradient), value, n_grad=n_grad)


def of_each_datum(posterior: Posterior, params: PyTree, rows: PyTree) -> LogLikelihood:
    """Values (n,) and gradients, leading axis (n,) before each leaf of the parameters."""

    def of_one(row: PyTree) -> tuple[Array, PyTree]:
        one = jax.tree.map(lambda x: x[None], row)
        return jax.value_and_grad(lambda theta: jnp.sum(posterior.log_likelihood(theta, one)))(params)

    return LogLikelihood(*jax.vmap(of_one)(rows))


def squared_norm(gradients: PyTree) -> Array:
    """Squared Euclidean norm over all leaves, of each entry of the leading axis (n,)."""
    squares = [jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=1) for x in jax.tree.leaves(gradients)]
    total = squares[0]
    for square in squares[1:]:
        total = total + square.astype(total.dtype)
    return total
