"""Particles in a periodic box: energies, forces, virials, and molecular dynamics by `ergodica.samplers.BAOAB`.

Units are those of Lennard-Jones: mass, diameter, well depth and Boltzmann's constant are 1. Two dimensions. Positions have
shape ``(N, 2)`` and need not lie in the box.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.estimators import Minibatch
from ergodica.samplers import BAOAB

SWITCH_ON, CUTOFF = 1.8, 2.3
GRID_START, GRID_SPACING = 0.5, 0.005
GRID = GRID_START + GRID_SPACING * np.arange(round((CUTOFF - GRID_START) / GRID_SPACING) + 1)
BINS = np.linspace(0.75, 2.25, 31)


# --- pair potentials --------------------------------------------------------------------------------------------------


def switch(r: jax.Array, on: float = SWITCH_ON, off: float = CUTOFF) -> jax.Array:
    """Fall from 1 to 0 between two distances, with two continuous derivatives."""
    s = jnp.clip((r - on) / (off - on), 0.0, 1.0)
    return 1 - s**3 * (10 - 15 * s + 6 * s**2)


def lennard_jones(r: jax.Array) -> jax.Array:
    """Pair energy :math:`4 (r^{-12} - r^{-6})`, switched off smoothly before the cutoff."""
    return 4 * (r**-12 - r**-6) * switch(r)


class PairTable(NamedTuple):
    """A pair potential by its values and slopes on `GRID`; between the knots a cubic, below the first a line."""

    values: jax.Array
    slopes: jax.Array


def tabulate(u: Callable) -> PairTable:
    """Make the table of a pair potential, a function of one distance."""
    values, slopes = jax.vmap(jax.value_and_grad(u))(jnp.asarray(GRID, jnp.result_type(float)))
    return PairTable(values, slopes)


def interpolate(table: PairTable, r: jax.Array) -> jax.Array:
    """Energy of pairs at any distances (cubic Hermite interpolation); 0 from the cutoff on."""
    place = (r - GRID_START) / GRID_SPACING
    low = jnp.clip(jnp.floor(place), 0, len(GRID) - 2).astype(jnp.int32)
    t = place - low
    u0, u1 = table.values[low], table.values[low + 1]
    d0, d1 = GRID_SPACING * table.slopes[low], GRID_SPACING * table.slopes[low + 1]
    inside = u0 + t * (d0 + t * (3 * (u1 - u0) - 2 * d0 - d1 + t * (2 * (u0 - u1) + d0 + d1)))
    return jnp.where(t < 0, u0 + d0 * t, jnp.where(r < CUTOFF, inside, 0.0))


# --- systems ----------------------------------------------------------------------------------------------------------


def pair_distances(x: jax.Array, box: jax.Array) -> jax.Array:
    """Distance of each of the N (N - 1) / 2 pairs, to the nearest image."""
    first, second = np.triu_indices(len(x), 1)
    separation = x[first] - x[second]
    separation = separation - box * jnp.round(separation / box)
    return jnp.sqrt(jnp.sum(separation**2, axis=-1))


class System(eqx.Module):
    r"""What a configuration's energy is: pairs, and where ``embedding`` is given a part that no pair potential has.

    .. math:: U(x) = \sum_{i<j} u(r_{ij}) + \frac{c}{2} \sum_i n_i^2, \qquad n_i = \sum_{j \ne i} s(r_{ij})

    with :math:`c` the embedding and :math:`s` a switch that counts neighbours.
    """

    table: PairTable
    embedding: Any = None

    def energy(self, x: jax.Array, box: jax.Array) -> jax.Array:
        """Potential energy of all particles."""
        r = pair_distances(x, box)
        pairs = jnp.sum(interpolate(self.table, r))
        if self.embedding is None:
            return pairs
        first, second = np.triu_indices(len(x), 1)
        near = switch(r, 1.2, 1.8)
        neighbours = jnp.zeros(len(x), r.dtype).at[first].add(near).at[second].add(near)
        return pairs + self.embedding / 2 * jnp.sum(neighbours**2)


def forces(system: System, x: jax.Array, box: jax.Array) -> jax.Array:
    """Negative gradient of the energy."""
    return -jax.grad(system.energy)(x, box)


def virial(system: System, x: jax.Array, box: jax.Array) -> jax.Array:
    r"""Minus the derivative of the energy by :math:`\log\lambda` where box and positions are stretched by :math:`\lambda`.

    For pairs it is the sum of force times distance.
    """
    one = jnp.ones((), x.dtype)
    return -jax.grad(lambda stretch: system.energy(stretch * x, stretch * box))(one)


def pressure(system: System, x: jax.Array, box: jax.Array, temperature: jax.Array) -> jax.Array:
    r"""Pressure of one configuration in two dimensions, :math:`(N T + W / 2) / L^2` with the virial :math:`W`."""
    return (len(x) * temperature + virial(system, x, box) / 2) / box**2


def radial_distribution(r: jax.Array, box: jax.Array, num_particles: int) -> jax.Array:
    """Pairs in each of the `BINS` over what an ideal gas of the same density would have (its mean over configurations is g)."""
    inside = (r[:, None] >= BINS[:-1]) & (r[:, None] < BINS[1:])
    ideal = num_particles * (num_particles - 1) / 2 * np.pi * (BINS[1:] ** 2 - BINS[:-1] ** 2) / box**2
    return jnp.sum(inside, axis=0) / ideal


# --- molecular dynamics -----------------------------------------------------------------------------------------------


class State(NamedTuple):
    """A thermodynamic state, and the step of the integrator there."""

    density: float
    temperature: float
    step_size: float

    def box(self, num_particles: int) -> float:
        """Side of the square box."""
        return float(np.sqrt(num_particles / self.density))


FRICTION = 1.0


def thermostat(system: System, box: jax.Array, temperature: jax.Array, step_size: jax.Array) -> Any:
    """Langevin dynamics of the particles: BAOAB on the log density -U at the given temperature."""
    posterior = erg.Posterior(partial(_minus_energy, system, box))
    return BAOAB(Minibatch(posterior, scheme="full"), step_size, FRICTION, temperature=temperature)


def _minus_energy(system: System, box: jax.Array, x: jax.Array) -> jax.Array:
    return -system.energy(x, box)


class Observed(NamedTuple):
    """Block means of a run: energy a particle and pressure (num_blocks,), and g (num_blocks, bins)."""

    energy: jax.Array
    pressure: jax.Array
    g: jax.Array


@eqx.filter_jit
def simulate(
    key: jax.Array,
    systems: System,
    starts: jax.Array,
    state: Any,
    num_warmup: int,
    num_blocks: int,
    block: int,
    every: int,
) -> tuple[Observed, jax.Array]:
    """Run one system a start, all with noise of their own; measure at every ``every``-th step, ``block`` times a block.

    ``state`` is ``(box, temperature, step_size)``, arrays. Returns the observations and the configurations at the end of the
    blocks, each with leading axes (systems, blocks).
    """
    box, temperature, step_size = state

    def one(key: jax.Array, system: System, x: jax.Array) -> Any:
        kernel = thermostat(system, box, temperature, step_size)
        key_init, key_run = jax.random.split(key)

        def advance(carry: Any, count: int) -> Any:
            def step(_: jax.Array, carry: Any) -> Any:
                chain, index = carry
                return kernel.step(jax.random.fold_in(key_run, index), chain)[0], index + 1

            return jax.lax.fori_loop(0, count, step, carry)

        def measure(carry: Any, _: None) -> Any:
            carry = advance(carry, every)
            x = carry[0].position
            found = Observed(
                system.energy(x, box) / len(x),
                pressure(system, x, box, temperature),
                radial_distribution(pair_distances(x, box), box, len(x)),
            )
            return carry, found

        def run_block(carry: Any, _: None) -> Any:
            carry, found = jax.lax.scan(measure, carry, None, block)
            return carry, (jax.tree.map(lambda v: jnp.mean(v, axis=0), found), carry[0].position)

        carry = advance((kernel.init(key_init, x), jnp.zeros((), jnp.int32)), num_warmup)
        return jax.lax.scan(run_block, carry, None, num_blocks)[1]

    return jax.vmap(one)(jax.random.split(key, len(starts)), systems, starts)
