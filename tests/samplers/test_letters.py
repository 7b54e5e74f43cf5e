"""The letters one by one, where the closed-form laws of whole schemes would not see a loss of precision."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core import rng
from ergodica.core.types import Estimate
from ergodica.samplers import Splitting
from ergodica.samplers.letters import euler_friction, free_flow, friction_and_noise
from tests.support.affine import NoisyQuadratic, noise_from

SCALED_TIMES = (1e-7, 1e-5, 1e-3, 0.03, 0.29, 0.31, 1.0, 5.0, 30.0)


def exact_flow(x):
    """Noise covariance of the force-free flow at friction x, time 1, T = M = 1, in sixty digits."""
    with decimal.localcontext(prec=60):
        x = decimal.Decimal(float(x))
        e = (-x).exp()
        position = (2 / x) * (1 - 2 * (1 - e) / x + (1 - e * e) / (2 * x))
        return float(position), float((1 - e) ** 2 / x), float(1 - e * e), float((1 - e) / x), float(e)


def flow_law(x, dtype):
    """Covariance entries, glide and decay of the shipped letter U."""
    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)

    def flow(p, noise):
        return jnp.stack(free_flow(zero, p, one, (noise[0], noise[1]), one, jnp.asarray(x, dtype), one))

    decay = jax.jacobian(flow)(one, jnp.zeros(2, dtype))
    loading = np.asarray(jax.jacobian(flow, argnums=1)(one, jnp.zeros(2, dtype)), np.float64)
    covariance = loading @ loading.T
    return covariance[0, 0], covariance[0, 1], covariance[1, 1], float(decay[0]), float(decay[1])


@pytest.mark.parametrize("x", SCALED_TIMES)
def test_free_flow_in_single_precision(x):
    np.testing.assert_allclose(flow_law(x, jnp.float32), exact_flow(np.float32(x)), rtol=4e-6, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("x", SCALED_TIMES)
def test_free_flow_in_double_precision(x):
    np.testing.assert_allclose(flow_law(x, jnp.float64), exact_flow(x), rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_free_flow_without_friction_is_a_drift():
    q, p = free_flow(
        jnp.array(1.0),
        jnp.array(2.0),
        jnp.array(4.0),
        (jnp.array(3.0), jnp.array(3.0)),
        *map(jnp.asarray, (0.5, 0.0, 1.0)),
    )
    assert (float(q), float(p)) == (1.0 + 0.5 * 2.0 / 4.0, 2.0)


@pytest.mark.usefixtures("x64")
def test_free_flow_composes():
    """Twice the flow over t is the flow over 2t, in law."""

    def law(t):
        def flow(z, noise):
            times = map(jnp.asarray, (t, 1.5, 0.7))
            return jnp.stack(free_flow(z[0], z[1], jnp.array(2.5), (noise[0], noise[1]), *times))

        f, g = jax.jacobian(flow, argnums=(0, 1))(jnp.ones(2), jnp.zeros(2))
        return f, g @ g.T

    f, q = law(0.4)
    np.testing.assert_allclose(law(0.8)[0], f @ f, rtol=1e-13)
    np.testing.assert_allclose(law(0.8)[1], f @ q @ f.T + q, rtol=1e-13)


@pytest.mark.parametrize("flow", [friction_and_noise, euler_friction])
def test_small_friction_keeps_its_noise_in_single_precision(flow):
    """1 - exp(-2x) must not be formed by a subtraction that cancels."""
    unit = jnp.ones(())
    spread = flow(jnp.zeros(()), unit, unit, jnp.asarray(1e-4), jnp.asarray(1e-4), unit)
    np.testing.assert_allclose(spread, np.sqrt(2e-8), rtol=1e-6)


def test_zero_temperature_is_deterministic_and_conserves_what_a_leapfrog_step_does():
    gradient = NoisyQuadratic(jnp.eye(2), jnp.asarray(0.0))
    kernel = Splitting("BABO", gradient, 0.1, friction=0.0, temperature=0.0)
    with noise_from(jnp.linspace(1.0, 5.0, 40)):
        state = kernel.init(jax.random.key(0), jnp.array([1.0, -2.0]))
        np.testing.assert_array_equal(state.momentum, 0.0)
        state, _ = kernel.step(jax.random.key(1), state)
    np.testing.assert_allclose(state.position, np.array([1.0, -2.0]) * (1 - 0.1**2 / 2), rtol=1e-6)


def test_momentum_starts_in_its_own_law():
    """Against variance M T, for masses given per coordinate; sees errors above 2 %."""
    mass = {"a": jnp.array([0.5, 4.0]), "b": jnp.array(9.0)}

    class Zero(NoisyQuadratic):
        def estimate(self, key, params, state, batch=None):
            return Estimate(jax.tree.map(jnp.zeros_like, params), jnp.zeros(())), state

    kernel = Splitting("BAOA", Zero(jnp.eye(1), jnp.zeros(())), 0.1, mass=mass, temperature=0.7)
    position = jax.tree.map(jnp.zeros_like, mass)
    keys = jax.random.split(jax.random.key(3), 200_000)
    momenta = jax.jit(jax.vmap(lambda key: kernel.init(key, position).momentum))(keys)
    for p, m in zip(jax.tree.leaves(momenta), jax.tree.leaves(mass), strict=True):
        squares = np.asarray(p, np.float64) ** 2 / (0.7 * np.asarray(m))
        error = np.sqrt(2 / len(keys))
        assert 5 * error < 0.02
        assert np.all(np.abs(squares.mean(axis=0) - 1) < 5 * error)


def test_normals_are_independent_between_leaves():
    tree = {"a": jnp.zeros(50_000), "b": jnp.zeros(50_000)}
    draws = rng.normal_like(jax.random.key(0), tree)
    correlation = np.corrcoef(draws["a"], draws["b"])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(50_000)
