"""Clipped and noised gradients at clients: closed forms, the scale of the noise, and the counting of privacy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ergodica as erg
from ergodica.estimators.federated.private import gaussian_privacy
from tests.support.statistics import REJECTION, assert_mean, z_scores

DATA = jnp.array([0.2, -0.3, 5.0, 0.4, -7.0, 0.1])
CLIENT = [0, 0, 0, 1, 1, 1]


def shards():
    posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, DATA, initial=jnp.array(0.0))
    return erg.Shards(posterior, CLIENT)


def private(max_norm=1.0, noise=0.0, surrogates=None, **options):
    conducive = erg.estimators.Conducive(shards(), surrogates, probabilities="uniform", **options)
    return erg.estimators.PrivateConducive(conducive, max_norm, noise)


def at(gradient, client, theta=0.0, key=0):
    state = gradient.visit(gradient.init(jax.random.key(0), jnp.array(0.0)), jnp.array(client))
    return gradient.estimate(jax.random.key(key), jnp.array(theta), state)[0].gradient


def test_each_datum_counts_with_no_more_than_the_norm():
    np.testing.assert_allclose(at(private(), 0), 2 * (0.2 - 0.3 + 1.0), rtol=1e-5)
    np.testing.assert_allclose(at(private(), 1), 2 * (0.4 - 1.0 + 0.1), rtol=1e-5)
    exact = erg.estimators.GaussianSurrogates(mean=jnp.array([1.0, 2.0]), precision=jnp.array([3.0, 1.0]))
    at_half = 0.5
    conducive = 4 * (5 / 4 - at_half) - 2 * 3 * (1.0 - at_half)
    own = 2 * (-0.3 - 0.8 + 1.0)
    np.testing.assert_allclose(at(private(surrogates=exact), 0, at_half), -at_half + own + conducive, rtol=1e-5)


def test_with_a_wide_norm_it_is_the_conducive_gradient():
    conducive = erg.estimators.Conducive(shards(), probabilities="uniform")
    for client in (0, 1):
        np.testing.assert_allclose(at(private(100.0), client, 0.3), at(conducive, client, 0.3), rtol=1e-5)


def test_one_datum_moves_the_sum_by_no_more_than_the_norm():
    """The sensitivity that the counting rests on, at data of any size; without clipping it is exceeded."""
    posterior = erg.Posterior(
        lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.delete(DATA, 4), initial=jnp.array(0.0)
    )
    fewer = erg.Shards(posterior, [0, 0, 0, 1, 1])

    def change(max_norm):
        conducive = erg.estimators.Conducive(fewer, probabilities="uniform")
        without = at(erg.estimators.PrivateConducive(conducive, max_norm, 0.0), 1)
        return abs(float(at(private(max_norm), 1) - without)) * 0.5  # f_s

    assert change(1.0) <= 1.0 + 1e-5
    assert change(100.0) > 6.0


def test_noise_has_the_stated_scale():
    """4000 draws see an error of 12% in the variance; noise that is not divided by the share would be a quarter of it."""
    draws = jax.vmap(lambda i: at(private(noise=2.0), 0, key=i))(jnp.arange(4000, dtype=jnp.uint32))
    away = np.asarray(draws, float) - 2 * (0.2 - 0.3 + 1.0)
    assert_mean(away**2, (2.0 / 0.5) ** 2, smallest_error=0.13)
    assert abs(z_scores(away**2, 2.0**2)) > REJECTION
    found = float(private(noise=2.0).covariance(jnp.array(0.0), jnp.array(0))[0, 0])
    assert found == pytest.approx(16.0)


def test_batches_are_refused():
    with pytest.raises(ValueError, match="must use all rows"):
        private(batch_size=2)


@pytest.mark.parametrize(("count", "z"), [(1, 0.5), (1, 3.0), (400, 30.0), (10**6, 900.0)])
def test_the_counting_is_the_exact_trade_off(count, z):
    """At the epsilon found, delta is that of N(mu, 1) against N(0, 1), over the region where their ratio exceeds exp(epsilon)."""
    loss = gaussian_privacy(count, z, 1e-6)
    assert loss.mu == pytest.approx(np.sqrt(count) / z)
    cut = loss.epsilon / loss.mu + loss.mu / 2
    excess = stats.norm.sf(cut - loss.mu) - np.exp(loss.epsilon) * stats.norm.sf(cut)
    assert excess == pytest.approx(1e-6, rel=1e-5)
    rho = loss.mu**2 / 2
    assert loss.epsilon < rho + 2 * np.sqrt(rho * np.log(1e6))  # the bound of zero-concentrated privacy


def test_the_langevin_noise_counts_where_it_is_secret():
    """A step with noise sqrt(2 h) alone, moved by h C / f, is a mechanism with mu = h C / f / sqrt(2 h)."""
    loss = gaussian_privacy(1, 0.0, 1e-5, max_norm=3.0, share=0.5, step_size=1e-3)
    assert loss.mu == pytest.approx(1e-3 * 3.0 / 0.5 / np.sqrt(2e-3))
    both = gaussian_privacy(7, 4.0, 1e-5, max_norm=3.0, share=0.5, step_size=1e-3)
    assert both.mu < gaussian_privacy(7, 4.0, 1e-5).mu


def test_an_accountant_of_its_own_agrees():
    """The library ``dp-accounting``, where it is installed, composes the same mechanisms numerically."""
    pld = pytest.importorskip("dp_accounting.pld", reason="dp-accounting is not installed")
    dp = pytest.importorskip("dp_accounting")
    accountant = pld.PLDAccountant()
    accountant.compose(dp.GaussianDpEvent(30.0), 400)
    assert accountant.get_epsilon(1e-5) == pytest.approx(gaussian_privacy(400, 30.0, 1e-5).epsilon, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0, "noise_multiplier": 1.0}, "num_steps"),
        ({"num_steps": 1, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"num_steps": 1, "noise_multiplier": 1.0, "delta": 2.0}, "delta"),
        ({"num_steps": 1, "noise_multiplier": 1.0, "step_size": 0.1}, "max_norm"),
    ],
)
def test_what_cannot_be_counted_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_privacy(**arguments)
