"""Predictions and scores against closed forms, on a Gaussian mean model whose draws are exact."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import ergodica as erg
from ergodica.diagnostics.predictive import coverage, crps, elpd, log_mean_exp, predictive

N = 40
DATA = np.random.default_rng(1).normal(0.5, 1.0, size=N).astype(np.float32)
PRECISION = N + 1.0
MEAN = DATA.sum() / PRECISION


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)


def plain_posterior():
    return erg.Posterior(
        lambda p: -0.5 * p["mu"] ** 2,
        lambda p, y: -0.5 * (y - p["mu"]) ** 2 - 0.5 * jnp.log(2 * jnp.pi).astype(y.dtype),
        jnp.asarray(DATA),
        initial={"mu": jnp.array(0.0)},
    )


def numpyro_posterior():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return erg.from_numpyro(model, data={"y": jnp.asarray(DATA)})


def exact_draws(draws=2000):
    mu = np.random.default_rng(0).normal(MEAN, PRECISION**-0.5, size=(4, draws)).astype(np.float32)
    return az.from_dict({"posterior": {"mu": mu}})


@pytest.mark.parametrize(("make", "site"), [(plain_posterior, "obs"), (numpyro_posterior, "y")])
def test_log_likelihood_is_the_density_in_every_chunking(make, site):
    dt, posterior = exact_draws(50), make()
    expected = log_normal(DATA, dt["posterior"]["mu"].values[..., None], 1.0)
    for batch_size in (7, 40, 1000):
        result = predictive(dt, posterior, batch_size=batch_size)["log_likelihood"][site]
        np.testing.assert_allclose(result.values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "site"), [(plain_posterior, "obs"), (numpyro_posterior, "y")])
def test_loo_is_the_closed_form(make, site):
    """Leaving one out of a conjugate model is exact: N(mean without it, 1 + 1 / precision without it)."""
    result = predictive(exact_draws(), make())
    without = (DATA.sum() - DATA) / N
    expected = log_normal(DATA, without, 1 + 1 / N).sum()
    found = az.loo(result, var_name=site)
    assert found.elpd == pytest.approx(expected, abs=0.05)  # Monte Carlo error about .01


def test_held_out_scores_against_the_closed_form():
    new = np.random.default_rng(2).normal(0.5, 1.0, size=30).astype(np.float32)
    result = predictive(exact_draws(), numpyro_posterior(), key=jax.random.key(0), data={"y": jnp.asarray(new)})
    held_out, variance = result["held_out"], 1 + 1 / PRECISION
    truth = log_normal(new, MEAN, variance)
    assert abs(held_out.attrs["elpd"] - truth.sum()) < 5 * held_out.attrs["elpd_mcse"]
    assert held_out.attrs["elpd_mcse"] < 0.05
    assert held_out.attrs["nll"] == pytest.approx(-held_out.attrs["elpd"] / 30)
    np.testing.assert_allclose(held_out["lpd_y"], truth, atol=0.05)
    assert result["predictions"]["y"].shape == (4, 2000, 30)
    inside = np.abs(new - MEAN) < 1.6448536 * variance**0.5
    assert held_out.attrs["coverage90_y"] == pytest.approx(inside.mean(), abs=1.5 / 30)
    assert "log_likelihood" not in result.children  # az.loo would leave out what was never in


def test_posterior_predictive_has_the_right_moments():
    result = predictive(exact_draws(), numpyro_posterior(), key=jax.random.key(0), log_likelihood=False)
    draws = result["posterior_predictive"]["y"].values
    assert draws.shape == (4, 2000, N)
    spread = np.sqrt((1 + 1 / PRECISION) / draws.size + 1 / PRECISION / 8000)
    assert abs(draws.mean() - MEAN) < 5 * spread
    assert draws.var() == pytest.approx(1 + 1 / PRECISION, rel=0.02)


def test_result_keeps_groups_and_attributes():
    dt = exact_draws(20)
    dt.attrs["sampler"] = "exact"
    result = predictive(dt, plain_posterior())
    assert "log_likelihood" not in dt.children
    xr.testing.assert_identical(result["posterior"].to_dataset(), dt["posterior"].to_dataset())
    assert result.attrs == dt.attrs


def test_mcse_of_elpd_is_the_spread_over_replicates():
    replicates = []
    for seed in range(60):
        mu = np.random.default_rng(seed).normal(MEAN, PRECISION**-0.5, size=(4, 200))
        replicates.append(elpd(log_normal(DATA + 1.0, mu[..., None], 1.0)))
    spread = np.std([r["elpd"] for r in replicates], ddof=1)  # relative s.e. .09
    assert np.mean([r["elpd_mcse"] for r in replicates]) == pytest.approx(spread, rel=0.35)


def test_formulas():
    draws = np.random.default_rng(0).normal(size=(20000, 3))
    observed = np.array([0.0, 1.0, -2.0])
    density, cumulative = np.exp(-(observed**2) / 2) / np.sqrt(2 * np.pi), np.array([0.5, 0.84134475, 0.02275013])
    expected = observed * (2 * cumulative - 1) + 2 * density - 1 / np.sqrt(np.pi)
    np.testing.assert_allclose(crps(draws, observed), expected, atol=0.02)
    pairs = draws[:50, 0]
    by_hand = np.abs(pairs - 1.0).mean() - np.abs(np.subtract.outer(pairs, pairs)).sum() / (50 * 49) / 2
    np.testing.assert_allclose(crps(pairs[:, None], np.array([1.0])), by_hand)
    assert coverage(draws, observed, 0.9) == pytest.approx(2 / 3)
    np.testing.assert_allclose(log_mean_exp(np.log([[[1.0], [3.0]]])), np.log(2.0))


def test_errors_say_what_to_do():
    dt = exact_draws(5)
    with pytest.raises(ValueError, match=r"from_numpyro.*Leave key out"):
        predictive(dt, plain_posterior(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="nothing to compute"):
        predictive(dt, plain_posterior(), log_likelihood=False)
    prior_only = erg.Posterior(lambda p: -0.5 * p["mu"] ** 2, initial={"mu": jnp.array(0.0)})
    with pytest.raises(ValueError, match="no data"):
        predictive(dt, prior_only)
    with pytest.raises(ValueError, match="batch_size"):
        predictive(dt, plain_posterior(), batch_size=0)
    with pytest.raises(TypeError, match="posterior"):
        predictive(dt, "model")
