"""Hamiltonian Monte Carlo for many independent targets at once: one a row, each with its own acceptance."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import rng, tree
from ergodica.core.types import Key, PyTree

type LogDensities = Callable[[PyTree], Array]
"""From positions, one a row along the leading axis of every leaf, to log densities (n,)."""


class Rows(NamedTuple):
    """Positions (n, …), with their log densities (n,) and gradients (n, …)."""

    position: PyTree
    value: Array
    gradient: PyTree


def evaluate(log_densities: LogDensities, position: PyTree) -> Rows:
    """Evaluate values and gradients; rows do not see each other, so the gradient of the sum is that of each."""

    def total(position: PyTree) -> tuple[Array, Array]:
        values = log_densities(position)
        return jnp.sum(values), values

    gradient, values = jax.grad(total, has_aux=True)(position)
    return Rows(position, values, gradient)


def leapfrog(
    log_densities: LogDensities, rows: Rows, momentum: PyTree, step_size: Array, num_leapfrog: int
) -> tuple[Rows, PyTree]:
    """Integrate Hamilton's equations with unit mass: kick by half a step, drift, kick by half a step, and again."""

    def step(carry: tuple[Rows, PyTree], _: None) -> tuple[tuple[Rows, PyTree], None]:
        rows, momentum = carry
        momentum = tree.axpy(0.5 * step_size, rows.gradient, momentum)
        rows = evaluate(log_densities, tree.axpy(step_size, momentum, rows.position))
        return (rows, tree.axpy(0.5 * step_size, rows.gradient, momentum)), None

    return jax.lax.scan(step, (rows, momentum), None, length=num_leapfrog)[0]


def step(key: Key, log_densities: LogDensities, rows: Rows, step_size: Array, num_leapfrog: int) -> tuple[Rows, Array]:
    """Move every row once, and give the acceptance probabilities (n,).

    Leaves each row's law invariant at any step size. With ``num_leapfrog=1`` it is the Metropolis-adjusted Langevin
    algorithm, MALA, of step ``step_size**2 / 2``. Source: Duane et al. (1987).
    """
    key_momentum, key_accept = jax.random.split(key)
    momentum = rng.normal_like(key_momentum, rows.position)
    proposal, end = leapfrog(log_densities, rows, momentum, step_size, num_leapfrog)
    gain = proposal.value - rows.value - (_kinetic_energies(end) - _kinetic_energies(momentum)).astype(rows.value.dtype)
    probability = jnp.where(jnp.isfinite(gain), jnp.exp(jnp.minimum(gain, 0.0)), 0.0)
    accepted = jax.random.uniform(key_accept, gain.shape, gain.dtype) < probability

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, proposal, rows), probability


def _kinetic_energies(momentum: PyTree) -> Array:
    energies = [0.5 * jnp.sum(jnp.square(p.reshape(p.shape[0], -1)), axis=1) for p in jax.tree.leaves(momentum)]
    return jnp.sum(jnp.stack(energies), axis=0)
