"""Preconditioned SGLD: the exact law once frozen, the second moment by hand, and the drift by automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.samplers import SGLD, PreconditionedSGLD, preconditioned
from tests.support.affine import NoisyQuadratic, Prepared, noise_from, stationary_covariance, step_map

pytestmark = pytest.mark.usefixtures("x64")

PRECISION = np.array([[2.0, 0.6], [0.6, 1.0]])
SECOND_MOMENT = np.array([0.3, 4.0])
SPREAD, NUM_ADAPT, DECAY, DAMPING = 1.3, 5, 0.9, 0.1


def frozen(h, temperature=0.7):
    gradient = NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(SPREAD))
    kernel = PreconditionedSGLD(gradient, h, NUM_ADAPT, temperature=temperature, decay=DECAY, damping=DAMPING)
    return Prepared(kernel, second_moment=jnp.asarray(SECOND_MOMENT), count=jnp.asarray(NUM_ADAPT, jnp.int32))


def expected_law(h, temperature):
    """Solve the equation of the docstring by Kronecker products."""
    G = np.diag(1 / (DAMPING + np.sqrt(SECOND_MOMENT / (1 - DECAY**NUM_ADAPT))))
    F = np.eye(2) - h * G @ PRECISION
    noise = 2 * h * temperature * G + h**2 * SPREAD**2 * G @ G
    return np.linalg.solve(np.eye(4) - np.kron(F, F), noise.ravel()).reshape(2, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("h", [0.05, 0.4])
def test_law_of_the_frozen_kernel(h, temperature):
    shipped = stationary_covariance(step_map(frozen(h, temperature), jnp.zeros(2)))
    np.testing.assert_allclose(shipped, expected_law(h, temperature), rtol=1e-12)


def test_the_law_tends_to_the_target():
    errors = []
    for h in (0.004, 0.002):
        shipped = stationary_covariance(step_map(frozen(h), jnp.zeros(2)))
        errors.append(np.linalg.norm(shipped - 0.7 * np.linalg.inv(PRECISION)))
    assert 0.97 < np.log2(errors[0] / errors[1]) < 1.03


def test_noise_not_preconditioned_is_rejected(monkeypatch):
    """Mutant: sqrt(2 h T) in place of sqrt(2 h T G)."""

    def mutant(x, g, xi, G, h, T):
        return x + h * G * g + jnp.sqrt(2 * h * T) * xi

    monkeypatch.setattr(preconditioned, "preconditioned_step", mutant)
    shipped = stationary_covariance(step_map(frozen(0.05), jnp.zeros(2)))
    assert np.max(np.abs(shipped / expected_law(0.05, 0.7) - 1)) > 0.2


def test_second_moment_is_adapted_and_then_frozen():
    """Five gradients against NumPy, and not one more."""
    gradient = NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(0.0))
    kernel = PreconditionedSGLD(gradient, 0.1, NUM_ADAPT, temperature=0.0, decay=DECAY, damping=DAMPING)
    state = kernel.init(jax.random.key(0), jnp.array([1.0, -2.0]))
    theta, moment = np.array([1.0, -2.0]), np.zeros(2)
    for k in range(1, NUM_ADAPT + 3):
        with noise_from(jnp.zeros(8)):
            state, _ = kernel.step(jax.random.key(k), state)
        g = -PRECISION @ theta
        if k <= NUM_ADAPT:
            moment = DECAY * moment + (1 - DECAY) * g**2
        theta = theta + 0.1 * g / (DAMPING + np.sqrt(moment / (1 - DECAY ** min(k, NUM_ADAPT))))
        np.testing.assert_allclose(state.second_moment, moment, rtol=1e-12)
        np.testing.assert_allclose(state.position, theta, rtol=1e-12)


def test_drift_is_the_derivative_of_the_preconditioner():
    """Through the last gradient, for a target whose Hessian is diagonal: there one Rademacher probe is exact."""
    posterior = erg.Posterior(lambda t: -jnp.sum(jnp.array([1.0, 0.3]) * jnp.cosh(t)), initial=jnp.zeros(2))
    gradient = erg.estimators.Minibatch(posterior, scheme="full")
    options = {"num_adapt": None, "decay": DECAY, "damping": DAMPING, "temperature": 0.6}
    plain = PreconditionedSGLD(gradient, 0.1, **options)
    corrected = PreconditionedSGLD(gradient, 0.1, drift_correction=True, **options)
    theta, count = jnp.array([0.7, -1.2]), 3

    def preconditioner(theta):
        g = jax.grad(posterior.log_density)(theta)
        moment = (DECAY * SECOND_MOMENT + (1 - DECAY) * g**2) / (1 - DECAY ** (count + 1))
        return 1 / (DAMPING + jnp.sqrt(moment))

    moved = []
    for kernel in (plain, corrected):
        state = Prepared(kernel, second_moment=jnp.asarray(SECOND_MOMENT), count=jnp.asarray(count, jnp.int32))
        state = state.init(jax.random.key(0), theta)
        moved.append(kernel.step(jax.random.key(1), state)[0].position)
    drift = np.diagonal(jax.jacobian(preconditioner)(theta))
    np.testing.assert_allclose(moved[1] - moved[0], 0.1 * 0.6 * drift, rtol=1e-10)


def test_drift_where_all_gradients_were_zero():
    zero = jnp.zeros(2)
    drift = preconditioned.preconditioner_drift(zero, zero, jnp.ones(2), jnp.asarray(0.1), jnp.asarray(1.0))
    np.testing.assert_array_equal(drift, 0)


def test_freezing_removes_the_bias_of_adapting():
    """With a decay of 1/2 the preconditioner follows each gradient: the variance is far off, and right when frozen."""
    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(64))
    gradient = erg.estimators.Minibatch(posterior, scheme="full")
    h, chains = 0.05, 64

    def variance(num_adapt):
        kernel = PreconditionedSGLD(gradient, h, num_adapt, decay=0.5, damping=0.5)

        def chain(key):
            key_start, key_init, key_run = jax.random.split(key, 3)
            start = kernel.init(key_init, jax.random.normal(key_start, (64,)))

            def body(state, i):
                state, _ = kernel.step(jax.random.fold_in(key_run, i), state)
                return state, jnp.mean(state.position**2)

            return jnp.mean(jax.lax.scan(body, start, jnp.arange(400))[1][200:])

        found = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), chains))
        return float(found.mean()), float(found.std() / np.sqrt(chains))

    adapting, error = variance(None)
    fixed, error_fixed = variance(20)
    assert abs(adapting - 1) > 8 * error + 0.1
    # frozen, a coordinate has variance 1 / (1 - h G / 2), with G at most 1 / damping
    assert 1 - 5 * error_fixed < fixed < 1 / (1 - h) + 5 * error_fixed


def test_unit_preconditioner_is_sgld():
    gradient = NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(SPREAD))
    kernel = PreconditionedSGLD(gradient, 0.2, 1, decay=0.5, damping=0.5)
    kernel = Prepared(kernel, second_moment=jnp.full(2, 0.125), count=jnp.asarray(1, jnp.int32))
    expected = step_map(SGLD(gradient, 0.2), jnp.zeros(2))
    for found, wanted in zip(step_map(kernel, jnp.zeros(2)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_bad_input_raises():
    gradient = NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(SPREAD))
    with pytest.raises(ValueError, match="drift_correction is for a preconditioner that adapts for ever"):
        PreconditionedSGLD(gradient, 0.1, drift_correction=True)
    with pytest.raises(ValueError, match="num_adapt must be at least 1; got 0"):
        PreconditionedSGLD(gradient, 0.1, 0)
    with pytest.raises(ValueError, match="decay must be below 1"):
        PreconditionedSGLD(gradient, 0.1, decay=1.0)
    with pytest.raises(ValueError, match="damping must be finite and above 0"):
        PreconditionedSGLD(gradient, 0.1, damping=0.0)
