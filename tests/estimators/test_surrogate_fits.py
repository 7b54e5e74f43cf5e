"""Surrogates that are fitted: exact where they can be, corrected for their own step, defined where likelihoods are improper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_continuous_lyapunov

import ergodica as erg
from ergodica.estimators import Conducive, GaussianSurrogates, laplace_surrogates, moment_surrogates
from ergodica.estimators.federated.local_runs import corrected_precision
from ergodica.run.linear_law import solve_lyapunov
from tests.support.shards import gaussian_mean_shards, regression_shards


def random_precision(seed, size=4):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return np.eye(size) + root @ root.T


class TestCorrection:
    @pytest.mark.parametrize("noise_size", [0.0, 3.0])
    @pytest.mark.parametrize("step", [1e-4, 1e-2, 0.05])
    def test_inverts_the_law_of_sgld(self, step, noise_size):
        """From the covariance that SGLD has, with its step and noise, back to the precision it was run on."""
        precision, noise = random_precision(0), noise_size * random_precision(1)
        transition = np.eye(4) - step * precision
        covariance = solve_lyapunov(transition, 2 * step * np.eye(4) + step**2 * noise)
        np.testing.assert_allclose(corrected_precision(covariance, step, noise), precision, rtol=1e-6, atol=1e-6)

    def test_scalars(self):
        lam, step, noise = np.array([0.5, 3.0]), 0.1, np.array([0.0, 4.0])
        variances = (2 + step * noise) / (lam * (2 - step * lam))
        np.testing.assert_allclose(corrected_precision(variances, step, noise), lam, rtol=1e-12)

    def test_no_step_no_correction(self):
        covariance = random_precision(2)
        np.testing.assert_allclose(corrected_precision(covariance, 0.0, 0 * covariance), np.linalg.inv(covariance))
        np.testing.assert_allclose(corrected_precision(np.array([4.0]), 0.0, np.zeros(1)), [0.25])

    def test_first_order(self):
        """For small steps the correction is that of the continuous equation, S/2 h: an independent formula."""
        precision, noise, step = random_precision(0), random_precision(1), 1e-5
        first = np.linalg.inv(precision) + step * (
            solve_continuous_lyapunov(precision, noise + precision @ np.linalg.inv(precision) @ precision)
        )
        np.testing.assert_allclose(corrected_precision(first, step, noise), precision, rtol=1e-6, atol=1e-6)

    def test_impossible_covariances(self):
        with pytest.raises(ValueError, match="smaller than any that its step and gradient noise can have"):
            corrected_precision(0.1 * np.eye(2), 0.5, np.eye(2))


def test_local_runs_find_the_local_laws():
    """On Gaussian shards, with large steps and small batches: the corrected precisions are right, the uncorrected are not."""
    shards = gaussian_mean_shards((20, 60), (-1.0, 2.0), (0.5, 1.5), 0.5)
    options = {"num_samples": 40_000, "num_warmup": 500, "batch_size": 5, "prior_share": False}
    step = 0.4 / np.array([20.0, 60.0])
    found = moment_surrogates(jax.random.key(0), shards, step, **options)
    precision = np.asarray(found.natural.precision).ravel()
    # 40,000 iterates of autocorrelation time 4: standard error of a variance 1.4%
    np.testing.assert_allclose(precision, [20.0, 60.0], rtol=5 * 0.014)
    means = np.asarray(found.centre) + np.asarray(found.natural.linear).ravel() / precision
    np.testing.assert_allclose(means, [-1.0, 2.0], atol=5 * 0.014 * np.sqrt(4 / 20))
    plain = moment_surrogates(jax.random.key(0), shards, step, correct_step=False, **options)
    assert np.all(np.asarray(plain.natural.precision).ravel() < 0.6 * precision)


@pytest.mark.sweep
def test_local_runs_with_correlations():
    """Full, diagonal and low-rank fits of one run: the diagonal one has one over the variances."""
    shards = regression_shards((40, 90, 60), 2, mixing=np.array([[1.0, 0.6], [0.0, 0.8]]))
    laplace = laplace_surrogates(shards)
    largest = np.linalg.eigvalsh(np.asarray(laplace.natural.precision, float)).max(axis=1)
    fits = {
        kind: moment_surrogates(jax.random.key(1), shards, 0.1 / largest, num_samples=4000, thin=5, covariance=kind)
        for kind in ("full", "diagonal", 2)
    }
    exact = np.asarray(laplace.natural.precision, float)
    found = np.asarray(fits["full"].natural.precision, float)
    for P, Q in zip(exact, found, strict=True):
        relative = np.linalg.eigvals(np.linalg.solve(P, Q)).real
        assert np.all(np.abs(relative - 1) < 0.25)  # 5 standard errors with some 800 effective draws
    diagonal = np.asarray(fits["diagonal"].natural.precision, float)
    np.testing.assert_allclose(diagonal, [1 / np.diag(np.linalg.inv(P)) for P in found], rtol=0.05)
    gradient = [fits[k].conducive(jnp.ones(2), jnp.array(1), jnp.array(0.3))[1] for k in ("full", 2)]
    np.testing.assert_allclose(gradient[0], gradient[1], rtol=1e-3)


def separable():
    """Three clients; at the first all outcomes are equal, so that its likelihood alone has no mode."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 2))
    client = np.repeat([0, 1, 2], 20)
    y = np.where(client == 0, 1.0, (rng.random(60) < 1 / (1 + np.exp(-x @ [1.0, -1.0]))).astype(float))

    def log_likelihood(theta, rows):
        x, y = rows
        logits = theta[0] + x @ theta[1:]
        return y * logits - jax.nn.softplus(logits)

    posterior = erg.Posterior(
        lambda theta: -0.5 * jnp.sum((theta / 2) ** 2),
        log_likelihood,
        (jnp.asarray(x), jnp.asarray(y)),
        initial=jnp.zeros(3),
    )
    return erg.Shards(posterior, client)


@pytest.mark.usefixtures("x64")
class TestImproperLikelihoods:
    def test_own_modes_exist_with_a_share_of_the_prior(self):
        q = laplace_surrogates(separable(), "local")
        precision = np.asarray(q.natural.precision)
        assert np.linalg.eigvalsh(precision).min() > 0.08  # a third of the prior's 1/4, at least
        assert np.all(np.isfinite(q.natural.linear))

    def test_one_centre_is_better_than_their_own(self):
        """Misfit over the posterior, by the tool: an expansion where the chain is against one where the client is."""
        shards = separable()
        found = {}
        for centre in ("mode", "local"):
            gradient = Conducive(shards, laplace_surrogates(shards, centre))
            sampler = erg.samplers.Federated(erg.samplers.SGLD(gradient, 1e-3), 20)
            found[centre] = erg.predict_federated(jax.random.key(0), sampler)
        assert np.all(found["mode"].misfit < 0.2)
        assert found["mode"].misfit.max() < 0.2 * found["local"].misfit.max()

    def test_damping_raises_curvatures(self):
        shards = separable()
        least = np.linalg.eigvalsh(np.asarray(laplace_surrogates(shards, damping=4.0).natural.precision)).min()
        assert least > 4 - 1e-9
        assert np.asarray(laplace_surrogates(shards, covariance="diagonal", damping=4.0).natural.precision).min() >= 4
        assert np.linalg.eigvalsh(np.asarray(laplace_surrogates(shards).natural.precision)).min() < 3


@pytest.mark.usefixtures("x64")
def test_diagonal_is_the_diagonal():
    shards = regression_shards()
    full, diagonal = (laplace_surrogates(shards, covariance=kind) for kind in ("full", "diagonal"))
    np.testing.assert_allclose(
        diagonal.natural.precision, np.einsum("sdd->sd", np.asarray(full.natural.precision)), rtol=1e-10
    )


class TestBuilder:
    def test_builds_what_its_parts_build(self):
        shards = regression_shards()
        q = laplace_surrogates(shards, covariance="diagonal", probabilities="uniform")
        built = erg.fsgld(
            shards,
            step_size=1e-3,
            local_steps=4,
            batch_size=3,
            covariance="diagonal",
            probabilities="uniform",
            strength=0.5,
        )
        gradient = Conducive(shards, q, 3, probabilities="uniform", strength=0.5)
        parts = erg.samplers.Federated(erg.samplers.SGLD(gradient, 1e-3), 4)
        assert jax.tree.structure(built) == jax.tree.structure(parts)
        jax.tree.map(np.testing.assert_array_equal, built, parts)

    def test_moments(self):
        shards = gaussian_mean_shards((20, 60), (-1.0, 2.0), (0.5, 1.5), 0.5)
        built = erg.fsgld(shards, step_size=1e-3, surrogates="moments", local_steps=2)
        assert isinstance(built.gradient.surrogates, GaussianSurrogates)

    def test_clients_of_different_speed(self):
        built = erg.fsgld(
            gaussian_mean_shards(),
            step_size=1e-4,
            local_steps=30,
            surrogates=None,
            seconds=[1.0, 1.0, 4.0],
            schedule="permutation",
        )
        assert built.local_steps.tolist() == [40, 40, 10]
        np.testing.assert_allclose(built.gradient.probabilities, np.array([4, 4, 1]) / 9, rtol=1e-6)

    def test_bad_input(self):
        shards = gaussian_mean_shards()
        with pytest.raises(ValueError, match="client must say whose each datum is"):
            erg.fsgld(shards.posterior, step_size=1e-4)
        with pytest.raises(ValueError, match="client belongs to a posterior of all the data"):
            erg.fsgld(shards, client=[0], step_size=1e-4)
        with pytest.raises(ValueError, match="surrogates must be one of"):
            erg.fsgld(shards, step_size=1e-4, surrogates="guess")
        with pytest.raises(ValueError, match="seconds must have one entry a client"):
            erg.fsgld(shards, step_size=1e-4, seconds=[1.0])
        with pytest.raises(ValueError, match="seconds choose local_steps"):
            erg.fsgld(shards, step_size=1e-4, seconds=[1.0, 1.0, 1.0], probabilities="uniform")
        with pytest.raises(ValueError, match="num_samples must be above the number of coordinates"):
            moment_surrogates(jax.random.key(0), regression_shards(), 1e-3, num_samples=3)
        with pytest.raises(ValueError, match="A local run became non-finite"):
            moment_surrogates(jax.random.key(0), regression_shards(), 10.0, num_samples=100)
        with pytest.raises(ValueError, match="centre must be one of"):
            laplace_surrogates(shards, "somewhere")
        with pytest.raises(TypeError, match="covariance must be an integer"):
            laplace_surrogates(shards, covariance=0.5)
