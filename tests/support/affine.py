"""The exact law of a kernel on a quadratic target, read off the shipped code.

On a Gaussian target with additive gradient noise one step of a Langevin kernel is affine in (state, noise):

    z' = F z + G xi + offset,    xi ~ N(0, I)

`step_map` replaces the source of randomness, `ergodica.core.rng.normal_like`, by slices of a given vector, so that
automatic differentiation of the kernel's own `step` gives F and G. No draw is made, and nothing of the kernel is
rewritten. The stationary covariance is then a discrete Lyapunov equation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from scipy.linalg import solve_discrete_lyapunov

from ergodica.core import rng
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Batch, Estimate, Key, PyTree

MOST_NOISES = 64


class Tape:
    """A vector of noises, handed out piece by piece."""

    def __init__(self, values: Array) -> None:
        self.values, self.used = values, 0

    def take(self, tree: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(tree)
        piece = jax.lax.dynamic_slice_in_dim(self.values, self.used, flat.size)
        self.used += flat.size
        return unravel(piece)


_tape: list[Tape] = []


@contextmanager
def noise_from(values: Array) -> Iterator[Tape]:
    """Let every draw of a kernel inside the block be the next entries of ``values``."""
    tape = Tape(values)
    _tape.append(tape)
    try:
        with mock.patch.object(rng, "normal_like", lambda key, tree: tape.take(tree)):
            yield tape
    finally:
        _tape.pop()


class NoisyQuadratic(AbstractGradientEstimator):
    """Gradient of -theta' A theta / 2 with additive noise of covariance ``spread^2 I``, from the tape if one is on."""

    precision: Array
    spread: Array

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> None:
        return None

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        noise = _tape[-1].take(params)
        return Estimate(-self.precision @ params + self.spread * noise, jnp.zeros(())), state


class StepMap(NamedTuple):
    """``z' = transition @ z + loading @ noise + offset``; ``z`` ravels position, momentum and carried gradient."""

    transition: Array
    loading: Array
    offset: Array


def moving_parts(state: Any) -> tuple[PyTree, PyTree, PyTree]:
    """What of a state the law is about: position, momentum, and the gradient that the next step will reuse."""
    force = getattr(state, "force", None)
    return state.position, getattr(state, "momentum", None), None if force is None else force.gradient


def with_parts(state: Any, parts: tuple[PyTree, PyTree, PyTree]) -> Any:
    """Put `moving_parts` back."""
    position, momentum, gradient = parts
    state = state._replace(position=position)
    if momentum is not None:
        state = state._replace(momentum=momentum)
    if gradient is not None:
        state = state._replace(force=state.force._replace(gradient=gradient))
    return state


def as_function(kernel: Any, position: PyTree, batch: Batch | None = None) -> tuple[Callable, int, int]:
    """Give ``f(z, noise) -> z'`` of one step, the length of ``z`` and the number of noises."""
    key = jax.random.key(0)
    with noise_from(jnp.zeros(MOST_NOISES, jnp.result_type(float))):
        state = kernel.init(key, position, batch)
    flat, unravel = ravel_pytree(moving_parts(state))
    used = []

    def step(z: Array, noise: Array) -> Array:
        with noise_from(noise) as tape:
            after, _ = kernel.step(key, with_parts(state, unravel(z)), batch)
        used.append(tape.used)
        return ravel_pytree(moving_parts(after))[0]

    jax.eval_shape(step, flat, jnp.zeros(MOST_NOISES, flat.dtype))
    return step, flat.size, used[0]


def step_map(kernel: Any, position: PyTree, batch: Batch | None = None) -> StepMap:
    """Differentiate one step; can be traced, so that hyper-parameters may be mapped over."""
    step, size, num_noises = as_function(kernel, position, batch)
    z, noise = jnp.zeros(size, jnp.result_type(float)), jnp.zeros(num_noises, jnp.result_type(float))
    transition, loading = jax.jacobian(step, argnums=(0, 1))(z, noise)
    return StepMap(transition, loading, step(z, noise))


def stationary_covariance(maps: StepMap) -> np.ndarray:
    """Solve ``S = F S F' + G G'``."""
    transition, loading = np.asarray(maps.transition), np.asarray(maps.loading)
    assert np.max(np.abs(np.linalg.eigvals(transition))) < 1, "the step is unstable: no stationary law"
    return solve_discrete_lyapunov(transition, loading @ loading.T)


class Prepared:
    """A kernel whose chains start with given parts of their state."""

    def __init__(self, kernel: Any, **parts: Any) -> None:
        self.kernel, self.parts = kernel, parts

    def init(self, key: Key, position: PyTree, batch: Batch | None = None) -> Any:
        return self.kernel.init(key, position, batch)._replace(**self.parts)

    def step(self, key: Key, state: Any, batch: Batch | None = None) -> tuple[Any, Any]:
        return self.kernel.step(key, state, batch)
