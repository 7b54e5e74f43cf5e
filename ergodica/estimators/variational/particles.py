"""All particles of a step, on all branches."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.lanes import Lanes, branching_sites, make_lanes
from ergodica.estimators.variational.run import Estimators, Keys, Particle, run_particle
from ergodica.estimators.variational.structure import Program, Structure


class Run(NamedTuple):
    """All particles of a step, and what is needed to read them.

    ``again(given)`` runs them once more with the same random numbers, with the values ``given`` by site (K, A_1 … A_m, batch …,
    event …), and with the parameters held.
    """

    program: Program
    structure: Structure
    estimators: Estimators
    lanes: Lanes
    particles: Particle
    again: Callable[[dict[str, Array]], "Run"]


def over_branches(lane: Callable, counts: dict[str, int], given: dict[str, Array]) -> Particle:
    """Run a particle on every combination of branches, with the same random numbers; one axis for each site."""

    def nested(remaining: tuple[str, ...], branches: dict, given: dict) -> Particle:
        if not remaining:
            return lane(branches, given)
        name = remaining[0]
        inner = jax.vmap(lambda a, given: nested(remaining[1:], branches | {name: a}, given))
        return inner(jnp.arange(counts[name]), given)

    return nested(tuple(counts), {}, given)


def branch_counts(structure: Structure, estimators: Estimators) -> dict[str, int]:
    """Number of branches of the sites that have several."""
    branching = branching_sites(structure, estimators)
    return {name: estimators[name].num_branches(structure.sites[name]) for name in branching}


def num_runs(num_particles: int, structure: Structure, estimators: Estimators) -> int:
    """Runs of the program a step."""
    reruns = sum(estimators[name].num_reruns(site) for name, site in structure.sites.items())
    return num_particles * math.prod(branch_counts(structure, estimators).values()) * (1 + reruns)


def run_particles(
    key: Key,
    num_particles: int,
    vectorize: bool | Callable,  # noqa: FBT001  (as NumPyro's argument)
    params: dict,
    program: Program,
    structure: Structure,
    estimators: Estimators,
    *,
    split: bool = False,
) -> Run:
    """Split the key as NumPyro does, and run all particles on all branches."""
    plate_key = None
    if structure.subsampled:
        plate_key, key = jax.random.split(key)
    noise, key = _coupling_noise(key, structure, estimators, num_particles)
    keys = key[None] if num_particles == 1 else jax.random.split(key, num_particles)
    pairs = jax.vmap(lambda k: jax.random.split(k))(keys)
    counts = branch_counts(structure, estimators)

    def run(params: dict, given: dict, *, split: bool = False) -> Run:
        def one(own: tuple[Array, dict, dict]) -> Particle:
            (model_key, guide_key), noise, given = own

            def lane(branches: dict, given: dict) -> Particle:
                on = Keys(model_key, guide_key, plate_key)
                return run_particle(program, structure, estimators, on, branches, noise, given, params, split=split)

            return over_branches(lane, counts, given)

        particles = over_particles(one, (pairs, noise, given), num_particles, vectorize)
        lanes = make_lanes(structure, estimators, particles.log_prob, particles.records)
        return Run(program, structure, estimators, lanes, particles, again)

    def again(given: dict[str, Array]) -> Run:
        return run(jax.lax.stop_gradient(params), given)

    return run(params, {}, split=split)


def as_branches(run: Run, again: Run, name: str) -> Run:
    """Two runs as one, where those of ``again`` are further branches of a site: probes, as far as others can see."""
    old = run.lanes
    branching = old.branching if name in old.branching else (*old.branching, name)
    axis = Lanes(run.structure, branching, {}).axis(name)

    def join(x: Array, y: Array) -> Array:
        both = (x, y) if name in old.branching else (jnp.expand_dims(x, axis), jnp.expand_dims(y, axis))
        return jnp.concatenate(both, axis)

    held = jax.lax.stop_gradient((run.particles.terms, run.particles.log_prob, dict(old.log_weights)))
    other = (again.particles.terms, again.particles.log_prob, dict(again.lanes.log_weights))
    terms, log_prob, log_weights = jax.tree.map(join, held, other)
    particles = Particle(terms, {}, log_prob, {}, {})
    return run._replace(lanes=Lanes(run.structure, branching, log_weights), particles=particles)


def over_particles(
    function: Callable,
    xs: PyTree,
    num_particles: int,
    vectorize: bool | Callable,  # noqa: FBT001
) -> PyTree:
    """Map a function over the particles."""
    if num_particles == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    if callable(vectorize):
        return vectorize(function, xs)
    return jax.vmap(function)(xs) if vectorize else jax.lax.map(function, xs)


def _coupling_noise(key: Key, structure: Structure, estimators: Estimators, num_particles: int) -> tuple[dict, Key]:
    """Noise of the sites whose particles are coupled. The key is split only if there are such sites."""
    shapes = jax.eval_shape(
        lambda k: {name: estimators[name].noise(k, site, num_particles) for name, site in structure.sites.items()}, key
    )
    coupled = [name for name, shape in shapes.items() if shape is not None]
    if not coupled:
        return {}, key
    key, *own = jax.random.split(key, 1 + len(coupled))
    return {
        name: estimators[name].noise(k, structure.sites[name], num_particles)
        for name, k in zip(coupled, own, strict=True)
    }, key


def mean_of_particles(mutable: dict, lead: int) -> dict:
    """Mutable values are averaged over the particles (integers are taken from the first)."""

    def mean(x: Array) -> Array:
        x = x.reshape(x.shape[0], -1, *x.shape[lead:])[:, 0]
        return jax.lax.stop_gradient(jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0])

    return jax.tree.map(mean, mutable)
