"""The fourth-order splitting: its order in finite time, in the stationary law, and on a force that is not linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import ergodica as erg
from ergodica.samplers import ForceGradient, force_gradient
from tests.support.affine import NoisyQuadratic, stationary_covariance, step_map

pytestmark = pytest.mark.usefixtures("x64")

PRECISION, MASS = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([0.5, 2.0])
FRICTION, TEMPERATURE = 1.5, 0.7
STEPS = (0.2, 0.1)


def maps(h):
    gradient = NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(0.0))
    kernel = ForceGradient(gradient, h, FRICTION, mass=jnp.asarray(MASS), temperature=TEMPERATURE)
    return jax.tree.map(np.asarray, step_map(kernel, jnp.zeros(2)))


def exact_moments(time, mean):
    """Mean and covariance of (theta, p) after a time, from a point."""
    generator = np.block([[np.zeros((2, 2)), np.diag(1 / MASS)], [-PRECISION, -FRICTION * np.eye(2)]])
    flow = expm(generator * time)
    limit = np.zeros((4, 4))
    limit[:2, :2], limit[2:, 2:] = TEMPERATURE * np.linalg.inv(PRECISION), TEMPERATURE * np.diag(MASS)
    return flow @ mean, limit - flow @ limit @ flow.T


def moments(h, time, mean):
    step = maps(h)
    mean = np.concatenate([mean, -PRECISION @ mean[:2]])  # the force that is carried
    covariance = np.zeros((6, 6))
    for _ in range(round(time / h)):
        mean = step.transition @ mean
        covariance = step.transition @ covariance @ step.transition.T + step.loading @ step.loading.T
    return mean[:4], covariance[:4, :4]


def order(errors):
    return np.log2(errors[0] / errors[1])


def finite_time_orders():
    start = np.array([1.0, -0.5, 0.3, 0.0])
    mean, covariance = exact_moments(1.0, start)
    found = [moments(h, 1.0, start) for h in STEPS]
    return order([np.linalg.norm(m - mean) for m, _ in found]), order(
        [np.linalg.norm(c - covariance) for _, c in found]
    )


def test_weak_order_four_at_finite_time():
    """Mean and covariance, of correlated coordinates with different masses."""
    assert min(finite_time_orders()) > 3.9


def test_stationary_order_four():
    errors = []
    for h in STEPS:
        covariance = stationary_covariance(maps(h))
        errors.append(np.linalg.norm(covariance[:2, :2] - TEMPERATURE * np.linalg.inv(PRECISION)))
    assert order(errors) > 3.9


@pytest.mark.parametrize("coefficient", [0.0, -1 / 24, 1 / 48])
def test_other_coefficients_lose_the_order(coefficient, monkeypatch):
    def mutant(gradient, curvature, h):
        return jax.tree.map(lambda g, c: g + coefficient * h**2 * c, gradient, curvature)

    monkeypatch.setattr(force_gradient, "corrected_force", mutant)
    assert min(finite_time_orders()) < 2.3


def test_order_four_on_a_force_that_is_not_linear():
    """At temperature 0: two coupled pendulums with friction, against a solver of high order."""

    def log_density(t):
        return jnp.cos(t[0]) + 0.5 * jnp.cos(t[1] - t[0]) + 0.2 * jnp.sin(t[0] + 2 * t[1])

    gradient = erg.estimators.Minibatch(erg.Posterior(log_density, initial=jnp.zeros(2)), scheme="full")
    force = jax.jit(jax.grad(log_density))
    theta, p = np.array([1.2, -0.7]), np.array([0.4, 1.1])

    def field(_, z):
        return np.concatenate([z[2:] / MASS, np.asarray(force(jnp.asarray(z[:2]))) - 0.3 * z[2:]])

    exact = solve_ivp(field, (0, 2), np.concatenate([theta, p]), rtol=1e-12, atol=1e-12, method="DOP853").y[:2, -1]
    errors = []
    for h in STEPS:
        kernel = ForceGradient(gradient, h, 0.3, mass=jnp.asarray(MASS), temperature=0.0)
        state = kernel.init(jax.random.key(0), jnp.asarray(theta))._replace(momentum=jnp.asarray(p))
        step = jax.jit(lambda state, kernel=kernel: kernel.step(jax.random.key(1), state)[0])
        for _ in range(round(2 / h)):
            state = step(state)
        errors.append(np.linalg.norm(state.position - exact))
    assert order(errors) > 3.7


def test_independent_gradient_noise_brings_back_order_one():
    def error(h):
        gradient = NoisyQuadratic(jnp.full((1, 1), 2.0), jnp.asarray(1.0))
        kernel = ForceGradient(gradient, h, FRICTION, temperature=TEMPERATURE)
        return abs(stationary_covariance(step_map(kernel, jnp.zeros(1)))[0, 0] - TEMPERATURE / 2)

    assert abs(order([error(0.02), error(0.01)]) - 1) < 0.1
