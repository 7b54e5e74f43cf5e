"""Gradients of models with a latent variable of each datum, by Fisher's identity."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.latent import LatentPosterior
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators import rowwise_hmc
from ergodica.estimators.minibatch.subsample import Minibatch, MinibatchState

type Latents = dict[str, Array]


class LocalLatentsState(NamedTuple):
    """Where the epoch stands, and the latents of all data (N, …) where they are kept (else an empty dict)."""

    minibatch: MinibatchState
    latents: Latents


class InnerRun(NamedTuple):
    """What is known of the inner run: its mean acceptance probability."""

    acceptance_rate: Array


class LocalLatents(AbstractGradientEstimator):
    r"""Minibatch gradient where each datum has a latent variable, which short inner chains sample.

    .. math::

        \nabla\log p(x_i \mid \theta) &= \mathrm{E}_{z \sim p(z \mid x_i, \theta)} \nabla_\theta \log p(x_i, z \mid \theta) \\
        \hat g(\theta) &= \nabla\log p(\theta) + N \sum_{i \in B} w_i \nabla_\theta \log p(x_i, z_i \mid \theta)

    with :math:`z_i` the end of ``num_inner_steps`` steps of Hamiltonian Monte Carlo on :math:`p(z \mid x_i, \theta)`, all rows of
    the batch side by side.

    Parameters
    ----------
    posterior : LatentPosterior
        Such as ``from_numpyro(…, local_latents=True)`` makes.
    batch_size : int, optional
        Rows a gradient; left out for ``scheme="full"``.
    scheme : {"blocks", "full"}
        As in `Minibatch`. Draws with replacement are not offered: a datum drawn twice would have two latents.
    inner_step_size : float
        Of the leapfrog integrator, in units of the unconstrained latents. Aim at an ``acceptance_rate`` (in ``aux``) of 0.6 to 0.9.
    num_inner_steps : int
        Steps of the inner chain a gradient. 0 takes the start as it is: right if ``guess`` draws from the latents' posterior.
    num_leapfrog : int
        Leapfrog steps in each; 1 is MALA.
    start : {"last", "guess"}
        Where an inner chain starts: where the last one of that datum ended (kept in the state), or at a fresh ``guess``.
    guess : callable, optional
        ``guess(key, position, rows) -> latents``, a dict of arrays (n, …), such as draws of an amortised guide; standard
        normals unless given.
    num_initial_steps : int
        Inner steps of all data when a chain is initialised; for ``start="last"``.
    key : typed PRNG key, optional
        For the one shuffle of the rows.

    Raises
    ------
    ValueError, TypeError
        For another kind of posterior, a scheme or size out of range, or a guess of other shapes.

    Notes
    -----
    The identity is exact, and the inner chain leaves :math:`p(z \mid x_i, \theta)` invariant at any step size. What remains is
    that a short chain remembers its start: the gradient is biased, and the sampler's law with it, until ``num_inner_steps``
    is many times the chain's autocorrelation time. With ``start="last"`` the bias is small while :math:`\theta` moves little
    between two visits of a datum (one epoch), and none at rest. Measure it by `ergodica.compare_gradients` with several
    ``num_inner_steps``, and by running with twice as many. A guess that is near the posterior of the latents helps
    from the first step on; nothing checks that it is.

    Even without bias the variance is larger than that of the marginal likelihood's gradient: integrate a latent by hand where
    you can. The estimate's ``value`` is of the density of data and latents together, at the latents drawn.

    Probes start at the same latents and write nothing back: with ``start="last"`` they are independent of the sampler's gradient
    given those latents only.

    Cost: ``2 + num_inner_steps * num_leapfrog`` gradients for each row of a batch. Memory with ``start="last"``: the
    latents of all data, for each chain.

    References
    ----------
    The identity: Louis (1982), equation 3.1. The inner chain: Duane et al. (1987).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ergodica.models import LatentPosterior
    >>> posterior = LatentPosterior(
    ...     log_prior=lambda theta: -0.5 * theta**2,
    ...     log_joint=lambda theta, z, x: -0.5 * (z["z"] - theta) ** 2 - 0.5 * (x - z["z"]) ** 2,
    ...     data=jnp.arange(6.0),
    ...     latents={"z": ()},
    ...     initial=jnp.array(0.0),
    ... )
    >>> gradient = LocalLatents(posterior, batch_size=2, inner_step_size=0.7)
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> estimate, state = gradient.estimate(jax.random.key(1), jnp.array(0.0), state)
    >>> estimate.gradient.shape, state.latents["z"].shape, estimate.n_grad
    ((), (6,), 6)
    """

    target: LatentPosterior
    minibatch: Minibatch
    guess: Callable
    inner_step_size: Array
    num_inner_steps: int = eqx.field(static=True)
    num_leapfrog: int = eqx.field(static=True)
    num_initial_steps: int = eqx.field(static=True)
    start: str = eqx.field(static=True)

    references: ClassVar = ("louis1982", "duane1987", "welling2011")

    def __init__(
        self,
        posterior: LatentPosterior,
        batch_size: int | None = None,
        scheme: Literal["blocks", "full"] = "blocks",
        *,
        inner_step_size: float,
        num_inner_steps: int = 1,
        num_leapfrog: int = 1,
        start: Literal["last", "guess"] = "last",
        guess: Callable[[Key, PyTree, PyTree], Latents] | None = None,
        num_initial_steps: int = 0,
        key: Key | None = None,
    ) -> None:
        if not isinstance(posterior, LatentPosterior):
            raise TypeError(
                f"posterior must be a LatentPosterior; got {type(posterior).__name__}. Make one by "
                "from_numpyro(model, …, local_latents=True); without local latents, use Minibatch."
            )
        self.target = posterior
        self.minibatch = _minibatch_with_indices(
            posterior, batch_size, check.one_of("scheme", scheme, ("blocks", "full")), key
        )
        self.inner_step_size = check.positive("inner_step_size", inner_step_size)
        self.num_inner_steps = check.integer("num_inner_steps", num_inner_steps, least=0)
        self.num_leapfrog = check.integer("num_leapfrog", num_leapfrog)
        self.num_initial_steps = check.integer("num_initial_steps", num_initial_steps, least=0)
        self.start = check.one_of("start", start, ("last", "guess"))
        standard = Partial(_standard_normals, posterior)
        self.guess = standard if guess is None else as_partial(check.function("guess", guess))
        self._check_guess()

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> LocalLatentsState:
        """Open the first epoch; where latents are kept, guess them for all data and run ``num_initial_steps``."""
        _refuse_batch(batch)
        key_epoch, key_guess, key_run = jax.random.split(key, 3)
        minibatch = self.minibatch.init(key_epoch, params)
        if self.start == "guess":
            return LocalLatentsState(minibatch, {})
        rows = self.target.data
        latents = self.guess(key_guess, params, rows)
        latents, _ = self._run(key_run, params, latents, rows, self.num_initial_steps)
        return LocalLatentsState(minibatch, latents)

    def estimate(
        self, key: Key, params: PyTree, state: LocalLatentsState, batch: Batch | None = None
    ) -> tuple[Estimate, LocalLatentsState]:
        """Estimate the gradient at ``params`` from the next batch, and keep the latents it ends with."""
        _refuse_batch(batch)
        key_draw, key_run = jax.random.split(key)
        drawn, minibatch = self.minibatch.draw(key_draw, state.minibatch)
        estimate, latents = self._at(key_run, params, drawn, state)
        if self.start == "last":
            index = drawn.data["index"]
            latents = {name: x.at[index].set(latents[name], unique_indices=True) for name, x in state.latents.items()}
        else:
            latents = {}
        return estimate, LocalLatentsState(minibatch, latents)

    def probe(self, key: Key, params: PyTree, state: LocalLatentsState) -> Estimate:
        """Estimate from a batch that is independent of the epoch; the latents in the state stay as they are."""
        key_draw, key_run = jax.random.split(key)
        return self._at(key_run, params, self.minibatch.independent_batch(key_draw), state)[0]

    def _at(self, key: Key, params: PyTree, batch: Batch, state: LocalLatentsState) -> tuple[Estimate, Latents]:
        """Run the inner chains of a batch, and differentiate where they end."""
        key_guess, key_run = jax.random.split(key)
        rows, index = batch.data["rows"], batch.data["index"]
        if self.start == "last":
            latents = {name: jnp.take(x, index, axis=0, mode="clip") for name, x in state.latents.items()}
        else:
            latents = self.guess(key_guess, params, rows)
        latents, acceptance_rate = self._run(key_run, params, latents, rows, self.num_inner_steps)

        def log_density(params: PyTree) -> Array:
            prior, values = self.target.log_prior(params), self.target.log_joint(params, latents, rows)
            weight = self.target.num_data * batch.weight.astype(values.dtype)
            return prior + jnp.sum(weight * values).astype(prior.dtype)

        value, gradient = jax.value_and_grad(log_density)(params)
        cost = index.shape[0] * (2 + self.num_inner_steps * self.num_leapfrog)
        return Estimate(gradient, value, aux=InnerRun(acceptance_rate), n_grad=cost), latents

    def _run(self, key: Key, params: PyTree, latents: Latents, rows: PyTree, num_steps: int) -> tuple[Latents, Array]:
        """Move the latents of some rows; give them, and the mean acceptance probability."""
        if not num_steps:
            return latents, jnp.ones(())

        def log_densities(latents: Latents) -> Array:
            return self.target.log_joint(params, latents, rows)

        def body(chains: rowwise_hmc.Rows, key: Key) -> tuple[rowwise_hmc.Rows, Array]:
            chains, probability = rowwise_hmc.step(key, log_densities, chains, self.inner_step_size, self.num_leapfrog)
            return chains, jnp.mean(probability)

        chains = rowwise_hmc.evaluate(log_densities, latents)
        chains, probabilities = jax.lax.scan(body, chains, jax.random.split(key, num_steps))
        return chains.position, jnp.mean(probabilities)

    @property
    def posterior(self) -> LatentPosterior:
        """The posterior whose gradient is estimated."""
        return self.target

    def _check_guess(self) -> None:
        if self.target.initial is None:
            return
        rows = jax.tree.map(lambda x: x[:1], self.target.data)
        guess = jax.eval_shape(self.guess, jax.random.key(0), self.target.shape(), rows)
        got = {name: tuple(x.shape) for name, x in guess.items()} if isinstance(guess, dict) else guess
        expected = {name: x.shape for name, x in self.target.latent_shapes(1).items()}
        if got != expected:
            raise ValueError(f"guess must return the latents of one row with shapes {expected}; got {got}.")


def _minibatch_with_indices(
    posterior: LatentPosterior, batch_size: int | None, scheme: Any, key: Key | None
) -> Minibatch:
    """Make a minibatch whose rows know their place among the data."""
    data = {"rows": posterior.data, "index": jnp.arange(posterior.num_data)}
    indexed = Posterior(posterior.log_prior, posterior.log_likelihood, data)
    return Minibatch(indexed, batch_size, scheme, key=key)


def _standard_normals(posterior: LatentPosterior, key: Key, position: PyTree, rows: PyTree) -> Latents:  # noqa: ARG001
    return rng.normal_like(key, posterior.latent_shapes(jax.tree.leaves(rows)[0].shape[0]))


def _refuse_batch(batch: Any) -> None:
    if batch is not None:
        raise ValueError(
            "LocalLatents takes no batch that is handed over, since it could not tell which data the rows are and where their "
            "latents stand; give the posterior all the data."
        )
