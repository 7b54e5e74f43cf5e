"""BlackJAX both ways, against exact moments."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from tests.support.statistics import assert_mean

PRECISION = jnp.array([1.0, 4.0])


@pytest.fixture
def posterior():
    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum(PRECISION * (theta["x"] - 1.0) ** 2),
        initial=lambda key: {"x": 1.0 + jax.random.normal(key, (2,)) / jnp.sqrt(PRECISION)},
    )


def test_nuts_through_sample(posterior):
    algorithm = blackjax.nuts(posterior.log_density, 0.7, jnp.ones(2))
    dt = erg.sample(
        jax.random.key(0), erg.from_blackjax(algorithm, posterior=posterior, exact=True), 50, 50, num_chains=400, thin=2
    )
    x = dt.posterior["x"].values
    assert_mean(x.mean(1), np.ones(2), smallest_error=0.05)
    assert_mean(((x - 1) ** 2).mean(1), 1 / PRECISION, smallest_error=0.1)
    assert_mean(dt.sample_stats["t_conf"].values.mean(1), 1.0, smallest_error=0.1)
    assert dt.attrs["exact"] == "exact"
    assert {"lp", "energy", "acceptance_rate", "diverging", "tree_depth", "n_steps"} <= set(dt.sample_stats.data_vars)
    np.testing.assert_allclose(
        dt.sample_stats["lp"], -0.5 * (np.asarray(PRECISION) * (x - 1) ** 2).sum(-1), rtol=1e-4, atol=1e-5
    )


def test_n_grad_counts_data():
    data = jnp.arange(5.0)
    posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, data, initial=jnp.array(0.0))
    kernel = erg.from_blackjax(blackjax.nuts(posterior.log_density, 0.3, jnp.ones(1)), posterior=posterior)
    dt = erg.sample(jax.random.key(0), kernel, 20, 10, num_chains=2)
    np.testing.assert_array_equal(dt.sample_stats["n_grad"], 5 * dt.sample_stats["n_steps"])
    assert dt.attrs["num_gradients"] > dt.sample_stats["n_grad"].sum()


def test_sgld_through_run_inference_algorithm(posterior):
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)
    algorithm = erg.to_blackjax(sampler)

    def one(key):
        start, run = jax.random.split(key)
        _, x = blackjax.util.run_inference_algorithm(
            run,
            algorithm,
            200,
            initial_position=posterior.start(start),
            transform=lambda state, info: state.position["x"],
        )
        return x[100:]

    x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2000)))
    law = 2 / (PRECISION * (2 - 0.1 * PRECISION))
    assert_mean(((x - 1) ** 2).mean(1), law, smallest_error=0.06)


def test_bad_input(posterior):
    with pytest.raises(TypeError, match="SamplingAlgorithm"):
        erg.from_blackjax(posterior.log_density)
    with pytest.raises(TypeError, match="Posterior"):
        erg.from_blackjax(blackjax.nuts(posterior.log_density, 0.1, jnp.ones(2)), posterior=3)
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)
    with pytest.raises(ValueError, match="give init"):
        erg.to_blackjax(sampler).init(posterior.start(jax.random.key(0)))
    with pytest.raises(TypeError, match="AbstractKernel"):
        erg.to_blackjax("SGLD")


def test_refuses_batches_and_stochastic_gradient_kernels(posterior):
    kernel = erg.from_blackjax(blackjax.nuts(posterior.log_density, 0.1, jnp.ones(2)), posterior=posterior)
    batch = erg.estimators.Minibatch(erg.Posterior(lambda t: t, lambda t, x: x, jnp.ones(3), initial=0.0), 2).block(0)
    with pytest.raises(ValueError, match="no batch"):
        kernel.init(jax.random.key(0), posterior.start(jax.random.key(0)), batch)
    gradient = blackjax.sgmcmc.gradients.grad_estimator(lambda x: -(x**2), lambda x, datum: x * datum, 3)
    with pytest.raises(TypeError, match="stochastic-gradient"):
        erg.from_blackjax(blackjax.sgld(gradient))
