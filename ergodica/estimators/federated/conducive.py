"""Minibatch gradients at clients, with and without conducive gradients: FSGLD and DSGLD."""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.federated import AbstractFederatedGradient
from ergodica.core.permutation import AliasTable
from ergodica.core.shards import Shards
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.federated.surrogates import AbstractSurrogates


class ConduciveState(NamedTuple):
    """Where a chain is.

    Attributes
    ----------
    client : int32 scalar or None
        The client; ``None`` where each estimate draws one of its own.
    share : scalar or None
        :math:`f_s`, what the client's gradient is divided by; ``None`` where there is one client, which has all the data.
    """

    client: Array | None
    share: Array | None


class Conducive(AbstractFederatedGradient):
    r"""Gradient at one client, with what the others would say of it: the gradient of FSGLD, and of DSGLD at strength 0.

    .. math::

        \hat g_s(\theta) = \nabla\log p(\theta) + \frac{N_s}{f_s m} \sum_{i \in B} \nabla\log p(x_i \mid \theta)
            + \alpha \left[ \nabla\log q(\theta) - \frac{1}{f_s} \nabla\log q_s(\theta) \right],
        \qquad q = \prod_{r=1}^S q_r

    for a batch :math:`B` of :math:`m` rows of client :math:`s`, drawn with replacement, and surrogates :math:`q_s` of the
    likelihoods :math:`p(x_s \mid \theta)`.

    Parameters
    ----------
    shards : Shards
    surrogates : AbstractSurrogates, optional
        Such as `GaussianSurrogates` or those of `laplace_surrogates`. Left out, there is no bracket (DSGLD).
    batch_size : int, optional
        :math:`m`. Left out, all rows of the client are used.
    probabilities : {"sizes", "uniform"} or array (S,)
        :math:`f_s`, the share of steps made at each client: in proportion to the sizes of the shards, equal, or any other.
    strength : float
        :math:`\alpha`: 0 is DSGLD, 1 is FSGLD.

    Raises
    ------
    ValueError, TypeError
        For surrogates of another number of clients, probabilities that are none, or numbers out of range.

    Notes
    -----
    The bracket has mean 0 over clients drawn with :math:`f`, whatever the surrogates are: they change noise, not bias, while a
    chain moves on at each step. If :math:`q_s` is the client's likelihood, the gradient of a whole shard is that of the
    posterior at *every* client, and a chain may stay as long as it likes. Without surrogates, or with poor ones, a chain that
    stays drifts towards the client's own posterior; `ergodica.predict_federated` says how far, before the run.

    Cost: ``batch_size`` likelihood gradients and one evaluation of a surrogate, whatever the number of clients. Without
    ``batch_size``, as many as the largest shard has rows. Inside `ergodica.samplers.Federated` the chain is at one
    client; by itself, as in a plain `SGLD`, the estimator draws a client at each call.

    Not for a likelihood that does not factorise over the rows, nor for data that are streamed.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), equations 3 to 5 and remark 1; Ahn, Shahbaba and Welling (2014).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> shards = erg.Shards(posterior, [0, 0, 1, 1, 1, 1])
    >>> exact = erg.estimators.GaussianSurrogates(mean=jnp.array([0.5, 3.5]), precision=jnp.array([2.0, 4.0]))
    >>> gradient = Conducive(shards, exact)
    >>> at = [gradient.visit(gradient.init(jax.random.key(0), posterior.initial), jnp.array(s)) for s in (0, 1)]
    >>> [round(float(gradient.estimate(jax.random.key(1), jnp.array(1.0), state)[0].gradient), 4) for state in at]
    [8.0, 8.0]
    >>> float(jax.grad(posterior.log_density)(jnp.array(1.0)))
    8.0
    """

    shards: Shards
    surrogates: AbstractSurrogates | None
    probabilities: Array
    strength: Array
    table: AliasTable
    batch_size: int | None = eqx.field(static=True)
    sole: bool = eqx.field(static=True)

    references: ClassVar = ("elmekkaoui2021", "ahn2014")

    def __init__(
        self,
        shards: Shards,
        surrogates: AbstractSurrogates | None = None,
        batch_size: int | None = None,
        *,
        probabilities: Literal["sizes", "uniform"] | Any = "sizes",
        strength: Any = 1.0,
    ) -> None:
        self.shards = check.instance("shards", shards, Shards, "such as Shards(posterior, client)")
        self.surrogates = surrogates
        if surrogates is not None:
            check.instance("surrogates", surrogates, AbstractSurrogates, "such as GaussianSurrogates(mean, precision)")
            if surrogates.num_clients != shards.num_clients:
                raise ValueError(
                    f"surrogates must be of the {shards.num_clients} clients that shards has; got {surrogates.num_clients}."
                )
        self.batch_size = None if batch_size is None else check.integer("batch_size", batch_size)
        share = client_probabilities(shards, probabilities)
        self.probabilities, self.table = jnp.asarray(share, jnp.result_type(float)), AliasTable(share)
        self.strength = check.positive("strength", strength, allow_zero=True)
        self.sole = shards.num_clients == 1

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> ConduciveState:  # noqa: ARG002
        """Start at no client: each estimate draws one until `visit` puts the chain at one."""
        self._refuse(batch)
        return ConduciveState(None, None)

    def visit(self, state: ConduciveState, client: Array, share: Array | None = None) -> ConduciveState:  # noqa: ARG002
        """Put a chain at a client."""
        if self.sole:
            return ConduciveState(client, None)
        return ConduciveState(client, self.probabilities[client] if share is None else share)

    def estimate(
        self, key: Key, params: PyTree, state: ConduciveState, batch: Batch | None = None
    ) -> tuple[Estimate, ConduciveState]:
        """Estimate the gradient at ``params`` from a batch of the client where the chain is."""
        self._refuse(batch)
        if state.client is None:
            return self.probe(key, params, state), state
        return self.at(params, state, self._draw(key, state.client)), state

    def probe(self, key: Key, params: PyTree, state: ConduciveState) -> Estimate:
        """Estimate at a client that is drawn anew, which is unbiased for the posterior wherever the chain is."""
        key_client, key_rows = jax.random.split(key)
        client = self.table.draw(jax.random.bits(key_client, (2,), jnp.uint32))
        return self.at(params, self.visit(state, client), self._draw(key_rows, client))

    def at(self, params: PyTree, state: ConduciveState, batch: Batch) -> Estimate:
        """Estimate value and gradient at a client, from a batch of it."""
        client, share = state
        assert client is not None

        def log_density(params: PyTree) -> Array:
            prior, own = self.posterior.log_prior(params), self.shards.log_likelihood(params, client, batch)
            return prior + (own if share is None else own / tree.cast_like(share, own)).astype(prior.dtype)

        value, gradient = jax.value_and_grad(log_density)(params)
        if self.surrogates is not None and share is not None:
            push, direction = self.surrogates.conducive(params, client, share)
            gradient = tree.axpy(self.strength, direction, gradient)
            value = value + tree.cast_like(self.strength, value) * push.astype(value.dtype)
        return Estimate(gradient, value, n_grad=batch.weight.shape[0])

    def mean_log_density(self, params: PyTree, client: Array) -> Array:
        """Evaluate what the gradients at a client are, on average over batches, the gradient of (scalar)."""
        return self.at(params, self.visit(ConduciveState(None, None), client), self.shards.whole(client)).value

    def surrogate_log_density(self, params: PyTree, client: Array) -> Array:
        """Log density of a client's surrogate, up to a constant; 0 where there is none."""
        if self.surrogates is None:
            return jnp.zeros((), jax.eval_shape(self.posterior.log_prior, params).dtype)
        return self.surrogates.evaluate(self.surrogates.of(client), params)[0]

    def covariance(self, params: PyTree, client: Array, *, diagonal: bool = False) -> Array:
        """Covariance (D, D) of one gradient at a client: that of its data's gradients, times :math:`N_s^2 / (f_s^2 m)`."""
        _, spread = self.shards.gradient_moments(params, client, diagonal=diagonal)
        if self.batch_size is None:
            return jnp.zeros_like(spread)
        size = self.shards.sizes[client].astype(spread.dtype) / self.probabilities[client].astype(spread.dtype)
        return spread * (size * size / jnp.asarray(self.batch_size, spread.dtype))

    def only(self, client: int) -> "Conducive":
        """Take what one client needs: its rows, its surrogate and the sum of all, and its share :math:`f_s`."""
        surrogates = None if self.surrogates is None else self.surrogates.only(client)
        alone = Conducive(self.shards.only(client), surrogates, self.batch_size, strength=self.strength)
        object.__setattr__(alone, "probabilities", self.probabilities[client : client + 1])
        object.__setattr__(alone, "sole", self.sole)
        return alone

    @property
    def exact(self) -> bool:
        """Whether there is one client, and all its rows are used."""
        return self.batch_size is None and self.sole

    def _draw(self, key: Key, client: Array) -> Batch:
        return self.shards.whole(client) if self.batch_size is None else self.shards.draw(key, client, self.batch_size)

    def _refuse(self, batch: Batch | None) -> None:
        if batch is not None:
            raise ValueError(
                "Conducive takes no batch that is handed over: it belongs to no client. Give shards that hold the data."
            )


def client_probabilities(shards: Shards, probabilities: Any) -> np.ndarray:
    """Probabilities of the clients, by name or given, in double precision; raise where they are none."""
    count = shards.num_clients
    if isinstance(probabilities, str):
        check.one_of("probabilities", probabilities, ("sizes", "uniform"))
        sizes = np.asarray(shards.sizes, np.float64)
        return sizes / sizes.sum() if probabilities == "sizes" else np.full(count, 1 / count)
    found = np.asarray(probabilities, np.float64)
    if found.shape != (count,):
        raise ValueError(f"probabilities must have one entry a client, shape ({count},); got {found.shape}.")
    if not np.all(np.isfinite(found)) or np.any(found <= 0) or abs(found.sum() - 1) > 1e-3:
        raise ValueError(
            f"probabilities must be above 0 with the sum 1 (a client that is never visited would be left out of the posterior); "
            f"got entries from {found.min()} to {found.max()} with the sum {found.sum()}."
        )
    return found / found.sum()
