"""Latents remembered for each datum, and the accept rule and baseline of their moves."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import PyTree
from ergodica.estimators.minibatch.subsample import MinibatchState


class MonteCarloEMState(NamedTuple):
    """Where the epoch stands, and a chain for each datum.

    Attributes
    ----------
    minibatch : MinibatchState
    latents : pytree of arrays (N, …)
    started : bool array (N,)
        Whether a latent of positive likelihood has been found.
    visits : int32 array (N,)
        How often a chain was moved on from a latent that it had.
    moves : int32 array (N,)
        How often it accepted another one.
    """

    minibatch: MinibatchState
    latents: PyTree
    started: Array
    visits: Array
    moves: Array

    @property
    def acceptance_rate(self) -> Array:
        """Share of the visits at which each chain moved; NaN where it was never visited twice."""
        return jnp.where(self.visits > 0, self.moves / jnp.maximum(self.visits, 1), jnp.nan)


class EStep(NamedTuple):
    """What is known of the chains of a batch, after their step.

    Attributes
    ----------
    acceptance_rate : scalar
        Mean acceptance probability of the proposals.
    started : scalar
        Share of the rows that have a latent of positive likelihood.
    """

    acceptance_rate: Array
    started: Array


class Rows(NamedTuple):
    """Latents of some rows, and the logarithms of their prior, likelihood and proposal densities (n,)."""

    latents: PyTree
    log_prior: Array
    log_likelihood: Array
    log_proposal: Array

    @property
    def log_weight(self) -> Array:
        """Of the Metropolis independence sampler; the prior cancels where it is the proposal."""
        ratio = self.log_prior - self.log_proposal
        return jnp.where(self.log_likelihood > -jnp.inf, ratio + self.log_likelihood, -jnp.inf)


def acceptance_probability(log_weight: Array, proposed: Array) -> Array:
    r"""Of the Metropolis independence sampler: :math:`\min(1, w' / w)`; 0 where :math:`w' = 0`, also where :math:`w = 0`."""
    ratio = jnp.where(proposed > -jnp.inf, proposed - log_weight, -jnp.inf)
    return jnp.exp(jnp.minimum(jnp.where(jnp.isnan(ratio), -jnp.inf, ratio), 0))
