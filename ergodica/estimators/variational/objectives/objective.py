"""What all objectives over NumPyro programs have in common: the choice of estimators, the run, and the face that SVI sees."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.choose import Choice, choose
from ergodica.estimators.variational.explain import Explanation, explain
from ergodica.estimators.variational.facts import Context, Downstream
from ergodica.estimators.variational.lanes import on_every_branch, own_axis_second, own_branches
from ergodica.estimators.variational.objectives.loss import AbstractLoss, Evaluation
from ergodica.estimators.variational.particles import (
    Run,
    as_branches,
    branch_counts,
    mean_of_particles,
    num_runs,
    run_particles,
)
from ergodica.estimators.variational.run import Estimators
from ergodica.estimators.variational.site import AbstractSiteEstimator, only_gradient
from ergodica.estimators.variational.structure import Program, Structure, inspect
from ergodica.estimators.variational.wrap import declare_in_guide, missing_state


class AbstractObjective(AbstractLoss):
    """An objective over a model and a guide, estimated from particles, with an estimator of its own at each site."""

    num_particles: int = eqx.field(static=True)
    sites: dict[str, Any]
    vectorize_particles: bool | Callable = eqx.field(static=True)

    linear: ClassVar[bool] = True
    """Whether the objective is a mean over the particles."""

    def __init__(
        self,
        num_particles: int = 1,
        sites: Mapping[str, Any] | None = None,
        *,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.sites = check_sites(sites)
        self.vectorize_particles = vectorize_particles

    # --- what an objective is ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def combine(self, run: Run) -> Array:
        """The objective's value, with the derivatives that flow through values and weights."""

    @abc.abstractmethod
    def cost(self, run: Run, name: str) -> tuple[Array, Array | None]:
        """``cost`` and ``others`` of a site (see `Downstream`), with the axes of the lanes."""

    @property
    def unbiased(self) -> bool:
        """Whether the estimate is unbiased where those of all sites are."""
        return True

    @property
    def label(self) -> str:
        """What `explain` calls it."""
        return type(self).__name__

    @property
    def notes(self) -> tuple[str, ...]:
        """What `explain` says of it, a sentence or two a line."""
        return ()

    def choose(self, structure: Structure) -> dict[str, Choice]:
        """Choose each site's estimator."""
        return choose(self.sites, structure, self.context)

    def check(self, program: Program, structure: Structure, estimators: Estimators) -> None:  # noqa: ARG002
        """Raise where the sites' estimators do not go together under this objective."""
        return

    def splits(self, estimators: Estimators) -> bool:  # noqa: ARG002
        """Whether derivatives by the values and by the parameters are taken apart (see `run_particle`)."""
        return False

    # --- what users call -----------------------------------------------------------------------------------------------

    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """What `explain` prints, as rows."""
        program = Program(model, guide, args, kwargs)
        structure = inspect(program, {})
        chosen = self.choose(structure)
        self.check(program, structure, {name: c.estimator for name, c in chosen.items()})
        return explain(self, structure, chosen)

    def guide(self, model: Callable, guide: Callable) -> Callable:
        """The guide with the estimators' own state and parameters declared, for estimators that learn or remember.

        Moving averages are ``numpyro.mutable`` sites, networks ``numpyro.param`` sites that the optimiser trains with the rest.
        """
        return declare_in_guide(self, model, guide)

    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:
        """Empty memories of the estimators that have one, by site."""
        structure = inspect(program, params)
        chosen = self.choose(structure)
        states = {name: chosen[name].estimator.init(site) for name, site in structure.sites.items()}
        return {name: state for name, state in states.items() if state is not None}

    # --- machinery -----------------------------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """What sites are told of the objective."""
        return Context(type(self).__name__, self.num_particles, self.linear)

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:
        """Estimate the objective; ascends."""
        structure = inspect(program, params)
        estimators = {name: c.estimator for name, c in self.choose(structure).items()}
        self.check(program, structure, estimators)
        missing_state(structure, estimators, state, learned, program)
        split = self.splits(estimators)
        run = run_particles(
            key, self.num_particles, self.vectorize_particles, params, program, structure, estimators, split=split
        )
        value, new_state = self.combine(run), {}
        for name, site in structure.sites.items():
            downstream = self.downstream(run, name, state.get(name), learned.get(name))
            if downstream is None:
                continue
            surrogate = estimators[name].surrogate(site, downstream)
            if surrogate is not None:
                share = 1.0 / self.num_particles if self.linear else 1.0
                value = value + share * only_gradient(surrogate).astype(value.dtype)
            if name in state:
                new_state[name] = jax.lax.stop_gradient(estimators[name].update(site, downstream))
        runs = num_runs(self.num_particles, structure, estimators)
        return Evaluation(value, new_state, mean_of_particles(run.particles.mutable, run.lanes.lead), runs)

    def downstream(self, run: Run, name: str, state: PyTree, learned: PyTree) -> Downstream | None:
        """What became of the particles at a site; ``None`` if its estimator adds no surrogate."""
        estimator, site, lanes = run.estimators[name], run.structure.sites[name], run.lanes
        if type(estimator).surrogate is AbstractSiteEstimator.surrogate:
            return None
        keep = own_branches(lanes, name)
        cost, others = self.cost(run, name)
        log_prob = lanes.sum_to(lanes.select(run.particles.log_prob[name], keep), site.plates, site.plates)
        record = jax.tree.map(lambda x: lanes.select(x, keep), run.particles.records.get(name))
        weights, scale = self.weights(run)
        moved = [own_axis_second(lanes, name, x) for x in (cost, others, log_prob, record, weights)]
        return Downstream(
            *moved,
            scale=scale,
            cost_of=lambda value: self.cost_of(run, name, value),
            params=learned,
            state=state,
            args=run.program.args,
            kwargs=run.program.kwargs,
        )

    def cost_of(self, run: Run, name: str, value: Array) -> Array:
        """Cost of other values of a site, with the axes of its `Downstream`; the parameters are held."""
        counts = branch_counts(run.structure, run.estimators)
        again = run.again({name: on_every_branch(run.lanes, name, value, counts)})
        both = as_branches(run, again, name)
        return own_axis_second(both.lanes, name, self.cost(both, name)[0])[:, counts.get(name, 1) :]

    def weights(self, run: Run) -> tuple[Array | None, Any]:  # noqa: ARG002
        """Log importance weights and the bound's scale, where the objective has them."""
        return None, 1.0


def check_sites(sites: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``sites`` as a dict; raise unless it maps names to estimators."""
    if sites is None:
        return {}
    if not isinstance(sites, Mapping):
        raise TypeError(
            f"sites must map names of sites to estimators, such as {{'z': LeaveOneOut(), '*': 'auto'}}; got {sites!r}."
        )
    for name, estimator in sites.items():
        if estimator != "auto" and not isinstance(estimator, AbstractSiteEstimator):
            raise TypeError(
                f"sites[{name!r}] must be an estimator such as LeaveOneOut(), or 'auto'; got {estimator!r} of type "
                f"{type(estimator).__name__}."
            )
    return {name: None if estimator == "auto" else estimator for name, estimator in sites.items()}
