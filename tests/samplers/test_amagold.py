"""AMAGOLD: reversibility of a kick to rounding, and exact laws at steps where uncorrected dynamics is far off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfc
from scipy.stats import norm

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.samplers import AMAGOLD, SGHMC, amagold
from tests.support.marks import swept
from tests.support.problems import gaussian_mean, logistic_regression
from tests.support.statistics import REJECTION, assert_mean, z_scores

NUM_DATA, BATCH_SIZE, DATA_VARIANCE, PRIOR_VARIANCE = 50, 40, 2.0, 25.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_kick_has_the_stated_reverse(temperature):
    """Densities of the kick and of its reverse from NumPy; their ratio from the work that the shipped kick reports."""
    h, gamma, mass = 0.7, 1.3, np.array([0.5, 2.0])
    p, g, xi = np.array([0.4, -1.0]), np.array([2.0, 0.3]), np.array([0.7, -1.9])
    after, work = amagold.midpoint_kick(*map(jnp.asarray, (p, g, xi, mass, h, gamma, temperature)))

    def log_density(start, end):
        b = gamma * h / 2
        sd = np.sqrt(2 * gamma * h * temperature * mass) / (1 + b)
        return norm.logpdf(end, ((1 - b) * start + h * g) / (1 + b), sd).sum()

    q = np.asarray(after)
    kinetic = 0.5 * np.sum(q**2 / mass) - 0.5 * np.sum(p**2 / mass)
    expected = (kinetic - float(work)) / temperature
    np.testing.assert_allclose(log_density(-q, -p) - log_density(p, q), expected, rtol=1e-12)


def target():
    posterior = gaussian_mean(NUM_DATA, DATA_VARIANCE, PRIOR_VARIANCE)
    x = np.asarray(posterior.data, np.float64)
    precision = NUM_DATA / DATA_VARIANCE + 1 / PRIOR_VARIANCE
    noise = (NUM_DATA / DATA_VARIANCE) ** 2 * x.var() / BATCH_SIZE
    return posterior, precision, x.sum() / DATA_VARIANCE / precision, noise


def settings():
    """A step of one over the frequency, friction of the frequency."""
    _, precision, _, _ = target()
    return {"step_size": 1.0 / np.sqrt(precision), "friction": np.sqrt(precision)}


@functools.partial(jax.jit, static_argnames="num_steps")
def _squares(kernel, key, positions, mean, variance, num_steps):
    def chain(key, position):
        key_init, key_run = jax.random.split(key)

        def body(i, carry):
            state, total = carry
            state, _ = kernel.step(jax.random.fold_in(key_run, i), state)
            return state, total + (state.position - mean) ** 2 / variance / num_steps

        return jax.lax.fori_loop(0, num_steps, body, (kernel.init(key_init, position), jnp.zeros(())))[1]

    return jax.vmap(chain)(jax.random.split(key, positions.shape[0]), positions)


def squares(kernel, num_chains=8192, num_steps=20, temperature=1.0):
    """Squared deviations over the variance asked for, of chains that start in that law."""
    _, precision, mean, _ = target()
    variance = temperature / precision
    start = mean + np.sqrt(variance) * jax.random.normal(jax.random.key(1), (num_chains,))
    return _squares(kernel, jax.random.key(2), start, jnp.float32(mean), jnp.float32(variance), num_steps)


def corrected(temperature=1.0, wrap=lambda gradient: gradient):
    posterior, _, _, _ = target()
    gradient = wrap(erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform"))
    return AMAGOLD(gradient, num_steps=3, temperature=temperature, **settings())


@pytest.mark.optimised
@pytest.mark.parametrize("temperature", [swept(1.0), 0.5])
def test_exact_at_a_large_step(temperature):
    assert_mean(squares(corrected(temperature), 16_384, 60, temperature), 1.0, smallest_error=0.02)


class Scaled(AbstractGradientEstimator):
    inner: AbstractGradientEstimator
    factor: float

    def init(self, key, params, batch=None):
        return self.inner.init(key, params, batch)

    def estimate(self, key, params, state, batch=None):
        found, state = self.inner.estimate(key, params, state, batch)
        return found._replace(gradient=self.factor * found.gradient), state

    @property
    def posterior(self):
        return self.inner.posterior


@pytest.mark.sweep
def test_exact_with_a_wrong_gradient():
    """The correction is of the density, so that even half the gradient samples the whole posterior."""
    assert_mean(squares(corrected(wrap=lambda g: Scaled(g, 0.5)), 16_384), 1.0, smallest_error=0.02)


@pytest.mark.sweep
def test_without_correction_the_law_is_another():
    posterior, _, _, _ = target()
    gradient = erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform")
    found = squares(SGHMC(gradient, **settings()), 1024, 100)
    assert z_scores(found, 1.0) > REJECTION


@pytest.mark.parametrize("mutant", [swept("always accepted"), swept("work forgotten"), "work of the old momentum"])
def test_mutants_are_rejected(mutant, monkeypatch):
    right = amagold.midpoint_kick

    def wrong_kick(p, g, xi, mass, h, friction, temperature):
        after, work = right(p, g, xi, mass, h, friction, temperature)
        return after, jnp.zeros_like(work) if mutant == "work forgotten" else h * g * p / mass

    if mutant == "always accepted":
        monkeypatch.setattr(amagold, "acceptance_rate", lambda gain, temperature: jnp.ones_like(gain))
    else:
        monkeypatch.setattr(amagold, "midpoint_kick", wrong_kick)
    _squares.clear_cache()
    found = squares(corrected(), 4096)
    _squares.clear_cache()
    assert abs(z_scores(found, 1.0)) > REJECTION


class Noisy(AbstractGradientEstimator):
    """The exact gradient, and normal noise."""

    inner: AbstractGradientEstimator
    spread: float

    def init(self, key, params, batch=None):
        return None

    def estimate(self, key, params, state, batch=None):
        found, _ = self.inner.estimate(key, params, self.inner.init(key, params))
        return found._replace(gradient=found.gradient + self.spread * jax.random.normal(key, params.shape)), state

    @property
    def posterior(self):
        return self.inner.posterior


def test_acceptance_under_noise():
    """In many dimensions, where the step is small and only the noise matters: erfc(sigma / sqrt 8), as documented."""
    size, h, num_steps, variance = 64, 0.1, 10, 1.5
    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(size))
    spread = float(np.sqrt(variance / (h**2 * size * num_steps)))
    kernel = AMAGOLD(Noisy(erg.estimators.Minibatch(posterior, scheme="full"), spread), h, num_steps, 0.5)

    @jax.jit
    @jax.vmap
    def rate(key):
        key_start, key_init, key_step = jax.random.split(key, 3)
        state = kernel.init(key_init, jax.random.normal(key_start, (size,)))
        return kernel.step(key_step, state)[1].acceptance_rate

    found = rate(jax.random.split(jax.random.key(0), 8192)).mean()
    assert abs(found / erfc(np.sqrt(variance / 8)) - 1) < 0.03


def test_acceptance_rate_and_its_limits():
    rate = amagold.acceptance_rate
    gain = jnp.array([-1.0, 0.0, 2.0, jnp.nan, -jnp.inf])
    np.testing.assert_allclose(rate(gain, jnp.asarray(0.5)), [np.exp(-2.0), 1, 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rate(gain, jnp.asarray(0.0)), [0, 1, 1, 0, 0])


def test_rejected_trajectories_are_flagged_and_left():
    posterior = logistic_regression()
    kernel = AMAGOLD(erg.estimators.Minibatch(posterior, 5, "uniform"), 1e30, 3)
    state = kernel.init(jax.random.key(0), jnp.ones(3))
    after, info = kernel.step(jax.random.key(1), state)
    np.testing.assert_array_equal(after.position, state.position)
    assert info.diverging
    assert info.acceptance_rate == 0


def test_estimators_with_a_memory_are_refused():
    posterior = logistic_regression()
    for gradient in (
        erg.estimators.Minibatch(posterior, 5),
        erg.estimators.ControlVariate(erg.estimators.Minibatch(posterior, 5), jnp.zeros(3)),
    ):
        with pytest.raises(ValueError, match="gradient must have no memory"):
            AMAGOLD(gradient, 0.1).init(jax.random.key(0), jnp.zeros(3))
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        AMAGOLD(erg.estimators.Minibatch(posterior, 5, "uniform"), 0.1, 0)
    kernel = AMAGOLD(erg.estimators.Minibatch(posterior, 5, "uniform"), 0.1)
    with pytest.raises(ValueError, match="batch= cannot be handed over"):
        kernel.step(jax.random.key(0), kernel.init(jax.random.key(0), jnp.zeros(3)), posterior.data)
