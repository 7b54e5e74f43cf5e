"""Markov chains over the latent sites of a guide, one for each element of the plates that enclose the whole program."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace

from ergodica.core.types import Key
from ergodica.estimators.variational.facts import Distribution, Draw, Site
from ergodica.estimators.variational.objectives.weighted import plate_scale
from ergodica.estimators.variational.particles import Run
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.structure import Plate, Program, Structure

type Index = tuple[Array, ...] | None
"""For each batch dimension the elements that are in the program, as `jax.numpy.ix_` gives them; ``None``: all of them."""


class Chains(NamedTuple):
    """Where the chains are, and how they have moved. Arrays run over the *whole* plates, also where these are subsampled.

    Attributes
    ----------
    values : dict of str to array
        By the guide's site.
    started : bool array
        Whether a chain has a state yet.
    visits : int32 array
        Steps at which the chain was moved on from a state that it had.
    moves : array
        Steps at which it left that state; for several proposals a step, the shares of them that were accepted, summed.
    step : int32 scalar
        Steps of all.
    """

    values: dict[str, Array]
    started: Array
    visits: Array
    moves: Array
    step: Array

    @property
    def acceptance_rate(self) -> Array:
        """Share of the visits at which each chain moved; NaN where it was never visited twice."""
        return jnp.where(self.visits > 0, self.moves / jnp.maximum(self.visits, 1), jnp.nan)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The plates whose elements have chains of their own, and the elements of them that are in the program."""

    structure: Structure
    plates: list[Plate]
    indices: dict[str, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array with one entry a chain: full sizes at the plates' dimensions, 1 between them."""
        sizes = {p.dim: p.full_size for p in self.plates}
        return tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))

    @property
    def scale(self) -> float:
        """How many chains each of those in the program stands for."""
        return plate_scale(self.plates)

    def full_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Batch shape of a site over the whole plates."""
        sizes = {p.dim: p.full_size for p in self.plates}
        return tuple(sizes.get(i - len(batch_shape), n) for i, n in enumerate(batch_shape))

    def index(self, batch_shape: tuple[int, ...]) -> Index:
        """Where the program's elements stand among those of the whole plates."""
        if not any(p.subsampled for p in self.plates):
            return None
        rows = {p.dim: self.indices[p.name] for p in self.plates if p.subsampled}
        ranges = [rows.get(i - len(batch_shape), jnp.arange(n)) for i, n in enumerate(batch_shape)]
        return jnp.ix_(*ranges)

    def take(self, x: Array, batch_shape: tuple[int, ...]) -> Array:
        """The program's elements of an array over the whole plates."""
        index = self.index(batch_shape)
        return x if index is None else x[index]

    def put(self, x: Array, batch_shape: tuple[int, ...], new: Array) -> Array:
        """Write the program's elements into an array over the whole plates."""
        index = self.index(batch_shape)
        new = new.reshape(batch_shape + x.shape[len(batch_shape) :]).astype(x.dtype)
        return new if index is None else x.at[index].set(new)

    def of_chains(self, x: Array) -> Array:
        """Reshape an array over the program's elements, aligned to the structure's rank, to that of the chains' own rank."""
        return x.reshape(x.shape[self.structure.rank - len(self.shape) :])

    @property
    def chain_shape(self) -> tuple[int, ...]:
        """Shape of an array with one entry for each chain in the program."""
        sizes = {p.dim: p.size for p in self.plates}
        return tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))


class Retained(AbstractSiteEstimator):
    """Particle 0 takes the value that the chain is at; the others are drawn. No derivatives flow through either."""

    value: Array

    @property
    def unbiased(self) -> bool:
        """No: only once the chain has settled."""
        return False

    def noise(self, key: Key, site: Site, num_particles: int) -> dict[str, Array]:  # noqa: ARG002  (nothing is random)
        """Hand the chain's value to all particles, and say which is the first."""
        held = jnp.broadcast_to(self.value, (num_particles, *self.value.shape))
        return {"held": held, "first": jnp.arange(num_particles) == 0}

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: dict[str, Array]) -> Draw:  # noqa: ARG002
        """Take the chain's value, or draw; and record it."""
        value = jax.lax.stop_gradient(jnp.where(noise["first"], noise["held"], fn(rng_key=key)))
        return Draw(value, value)


def held_sites(structure: Structure) -> list[str]:
    """Sites that have a state: all but point masses, which follow from the others."""
    return [name for name, site in structure.sites.items() if not site.delta]


def start(program: Program, params: dict, layout: Layout) -> Chains:
    """Chains without a state."""
    sites = layout.structure.sites
    drawn = jax.eval_shape(lambda: _guide_values(program, params, jax.random.key(0)))
    values = {
        name: jnp.zeros(layout.full_shape(sites[name].batch_shape) + sites[name].event_shape, drawn[name].dtype)
        for name in held_sites(layout.structure)
    }
    return Chains(
        values=values,
        started=jnp.zeros(layout.shape, bool),
        visits=jnp.zeros(layout.shape, jnp.int32),
        moves=jnp.zeros(layout.shape, jnp.result_type(float)),
        step=jnp.zeros((), jnp.int32),
    )


def draw_plates(key: Key, program: Program, params: dict, structure: Structure) -> dict[str, Array]:
    """Draw the elements of the subsampled plates, as the guide does."""
    if not structure.subsampled:
        return {}
    names = {p.name for plates in structure.plates.values() for p in plates if p.subsampled}
    return {name: value for name, value in _guide_values(program, params, key).items() if name in names}


def chosen_values(run: Run, index: Array) -> dict[str, Array]:
    """Value of each site at the particles ``index``, which has the rank of the structure."""

    def at(name: str) -> Array:
        record = run.particles.records[name]
        which = index.reshape((1, *index.shape, *(1,) * (record.ndim - 1 - index.ndim)))
        return jnp.take_along_axis(record, jnp.broadcast_to(which, (1, *record.shape[1:])), axis=0)[0]

    return {name: at(name) for name in held_sites(run.structure)}


def _guide_values(program: Program, params: dict, key: Key) -> dict[str, Array]:
    guide = seed(substitute(program.guide, data=params), key)
    sites = trace(guide).get_trace(*program.args, **program.kwargs)
    return {name: site["value"] for name, site in sites.items() if site["type"] in ("sample", "plate")}
