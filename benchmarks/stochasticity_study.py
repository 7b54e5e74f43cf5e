"""What minibatches do to the order of Langevin integrators: error of the sampled law against the step size.

The question is that of Franzese, Milios, Filippone and Michiardi (2022), "Revisiting the effects of stochasticity for
Hamiltonian samplers", asked of the kernels of `ergodica.samplers`, with full gradients, independent batches, reshuffled
blocks and symmetric sweeps.

- Gaussian target: no random number is drawn. Fed with one batch, a shipped kernel is an affine map with Gaussian noise,
  so the first two moments move linearly; averaged over the batch orders, their fixed point is the stationary law.
- Logistic regression in two dimensions: simulation of many chains, against quadrature on a grid.
- Bayesian neural network with 25 weights: predictive negative log likelihood. No exact reference exists.

    python benchmarks/stochasticity_study.py [--output benchmarks/results] [--quick]

`--quick` computes the Gaussian part alone, in seconds.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ergodica as erg
from ergodica.core import rng
from ergodica.core.types import Batch
from ergodica.estimators import Minibatch
from ergodica.samplers import ABOBA, BAOA, BAOAB, OBABO, SGHMC, SGLD, UBU, LieTrotter


def sgld(gradient, step_size, friction):  # noqa: ARG001
    """SGLD among the underdamped ones: it has no friction."""
    return SGLD(gradient, step_size)


INTEGRATORS: dict[str, Callable] = {
    "SGLD": sgld,
    "SGHMC": SGHMC,
    "LieTrotter": LieTrotter,
    "OBABO": OBABO,
    "UBU": UBU,
    "BAOA": BAOA,
    "BAOAB": BAOAB,
    "ABOBA": ABOBA,
}
PALINDROMES: dict[str, Callable] = {
    "OBABO": functools.partial(OBABO, one_batch=True),
    "UBU": functools.partial(UBU, one_batch=True),
    "BAOAB": functools.partial(BAOAB, one_batch=True),
    "ABOBA": functools.partial(ABOBA, one_batch=True),
}
ORDERS = ("full", "uniform", "blocks", "symmetric")
TITLES = {
    "full": "full gradients",
    "uniform": "independent batches",
    "blocks": "reshuffled blocks",
    "symmetric": "symmetric sweeps, one batch a step",
}
ROUNDING = 1e-10  # relative errors below this are those of float64 linear algebra


def integrators_of(order: str) -> dict[str, Callable]:
    """Give the integrators that are run with a batch order; symmetric sweeps are for palindromes."""
    return PALINDROMES if order == "symmetric" else INTEGRATORS


# --- Gaussian target: exact laws --------------------------------------------------------------------------------------

NUM_BLOCKS, FRICTION = 8, 1.5
STEPS = tuple(0.64 / 2**i for i in range(9))
MOST_NOISES = 16


def quadratic_blocks(num_blocks: int = NUM_BLOCKS) -> tuple[np.ndarray, np.ndarray]:
    """Curvatures (K, 2, 2) that do not commute, and linear terms (K, 2).

    Their sum has curvature about 1 in all directions. One block estimates the gradient with a noise variance of about K a
    coordinate, as where a well-specified model is cut into K blocks.
    """
    curvatures, shifts = [], []
    for k in range(num_blocks):
        angle = 0.4 + 2.0 * k
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        curvatures.append(turn @ np.diag([1.6, 0.2 + 0.1 * k]) @ turn.T)
        shifts.append([np.cos(1.7 * k), np.sin(1.1 * k)])
    return np.array(curvatures) / num_blocks, np.array(shifts) * np.sqrt(2 / num_blocks)


def gaussian_posterior() -> erg.Posterior:
    """Make the sum of the blocks' quadratic log likelihoods, under a flat prior; a block is one datum."""
    return erg.Posterior(
        lambda theta: 0.0 * jnp.sum(theta),
        lambda theta, rows: -0.5 * jnp.einsum("nij,i,j->n", rows[0], theta, theta) + rows[1] @ theta,
        jax.tree.map(jnp.asarray, quadratic_blocks()),
        initial=jnp.zeros(2),
    )


@contextmanager
def noise_from(values: jax.Array) -> Iterator[None]:
    """Let the noises of a kernel be the next entries of ``values``."""
    used = 0

    def take(_: Any, tree: Any) -> Any:
        nonlocal used
        flat, unravel = ravel_pytree(tree)
        used += flat.size
        return unravel(values[used - flat.size : used])

    with mock.patch.object(rng, "normal_like", take):
        yield


def moving_parts(state: Any) -> tuple:
    """Position, momentum, and the gradient that the next step reuses: what the law is about."""
    force = getattr(state, "force", None)
    return state.position, getattr(state, "momentum", None), None if force is None else force.gradient


def with_parts(state: Any, parts: tuple) -> Any:
    """Put `moving_parts` back."""
    position, momentum, gradient = parts
    state = state._replace(position=position)
    if momentum is not None:
        state = state._replace(momentum=momentum)
    return state if gradient is None else state._replace(force=state.force._replace(gradient=gradient))


def affine_step(kernel: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differentiate the kernel's own step: ``z' = F z + G xi + b``."""
    key, no_noise = jax.random.key(0), jnp.zeros(MOST_NOISES)
    with noise_from(no_noise):
        state = kernel.init(key, jnp.zeros(2), batch)
    flat, unravel = ravel_pytree(moving_parts(state))

    def step(z, noise):
        with noise_from(noise):
            after, _ = kernel.step(key, with_parts(state, unravel(z)), batch)
        return ravel_pytree(moving_parts(after))[0]

    zero = jnp.zeros_like(flat)
    return *jax.jacobian(step, argnums=(0, 1))(zero, no_noise), step(zero, no_noise)


def moment_operators(make: Callable, batches: Batch, steps: tuple[float, ...]) -> np.ndarray:
    """Operators (H, K, n, n) on (1, mean, second moment), one for each step size and batch."""
    gradient = Minibatch(gaussian_posterior(), 1, "uniform")

    def at(h, batch):
        return affine_step(make(gradient, h, FRICTION), batch)

    over_both = jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))
    F, G, b = map(np.asarray, jax.jit(over_both)(jnp.array(steps), batches))
    size = b.shape[-1]
    L = np.zeros((*b.shape[:2], 1 + size + size**2, 1 + size + size**2))
    mean, second = slice(1, 1 + size), slice(1 + size, None)
    L[..., 0, 0], L[..., mean, 0], L[..., mean, mean] = 1.0, b, F
    constant = b[..., :, None] * b[..., None, :] + G @ np.swapaxes(G, -1, -2)
    L[..., second, 0] = constant.reshape(*b.shape[:2], -1)
    cross = np.einsum("...im,...j->...ijm", F, b) + np.einsum("...i,...jm->...ijm", b, F)
    L[..., second, mean] = cross.reshape(*b.shape[:2], size**2, size)
    L[..., second, second] = np.einsum("...ik,...jl->...ijkl", F, F).reshape(*b.shape[:2], size**2, size**2)
    return L


def over_orders(L: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Average products of operators over the orders of every subset of the blocks (a bit mask), by recursion on its last.

    The second product goes through the subset and back again.
    """
    identity = np.broadcast_to(np.eye(L.shape[-1]), L[:, 0].shape)
    found = {0: (identity, identity)}
    for mask in range(1, 2 ** L.shape[1]):
        members = [k for k in range(L.shape[1]) if mask >> k & 1]
        there = sum(L[:, k] @ found[mask ^ 1 << k][0] for k in members) / len(members)
        back = sum(L[:, k] @ found[mask ^ 1 << k][1] @ L[:, k] for k in members) / len(members)
        found[mask] = there, back
    return found


def path_of(order: str, L: np.ndarray) -> list[np.ndarray]:
    """Mean operators (H, n, n) from the start of an epoch to the end of each of its steps."""
    if order in ("full", "uniform"):
        return [L.mean(axis=1)]
    num_blocks, found = L.shape[1], over_orders(L)
    by_size = [[mask for mask in found if mask.bit_count() == j] for j in range(num_blocks + 1)]
    path = [np.mean([found[mask][0] for mask in masks], axis=0) for masks in by_size[1:]]
    if order == "symmetric":
        everything = 2**num_blocks - 1
        path += [np.mean([found[m][1] @ found[everything ^ m][0] for m in masks], axis=0) for masks in by_size[1:]]
    return path


def stationary_covariance(path: list[np.ndarray]) -> np.ndarray:
    """Covariances (H, 2, 2) of the position, over all iterates; NaN where the step is unstable."""
    covariances = []
    for i, epoch in enumerate(path[-1]):
        size = epoch.shape[0]
        if np.max(np.abs(np.linalg.eigvals(epoch[1:, 1:]))) >= 1:
            covariances.append(np.full((2, 2), np.nan))
            continue
        start = np.concatenate([[1.0], np.linalg.solve(np.eye(size - 1) - epoch[1:, 1:], epoch[1:, 0])])
        moments = np.mean([operators[i] @ start for operators in path], axis=0)
        dimension = int((np.sqrt(4 * size - 3) - 1) / 2)
        mean, second = moments[1 : 1 + dimension], moments[1 + dimension :].reshape(dimension, dimension)
        covariances.append((second - np.outer(mean, mean))[:2, :2])
    return np.array(covariances)


def gaussian_errors(steps: tuple[float, ...] = STEPS) -> dict[str, dict[str, list[float]]]:
    """Relative error of the covariance for each batch order and integrator, at each step size.

    It is the root mean square entry per dimension of the error in whitened coordinates,
    ``|S^(-1/2) (S_h - S) S^(-1/2)|_F / sqrt(d)`` for the covariance ``S`` of the target.
    """
    curvatures, _ = quadratic_blocks()
    root = np.linalg.cholesky(curvatures.sum(axis=0))
    errors: dict[str, dict[str, list[float]]] = {}
    with jax.enable_x64(True):
        data = gaussian_posterior().data
        each = Batch(jax.tree.map(lambda x: x[:, None], data), jnp.ones((NUM_BLOCKS, 1)))
        whole = Batch(jax.tree.map(lambda x: x[None], data), jnp.full((1, NUM_BLOCKS), 1 / NUM_BLOCKS))
        for order in ORDERS:
            errors[order] = {}
            for name, make in integrators_of(order).items():
                operators = moment_operators(make, whole if order == "full" else each, steps)
                sampled = stationary_covariance(path_of(order, operators))
                white = root.T @ sampled @ root - np.eye(2)
                errors[order][name] = (np.linalg.norm(white, axis=(1, 2)) / np.sqrt(2)).tolist()
    return errors


def slope(steps: Any, errors: Any) -> float | None:
    """Fit the order over the three smallest steps; ``None`` where the errors are rounding."""
    errors = np.asarray(errors)[-3:]
    return None if np.any(errors < ROUNDING) else float(np.polyfit(np.log(steps[-3:]), np.log(errors), 1)[0])


# --- simulation -------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Mean over independent chains, and its standard error."""

    mean: float
    error: float


@eqx.filter_jit
def run_chains(kernel: Any, statistic: Callable, key: jax.Array, starts: Any, num_warmup: Any, num_steps: Any):
    """Time average of a statistic for each chain; the counts and all hyper-parameters are traced."""
    num_chains = jax.tree.leaves(starts)[0].shape[0]
    key_init, key_run = jax.random.split(key)
    states = jax.vmap(kernel.init)(jax.random.split(key_init, num_chains), starts)

    def step(i, carry):
        states, total = carry
        keys = jax.random.split(jax.random.fold_in(key_run, i), num_chains)
        states, _ = jax.vmap(kernel.step)(keys, states)
        values = jax.vmap(statistic)(states.position)
        return states, total + jnp.where(i < num_warmup, 0.0, values)

    _, total = jax.lax.fori_loop(0, num_warmup + num_steps, step, (states, jnp.zeros(num_chains)))
    return total / num_steps


def simulate(kernel: Any, statistic: Callable, key: jax.Array, starts: Any, warmup: int, steps: int) -> Estimate:
    """Average over time and chains."""
    means = np.asarray(run_chains(kernel, statistic, key, starts, jnp.asarray(warmup), jnp.asarray(steps)), np.float64)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / np.sqrt(means.size)))


# --- logistic regression ----------------------------------------------------------------------------------------------

LOGISTIC_ROWS, LOGISTIC_BLOCKS, LOGISTIC_FRICTION = 64, 8, 6.0
LOGISTIC_STEPS = (0.16, 0.08, 0.04, 0.02, 0.01)


def logistic_posterior() -> erg.Posterior:
    """Make a regression with two coefficients and 64 rows, prior N(0, 4)."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(LOGISTIC_ROWS, 2))
    y = generator.uniform(size=LOGISTIC_ROWS) < 1 / (1 + np.exp(-x @ [1.0, -0.5]))

    def log_likelihood(theta, rows):
        x, y = rows
        logits = x @ theta
        return y * logits - jax.nn.softplus(logits)

    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return erg.Posterior(lambda theta: -jnp.sum(theta**2) / 8, log_likelihood, data, initial=jnp.zeros(2))


class Quadrature(NamedTuple):
    """Moments on a grid, and the grid with its probabilities."""

    mean: np.ndarray
    covariance: np.ndarray
    points: np.ndarray
    probabilities: np.ndarray


def quadrature(posterior: erg.Posterior, half_width: float = 6.0, size: int = 601) -> Quadrature:
    """Sum over a square grid: for a smooth density that has died out at the edges, exact to rounding."""
    axis = np.linspace(-half_width, half_width, size)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    with jax.enable_x64(True):
        log_density = np.asarray(jax.lax.map(posterior.log_density, jnp.asarray(points), batch_size=10_000))
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = weights @ points
    return Quadrature(mean, (points - mean).T @ ((points - mean) * weights[:, None]), points, weights)
