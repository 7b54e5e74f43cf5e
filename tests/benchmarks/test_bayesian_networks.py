"""What Bayesian networks are compared with: Laplace is exact on a linear model, and SWAG draws from the Gaussian it says."""

import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import xarray as xr

import ergodica as erg

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bayesian_networks_methods

    yield bayesian_networks_methods
    del sys.modules["bayesian_networks_methods"]


@pytest.mark.parametrize("prior_sd", [2.0, 0.1])
def test_laplace_of_a_linear_model_is_its_posterior(methods, prior_sd):
    """Mean and variance of the prediction by linear algebra; the mutant is another prior, which matters for 20 rows."""
    generator = np.random.default_rng(0)
    x, x_new = generator.normal(size=(20, 3)).astype(np.float32), generator.normal(size=(5, 3)).astype(np.float32)
    y = (x @ [1.0, -1.0, 0.5] + 0.3 * generator.normal(size=20)).astype(np.float32)
    design, sd = np.concatenate([x, np.ones((20, 1))], 1).astype(float), 0.3
    covariance = np.linalg.inv(design.T @ design / sd**2 + np.eye(4) / 2.0**2)
    mode = covariance @ design.T @ y / sd**2
    new = np.concatenate([x_new, np.ones((5, 1))], 1)
    model = methods.Regressor(eqx.nn.Linear(3, "scalar", key=jax.random.key(0)), jnp.log(jnp.array(sd)))
    posterior = erg.models.from_equinox(model, methods.normal, x, y, prior_scale=2.0)
    position = {
        "net.weight": jnp.asarray(mode[None, :3], jnp.float32),
        "net.bias": jnp.asarray(mode[3:], jnp.float32).reshape(model.net.bias.shape),
        "log_sd": model.log_sd,
    }
    assert position.keys() == posterior.shape().keys()
    scales = dict.fromkeys(position, prior_sd)
    mean, spread = methods._laplace(
        "net", methods.mean_and_log_sd, posterior, jnp.asarray(x_new), position, scales, jax.random.key(1)
    )
    np.testing.assert_allclose(mean, new @ mode, rtol=1e-4, atol=1e-5)
    expected = np.sqrt(sd**2 + np.einsum("ni,ij,nj->n", new, covariance, new))
    assert np.allclose(spread, expected, rtol=1e-4) == (prior_sd == 2.0)


def test_laplace_of_labels_has_the_variance_of_the_logits(methods):
    """Two classes and one input: the precision of the logit difference by hand, through the mean of the sigmoid."""
    x, y = jnp.ones((50, 1)), jnp.asarray([0] * 30 + [1] * 20, jnp.int32)
    model = eqx.nn.Linear(1, 2, use_bias=False, key=jax.random.key(0))
    posterior = erg.models.from_equinox(model, methods.categorical, x, y, prior_scale=3.0)
    weight = jnp.array([[0.2], [-0.2]])
    probabilities = methods._laplace(
        "weight", methods.log_probabilities, posterior, x[:1], {"weight": weight}, {"weight": 3.0}, jax.random.key(1)
    )
    p = 1 / (1 + np.exp(-0.4))
    variance = 2 / (
        1 / 9 + 2 * 50 * p * (1 - p)
    )  # of the difference: along (1, -1) the precision is 1/9 + 2 N p (1 - p)
    z, weights = np.polynomial.hermite_e.hermegauss(40)
    sigmoid = 1 / (1 + np.exp(-(0.4 + np.sqrt(variance) * z)))
    expected = weights @ sigmoid / weights.sum()
    spread = np.sqrt(weights @ (sigmoid - expected) ** 2 / weights.sum() / 200)  # of 200 simulations
    assert abs(float(probabilities[0, 0]) - expected) < 5 * spread
    assert spread < 0.01


def test_swag_draws_have_the_covariance_of_the_method(methods):
    """Half the diagonal, plus half the covariance of the last iterates about the mean; the mutant forgets the halves."""
    generator = np.random.default_rng(1)
    iterates = generator.normal(size=(1, 4000, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    mean, variance = iterates.mean(1), iterates.var(1)
    dataset = xr.Dataset({"w": (("chain", "draw", "w_dim_0"), iterates.astype(np.float32))})
    summary = {
        f"summary/{name}": xr.Dataset({"w": (("chain", "w_dim_0"), value)})
        for name, value in (("mean", mean), ("variance", variance))
    }
    dt = xr.DataTree.from_dict({"posterior": dataset, **summary})
    draws = methods.swag_draws(jax.random.key(2), dt).posterior["w"].values[0]
    deviations = iterates[0, -20:] - mean[0]
    expected = np.diag(variance[0]) / 2 + deviations.T @ deviations / (2 * 19)
    error = np.abs(np.cov(draws.T) - expected).max()
    tolerance = 5 * np.sqrt(2 / 4000) * np.diag(expected).max()
    assert error < tolerance
    assert np.abs(np.cov(draws.T) - 2 * expected).max() > tolerance
    assert np.abs(draws.mean(0) - mean[0]).max() < 5 * np.sqrt(expected.max() / 4000)


@pytest.mark.sweep
def test_problems_are_posteriors(methods):
    """Sizes of the splits, no row on both sides, and the prior that each problem says."""
    for name, scale in (("auto_mpg", 8**-0.5), ("digits", 4 / 8), ("digits_unit", 1.0)):
        problem = methods.PROBLEMS[name]
        s = methods.split(problem, 0)
        assert s.posterior.num_data == problem.num_train
        assert len(s.test["y"]) == problem.num_test
        first = next(n for n in s.posterior.shape() if n.endswith("layers.0.weight"))
        position = jax.tree.map(jnp.zeros_like, s.posterior.start(jax.random.key(0)))
        moved = {**position, first: position[first].at[0, 0].set(1.0)}
        change = s.posterior.log_prior(moved) - s.posterior.log_prior(position)
        assert float(change) == pytest.approx(-0.5 / scale**2, rel=1e-2)


def test_a_law_is_scored_as_calibration_does(methods):
    s = methods.Split(None, None, {"x": jnp.zeros(3), "y": jnp.zeros(3)})
    found = methods.scores(s, {"gaussians": (np.zeros((2, 3)), np.ones((2, 3)))})
    assert found["nll"][0] == pytest.approx(-float(dist.Normal().log_prob(0.0)), abs=1e-5)
    assert found["nll"][3] is None
