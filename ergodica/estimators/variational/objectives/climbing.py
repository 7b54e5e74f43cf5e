"""What losses with chains of their own have in common: declaration, run, expectation, and the chains' move."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import block, substitute
from numpyro.primitives import mutable

from ergodica.core.types import Key, PyTree
from ergodica.estimators.em.independence import Selection
from ergodica.estimators.variational.explain import Explanation, Row
from ergodica.estimators.variational.objectives.chains import (
    Chains,
    Layout,
    Retained,
    chosen_values,
    draw_plates,
    held_sites,
    start,
)
from ergodica.estimators.variational.objectives.loss import AbstractLoss, Evaluation
from ergodica.estimators.variational.objectives.weighted import enclosing_plates, reduce_terms, weigh
from ergodica.estimators.variational.particles import Run, mean_of_particles, run_particles
from ergodica.estimators.variational.site import only_gradient
from ergodica.estimators.variational.sites.reparam import Reparam
from ergodica.estimators.variational.structure import GUIDE, Program, Structure, inspect
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
