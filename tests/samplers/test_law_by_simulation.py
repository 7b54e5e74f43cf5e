"""Real noise, real batches: variances of chains against closed forms, and mutants that the same tests must reject.

The target is the mean of Gaussian data under `uniform` batches, where the gradient noise does not depend on the
position and its variance is (N/v0)^2 v/n. Settings are chosen for power: the chain decorrelates within ten steps, and
injected and gradient noise are of one size, so that a wrong factor on either shows (with ten times the gradient noise a
halved gradient changes the variance by 5 % only). All chains start in the predicted
law and run long enough to leave it if it is not theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.samplers import BAOAB, SGLD, langevin, splitting
from tests.support.chains import time_averages
from tests.support.laws import VARIANCES, sgld_variance
from tests.support.marks import swept
from tests.support.problems import gaussian_mean, linear_regression
from tests.support.statistics import REJECTION, assert_mean, z_scores

NUM_DATA, BATCH_SIZE, DATA_VARIANCE, PRIOR_VARIANCE = 50, 10, 2.0, 25.0
NUM_CHAINS = 10_240
LENGTH = {"num_discarded": 60, "num_steps": 120}
SMALLEST_ERROR = 0.02


def target():
    """Precision, mean of the posterior and variance of the gradient noise."""
    posterior = gaussian_mean(NUM_DATA, DATA_VARIANCE, PRIOR_VARIANCE)
    x = np.asarray(posterior.data, np.float64)
    precision = NUM_DATA / DATA_VARIANCE + 1 / PRIOR_VARIANCE
    noise = (NUM_DATA / DATA_VARIANCE) ** 2 * x.var() / BATCH_SIZE
    return posterior, precision, x.sum() / DATA_VARIANCE / precision, noise


class Scaled(AbstractGradientEstimator):
    """Mutant: a gradient off by a factor."""

    inner: AbstractGradientEstimator
    factor: float

    def init(self, key, params, batch=None):
        return self.inner.init(key, params, batch)

    def estimate(self, key, params, state, batch=None):
        estimate, state = self.inner.estimate(key, params, state, batch)
        return estimate._replace(gradient=jax.tree.map(lambda g: self.factor * g, estimate.gradient)), state


def overdamped(temperature=1.0, wrap=lambda gradient: gradient):
    posterior, precision, _, noise = target()
    h = 0.2 / precision
    gradient = wrap(erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform"))
    return SGLD(gradient, h, temperature=temperature), sgld_variance(h, precision, temperature, noise)


def underdamped(temperature=1.0, wrap=lambda gradient: gradient):
    """BAOAB at friction 2 sqrt(lambda); its positions have the law of BAOA, since it carries its gradient over."""
    posterior, precision, _, noise = target()
    h, friction = 0.3 / np.sqrt(precision), 2 * np.sqrt(precision)
    gradient = wrap(erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform"))
    law = VARIANCES["BAOAB1"](h, precision, friction, temperature, noise)
    return BAOAB(gradient, h, friction, temperature=temperature), law


EXACT = np.array([0.0, 1.0])


def deviation_and_square(theta, mean, scale):
    return jnp.stack([(theta - mean) / scale, (theta - mean) ** 2 / scale**2])


def outer_square(theta, mean):
    return (theta - mean)[:, None] * (theta - mean)[None, :]


def averages_of(kernel, variance, num_chains, **options):
    """Deviation from the true mean, in predicted standard deviations, and its square, averaged over each chain."""
    mean, scale = jnp.float32(target()[2]), jnp.float32(np.sqrt(variance))
    positions = mean + scale * jax.random.normal(jax.random.key(1), (num_chains,))
    return time_averages(jax.random.key(2), kernel, positions, deviation_and_square, mean, scale, **LENGTH, **options)


def z_of_mutant(kernel, variance):
    """The same test with a quarter of the chains: what it rejects so, the full one rejects all the more."""
    return np.max(np.abs(z_scores(averages_of(kernel, variance, NUM_CHAINS // 4, trace_anew=True), EXACT)))


@pytest.mark.parametrize("temperature", [swept(1.0), 0.25])
@pytest.mark.parametrize("make", [overdamped, underdamped])
@pytest.mark.swept_after(1)
def test_stationary_law(make, temperature):
    kernel, variance = make(temperature)
    assert_mean(averages_of(kernel, variance, NUM_CHAINS), EXACT, smallest_error=SMALLEST_ERROR)


def half_noise(step):
    """sqrt(h) for sqrt(2h)."""
    return lambda x, g, xi, h, T: step(x, g, xi, h, T / 2)


def noise_never_scaled_by_temperature(step):
    return lambda x, g, xi, h, T: step(x, g, xi, h, jnp.ones_like(T))


@pytest.mark.parametrize("mutate", [half_noise, swept(noise_never_scaled_by_temperature)])
def test_sgld_mutants_are_rejected(mutate, monkeypatch):
    monkeypatch.setattr(langevin, "langevin_step", mutate(langevin.langevin_step))
    assert z_of_mutant(*overdamped(0.25)) > REJECTION


def friction_at_temperature_one(flow):
    return lambda p, m, xi, t, gamma, T: flow(p, m, xi, t, gamma, jnp.ones_like(T))


def noise_of_half_the_time(flow):
    """sqrt(T (1 - c)) for sqrt(T (1 - c^2))."""

    def mutant(p, m, xi, t, gamma, T):
        c = jnp.exp(-gamma * t)
        return c * p + jnp.sqrt(T * (1 - c)) * jnp.sqrt(m) * xi

    return mutant


@pytest.mark.parametrize("mutate", [swept(friction_at_temperature_one), noise_of_half_the_time])
def test_splitting_mutants_are_rejected(mutate, monkeypatch):
    monkeypatch.setattr(splitting, "friction_and_noise", mutate(splitting.friction_and_noise))
    assert z_of_mutant(*underdamped(0.25)) > REJECTION


@pytest.mark.parametrize("factor", [0.5, BATCH_SIZE / NUM_DATA], ids=["halved gradient", "missing N/n"])
@pytest.mark.parametrize("make", [overdamped, swept(underdamped)])
def test_gradient_mutants_are_rejected(make, factor):
    kernel, variance = make(wrap=lambda gradient: Scaled(gradient, factor))
    assert z_of_mutant(kernel, variance) > REJECTION


def test_law_of_independent_batches_is_not_that_of_blocks():
    """Negative control: reshuffled blocks have a smaller variance than the closed form for `uniform` says."""
    posterior, precision, _, noise = target()
    h = 0.2 / precision
    kernel = SGLD(erg.estimators.Minibatch(posterior, BATCH_SIZE, "blocks"), h)
    z = z_scores(averages_of(kernel, sgld_variance(h, precision, 1.0, noise), NUM_CHAINS // 4), EXACT)
    assert z[1] < -REJECTION


def state_dependent_law(posterior, h, batch_size, noise):
    """Exact mean and covariance of SGLD on linear regression with `uniform` batches (the noise grows with |theta|)."""
    x, y = (np.asarray(posterior.data[name], np.float64) for name in ("x", "y"))
    num_data, d = x.shape
    curvatures = np.einsum("ni,nj->nij", x, x) / noise**2
    shifts = x * y[:, None] / noise**2
    precision = np.eye(d) + curvatures.sum(axis=0)
    mean = np.linalg.solve(precision, shifts.sum(axis=0))
    at_mean = curvatures @ mean - shifts
    spread = np.mean([np.kron(a, a) for a in curvatures], axis=0) - np.kron(*[curvatures.mean(axis=0)] * 2)
    factor = h**2 * num_data**2 / batch_size
    contraction = np.kron(np.eye(d) - h * precision, np.eye(d) - h * precision) + factor * spread
    assert np.max(np.abs(np.linalg.eigvals(contraction))) < 1
    injected = 2 * h * np.eye(d) + factor * np.cov(at_mean.T, bias=True)
    covariance = np.linalg.solve(np.eye(d * d) - contraction, injected.ravel()).reshape(d, d)
    return mean, covariance


@pytest.mark.sweep
def test_state_dependent_gradient_noise():
    """SGLD on linear regression through the real Minibatch, against the exact operator of its second moments."""
    num_data, noise, batch_size = 30, 0.7, 6
    posterior = linear_regression(num_data, 2, noise)
    x = np.asarray(posterior.data["x"], np.float64)
    h = 0.25 / np.linalg.eigvalsh(np.eye(2) + x.T @ x / noise**2)[-1]
    mean, covariance = state_dependent_law(posterior, h, batch_size, noise)
    additive_only = state_dependent_law(posterior, h, 10**9, noise)[1]
    assert np.max(np.abs(covariance / additive_only - 1)) > 0.3  # the gradient noise is most of what is tested

    kernel = SGLD(erg.estimators.Minibatch(posterior, batch_size, "uniform"), h)
    root = np.linalg.cholesky(covariance)
    positions = jnp.asarray(mean + np.asarray(jax.random.normal(jax.random.key(1), (16_384, 2))) @ root.T, jnp.float32)
    averages = time_averages(jax.random.key(2), kernel, positions, outer_square, jnp.float32(mean), **LENGTH)
    assert_mean(averages, covariance, smallest_error=SMALLEST_ERROR)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["blocks", "uniform"])
@pytest.mark.swept_after(1)
def test_control_variate_removes_all_noise_from_a_gaussian_mean(scheme):
    """Equal curvatures: from any centre, SGLD with a control variate is SGLD with the full gradient, step by step."""
    posterior, precision, _, _ = target()
    minibatch = erg.estimators.Minibatch(posterior, BATCH_SIZE, scheme)
    noisy = SGLD(erg.estimators.ControlVariate(minibatch, jnp.array(3.0)), 0.2 / precision)
    exact = SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.2 / precision)

    @jax.jit
    def path(kernel):
        def body(state, i):
            state, _ = kernel.step(jax.random.fold_in(jax.random.key(7), i), state)
            return state, state.position

        return jax.lax.scan(body, kernel.init(jax.random.key(0), jnp.array(1.0)), jnp.arange(300))[1]

    np.testing.assert_allclose(path(noisy), path(exact), rtol=0, atol=1e-12)
