"""A pair potential network, its posterior on energies and forces, and how it is fitted."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from pair_potential_physics import CUTOFF, System, forces, pair_distances, switch

import ergodica as erg
from ergodica.estimators import Minibatch
from ergodica.samplers import BAOAB, PreconditionedSGLD

WIDTH = 16
ENERGY_NOISE, FORCE_NOISE = 4.0, 4.0
NUM_DATA, BATCH = 16, 8
NUM_PAIRS = 64


class Network(eqx.Module):
    r"""Pair energy :math:`u_\theta(r) = s(r)\,[r^{-12} + a f_\theta(1/r)]`.

    :math:`f` is a perceptron with two hidden layers of tanh units, all of whose parameters have a standard normal prior
    (weights are divided by the root of the layer's width), :math:`s` the switch and :math:`r^{-12}` a core that keeps
    particles apart where there are no data. A quarter of the true repulsion, it is not the truth.
    """

    amplitude: float = 3.0

    def initial(self, key: jax.Array) -> dict[str, jax.Array]:
        """Draw parameters from the prior."""
        shapes = {"w1": (WIDTH,), "b1": (WIDTH,), "w2": (WIDTH, WIDTH), "b2": (WIDTH,), "w3": (WIDTH,), "b3": ()}
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def __call__(self, theta: dict[str, jax.Array], r: jax.Array) -> jax.Array:
        """Energies of pairs at distances of any shape."""
        x = (1 / r[..., None] - 0.8) / 0.2
        hidden = jnp.tanh(x * theta["w1"] + theta["b1"])
        hidden = jnp.tanh(hidden @ theta["w2"] / np.sqrt(WIDTH).item() + theta["b2"])
        f = hidden @ theta["w3"] / np.sqrt(WIDTH).item() + theta["b3"]
        return switch(r) * (r**-12 + self.amplitude * f)


class DataSet(NamedTuple):
    """Configurations and what was observed of them.

    Attributes
    ----------
    distances : array (n, pairs)
        Of the closest pairs, among them all within the cutoff.
    geometry : array (n, pairs, 2N)
        Derivatives of the distances with respect to the coordinates.
    energy : array (n,)
    forces : array (n, 2N)
    """

    distances: jax.Array
    geometry: jax.Array
    energy: jax.Array
    forces: jax.Array


def closest_pairs(x: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances of the closest pairs of one configuration, with their derivatives."""

    def of(flat: jax.Array) -> jax.Array:
        return pair_distances(flat.reshape(-1, 2), box)

    r, geometry = of(x.ravel()), jax.jacfwd(of)(x.ravel())
    order = jnp.argsort(r)[: NUM_PAIRS + 1]
    return r[order], geometry[order]


def observe(key: jax.Array, system: System, configurations: jax.Array, box: jax.Array) -> DataSet:
    """Measure energies and forces with independent normal errors; single precision from here on."""
    r, geometry = jax.vmap(lambda x: closest_pairs(x, box))(configurations)
    if r.shape[1] > NUM_PAIRS and float(r[:, NUM_PAIRS].min()) < CUTOFF:
        raise ValueError(f"A configuration has more than NUM_PAIRS={NUM_PAIRS} pairs within the cutoff; raise it.")
    energy = jax.vmap(lambda x: system.energy(x, box))(configurations)
    force = jax.vmap(lambda x: forces(system, x, box).ravel())(configurations)
    key_energy, key_force = jax.random.split(key)
    energy = energy + ENERGY_NOISE * jax.random.normal(key_energy, energy.shape)
    force = force + FORCE_NOISE * jax.random.normal(key_force, force.shape)
    return DataSet(*(np.asarray(v, np.float32) for v in (r[:, :NUM_PAIRS], geometry[:, :NUM_PAIRS], energy, force)))


def predict(network: Network, theta: Any, distances: jax.Array, geometry: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Energies (n,) and forces (n, 2N) of configurations given as in `DataSet`."""
    u, slope = jax.jvp(lambda r: network(theta, r), (distances,), (jnp.ones_like(distances),))
    return jnp.sum(u, axis=-1), -jnp.einsum("np,npk->nk", slope, geometry)


class Likelihood(eqx.Module):
    """Log likelihood of each configuration, up to a constant."""

    network: Network

    def __call__(self, theta: Any, rows: DataSet) -> jax.Array:
        energy, force = predict(self.network, theta, rows.distances, rows.geometry)
        energy_error = ((energy - rows.energy) / ENERGY_NOISE) ** 2
        return -0.5 * (energy_error + jnp.sum(((force - rows.forces) / FORCE_NOISE) ** 2, axis=-1))


def log_prior(theta: Any) -> jax.Array:
    """Standard normal, up to a constant."""
    return -0.5 * sum(jnp.sum(v**2) for v in jax.tree.leaves(theta))


class Report(eqx.Module):
    """The potential at some distances: what a run reports of its draws."""

    network: Network
    distances: np.ndarray

    def __call__(self, theta: Any) -> dict[str, jax.Array]:
        return {"u": self.network(theta, jnp.asarray(self.distances, jnp.float32))}


def make_posterior(network: Network, data: DataSet, distances: np.ndarray) -> erg.Posterior:
    """Make the posterior of the parameters, which reports u at the given distances."""
    return erg.Posterior(
        log_prior, Likelihood(network), data, initial=network.initial, constrain=Report(network, distances)
    )


# --- fits -------------------------------------------------------------------------------------------------------------

STEP_SIZE, FRICTION = 4e-3, 10.0
DESCENT_STEP = 3e-3


def langevin(posterior: erg.Posterior, halve: int = 1) -> Any:
    """BAOAB at temperature 1 with reshuffled batches; the step is in proportion to the shortest period."""
    amplitude = posterior.log_likelihood.network.amplitude
    return BAOAB(Minibatch(posterior, BATCH), STEP_SIZE * 3.0 / (amplitude * halve), FRICTION)


def decay(num_steps: jax.Array, count: jax.Array) -> jax.Array:
    """Step of the descent, which falls by a factor of 20."""
    return DESCENT_STEP * 20 ** (-count.astype(num_steps.dtype) / num_steps)


def descend(key: jax.Array, posterior: erg.Posterior, num_starts: int, num_steps: int) -> dict[str, jax.Array]:
    """Go down from draws of the prior by RMSprop on batches, which is preconditioned SGLD at temperature 0."""
    schedule = jax.tree_util.Partial(decay, jnp.asarray(num_steps, jnp.float32))
    sampler = PreconditionedSGLD(Minibatch(posterior, BATCH), schedule, None, temperature=0.0)
    dt = erg.sample(
        key, sampler, num_samples=1, num_warmup=num_steps - 1, num_chains=num_starts, progress=False, probes=False
    )
    return {str(k): jnp.asarray(v.values[:, -1]) for k, v in dt["unconstrained_posterior"].data_vars.items()}
