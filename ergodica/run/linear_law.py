r"""The stationary law of a kernel on a Gaussian target with gradient noise, read off the kernel's own step.

On a target of constant curvature one step of a Langevin kernel is affine in its state, in the noise of its gradients and in the
normals that it draws:

.. math:: z' = F z + \sum_e B_e \zeta_e + G \xi

The matrices are Jacobians of ``kernel.step``, so nothing of a kernel is written twice; the covariance then obeys a linear
equation. All arrays may have leading axes, one law each.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import rng
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree


class AffineStep(NamedTuple):
    """One step, ``z' = transition @ z + sum_e noise_loading[:, e] @ zeta_e + loading @ xi``.

    Attributes
    ----------
    transition : array (..., Z, Z)
    noise_loading : array (..., Z, E, D)
        For each of the ``E`` gradient estimates that a step calls for.
    loading : array (..., Z, X)
    select : array (..., D, Z)
        Takes the position out of ``z``.
    """

    transition: Any
    noise_loading: Any
    loading: Any
    select: Any


class _Tape:
    """A vector that is handed out piece by piece; zeros, however many, while there is none."""

    def __init__(self) -> None:
        self.rewind(None)

    def rewind(self, values: Array | None) -> None:
        self.values, self.used = values, 0

    def take(self, tree: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(tree)
        begin, self.used = self.used, self.used + flat.size
        return unravel(jnp.zeros_like(flat) if self.values is None else self.values[begin : self.used])


class _LinearGradient(AbstractGradientEstimator):
    """The gradient ``-curvature @ position``, with noise from a tape."""

    curvature: Array
    tape: _Tape = eqx.field(static=True)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> None:  # noqa: ARG002
        return None

    def draw(self, key: Key, state: None) -> tuple[Batch, None]:  # noqa: ARG002
        """Draw the noise of a whole step, for kernels whose kicks share a batch."""
        noise = self.tape.take(jnp.zeros(self.curvature.shape[0], self.curvature.dtype))
        return Batch(noise, jnp.ones(1)), state

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        flat, unravel = ravel_pytree(params)
        noise = (self.draw(key, state)[0] if batch is None else batch).data
        return Estimate(unravel(-self.curvature @ flat + noise), jnp.zeros((), flat.dtype)), state


def affine_step(kernel: AbstractKernel, position: Position, curvature: Array) -> AffineStep:
    """Differentiate one step of ``kernel`` on a Gaussian target of a given curvature (D, D), in double precision.

    Raises
    ------
    ValueError
        If the step is not affine: the kernel adapts, accepts or rejects, or scales its noise by the state.
    """
    with jax.enable_x64(True):  # noqa: FBT003  (its only argument)
        zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), float), position)
        return _checked(kernel, _read(_bare(kernel), zeros, jnp.asarray(curvature, float)))


def affine_steps(kernel: AbstractKernel, curvatures: Any, masses: Any = None) -> AffineStep:
    """As `affine_step`, for one coordinate by itself at each of the curvatures (D,); laws along the leading axis.

    ``masses`` (D,) replaces the mass of a kernel that has one.
    """
    with jax.enable_x64(True):  # noqa: FBT003  (its only argument)
        curvatures = jnp.asarray(curvatures, float)
        with_mass = masses is not None and hasattr(kernel, "mass")
        masses = jnp.asarray(masses, float) if with_mass else jnp.ones_like(curvatures)
        return _checked(kernel, _read_each(_bare(kernel), curvatures, masses, with_mass=with_mass))


@eqx.filter_jit
def _read_each(kernel: Any, curvatures: Array, masses: Array, *, with_mass: bool) -> tuple[AffineStep, AffineStep]:
    def of_one(curvature: Array, mass: Array) -> tuple[AffineStep, AffineStep]:
        own = eqx.tree_at(lambda k: k.mass, kernel, mass) if with_mass else kernel
        return _read(own, jnp.zeros((), float), curvature[None, None])

    return jax.vmap(of_one)(curvatures, masses)


def _checked(kernel: Any, steps: tuple[AffineStep, AffineStep]) -> AffineStep:
    step, elsewhere = jax.tree.map(np.asarray, steps)
    if not all(np.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in zip(step, elsewhere, strict=True)):
        raise ValueError(
            "sampler must take steps that are affine on a Gaussian target, as SGLD and Splitting do; those of "
            f"{type(kernel).__name__} are not, so its law is not predicted. Measure its bias after a run (ergodica.diagnose)."
        )
    return step


def gradient_of(kernel: Any) -> AbstractGradientEstimator:
    """The gradient estimator that a kernel holds; raise if there is none."""
    gradient = getattr(kernel, "gradient", None)
    if not isinstance(gradient, AbstractGradientEstimator):
        raise TypeError(
            "sampler must hold a gradient estimator in its field 'gradient', as SGLD and Splitting do; got "
            f"{type(kernel).__name__}."
        )
    return gradient


def _bare(kernel: Any) -> Any:
    """Take the data off a kernel, and its hyper-parameters to double precision."""
    gradient_of(kernel)
    bare = eqx.tree_at(lambda k: k.gradient, kernel, None)
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, bare)


@eqx.filter_jit
def _read(kernel: Any, position: Position, curvature: Array) -> tuple[AffineStep, AffineStep]:
    """Jacobians of the step at two states, which are equal if it is affine."""
    noises, normals = _Tape(), _Tape()
    gradient = _LinearGradient(curvature, noises)
    kernel = eqx.tree_at(lambda k: k.gradient, kernel, gradient, is_leaf=lambda x: x is None)
    with rng.normals_from(normals.take):
        start = kernel.init(jax.random.key(0), position)
    moving, fixed = eqx.partition(start, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(moving)

    def step(z: Array, zeta: Array | None, xi: Array | None, key: Key) -> Array:
        noises.rewind(zeta)
        normals.rewind(xi)
        with rng.normals_from(normals.take):
            after, _ = kernel.step(key, eqx.combine(unravel(z), fixed))
        return ravel_pytree(eqx.filter(after, eqx.is_inexact_array))[0]

    step(flat, None, None, jax.random.key(0))
    sizes = flat.size, noises.used, normals.used
    places = _places_of_position(moving)

    def at(size: float, seed: int) -> AffineStep:
        point = [size * jnp.cos(jnp.arange(n, dtype=flat.dtype)) for n in sizes]
        transition, noise_loading, loading = jax.jacfwd(step, argnums=(0, 1, 2))(*point, jax.random.key(seed))
        select = jnp.eye(flat.size, dtype=flat.dtype)[places]
        return AffineStep(transition, noise_loading.reshape(flat.size, -1, curvature.shape[0]), loading, select)

    return at(0.0, 0), at(1.0, 1)


def _places_of_position(moving: Any) -> np.ndarray:
    """Indices of the position among the raveled entries of a state."""
    marked = jax.tree.map(lambda x: np.zeros(x.shape), moving)
    marked = marked._replace(position=jax.tree.map(np.ones_like, marked.position))
    return np.flatnonzero(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(marked)]))


class _Steps(NamedTuple):
    r"""What ``count`` steps do to second moments; ``sum_`` is over 1, …, ``count`` steps.

    ``power`` :math:`F^n`; ``added`` :math:`R_n = \sum_{i<n} F^i Q F^{iT}`; ``drift`` :math:`M_n = \sum_{i<n} F^i B`.
    """

    count: int
    power: np.ndarray
    added: np.ndarray
    drift: np.ndarray
    sum_added: np.ndarray
    sum_drift: np.ndarray
    sum_square: np.ndarray


def _transpose(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _around(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ b @ _transpose(a)


def _join(first: _Steps, then: _Steps, noise: np.ndarray) -> _Steps:
    """Steps after steps: ``F^{n+i} = F^n F^i`` and so ``M_{n+i} = M_n + F^n M_i``."""
    n, power, m = first.count, first.power, then.count
    cross = first.drift @ noise @ _transpose(power @ then.sum_drift)
    square = m * _around(first.drift, noise) + cross + _transpose(cross) + _around(power, then.sum_square)
    return _Steps(
        n + m,
        power @ then.power,
        first.added + _around(power, then.added),
        first.drift + power @ then.drift,
        first.sum_added + m * first.added + _around(power, then.sum_added),
        first.sum_drift + m * first.drift + power @ then.sum_drift,
        first.sum_square + square,
    )


def _repeat(one: _Steps, count: int, noise: np.ndarray) -> _Steps:
    """``count`` steps, in about ``2 log2(count)`` joins."""
    if count == 1:
        return one
    half = _repeat(one, count // 2, noise)
    whole = _join(half, half, noise)
    return _join(whole, one, noise) if count % 2 else whole


def solve_lyapunov(transition: np.ndarray, added: np.ndarray) -> np.ndarray:
    r"""Solve :math:`P = F P F^T + Q` by Smith's doubling; needs a spectral radius below 1."""
    total = added
    while np.max(np.abs(transition)) > 1e-20:
        total = total + _around(transition, total)
        transition = transition @ transition
    return total


def spectral_radius(step: AffineStep) -> np.ndarray:
    """Largest modulus of an eigenvalue of the transition (...)."""
    return np.max(np.abs(np.linalg.eigvals(step.transition)), axis=-1)


def stationary_covariance(step: AffineStep, noise: np.ndarray, num_blocks: int | None = None) -> np.ndarray:
    r"""Covariance of the position in the stationary law, averaged over the steps of an epoch.

    Parameters
    ----------
    step : AffineStep
    noise : array (..., D, D)
        Covariance :math:`S` of the noise of one gradient.
    num_blocks : int, optional
        :math:`K`, where each epoch visits :math:`K` blocks in a fresh random order; gradients are independent unless given.

    Returns
    -------
    array (..., D, D)

    Raises
    ------
    ValueError
        If the step is unstable, or an epoch does not end at the end of a step.

    Notes
    -----
    Gradients of one epoch are drawn without replacement from :math:`K` values whose noises sum to zero:

    .. math:: \mathrm{Cov}(\zeta_t, \zeta_s) = S \left(\delta_{ts} - \frac{1 - \delta_{ts}}{K - 1}\right)
              = \frac{K}{K-1}\left(\delta_{ts} - \frac1K\right) S

    and those of different epochs are uncorrelated. After :math:`j` steps of an epoch the covariance is therefore

    .. math:: P_j = F^j P_0 F^{jT} + R_j - \frac{1}{K-1} M_j S M_j^T

    with :math:`R_j` that of independent gradients of covariance :math:`KS/(K-1)` and :math:`M_j = \sum_{i<j} F^i B`.
    :math:`P_0 = P_{K}` is a Lyapunov equation, and the average over :math:`j` is exact in :math:`O(\log K)` products of matrices.
    """
    if np.any(spectral_radius(step) >= 1):
        raise ValueError(
            f"sampler's step_size must be smaller: its step is unstable at this curvature (spectral radius "
            f"{np.max(spectral_radius(step)):.3g}, which must be below 1)."
        )
    own = _around(step.loading, np.eye(step.loading.shape[-1]))
    calls = np.moveaxis(step.noise_loading, -2, 0)
    of_one = np.sum([_around(call, noise) for call in calls], axis=0)
    if num_blocks is None or num_blocks == 1:
        kept = 1.0 if num_blocks is None else 0.0  # one block is all the data
        return _around(step.select, solve_lyapunov(step.transition, own + kept * of_one))
    if num_blocks % len(calls):
        raise ValueError(
            f"An epoch of {num_blocks} blocks ends in the middle of a step that asks for {len(calls)} gradients; give a "
            "batch_size with a number of blocks that it divides, or reuse_gradient=True."
        )
    length = num_blocks // len(calls)
    added = own + num_blocks / (num_blocks - 1) * of_one
    removed = noise / (num_blocks - 1)
    drift = step.noise_loading.sum(-2)
    one = _Steps(1, step.transition, added, drift, added, drift, _around(drift, removed))
    epoch = _repeat(one, length, removed)
    start = solve_lyapunov(epoch.power, epoch.added - _around(epoch.drift, removed))
    carried = _sum_of_powers(step.transition, start, length)
    return _around(step.select, (carried + epoch.sum_added - epoch.sum_square) / length)


def _sum_of_powers(transition: np.ndarray, start: np.ndarray, count: int) -> np.ndarray:
    r""":math:`\sum_{j=1}^{n} F^j P F^{jT}`."""
    zero = np.zeros_like(transition)
    kick = _around(transition, start)
    one = _Steps(1, transition, kick, zero, kick, zero, zero)
    return _repeat(one, count, zero).added
