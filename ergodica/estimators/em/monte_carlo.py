"""Gradients of a marginal likelihood by remembered latents, with a control variate from the proposals."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.leave_one_out import leave_one_out_mean
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.em.memory import EStep, MonteCarloEMState, Rows, acceptance_probability
from ergodica.estimators.minibatch.subsample import Minibatch
from ergodica.estimators.policy.gradient import Law


class MonteCarloEM(AbstractGradientEstimator):
    r"""Gradient of a marginal likelihood, with a Markov chain for each datum and its proposals as a control variate.

    .. math::

        \nabla_\theta \sum_i \log \mathrm{E}_{p_\theta(z \mid x_i)}\, c_\theta(z, y_i)
        &= \sum_i \mathrm{E}_{p_\theta(z \mid x_i, y_i)} \nabla_\theta
        \left[ \log p_\theta(z \mid x_i) + \log c_\theta(z, y_i) \right] \\
        \hat g &= N \sum_{i \in B} w_i \left[ \nabla_\theta \log p_\theta(z'_i \mid x_i) + \nabla_\theta \log c_\theta(z'_i, y_i)
        - \beta_i \nabla_\theta \log p_\theta(\tilde z_i \mid x_i) \right]

    The proposal :math:`\tilde z_i` is drawn from the prior and accepted with probability
    :math:`a_i = \min(1, c_\theta(\tilde z_i) / c_\theta(z_i))`; :math:`z'_i` is the state after that, which is remembered;
    :math:`\beta_i` is the mean of :math:`a_j` over the *other* rows of the batch.

    Parameters
    ----------
    prior : callable
        ``prior(params, rows)``: the law of the latents of n rows, such as a NumPyro distribution of batch shape (n,).
    log_likelihood : callable
        ``log_likelihood(params, latents, rows) -> (n,)``: :math:`\log c`. For answers that are right or wrong it is 0 or
        minus infinity. Its derivative must be finite there too: ``jnp.where(right, log_p, -jnp.inf)``, not
        ``jnp.log(jnp.where(right, p, 0.0))``.
    data : pytree of arrays
        One row a datum along the leading axis.
    batch_size : int, optional
        Rows a gradient; left out for ``scheme="full"``.
    scheme : {"blocks", "full"}
        As in `Minibatch`.
    guide : callable, optional
        ``guide(params, rows)``: a law to propose from in the place of the prior. Its own parameters get the gradient of
        :math:`\sum_i \mathrm{E}_{p(z \mid x_i, y_i)} \log q_\phi(z)`, and the control variate is then
        :math:`\beta_i \nabla_\phi \log q_\phi(\tilde z_i)`: the scores of the prior have no known mean under the guide.
    control_variate : bool
        ``False`` sets :math:`\beta_i = 0`.
    initial : pytree of arrays (N, …), optional
        Latents to start from. Without them a chain starts at the first proposal of positive likelihood, and its row gives
        the control variate's term alone until then.
    key : typed PRNG key, optional
        For the one shuffle of the rows.

    Raises
    ------
    ValueError, TypeError
        For batches of one row with a control variate, and laws or likelihoods that do not give one value a row.

    Notes
    -----
    Scores have mean zero under the law that they are scores of, whatever they are multiplied by, as long as that is independent of
    the sample: so the control variate adds no bias for any :math:`\beta_i` without row i, and adds one if row i is among them.
    As the model improves and nearly all proposals are accepted, :math:`\beta_i \to 1`, an accepted proposal counts
    :math:`1 - \beta_i` and the variance goes to zero; without the control variate it goes to that of the scores under the
    posterior. So it gains where many latents are right. Where few proposals are accepted, or where one latent holds nearly all
    of the posterior, it adds the scores of rejected proposals and takes away little: ``control_variate=False`` has the smaller
    variance then (`ergodica.compare_gradients` tells).

    Chains are remembered: at rest the estimate is unbiased, while the parameters move it lags. The likelihood of the
    remembered latent is evaluated again at the present parameters. The estimate's ``value`` is of the density of data and latents
    together, at the chains' states, with nothing for rows that have none.

    Not where hardly any proposal is accepted (``aux.acceptance_rate``, and ``state.acceptance_rate`` by row): the same
    latent is then reinforced again and again. Not where the latent can be summed over.

    Cost: two evaluations of prior and likelihood a row, and their derivative. Memory: the latents of all data.

    References
    ----------
    Phan et al. (2023), where the latents are chains of thought and the likelihood is whether the answer is right; the chain:
    Tierney (1994).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> data = {"x": jnp.array([0, 1, 1]), "y": jnp.array([2, 0, 0])}
    >>> def prior(logits, rows):
    ...     return dist.Categorical(logits=logits[rows["x"]])
    >>> def right(logits, z, rows):
    ...     return jnp.where(z == rows["y"], 0.0, -jnp.inf)
    >>> gradient = MonteCarloEM(prior, right, data, scheme="full")
    >>> logits = jnp.zeros((2, 3))
    >>> state = gradient.init(jax.random.key(0), logits)
    >>> for i in range(20):
    ...     estimate, state = gradient.estimate(jax.random.key(i), logits, state)
    >>> state.latents.tolist(), state.started.tolist()
    ([2, 0, 0], [True, True, True])
    """

    prior: Callable
    log_likelihood: Callable
    guide: Callable | None
    minibatch: Minibatch
    initial: PyTree
    control_variate: bool = eqx.field(static=True)

    references: ClassVar = ("phan2023", "tierney1994")

    def __init__(
        self,
        prior: Callable[[PyTree, PyTree], Law],
        log_likelihood: Callable[[PyTree, PyTree, PyTree], Array],
        data: PyTree,
        batch_size: int | None = None,
        scheme: Literal["blocks", "full"] = "blocks",
        *,
        guide: Callable[[PyTree, PyTree], Law] | None = None,
        control_variate: bool = True,
        initial: PyTree = None,
        key: Key | None = None,
    ) -> None:
        self.prior = as_partial(check.function("prior", prior))
        self.log_likelihood = as_partial(check.function("log_likelihood", log_likelihood))
        self.guide = None if guide is None else as_partial(check.function("guide", guide))
        self.control_variate = bool(control_variate)
        rows = jax.tree.map(jnp.asarray, data)
        number = check.leading_length("data", rows)
        indexed = Posterior(_flat, _flat_rows, {"rows": rows, "index": jnp.arange(number)})
        check.one_of("scheme", scheme, ("blocks", "full"))
        self.minibatch = Minibatch(indexed, batch_size, scheme, key=key)
        if control_variate and self.minibatch.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2, since the control variate of a row is weighted by the other rows; got 1. Take "
                "more rows, or control_variate=False."
            )
        self.initial = _checked_initial(initial, number)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> MonteCarloEMState:
        """Open the first epoch, with the initial latents if there are any."""
        _refuse_batch(batch)
        rows, number = self.minibatch.posterior.data["rows"], self.minibatch.posterior.num_data
        latents, started = self.initial, jnp.zeros(number, bool)
        if latents is None:
            shapes = jax.eval_shape(lambda: self._proposals(params, rows).sample(jax.random.key(0), ()))
            latents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            check.leading_length("latents drawn from prior", latents)
        else:
            started = self._evaluate(params, latents, rows).log_weight > -jnp.inf
        count = jnp.zeros(number, jnp.int32)
        return MonteCarloEMState(self.minibatch.init(key, params), latents, started, count, count)

    def estimate(
        self, key: Key, params: PyTree, state: MonteCarloEMState, batch: Batch | None = None
    ) -> tuple[Estimate, MonteCarloEMState]:
        """Move the chains of the next batch, and differentiate where they are."""
        _refuse_batch(batch)
        key_draw, key_move = jax.random.split(key)
        drawn, minibatch = self.minibatch.draw(key_draw, state.minibatch)
        estimate, after = self._move(key_move, params, drawn, state)
        index = drawn.data["index"]

        def put(x: Array, new: Array) -> Array:
            return x.at[index].set(new.astype(x.dtype), unique_indices=True)

        latents = jax.tree.map(put, state.latents, after.latents)
        started, visits, moves = (put(getattr(state, n), getattr(after, n)) for n in ("started", "visits", "moves"))
        return estimate, MonteCarloEMState(minibatch, latents, started, visits, moves)

    def probe(self, key: Key, params: PyTree, state: MonteCarloEMState) -> Estimate:
        """Estimate from a batch that is independent of the epoch and from other proposals; the chains stay where they are."""
        key_draw, key_move = jax.random.split(key)
        return self._move(key_move, params, self.minibatch.independent_batch(key_draw), state)[0]

    @property
    def batch_source(self) -> None:
        """None: a batch that is handed over would not say whose chains its rows have."""
        return

    def _move(
        self, key: Key, params: PyTree, batch: Batch, state: MonteCarloEMState
    ) -> tuple[Estimate, MonteCarloEMState]:
        """Propose, accept, and differentiate; the state returned has the batch's rows alone."""
        key_propose, key_accept = jax.random.split(key)
        rows, index = batch.data["rows"], batch.data["index"]
        own = jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), state._replace(minibatch=None))
        proposed = jax.lax.stop_gradient(self._proposals(params, rows).sample(key_propose, ()))
        current, new = (self._evaluate(params, latents, rows) for latents in (own.latents, proposed))
        probability = acceptance_probability(jnp.where(own.started, current.log_weight, -jnp.inf), new.log_weight)
        accepted = jax.random.uniform(key_accept, probability.shape, probability.dtype) < probability
        after = own._replace(
            latents=jax.tree.map(lambda x, y: jnp.where(_rows_of(accepted, x), x, y), proposed, own.latents),
            started=own.started | accepted,
            visits=own.visits + own.started.astype(jnp.int32),
            moves=own.moves + (accepted & own.started).astype(jnp.int32),
        )
        beta = leave_one_out_mean(probability) if self.control_variate else jnp.zeros_like(probability)
        weight = self.minibatch.posterior.num_data * batch.weight

        def surrogate(params: PyTree) -> tuple[Array, Array]:
            at, tilde = (self._evaluate(params, z, rows) for z in (after.latents, proposed))
            joint = jnp.where(after.started, at.log_prior + at.log_likelihood, 0)
            own = 0 if self.guide is None else jnp.where(after.started, at.log_proposal, 0)
            terms = joint + own - beta * tilde.log_proposal
            return jnp.sum(weight.astype(terms.dtype) * terms), jnp.sum(weight.astype(joint.dtype) * joint)

        gradient, value = jax.grad(surrogate, has_aux=True)(params)
        info = EStep(jnp.mean(probability), jnp.mean(after.started.astype(probability.dtype)))
        return Estimate(gradient, value, aux=info, n_grad=2 * index.shape[0]), after

    def _proposals(self, params: PyTree, rows: PyTree) -> Law:
        return (self.prior if self.guide is None else self.guide)(params, rows)

    def _evaluate(self, params: PyTree, latents: PyTree, rows: PyTree) -> Rows:
        """Evaluate all densities of some latents."""
        number = jax.tree.leaves(rows)[0].shape[0]
        log_prior = _checked("prior(params, rows).log_prob", self.prior(params, rows).log_prob(latents), number)
        log_likelihood = _checked("log_likelihood", self.log_likelihood(params, latents, rows), number)
        log_proposal = log_prior
        if self.guide is not None:
            log_proposal = _checked("guide(params, rows).log_prob", self.guide(params, rows).log_prob(latents), number)
        return Rows(latents, log_prior, log_likelihood.astype(log_prior.dtype), log_proposal)


def _flat(position: PyTree) -> Array:  # noqa: ARG001
    return jnp.zeros(())


def _flat_rows(position: PyTree, rows: PyTree) -> Array:  # noqa: ARG001
    return jnp.zeros(rows["index"].shape)


def _rows_of(flags: Array, like: Array) -> Array:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _checked(name: str, x: Any, number: int) -> Array:
    if jnp.shape(x) != (number,):
        raise ValueError(
            f"{name} must give one value a row, shape ({number},); got shape {jnp.shape(x)}. Axes of one row's latent belong "
            "to its event, as in Normal(...).to_event(1)."
        )
    return jnp.asarray(x)


def _checked_initial(initial: PyTree, number: int) -> PyTree:
    if initial is None:
        return None
    initial = jax.tree.map(jnp.asarray, initial)
    if check.leading_length("initial", initial) != number:
        length = check.leading_length("initial", initial)
        raise ValueError(f"initial must hold the latents of all {number} rows of data; got {length}.")
    return initial


def _refuse_batch(batch: Any) -> None:
    if batch is not None:
        raise ValueError(
            "MonteCarloEM takes no batch that is handed over, since it could not tell whose latents it remembers for the rows; "
            "give it all the data."
        )
