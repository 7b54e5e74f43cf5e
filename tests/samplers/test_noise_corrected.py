"""Noise-corrected SGLD: exact where the noise is known, right on average where it is measured, refused where it cancels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.samplers import NoiseCorrectedSGLD, noise_corrected
from tests.support.affine import NoisyQuadratic, stationary_covariance, step_map
from tests.support.chains import time_averages
from tests.support.laws import sgld_variance
from tests.support.problems import gaussian_mean
from tests.support.statistics import REJECTION, assert_mean, z_scores

SPREAD = 1.3
NUM_DATA, BATCH_SIZE, DATA_VARIANCE, PRIOR_VARIANCE = 50, 20, 2.0, 25.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_law_with_known_noise_is_that_of_full_gradients(temperature):
    precision = np.array([[2.0, 0.6], [0.6, 1.0]])
    gradient = NoisyQuadratic(jnp.asarray(precision), jnp.asarray(SPREAD))
    h = 0.2
    kernel = NoiseCorrectedSGLD(gradient, h, SPREAD**2, temperature=temperature)
    shipped = stationary_covariance(step_map(kernel, jnp.zeros(2)))
    F = np.eye(2) - h * precision
    exact = np.linalg.solve(np.eye(4) - np.kron(F, F), 2 * h * temperature * np.eye(2).ravel()).reshape(2, 2)
    np.testing.assert_allclose(shipped, exact, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_subtracting_at_order_h_is_rejected(monkeypatch):
    """Mutant: 2 h T - h s2 in place of 2 h T - h^2 s2."""
    right = noise_corrected.corrected_step
    monkeypatch.setattr(noise_corrected, "corrected_step", lambda x, g, xi, s2, h, T: right(x, g, xi, s2 / h, h, T))
    kernel = NoiseCorrectedSGLD(NoisyQuadratic(jnp.full((1, 1), 2.0), jnp.asarray(SPREAD)), 0.2, SPREAD**2)
    shipped = stationary_covariance(step_map(kernel, jnp.zeros(1)))
    assert abs(shipped[0, 0] / sgld_variance(0.2, 2.0, 1.0, 0.0) - 1) > 0.2


def target(scheme="uniform"):
    posterior = gaussian_mean(NUM_DATA, DATA_VARIANCE, PRIOR_VARIANCE)
    x = np.asarray(posterior.data, np.float64)
    precision = NUM_DATA / DATA_VARIANCE + 1 / PRIOR_VARIANCE
    noise = (NUM_DATA / DATA_VARIANCE) ** 2 * x.var() / BATCH_SIZE
    gradient = erg.estimators.Minibatch(posterior, BATCH_SIZE, scheme)
    return gradient, precision, x.sum() / DATA_VARIANCE / precision, noise


def square(theta, mean, scale):
    return ((theta - mean) / scale) ** 2


def squares(kernel, variance, mean, num_chains):
    scale = jnp.float32(np.sqrt(variance))
    positions = jnp.float32(mean) + scale * jax.random.normal(jax.random.key(1), (num_chains,))
    return time_averages(
        jax.random.key(2), kernel, positions, square, jnp.float32(mean), scale, num_discarded=60, num_steps=120
    )


@pytest.mark.sweep
def test_measured_noise_of_real_batches():
    """Uniform batches, measured for ever: the running mean is unbiased, and so is the variance."""
    gradient, precision, mean, noise = target()
    h = 0.2 / precision
    variance = sgld_variance(h, precision, 1.0, 0.0)
    assert sgld_variance(h, precision, 1.0, noise) / variance > 1.25  # what there is to correct
    assert h * noise < 0.75  # far from where nothing is left to inject
    kernel = NoiseCorrectedSGLD(gradient, h, num_adapt=None, decay=0.97)
    assert_mean(squares(kernel, variance, mean, 10_240), 1.0, smallest_error=0.02)


@pytest.mark.optimised
def test_frozen_noise_of_one_step_is_not_enough():
    """Negative control: a variance measured in a single step differs between chains and is wrong where it is clipped."""
    gradient, precision, mean, _ = target()
    h = 0.2 / precision
    variance = sgld_variance(h, precision, 1.0, 0.0)
    found = squares(NoiseCorrectedSGLD(gradient, h, num_adapt=1), variance, mean, 2048)
    wide = np.asarray(found).std()
    settled = np.asarray(
        squares(NoiseCorrectedSGLD(gradient, h, num_adapt=None, decay=0.97), variance, mean, 2048)
    ).std()
    assert wide > 1.2 * settled


def test_plain_sgld_is_rejected_by_the_same_test():
    gradient, precision, mean, _ = target()
    h = 0.2 / precision
    found = squares(erg.samplers.SGLD(gradient, h), sgld_variance(h, precision, 1.0, 0.0), mean, 1024)
    assert z_scores(found, 1.0) > REJECTION


def test_noise_is_kept_and_frozen():
    gradient, precision, _, noise = target()
    kernel = NoiseCorrectedSGLD(gradient, 0.01 / precision, num_adapt=400, decay=0.995)
    state = kernel.init(jax.random.key(0), jnp.array(0.0))
    step = jax.jit(lambda key, state: kernel.step(key, state))
    for i in range(400):
        state, info = step(jax.random.key(i), state)
    assert abs(state.noise / (1 - 0.995**400) / noise - 1) < 0.5  # some 200 effective squares: a standard error of 0.1
    after, _ = step(jax.random.key(400), state)
    assert after.noise == state.noise
    assert info.n_grad == 2 * BATCH_SIZE


@pytest.mark.parametrize(("noise", "exceeds"), [(19.9, False), (20.1, True)])
def test_too_much_noise_is_reported(noise, exceeds):
    """At h = 0.1 and T = 1 the gradient may bring a variance of 2 T / h = 20."""
    kernel = NoiseCorrectedSGLD(NoisyQuadraticOf(1), 0.1, {"a": 0.0, "b": noise})
    state = kernel.init(jax.random.key(0), {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    after, info = kernel.step(jax.random.key(1), state)
    assert bool(info.noise_exceeds) is exceeds
    assert bool(jnp.all(after.position["b"] == 0)) is exceeds
    assert jnp.all(after.position["a"] != 0)


class NoisyQuadraticOf(AbstractGradientEstimator):
    """An estimator without probes, for any structure."""

    factor: float

    def init(self, key, params, batch=None):
        return None

    def estimate(self, key, params, state, batch=None):
        return Estimate(jax.tree.map(lambda x: -self.factor * x, params), jnp.zeros(())), state


def test_what_cannot_be_corrected_is_refused():
    for estimator in (target("blocks")[0], erg.estimators.ControlVariate(target("blocks")[0], jnp.array(0.0))):
        with pytest.raises(ValueError, match="gradient must have independent noise at each call"):
            NoiseCorrectedSGLD(estimator, 0.1)
    with pytest.raises(ValueError, match="gives no independent probe"):
        NoiseCorrectedSGLD(NoisyQuadraticOf(1), 0.1).init(jax.random.key(0), jnp.zeros(2))
    with pytest.raises(ValueError, match="noise must be finite and at least 0; got -1"):
        NoiseCorrectedSGLD(NoisyQuadraticOf(1), 0.1, -1.0)
    with pytest.raises(ValueError, match="noise must be a scalar or have the structure of the position"):
        NoiseCorrectedSGLD(NoisyQuadraticOf(1), 0.1, {"a": 1.0}).init(jax.random.key(0), jnp.zeros(2))
