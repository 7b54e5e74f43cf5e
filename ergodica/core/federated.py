"""The contract between a sampler whose chains travel and the gradients that they find at each client."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array

from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.shards import Shards
from ergodica.core.types import PyTree


class AbstractFederatedGradient(AbstractGradientEstimator):
    r"""A gradient that a chain takes at the client where it is.

    The client is part of the estimator's state. `visit` puts a chain at one; as `init` leaves it, the state is at none, and each
    call of `estimate` draws a client of its own. The mean over clients, drawn with ``probabilities``, is the gradient of the
    posterior.
    """

    shards: eqx.AbstractVar[Shards]
    probabilities: eqx.AbstractVar[Array]
    """Share :math:`f_s` of the *steps* that are made at each client, with sum 1."""

    @abc.abstractmethod
    def visit(self, state: Any, client: Array, share: Array | None = None) -> Any:
        """Put a chain at a client.

        Parameters
        ----------
        state : pytree
        client : int32 scalar
        share : scalar, optional
            What this client's gradient is divided by; its entry of ``probabilities`` unless given.
        """

    @abc.abstractmethod
    def mean_log_density(self, params: PyTree, client: Array) -> Array:
        """Evaluate what the gradients at a client are, on average over batches, the gradient of (scalar)."""

    @abc.abstractmethod
    def surrogate_log_density(self, params: PyTree, client: Array) -> Array:
        """Log density of what stands for a client's likelihood elsewhere, up to a constant; 0 where nothing does."""

    @abc.abstractmethod
    def covariance(self, params: PyTree, client: Array, *, diagonal: bool = False) -> Array:
        """Covariance (D, D), or variances (D,), of one gradient at a client, over batches."""

    @abc.abstractmethod
    def only(self, client: int) -> "AbstractFederatedGradient":
        """Take what one client needs to give gradients at its own site: its data, as client 0 of one, and no others'."""

    @property
    def posterior(self) -> Any:
        """The posterior of all the data."""
        return self.shards.posterior
