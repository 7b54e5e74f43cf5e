"""All particles of a step, on all branches."""

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
    """All particles of a step, and what is needed to read them."""

    program: Program
    structure: Structure
    estimators: Estimators
    lanes: Lanes
    particles: Particle


def over_branches(lane: Callable, branching: tuple[str, ...], structure: Structure, estimators: Estimators) -> Particle:
    """Run a particle on every combination of branches, with the same random numbers; one axis for each site."""
    counts = [estimators[name].num_branches(structure.sites[name]) for name in branching]

    def nested(remaining: tuple[str, ...], branches: dict) -> Particle:
        if not remaining:
            return lane(branches)
        name, count = remaining[0], counts[len(branching) - len(remaining)]
        return jax.vmap(lambda a: nested(remaining[1:], branches | {name: a}))(jnp.arange(count))

    return nested(branching, {})


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
    branching = branching_sites(structure, estimators)

    def one(given: tuple[Array, dict]) -> Particle:
        (model_key, guide_key), noise = given

        def lane(branches: dict) -> Particle:
            on = Keys(model_key, guide_key, plate_key)
            return run_particle(program, structure, estimators, on, branches, noise, params, split=split)

        return over_branches(lane, branching, structure, estimators)

    particles = over_particles(one, (pairs, noise), num_particles, vectorize)
    return Run(program, structure, estimators, make_lanes(structure, estimators, particles.log_prob), particles)


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
