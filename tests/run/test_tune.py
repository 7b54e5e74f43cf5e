"""Predicted biases against closed forms and against real runs, and what `tune` makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.run.bias import predict_bias
from ergodica.run.curvature import hessian, hessian_diagonal, largest_curvature
from ergodica.run.tune import tune
from tests.support import problems
from tests.support.chains import time_averages
from tests.support.laws import VARIANCES, sgld_variance
from tests.support.statistics import REJECTION, assert_mean, z_scores

KEY = jax.random.key(0)
SPREAD = np.array([[4.0, 1.0], [1.0, 0.5]])  # covariance of the data
N, BATCH = 120, 10


@pytest.fixture
def gaussian():
    """Data of a known covariance: one curvature for every batch, and noise that does not depend on the position."""
    rows = jax.random.multivariate_normal(
        jax.random.key(3), jnp.zeros(2), jnp.asarray(SPREAD, jnp.zeros(()).dtype), (N,)
    )
    precision = jnp.asarray(np.linalg.inv(SPREAD), rows.dtype)

    def log_likelihood(theta, rows):
        difference = rows - theta[None]
        return -0.5 * jnp.einsum("ni,ij,nj->n", difference, precision, difference)

    return erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, rows, initial=jnp.zeros(2))


CURVATURE = N * np.linalg.inv(SPREAD) + np.eye(2)
MODE_OF = lambda posterior: jnp.asarray(  # noqa: E731
    np.linalg.solve(CURVATURE, np.linalg.inv(SPREAD) @ np.asarray(posterior.data).sum(0)), posterior.data.dtype
)


def noise_by_hand(gradient, position):
    """Covariance of one gradient of reshuffled blocks, block by block."""
    blocks = [gradient.at(position, gradient.block(k)).gradient for k in range(gradient.num_blocks)]
    return np.cov(np.array(blocks, np.float64), rowvar=False, bias=True)


def largest_eigenvalue(matrix):
    return np.linalg.eigvalsh(matrix)[-1]


@pytest.mark.usefixtures("x64")
class TestExactly:
    def test_hessian(self, gaussian):
        np.testing.assert_allclose(hessian(gaussian, jnp.ones(2)), CURVATURE, rtol=1e-10)
        np.testing.assert_allclose(hessian_diagonal(gaussian, jnp.ones(2)), np.diag(CURVATURE), rtol=1e-10)

    def test_independent_batches(self, gaussian):
        gradient = erg.estimators.Minibatch(gaussian, BATCH, "uniform")
        h, mode = 2e-4, MODE_OF(gaussian)
        each = np.array(
            jax.vmap(lambda row: jax.grad(lambda t: gaussian.log_likelihood(t, row[None])[0])(mode))(gaussian.data)
        )
        noise = N**2 / BATCH * np.cov(each, rowvar=False, bias=True)
        bias = predict_bias(KEY, erg.samplers.SGLD(gradient, h), mode, noise=noise)
        step, eye = np.eye(2) - h * CURVATURE, np.eye(4)
        added = 2 * h * np.eye(2) + h**2 * noise
        covariance = np.linalg.solve(eye - np.kron(step, step), added.ravel()).reshape(2, 2)
        truth = np.sqrt(np.diag(covariance) / np.diag(np.linalg.inv(CURVATURE))) - 1
        np.testing.assert_allclose(bias.inflation, truth, rtol=1e-6)
        assert bias.num_blocks is None
        # from probes: the noise is known to 2%, and so is what it adds
        probed = predict_bias(KEY, erg.samplers.SGLD(gradient, h), mode)
        np.testing.assert_allclose(probed.without_noise, bias.without_noise, rtol=1e-6)
        excess, found = bias.inflation - bias.without_noise, probed.inflation - bias.without_noise
        np.testing.assert_allclose(found, excess, rtol=5 * np.sqrt(2 / 4080))

    def test_blocks(self, gaussian):
        gradient = erg.estimators.Minibatch(gaussian, BATCH)
        mode, K, h = MODE_OF(gaussian), N // BATCH, 1e-3
        noise = noise_by_hand(gradient, mode)
        bias = predict_bias(KEY, erg.samplers.SGLD(gradient, h), mode, noise=noise)
        step = np.eye(2) - h * CURVATURE
        powers = np.array([np.linalg.matrix_power(step, i) for i in range(K + 1)])
        order = np.eye(K) - (1 - np.eye(K)) / (K - 1)

        def after(j, start):
            own = 2 * h * sum(p @ p.T for p in powers[:j])
            pairs = sum(order[t, s] * powers[t] @ noise @ powers[s].T for t in range(j) for s in range(j))
            return powers[j] @ start @ powers[j].T + own + h**2 * pairs

        eye = np.eye(4)
        start = np.linalg.solve(eye - np.kron(powers[K], powers[K]), after(K, np.zeros((2, 2))).ravel()).reshape(2, 2)
        covariance = np.mean([after(j, start) for j in range(1, K + 1)], axis=0)
        truth = np.sqrt(np.diag(covariance) / np.diag(np.linalg.inv(CURVATURE))) - 1
        np.testing.assert_allclose(bias.inflation, truth, rtol=1e-6)
        assert bias.num_blocks == K
        # the mutant, which takes the batches for independent, would be noticed
        assert np.max(np.abs(bias.independent / truth - 1)) > 0.1
        assert "independent batches would give" in str(bias)

    def test_diagonal_is_that_of_the_coordinates(self, gaussian):
        """With the diagonal alone each coordinate has the scalar law; masses are kept."""
        gradient = erg.estimators.Minibatch(gaussian, BATCH, "uniform")
        mass, variances = jnp.array([2.0, 5.0]), np.array([300.0, 900.0])
        sampler = erg.samplers.BAOA(gradient, 0.02, 3.0, mass=mass)
        bias = predict_bias(KEY, sampler, MODE_OF(gaussian), curvature="diagonal", noise=variances)
        lam = np.diag(CURVATURE)
        law = VARIANCES["BAOA"](0.02, lam / mass, 3.0, 1.0, variances / mass) / mass
        np.testing.assert_allclose(bias.inflation, np.sqrt(law * lam) - 1, rtol=1e-6)
        assert "correlations of the posterior were left out" in str(bias)

    @pytest.mark.parametrize("scheme", ["uniform", "blocks"])
    def test_largest_curvature(self, gaussian, scheme):
        gradient = erg.estimators.Minibatch(gaussian, BATCH, scheme)
        found = largest_curvature(KEY, gradient, jnp.zeros(2))
        np.testing.assert_allclose(found.value, largest_eigenvalue(CURVATURE), rtol=0.01)
        scaled = largest_curvature(KEY, gradient, jnp.zeros(2), scale=np.array([1.0, 0.1]))
        truth = largest_eigenvalue(np.diag([1.0, 0.1]) @ CURVATURE @ np.diag([1.0, 0.1]))
        np.testing.assert_allclose(scaled.value, truth, rtol=0.01)

    def test_tuned_step_is_where_the_law_meets_the_target(self):
        posterior = problems.gaussian_mean()
        gradient = erg.estimators.Minibatch(posterior, 10, "uniform")
        lam, s2 = 200 / 2.0 + 1 / 25.0, 4e4
        centre = jnp.asarray(posterior.data.mean() * 100 / lam)
        sampler, report = tune(KEY, erg.samplers.SGLD(gradient, 1.0), centre, noise=np.array([[s2]]), target_bias=0.1)
        np.testing.assert_allclose(np.sqrt(sgld_variance(float(sampler.step_size), lam, 1.0, s2) * lam), 1.1, rtol=1e-5)
        assert report.limited_by == "gradient noise"
        assert "control variate" in str(report)
        # what the text promises for exact gradients
        np.testing.assert_allclose(np.sqrt(2 / (2 - report.step_without_noise * lam)), 1.1, rtol=1e-5)
        # reshuffled, the same target allows a larger step
        blocks = erg.estimators.Minibatch(posterior, 10)
        more = tune(KEY, erg.samplers.SGLD(blocks, 1.0), centre, noise=np.array([[s2]]), target_bias=0.1)
        assert more.report.step_size > 2 * report.step_size

    def test_stability_limits_what_has_no_bias(self, gaussian):
        gradient = erg.estimators.Minibatch(gaussian, scheme="full")
        sampler, report = tune(KEY, erg.samplers.BAOA(gradient, 1.0), MODE_OF(gaussian))
        assert report.limited_by == "stability"
        np.testing.assert_allclose(report.step_size, 1 / np.sqrt(largest_eigenvalue(CURVATURE)), rtol=1e-3)
        assert sampler.scheme == "BAOA"
        assert "half of the largest stable one" in str(report)

    def test_friction_and_mass(self, gaussian):
        """Friction that is chosen relaxes no slower than one that is bad; a diagonal mass brings the scales together."""
        gradient = erg.estimators.Minibatch(gaussian, BATCH, "uniform")
        start = erg.samplers.BAOA(gradient, 1.0, 1000.0)
        noise = 1e-3 * noise_by_hand(erg.estimators.Minibatch(gaussian, BATCH), MODE_OF(gaussian))
        kept = tune(KEY, start, MODE_OF(gaussian), noise=noise, friction="kept")
        chosen = tune(KEY, start, MODE_OF(gaussian), noise=noise)
        assert kept.report.friction == 1000.0
        assert chosen.report.relaxation < kept.report.relaxation / 2
        massive = tune(KEY, start, MODE_OF(gaussian), noise=noise, mass="diagonal")
        np.testing.assert_allclose(massive.sampler.mass, np.diag(CURVATURE), rtol=1e-6)
        assert massive.report.relaxation < chosen.report.relaxation
        for tuned in (kept, chosen, massive):
            assert abs(tuned.report.bias.largest) <= 0.05 * (1 + 1e-6)


def logistic():
    """Many data a parameter, so that the posterior is Gaussian to within the Monte Carlo error."""
    posterior = problems.logistic_regression(num_data=3000, num_parameters=2)
    return posterior, erg.find_mode(KEY, posterior, progress=False).position


def mean_noise(gradient, mode, covariance):
    """Covariance of one gradient, exactly, averaged over 256 draws from the Laplace approximation."""
    posterior = gradient.posterior
    draws = jnp.asarray(np.random.default_rng(0).multivariate_normal(mode, covariance, size=256), mode.dtype)
    if gradient.scheme == "blocks":
        blocks, of_each = jax.vmap(gradient.block)(jnp.arange(gradient.num_blocks)), gradient.at
        gradients = jax.vmap(lambda t: jax.vmap(lambda batch: of_each(t, batch).gradient)(blocks))
        scale = 1.0
    else:
        one = lambda t, row: posterior.log_likelihood(t, jax.tree.map(lambda x: x[None], row))[0]  # noqa: E731
        gradients = jax.vmap(lambda t: jax.vmap(lambda row: jax.grad(one)(t, row))(posterior.data))
        scale = posterior.num_data**2 / gradient.batch_size
    each = np.asarray(jax.jit(gradients)(draws), np.float64)
    return scale * np.mean([np.cov(g, rowvar=False, bias=True) for g in each], axis=0)


@pytest.mark.optimised
@pytest.mark.parametrize("scheme", ["uniform", "blocks"])
@pytest.mark.swept_after(1)
def test_prediction_against_a_run(scheme):
    """Variances of SGLD on a logistic regression: within 5 standard errors, where 4% (2% of an sd) would be seen."""
    posterior, mode = logistic()
    gradient = erg.estimators.Minibatch(posterior, 30, scheme)
    sampler = erg.samplers.SGLD(gradient, 1.5e-4)
    covariance = np.linalg.inv(np.asarray(hessian(posterior, mode), np.float64))
    bias = predict_bias(KEY, sampler, mode, noise=mean_noise(gradient, mode, covariance))
    squares = time_averages(
        jax.random.key(7),
        sampler,
        jnp.tile(mode[None], (512, 1)),
        squared_distance,
        mode,
        num_discarded=500,
        num_steps=4000,
    )

    def predicted(inflation):
        return np.diag(covariance) * (1 + inflation) ** 2

    assert_mean(squares, predicted(bias.inflation), smallest_error=0.04)
    # exact gradients, or the other law, are not what ran
    assert np.min(np.abs(z_scores(squares, predicted(bias.without_noise)))) > REJECTION
    if scheme == "blocks":
        assert np.min(np.abs(z_scores(squares, predicted(bias.independent)))) > REJECTION
    # and by default the noise is known to 2% of itself
    probed = predict_bias(KEY, sampler, mode)
    excess = predicted(bias.inflation) - predicted(bias.without_noise)
    np.testing.assert_allclose(
        predicted(probed.inflation) - predicted(bias.without_noise), excess, rtol=5 * np.sqrt(2 / 4080)
    )


def squared_distance(position, centre):
    return (position - centre) ** 2


def test_on_a_numpyro_model():
    def model(x, y=None):
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([2]).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Normal(x @ beta, scale), obs=y)

    key_x, key_y = jax.random.split(jax.random.key(5))
    x = jax.random.normal(key_x, (300, 2))
    posterior = erg.from_numpyro(model, data={"x": x, "y": x[:, 0] + jax.random.normal(key_y, (300,))})
    tuned = erg.tune(KEY, erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, 30), 1.0, 10.0), friction="kept")
    assert sorted(tuned.report.bias.names) == ["beta[0]", "beta[1]", "scale"]
    again = erg.predict_bias(jax.random.key(1), tuned.sampler, tuned.report.centre)
    assert 0 < tuned.report.bias.largest <= 0.05 * 1.001
    np.testing.assert_allclose(again.largest, tuned.report.bias.largest, rtol=5 * np.sqrt(2 * 2 / 4080))


class Doubtful(AbstractGradientEstimator):
    """Reshuffled blocks with noise on top that does not cancel."""

    minibatch: erg.estimators.Minibatch

    def init(self, key, params, batch=None):
        return self.minibatch.init(key, params, batch)

    def estimate(self, key, params, state, batch=None):
        key, key_noise = jax.random.split(key)
        estimate, state = self.minibatch.estimate(key, params, state, batch)
        noise = 100 * jax.random.normal(key_noise, params.shape)
        return estimate._replace(gradient=estimate.gradient + noise), state

    def probe(self, key, params, state):
        return self.estimate(key, params, state)[0]

    @property
    def posterior(self):
        return self.minibatch.posterior


def test_errors(gaussian):
    blocks = erg.estimators.Minibatch(gaussian, BATCH)
    sgld, mode = erg.samplers.SGLD(blocks, 1e-3), MODE_OF(gaussian)
    with pytest.raises(ValueError, match="does not cancel over an epoch"):
        predict_bias(KEY, erg.samplers.SGLD(Doubtful(blocks), 1e-3), mode)
    with pytest.raises(ValueError, match="'symmetric'"):
        predict_bias(KEY, erg.samplers.SGLD(erg.estimators.Minibatch(gaussian, BATCH, "symmetric"), 1e-3), mode)
    with pytest.raises(ValueError, match="step_size must be a number"):
        predict_bias(KEY, erg.samplers.SGLD(blocks, lambda count: 1e-3), mode)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        predict_bias(KEY, erg.samplers.SGLD(blocks, 1e-3, temperature=0.0), mode)
    with pytest.raises(ValueError, match="unstable"):
        predict_bias(KEY, erg.samplers.SGLD(blocks, 1.0), mode)
    with pytest.raises(ValueError, match="curvature must have shape"):
        predict_bias(KEY, sgld, mode, curvature=np.eye(3))
    with pytest.raises(ValueError, match="smallest curvature there is -1"):
        predict_bias(KEY, sgld, mode, curvature=-np.eye(2))
    with pytest.raises(ValueError, match="noise must have the shape"):
        predict_bias(KEY, sgld, mode, noise=np.ones(2))
    wide = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(101))
    with pytest.raises(ValueError, match="at most 100 coordinates; there are 101"):
        predict_bias(KEY, erg.samplers.SGLD(erg.estimators.Minibatch(wide, scheme="full"), 0.1), jnp.zeros(101))
    with pytest.raises(ValueError, match="mass='diagonal' needs a sampler with a mass"):
        tune(KEY, sgld, mode, mass="diagonal")
    with pytest.raises(ValueError, match="target_bias must be finite and above 0"):
        tune(KEY, sgld, mode, target_bias=0.0)
    with pytest.raises(ValueError, match="friction must be one of"):
        tune(KEY, sgld, mode, friction="best")
