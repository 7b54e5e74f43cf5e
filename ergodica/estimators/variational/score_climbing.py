"""Inclusive Kullback-Leibler divergence and maximum likelihood, with a Markov chain on the posterior in the place of its draws."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import block, substitute
from numpyro.primitives import mutable

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.em.independence import Selection, conditional_importance, metropolis_independence
from ergodica.estimators.variational.chains import (
    Chains,
    Layout,
    Retained,
    chosen_values,
    draw_plates,
    held_sites,
    start,
)
from ergodica.estimators.variational.explain import Explanation, Row
from ergodica.estimators.variational.loss import AbstractLoss, Evaluation
from ergodica.estimators.variational.particles import Run, mean_of_particles, run_particles
from ergodica.estimators.variational.reparam import Reparam
from ergodica.estimators.variational.site import only_gradient
from ergodica.estimators.variational.structure import GUIDE, Program, Structure, inspect
from ergodica.estimators.variational.weighted import enclosing_plates, reduce_terms, weigh
from ergodica.estimators.variational.wrap import STATE

CHAINS = "chains"
"""Name that the chains are remembered by."""


class AbstractScoreClimbing(AbstractLoss):
    r"""Gradients of posterior expectations, by chains whose proposals are the guide's draws.

    .. math:: \nabla_\theta \log p_\theta(x) = \mathrm{E}_{p_\theta(z \mid x)} \nabla_\theta \log p_\theta(x, z), \qquad
        -\nabla_\phi \mathrm{KL}(p_\theta(z \mid x) \| q_\phi) = \mathrm{E}_{p_\theta(z \mid x)} \nabla_\phi \log q_\phi(z)
    """

    num_particles: int = eqx.field(static=True)
    vectorize_particles: bool | Callable = eqx.field(static=True)

    @abc.abstractmethod
    def select(self, key: Key, log_weights: Array) -> Selection:
        """Make a kernel's move from the log weights (1 + K, …) of the chain's state and of the proposals."""

    def continues(self, chains: Chains, started: Array) -> Array:  # noqa: ARG002
        """Which chains go on from the state that they have."""
        return started

    # --- what users call -----------------------------------------------------------------------------------------------

    def guide(self, model: Callable, guide: Callable) -> Callable:
        """The guide with the chains declared as a ``numpyro.mutable`` site, so that SVI carries them."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = guide(*args, **kwargs)
            with block():
                chains = self.memory(Program(model, guide, args, kwargs), {})[CHAINS]
            mutable(CHAINS + STATE, chains)
            return result

        return wrapped

    def chains(self, state: Any) -> Chains:
        """Find the chains in the result or state of `numpyro.infer.SVI`, or in the state of a `VariationalGradient`."""
        state = getattr(state, "state", state)
        remembered = getattr(state, "mutable_state", state) or {}
        for name in (CHAINS + STATE, CHAINS):
            if name in remembered:
                return remembered[name]
        raise ValueError(f"state holds no chains of {type(self).__name__}; got {type(state).__name__}.")

    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """What `explain` prints, as rows."""
        structure = inspect(Program(model, guide, args, kwargs), {})
        check_climbing(self, structure)
        plates = ", ".join(f"{p.name!r} ({p.full_size})" for p in enclosing_plates(structure))
        why = f"one for each element of {plates}" if plates else "one for the program"
        rows = tuple(
            Row(name, site.distribution, "follows" if site.delta else "chain", why, site.delta, 1, site.terms)
            for name, site in structure.sites.items()
        )
        title = (
            f"{type(self).__name__}, the chain and {self.num_particles} proposal{'s' * (self.num_particles != 1)}: "
            f"{1 + self.num_particles} runs of model and guide a step; the gradient is biased until the chains have settled."
        )
        return Explanation(title, rows)

    # --- machinery -----------------------------------------------------------------------------------------------------

    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:
        """Chains without a state yet."""
        structure = inspect(program, params)
        check_climbing(self, structure)
        return {CHAINS: start(program, params, Layout(structure, enclosing_plates(structure), {}))}

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:  # noqa: ARG002
        """Move the chains on, and differentiate where they are."""
        if CHAINS not in state:
            raise ValueError(
                f"{type(self).__name__} goes on from the chains of the step before, which SVI keeps only if the guide declares "
                "them: use SVI(model, loss.guide(model, guide), optimiser, loss)."
            )
        key_plates, key_run, key_select = jax.random.split(key, 3)
        chains = state[CHAINS]
        program = program._replace(guide=block(program.guide, hide=[CHAINS + STATE]))
        structure = inspect(program, params)
        check_climbing(self, structure)
        indices = draw_plates(key_plates, program, params, structure)
        layout = Layout(structure, enclosing_plates(structure), indices)
        run = self._run(key_run, params, program, layout, chains)
        started = layout.take(chains.started, layout.chain_shape)
        goes_on = self.continues(chains, started)
        weights = jax.lax.stop_gradient(reduce_terms(run, run.particles.terms, layout.plates))
        retained = jnp.where(goes_on.reshape(weights.shape[1:]), weights[0], -jnp.inf)
        selection = self.select(key_select, weights.at[0].set(retained))
        bound = jax.nn.logsumexp(weights[1:], axis=0) - jnp.log(self.num_particles)
        value = layout.scale * jnp.sum(bound) + only_gradient(expectation(run, selection.weights))
        after = moved_on(run, layout, chains, started, goes_on, selection)
        mutable = mean_of_particles(run.particles.mutable, run.lanes.lead)
        return Evaluation(value, {CHAINS: after}, mutable, 1 + self.num_particles)

    def _run(self, key: Key, params: dict, program: Program, layout: Layout, chains: Chains) -> Run:
        """Run the program at the chains' values and at as many draws of the guide as there are proposals."""
        sites, held = layout.structure.sites, held_sites(layout.structure)
        estimators = {
            name: Retained(layout.take(chains.values[name], site.batch_shape)) if name in held else Reparam()
            for name, site in sites.items()
        }
        model, guide = (substitute(f, data=layout.indices) for f in (program.model, program.guide))
        program = program._replace(model=model, guide=guide)
        number = 1 + self.num_particles
        return run_particles(key, number, self.vectorize_particles, params, program, layout.structure, estimators)


def expectation(run: Run, weights: Array) -> Array:
    """Weighted sum of ``log p`` and ``log q`` over the particles, with the plates' scale; the weights are held."""
    total, weights = jnp.zeros(()), jax.lax.stop_gradient(weights)
    own = {GUIDE.format(name) for name in run.structure.sites}
    for term, x in run.particles.terms.items():
        x = weigh(weights.astype(x.dtype), x)
        total = total + (-1 if term in own else 1) * jnp.sum(x).astype(total.dtype)
    return total


def moved_on(run: Run, layout: Layout, chains: Chains, started: Array, goes_on: Array, selection: Selection) -> Chains:
    """Write where the chains of this step are, and whether they moved."""
    values = chosen_values(run, selection.index)
    sites, shape = layout.structure.sites, layout.chain_shape
    index, accepted = layout.of_chains(selection.index), layout.of_chains(selection.accepted)
    accepted = jnp.where(goes_on, accepted, 0).astype(chains.moves.dtype)
    return Chains(
        values={name: layout.put(x, sites[name].batch_shape, values[name]) for name, x in chains.values.items()},
        started=layout.put(chains.started, shape, started | (index > 0)),
        visits=layout.put(chains.visits, shape, layout.take(chains.visits, shape) + goes_on.astype(jnp.int32)),
        moves=layout.put(chains.moves, shape, layout.take(chains.moves, shape) + accepted),
        step=chains.step + 1,
    )


def check_climbing(loss: AbstractScoreClimbing, structure: Structure) -> None:
    """Raise where a chain cannot hold the program's latent values, or its weights would be wrong."""
    if not held_sites(structure):
        raise ValueError(f"The guide draws nothing that {type(loss).__name__} could hold in a chain. Use ELBO.")
    for site in structure.sites.values():
        if site.in_scan:
            reason = "it is inside a scan, where its value cannot be set to that of the chain"
            raise site.refuse(loss, reason, "a Python loop for the scan")
        if site.delta and site.name in structure.moved_by_parameters:
            reason = "it is a point mass that parameters place, which has no density for a chain's value"
            raise site.refuse(loss, reason, "numpyro.param in the model for what shall be a point estimate")
    common = {p.name for p in enclosing_plates(structure)}
    for term, plates in structure.plates.items():
        for plate in plates:
            if plate.subsampled and plate.name not in common:
                raise ValueError(
                    f"Plate {plate.name!r} of {term} is subsampled and does not enclose every site of model and guide: one chain "
                    "over latents inside and outside of it can be moved only where all the data are seen. Take the whole "
                    "plate, or make what is outside of it parameters (numpyro.param)."
                )


class MarkovianScoreClimbing(AbstractScoreClimbing):
    r"""Inclusive KL divergence for the guide and maximum likelihood for the model, by conditional importance sampling.

    .. math::

        \tilde w_k &\propto p_\theta(x, z_k) / q_\phi(z_k), \qquad z_0 = z^{(t-1)}, \quad z_1, \dots, z_K \sim q_\phi \\
        \hat g &= \sum_{k=0}^K \tilde w_k \nabla_{\theta,\phi} \left[ \log p_\theta(x, z_k) + \log q_\phi(z_k) \right],
        \qquad z^{(t)} = z_k \text{ with probability } \tilde w_k

    The chain's state :math:`z^{(t-1)}` of the step before takes part as a particle, and is remembered. That is what makes the
    posterior invariant for every K, so that the bias of self-normalised importance sampling, of order 1/K at every step, is
    replaced by one that fades while the chain runs.

    Parameters
    ----------
    num_particles : int
        :math:`K`, the guide's draws a step; 1 is allowed.
    rao_blackwell : bool
        Whether all particles enter the gradient by their weights, as above, or the chain's new state alone (the paper's
        algorithm). The former has no more variance, given the particles, for the same runs of the program.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`.

    Raises
    ------
    ValueError, SiteError
        For subsampled plates that do not enclose every site, for sites inside of a scan, for point masses placed by parameters,
        and in SVI where the guide is not that of ``loss.guide(model, guide)``.

    Notes
    -----
    Plates that enclose every site of model and guide have a chain for each element. If such a plate is subsampled, the
    chains are those of the *whole* plate, found by the indices that the plate gives out, and those outside of the batch stand
    still. Data of a batch handed over as an argument are not seen by the indices: hand over all the data and index them
    by the plate, or set the plate by ``numpyro.handlers.substitute(model, {"data": rows})`` in model and guide.

    The loss is minus the importance-weighted bound of the K fresh draws; its derivative is that of no loss, but the
    estimate above. The gradient is biased while chains have not settled, and lags where parameters move fast. Each
    chain starts at its first visit from the draws of that step.

    Not where chains do not move: `chains` gives the acceptance rate of each. Near zero, draws of the guide hardly ever hit the
    posterior, and the gradient says the same thing every step; K of the order of :math:`\exp \mathrm{KL}(p \| q)` is what
    importance sampling needs, and the chain, too. A guide that misses the posterior's mass altogether is *not* seen there, since its own
    draws are all that the chain moves between: see `ergodica.diagnostics.check_guide`.

    `ergodica.compare_gradients` in the state ``"fresh"`` sees the first step, which is importance sampling without a chain.
    What chains do is seen by estimates in a row, as ``benchmarks/posterior_gradients.py`` takes them.

    Cost: ``1 + num_particles`` runs of model and guide, and their derivative. Memory: the latents of all elements of the plates.

    References
    ----------
    Naesseth, Lindsten and Blei (2020), algorithms 1 and 2; after Andrieu, Doucet and Holenstein (2010).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ergodica as erg
    >>> def model(x):
    ...     with numpyro.plate("data", 4):
    ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
    >>> def guide(x):
    ...     logits = numpyro.param("logits", jnp.zeros(4))
    ...     with numpyro.plate("data", 4):
    ...         numpyro.sample("z", dist.Bernoulli(logits=logits))
    >>> loss = erg.estimators.MarkovianScoreClimbing(num_particles=4)
    >>> svi = numpyro.infer.SVI(model, loss.guide(model, guide), optax.adam(0.05), loss)
    >>> result = svi.run(jax.random.key(0), 200, jnp.array([-1.0, 3.0, 2.5, 0.0]), progress_bar=False)
    >>> (result.params["logits"] > 0).tolist(), loss.chains(result).acceptance_rate.shape
    ([False, True, True, False], (4,))
    """

    rao_blackwell: bool = eqx.field(static=True)

    references: ClassVar = ("naesseth2020", "andrieu2010")

    def __init__(
        self, num_particles: int = 1, *, rao_blackwell: bool = True, vectorize_particles: bool | Callable = True
    ) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.rao_blackwell = bool(rao_blackwell)
        self.vectorize_particles = vectorize_particles

    def select(self, key: Key, log_weights: Array) -> Selection:
        """Draw by the normalised weights."""
        return conditional_importance(key, log_weights, rao_blackwell=self.rao_blackwell)


class JointStochasticApproximation(AbstractScoreClimbing):
    r"""Inclusive KL divergence for the guide and maximum likelihood for the model, by a Metropolis independence sampler.

    .. math::

        z' \sim q_\phi, \qquad \text{accept with probability } \min(1, w' / w), \quad w = p_\theta(x, z) / q_\phi(z), \qquad
        \hat g = \frac1K \sum_{t=1}^K \nabla_{\theta,\phi} \left[ \log p_\theta(x, z^{(t)}) + \log q_\phi(z^{(t)}) \right]

    over the states after K Metropolis steps, which go on from the state of the step before. Its weight is evaluated again under
    the present parameters, and after an acceptance the weight compared with is that of the state accepted.

    Parameters
    ----------
    num_particles : int
        :math:`K`, proposals a step.
    num_warmup : int
        Steps of SVI that forget the chains and start from their first proposal, as long as the guide is of no use as
        a proposal and remembered states would hold on to early parameters.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`.

    Raises
    ------
    ValueError, SiteError
        As `MarkovianScoreClimbing`.

    Notes
    -----
    Plates, the cache of each datum's state, subsampled plates and the loss are as for `MarkovianScoreClimbing`. At one proposal the
    chain moves more often than there, with probability :math:`\min(1, w'/w)` instead of :math:`w'/(w + w')`; but what is not
    accepted is lost, while the weights of the other take all draws into account.

    Not where chains do not move: a state whose weight is large is left once in about :math:`w_{\max}` proposals. See `chains`.

    Cost: ``1 + num_particles`` runs of model and guide, and their derivative. Memory: the latents of all elements of the plates.

    References
    ----------
    Ou and Song (2020), algorithm 1; the kernel: Tierney (1994).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.JointStochasticApproximation(num_particles=2, num_warmup=100)
    """

    num_warmup: int = eqx.field(static=True)

    references: ClassVar = ("ou2020", "tierney1994")

    def __init__(
        self, num_particles: int = 1, *, num_warmup: int = 0, vectorize_particles: bool | Callable = True
    ) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.num_warmup = check.integer("num_warmup", num_warmup, least=0)
        self.vectorize_particles = vectorize_particles

    def select(self, key: Key, log_weights: Array) -> Selection:
        """Visit the proposals in turn."""
        return metropolis_independence(key, log_weights)

    def continues(self, chains: Chains, started: Array) -> Array:
        """None of them during warm-up."""
        return started & (chains.step >= self.num_warmup)
