"""Exact stationary laws of the shipped kernels on a Gaussian target, for every order in which batches may come.

Fed with one batch, a kernel is an affine map with Gaussian noise, so the first two moments move linearly. The operators that
move them are read off the kernel's own step by automatic differentiation, averaged over the batch orders, and their fixed point
is the stationary law. No random number is drawn. `stochasticity_study.py` runs it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ergodica as erg
from ergodica.core import rng
from ergodica.core.types import Batch
from ergodica.estimators import Minibatch
from ergodica.samplers import ABOBA, BAOA, BAOAB, OBABO, SGHMC, SGLD, UBU, ForceGradient, LieTrotter


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
HIGHER_ORDER: dict[str, Callable] = {
    "ForceGradient": ForceGradient
}  # Gaussian part alone; one batch serves both its kicks
PALINDROMES: dict[str, Callable] = {
    "OBABO": functools.partial(OBABO, one_batch=True),
    "UBU": functools.partial(UBU, one_batch=True),
    "BAOAB": functools.partial(BAOAB, one_batch=True),
    "ABOBA": functools.partial(ABOBA, one_batch=True),
}
ORDERS = ("full", "uniform", "blocks", "symmetric")
ROUNDING = 1e-10  # relative errors below this are those of float64 linear algebra


def integrators_of(order: str) -> dict[str, Callable]:
    """Give the integrators that are run with a batch order; symmetric sweeps are for palindromes."""
    return PALINDROMES if order == "symmetric" else INTEGRATORS


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
        for name, make in (INTEGRATORS | HIGHER_ORDER).items():
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


def slope(steps: tuple[float, ...], errors: list[float]) -> float | None:
    """Fit the order over the three smallest steps with an error above rounding; ``None`` if there are not three."""
    kept = [(h, error) for h, error in zip(steps, errors, strict=True) if error > ROUNDING][-3:]
    return float(np.polyfit(*np.log(kept).T, 1)[0]) if len(kept) == 3 else None


def slope_table(errors: dict, steps: tuple[float, ...] = STEPS) -> dict[str, dict[str, float | None]]:
    """Fitted orders of the Gaussian part: by batch order, then integrator."""
    return {order: {name: slope(steps, e) for name, e in by_name.items()} for order, by_name in errors.items()}


HALVED = 0.005


def halving_table(
    errors: dict, larger: float = HALVED, steps: tuple[float, ...] = STEPS
) -> dict[str, dict[str, float | None]]:
    """Orders between one step size and its half, of errors averaged over all iterates; ``None`` where they are rounding."""
    i = int(np.argmin(np.abs(np.array(steps) - larger)))

    def order(e: list[float]) -> float | None:
        return float(np.log2(e[i] / e[i + 1])) if e[i + 1] > ROUNDING else None

    return {name: {kernel: order(e) for kernel, e in by_kernel.items()} for name, by_kernel in errors.items()}
