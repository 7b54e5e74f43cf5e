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

NUM_BLOCKS, FRICTION = 6, 1.5
STEPS = tuple(0.64 / 2**i for i in range(11))
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


def gaussian_batches() -> Batch:
    """Each of the K blocks; the mean of them, which gives the full gradient; each with the mean curvature in place of its own."""
    curvatures, shifts = quadratic_blocks()
    mean = curvatures.mean(axis=0, keepdims=True)
    A = np.concatenate([curvatures, mean, np.repeat(mean, NUM_BLOCKS, axis=0)])
    b = np.concatenate([shifts, shifts.mean(axis=0, keepdims=True), shifts])
    return Batch((jnp.asarray(A)[:, None], jnp.asarray(b)[:, None]), jnp.ones((len(A), 1)))


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


def affine_step(kernel: Any, batch: Batch | None) -> tuple[jax.Array, jax.Array, jax.Array]:
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


def moment_operators(kernel_at: Callable, batches: Batch | None, steps: tuple[float, ...]) -> np.ndarray:
    """Operators (H, K, n, n) on (1, mean, second moment), one for each step size and batch."""

    def at(batch, h):
        return affine_step(kernel_at(h), batch)

    maps = jax.vmap(jax.vmap(at, (0, None), axis_size=1 if batches is None else None), (None, 0))
    F, G, b = map(np.asarray, jax.jit(maps)(batches, jnp.array(steps)))
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


type Products = dict[int, np.ndarray]


def over_orders(L: np.ndarray, *, and_back: bool) -> Products:
    """Average products of operators over the orders of every subset of the blocks (a bit mask), by recursion on its size.

    With ``and_back`` the product goes through the subset and back again, and the recursion runs from the turn outwards.
    """
    found = {0: np.broadcast_to(np.eye(L.shape[-1]), L[:, 0].shape)}
    for mask in range(1, 2 ** L.shape[1]):
        members = [k for k in range(L.shape[1]) if mask >> k & 1]
        inner = [L[:, k] @ found[mask ^ 1 << k] for k in members]
        products = [x @ L[:, k] for x, k in zip(inner, members, strict=True)] if and_back else inner
        found[mask] = np.mean(products, axis=0)
    return found


def path_of(order: str, L: np.ndarray) -> list[np.ndarray]:
    """Mean operators (H, n, n) from the start of an epoch to the end of each of its steps."""
    if order in ("full", "uniform"):
        return [L.mean(axis=1)]
    num_blocks, there = L.shape[1], over_orders(L, and_back=False)
    by_size = [[mask for mask in there if mask.bit_count() == j] for j in range(1, num_blocks + 1)]
    path = [np.mean([there[mask] for mask in masks], axis=0) for masks in by_size]
    if order == "symmetric":
        back, everything = over_orders(L, and_back=True), 2**num_blocks - 1
        path += [np.mean([back[m] @ there[everything ^ m] for m in masks], axis=0) for masks in by_size]
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
    ``|S^(-1/2) (S_h - S) S^(-1/2)|_F / sqrt(d)`` for the covariance ``S`` of the target. Beside the batch orders, under
    ``"equal curvature"``, stand reshuffled blocks whose gradients differ by a constant alone.
    """
    root = np.linalg.cholesky(quadratic_blocks()[0].sum(axis=0))

    def error(path: list[np.ndarray]) -> list[float]:
        white = root.T @ stationary_covariance(path) @ root - np.eye(2)
        return (np.linalg.norm(white, axis=(1, 2)) / np.sqrt(2)).tolist()

    errors: dict[str, dict[str, list[float]]] = {order: {} for order in (*ORDERS, "equal curvature")}
    with jax.enable_x64(True):
        gradient, batches = Minibatch(gaussian_posterior(), 1, "uniform"), gaussian_batches()
        for name, make in INTEGRATORS.items():
            L = moment_operators(lambda h, make=make: make(gradient, h, FRICTION), batches, steps)
            blocks, whole, equal = np.split(L, (NUM_BLOCKS, NUM_BLOCKS + 1), axis=1)
            errors["full"][name] = error(path_of("full", whole))
            errors["uniform"][name] = error(path_of("uniform", blocks))
            errors["blocks"][name] = error(path_of("blocks", blocks))
            errors["equal curvature"][name] = error(path_of("blocks", equal))
        for name, make in PALINDROMES.items():
            L = moment_operators(lambda h, make=make: make(gradient, h, FRICTION), batches, steps)
            errors["symmetric"][name] = error(path_of("symmetric", L[:, :NUM_BLOCKS]))
    return errors


def slope(steps: Any, errors: Any) -> float | None:
    """Fit the order over the three smallest steps; ``None`` where the errors are rounding."""
    errors = np.asarray(errors)[-3:]
    return None if np.any(errors < ROUNDING) else float(np.polyfit(np.log(steps[-3:]), np.log(errors), 1)[0])


# --- simulation -------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def run_chains(kernels: Any, statistic: Callable, key: jax.Array, starts: Any, num_warmup: Any, num_steps: Any):
    """Time averages of a statistic for each chain of each kernel (given as a tuple), all driven by the same noise."""
    num_chains = jax.tree.leaves(starts)[0].shape[0]
    key_init, key_run = jax.random.split(key)
    keys = jax.random.split(key_init, num_chains)
    states = tuple(jax.vmap(kernel.init)(keys, starts) for kernel in kernels)

    def step(i, carry):
        states, total = carry
        keys = jax.random.split(jax.random.fold_in(key_run, i), num_chains)
        states = tuple(jax.vmap(kernel.step)(keys, state)[0] for kernel, state in zip(kernels, states, strict=True))
        values = jnp.stack([jax.vmap(statistic)(state.position) for state in states])
        return states, total + jnp.where(i < num_warmup, 0.0, values)

    total = jnp.zeros((len(kernels), *jax.eval_shape(jax.vmap(statistic), starts).shape))
    return jax.lax.fori_loop(0, num_warmup + num_steps, step, (states, total))[1] / num_steps


# --- logistic regression ----------------------------------------------------------------------------------------------

LOGISTIC_ROWS, LOGISTIC_BATCH, LOGISTIC_FRICTION = 64, 8, 6.0
LOGISTIC_STEPS = (0.32, 0.16, 0.08, 0.04)
SGLD_STEPS = (0.08, 0.04, 0.02, 0.01)
LOGISTIC_CHAINS, LOGISTIC_TIME, LOGISTIC_WARMUP_TIME = 1024, 100.0, 8.0


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


def logistic_errors(key: jax.Array) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Relative error of the variance, signed, and its standard error, for each batch order, integrator and step.

    The variance is the mean over whitened coordinates of the second moment about the true mean. Every chain has a twin that
    is driven by the same noise towards the Gaussian of the same mean and covariance, with exact gradients. What the twin
    samples is known exactly, so only the difference between the two is estimated.
    """
    posterior = logistic_posterior()
    truth = quadrature(posterior)
    precision = np.linalg.inv(truth.covariance)

    def quadratic(theta, mean, precision):
        return (theta - mean) @ precision @ (theta - mean)

    def twin_of(dtype):
        mean, P = jnp.asarray(truth.mean, dtype), jnp.asarray(precision, dtype)
        twin = erg.Posterior(lambda theta: -0.5 * quadratic(theta, mean, P), initial=jnp.zeros(2, dtype))
        return Minibatch(twin, scheme="full"), lambda theta: quadratic(theta, mean, P) / 2 - 1

    twin, statistic = twin_of(jnp.float32)
    chosen = np.random.default_rng(1).choice(len(truth.points), LOGISTIC_CHAINS, p=truth.probabilities)
    starts = jnp.asarray(truth.points[chosen], jnp.float32)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for order in ORDERS:
        gradient = Minibatch(posterior, None if order == "full" else LOGISTIC_BATCH, order)
        found[order] = {}
        for name, make in integrators_of(order).items():
            steps = SGLD_STEPS if name == "SGLD" else LOGISTIC_STEPS
            exact = twin_errors(make, twin_of, precision, steps)
            found[order][name] = []
            for h, of_twin in zip(steps, exact, strict=True):
                key, key_run = jax.random.split(key)
                kernels = tuple(make(g, h, LOGISTIC_FRICTION) for g in (gradient, twin))
                counts = (jnp.asarray(round(time / h)) for time in time_of(name))
                mine, twins = np.asarray(run_chains(kernels, statistic, key_run, starts, *counts), np.float64)
                difference = mine - twins
                error = float(difference.mean() + of_twin)
                se = float(difference.std(ddof=1) / np.sqrt(LOGISTIC_CHAINS))
                found[order][name].append({"step": h, "error": error, "se": se})
    return found


def time_of(name: str) -> tuple[float, float]:
    """Warm-up and length of a run: as many steps for SGLD, whose steps are shorter."""
    scale = SGLD_STEPS[0] / LOGISTIC_STEPS[0] if name == "SGLD" else 1.0
    return scale * LOGISTIC_WARMUP_TIME, scale * LOGISTIC_TIME


def twin_errors(make: Callable, twin_of: Callable, precision: np.ndarray, steps: tuple[float, ...]) -> np.ndarray:
    """What the statistic of the twin is on average, exactly."""
    with jax.enable_x64(True):
        gradient, _ = twin_of(jnp.float64)
        operators = moment_operators(lambda h: make(gradient, h, LOGISTIC_FRICTION), None, steps)
        return np.trace(precision @ stationary_covariance(path_of("full", operators)), axis1=1, axis2=2) / 2 - 1


def measured_slope(points: list[dict[str, float]]) -> tuple[float, float] | None:
    """Fit the order, and its standard error, over errors above five standard errors; ``None`` if they are fewer than three."""
    kept = [p for p in points if abs(p["error"]) > 5 * p["se"]]
    if len(kept) < 3 or len({np.sign(p["error"]) for p in kept}) > 1:
        return None
    x, y = (np.log([abs(p[name]) for p in kept]) for name in ("step", "error"))
    weight = np.array([abs(p["error"]) / p["se"] for p in kept])
    fit, covariance = np.polyfit(x, y, 1, w=weight, cov="unscaled")
    return float(fit[0]), float(np.sqrt(covariance[0, 0]))


# --- Bayesian neural network ------------------------------------------------------------------------------------------

BNN_WIDTH, BNN_ROWS, BNN_BATCH, BNN_FRICTION = 8, 64, 8, 5.0
BNN_STEPS = (0.04, 0.02, 0.01, 0.005)
BNN_CHAINS, BNN_TIME, BNN_WARMUP_TIME, BNN_START_TIME, BNN_GROUPS = 128, 40.0, 10.0, 60.0, 16
BNN_INTEGRATORS = ("SGLD", "OBABO", "BAOAB")
BNN_NOISE = 0.3


def network(theta: jax.Array, x: jax.Array) -> jax.Array:
    """One hidden layer of tanh units on one input."""
    slope, offset, out = theta[: 3 * BNN_WIDTH].reshape(3, BNN_WIDTH)
    return jnp.tanh(x[..., None] * 2 * slope + 2 * offset) @ out + theta[-1]


def bnn_problem() -> tuple[erg.Posterior, Callable]:
    """Make a regression with known noise under a N(0, 1) prior on the weights, and the densities of 64 held-out outputs."""
    generator = np.random.default_rng(2)
    x = generator.uniform(-2, 2, size=2 * BNN_ROWS)
    y = np.sin(2 * x) + BNN_NOISE * generator.normal(size=x.size)
    train, test = (
        tuple(jnp.asarray(v[part], jnp.float32) for v in (x, y)) for part in (slice(BNN_ROWS), slice(BNN_ROWS, None))
    )

    def log_likelihood(theta, rows):
        x, y = rows
        return -0.5 * ((y - network(theta, x)) / BNN_NOISE) ** 2 - np.log(BNN_NOISE * np.sqrt(2 * np.pi))

    size = 3 * BNN_WIDTH + 1
    posterior = erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, train, initial=jnp.zeros(size))
    return posterior, lambda theta: jnp.exp(log_likelihood(theta, test))


def bnn_nll(key: jax.Array) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Predictive negative log likelihood a held-out datum (nats), its standard error over groups of chains, for each step."""
    posterior, densities = bnn_problem()
    key, key_start, key_warm, key_noise = jax.random.split(key, 4)
    careful = BAOAB(Minibatch(posterior, scheme="full"), BNN_STEPS[-1], BNN_FRICTION)
    starts = 0.5 * jax.random.normal(key_noise, (BNN_CHAINS, 3 * BNN_WIDTH + 1))
    starts = last_positions(careful, key_warm, starts, jnp.asarray(round(BNN_START_TIME / BNN_STEPS[-1])))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for order in ("full", "uniform", "blocks"):
        gradient = Minibatch(posterior, None if order == "full" else BNN_BATCH, order)
        found[order] = {}
        for name in BNN_INTEGRATORS:
            scale = 1 / BNN_FRICTION if name == "SGLD" else 1.0
            found[order][name] = []
            for h in BNN_STEPS:
                # one key for all: the same noise, so that differences are less noisy than the values
                kernel = INTEGRATORS[name](gradient, scale * h, BNN_FRICTION)
                counts = (jnp.asarray(round(time / h)) for time in (BNN_WARMUP_TIME, BNN_TIME))
                means = np.asarray(run_chains((kernel,), densities, key_start, starts, *counts)[0], np.float64)
                groups = means.reshape(BNN_GROUPS, -1, means.shape[-1])
                left_out = [-np.log(np.delete(groups, i, axis=0).mean(axis=(0, 1))).mean() for i in range(BNN_GROUPS)]
                se = float(np.sqrt((BNN_GROUPS - 1) * np.var(left_out)))
                found[order][name].append(
                    {"step": scale * h, "nll": float(-np.log(means.mean(axis=0)).mean()), "se": se}
                )
    return found


@eqx.filter_jit
def last_positions(kernel: Any, key: jax.Array, starts: jax.Array, num_steps: Any) -> jax.Array:
    """Where the chains are after a number of steps."""
    key_init, key_run = jax.random.split(key)
    states = jax.vmap(kernel.init)(jax.random.split(key_init, len(starts)), starts)

    def step(i, states):
        return jax.vmap(kernel.step)(jax.random.split(jax.random.fold_in(key_run, i), len(starts)), states)[0]

    return jax.lax.fori_loop(0, num_steps, step, states).position


# --- figures and results ----------------------------------------------------------------------------------------------

STYLES = {
    "SGLD": dict(color="C3", marker="o", ls="-"),
    "SGHMC": dict(color="C1", marker="s", ls="-"),
    "LieTrotter": dict(color="C0", marker="^", ls="-", ms=7),
    "OBABO": dict(color="C9", marker="v", ls="--", ms=4),
    "UBU": dict(color="C2", marker="D", ls="-"),
    "BAOA": dict(color="C4", marker="o", ls="-", ms=8, mfc="none"),
    "BAOAB": dict(color="C6", marker="x", ls="--"),
    "ABOBA": dict(color="0.2", marker="+", ls=":", ms=7),
}


def panels(num_panels: int, title: Callable[[int], str], ylabel: str, **options: Any):
    """Make a row of log-log axes with a shared scale."""
    import matplotlib.pyplot as plt

    size = (3.3 * num_panels + 1.2, 3.9)
    figure, axes = plt.subplots(1, num_panels, figsize=size, layout="constrained", sharey=True, **options)
    for i, ax in enumerate(axes):
        ax.set(xscale="log", xlabel=r"step size $h$ (time)", title=title(i))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def guide(ax: Any, order: int, at: tuple[float, float], factor: float) -> None:
    """Draw a line of given slope, from a point down over a factor in the step."""
    h = np.array([at[0] / factor, at[0]])
    error = at[1] * (h / at[0]) ** order
    ax.plot(h, error, color="0.5", lw=1)
    ax.annotate(f"slope {order}", (h[0], error[0]), ha="right", va="center", color="0.35", fontsize=8)


def add_legend(figure: Any, axes: Any) -> None:
    """Put one legend for all panels to their right."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def draw_gaussian(errors: dict, steps: tuple[float, ...] = STEPS) -> Any:
    """Draw the exact errors: a panel for each batch order."""
    figure, axes = panels(4, lambda i: TITLES[ORDERS[i]], "relative error of the covariance")
    for ax, order in zip(axes, ORDERS, strict=True):
        for name, values in errors[order].items():
            shown = np.where(np.asarray(values) > ROUNDING, values, np.nan)
            if np.all(np.isnan(shown)):
                continue
            ax.plot(steps, shown, label=name, **({"ms": 5, "lw": 1.2} | STYLES[name]))
        if order != "full":
            ax.axvline(1 / NUM_BLOCKS, color="0.6", ls="--", lw=0.8)
    axes[0].annotate("BAOA, BAOAB, ABOBA:\nno error but rounding", (0.04, 0.03), xycoords="axes fraction", fontsize=8)
    axes[0].set(yscale="log", ylim=(3e-8, 10))
    axes[1].annotate(r"$K h = 1$", (1 / NUM_BLOCKS, 5e-8), ha="right", fontsize=8, rotation=90, color="0.35")
    guide(axes[0], 1, (0.02, 0.1), 8)
    guide(axes[1], 1, (0.02, 1.0), 8)
    for ax in (axes[0], axes[2], axes[3]):
        guide(ax, 2, (0.64, 2e-3) if ax is not axes[0] else (0.04, 1e-5), 8)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[n] for n in STYLES], list(STYLES), loc="outside right center", frameon=False)
    return figure


def draw_logistic(found: dict) -> Any:
    """Draw the size of the measured errors with two standard errors; open where not distinguishable from zero."""
    figure, axes = panels(4, lambda i: TITLES[ORDERS[i]], "size of the relative error of the variance")
    for ax, order in zip(axes, ORDERS, strict=True):
        for name, points in found[order].items():
            kept = [p for p in points if abs(p["error"]) > 2 * p["se"]]
            ax.errorbar(
                [p["step"] for p in kept],
                [abs(p["error"]) for p in kept],
                yerr=[2 * p["se"] for p in kept],
                label=name,
                **({"ms": 5, "lw": 1.2} | STYLES[name]),
            )
    axes[0].set(yscale="log", ylim=(1e-3, 10))
    guide(axes[1], 1, (0.3, 0.4), 4)
    guide(axes[2], 2, (0.3, 0.05), 4)
    add_legend(figure, axes)
    return figure


def draw_bnn(found: dict) -> Any:
    """Draw the predictive negative log likelihood."""
    figure, axes = panels(3, lambda i: TITLES[tuple(found)[i]], "predictive NLL a datum (nats)")
    for ax, results in zip(axes, found.values(), strict=True):
        for name, points in results.items():
            step, nll, se = (np.array([p[k] for p in points]) for k in ("step", "nll", "se"))
            ax.errorbar(step, nll, yerr=2 * se, label=name, **({"ms": 5, "lw": 1.2} | STYLES[name]))
    add_legend(figure, axes)
    return figure


def slope_table(errors: dict, steps: tuple[float, ...] = STEPS) -> dict[str, dict[str, float | None]]:
    """Fitted orders of the Gaussian part: by batch order, then integrator."""
    return {order: {name: slope(steps, e) for name, e in by_name.items()} for order, by_name in errors.items()}


def main() -> None:
    """Run the parts, print the slopes, write results and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the Gaussian part alone")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpy")},
        "seconds": {},
    }
    parts = {"gaussian": (gaussian_errors, draw_gaussian)}
    if not arguments.quick:
        parts["logistic"] = (lambda: logistic_errors(jax.random.key(1)), draw_logistic)
        parts["bnn"] = (lambda: bnn_nll(jax.random.key(2)), draw_bnn)
    for name, (compute, draw) in parts.items():
        start = time.perf_counter()
        results[name] = compute()
        results["seconds"][name] = round(time.perf_counter() - start, 1)
        draw(results[name]).savefig(arguments.output / f"stochasticity_{name}.png", dpi=110)
        print(name, results["seconds"][name], "s", flush=True)
        if not arguments.quick:
            (arguments.output / "stochasticity_study.json").write_text(json.dumps(results, indent=1))
    results["gaussian_steps"], results["gaussian_slopes"] = STEPS, slope_table(results["gaussian"])
    if not arguments.quick:
        results["logistic_slopes"] = {
            order: {name: measured_slope(points) for name, points in by_name.items()}
            for order, by_name in results["logistic"].items()
        }
        (arguments.output / "stochasticity_study.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({name: results[name] for name in results if name.endswith("slopes")}, indent=1))


if __name__ == "__main__":
    main()
