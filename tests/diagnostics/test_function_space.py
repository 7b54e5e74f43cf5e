"""Functions of draws, and the disagreement of chains about them, against closed forms."""

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import ergodica as erg
from ergodica.diagnostics import chain_disagreement, function_draws


def line(theta, x):
    return theta["a"] + theta["b"] * x


def draws_of(**values):
    return az.from_dict({"posterior": {k: np.asarray(v, np.float32) for k, v in values.items()}})


def test_function_of_a_plain_position_in_every_chunking():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 50)).astype(np.float32)
    posterior = erg.Posterior(
        lambda t: -0.5 * (t["a"] ** 2 + t["b"] ** 2), initial={"a": jnp.array(0.0), "b": jnp.array(0.0)}
    )
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    for batch_size in (2, 7, 100):
        found = function_draws(draws_of(a=a, b=b), posterior, line, x, batch_size=batch_size)
        np.testing.assert_allclose(found, a[..., None] + b[..., None] * x, rtol=1e-5, atol=1e-6)
        assert found.dims == ("chain", "draw", "row")
    with pytest.raises(ValueError, match="one row a datum"):
        function_draws(draws_of(a=a, b=b), posterior, lambda theta, x: theta["a"], x)
    with pytest.raises(ValueError, match="'a' that the draws do not hold"):
        function_draws(draws_of(b=b), posterior, line, x)


def test_function_of_a_numpyro_posterior_sees_the_scale_of_the_model():
    def model(x, y):
        a = numpyro.sample("a", dist.Normal())
        b = numpyro.sample("b", dist.LogNormal())
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    x = jnp.linspace(0.0, 1.0, 5)
    posterior = erg.from_numpyro(model, data={"x": x, "y": x})
    dt = draws_of(a=np.zeros((2, 4)), b=np.zeros((2, 4)))
    dt["unconstrained_posterior"] = dt["posterior"]
    np.testing.assert_allclose(function_draws(dt, posterior, line, x)[0, 0], x)  # b = exp(0)


def test_disagreement_of_shifted_chains_by_hand():
    within = np.array([-1.0, 1.0, -1.0, 1.0])
    values = xr.DataArray(np.array([0.0, 3.0])[:, None] + within, dims=("chain", "draw"))
    found = chain_disagreement(values)
    assert found.within == pytest.approx(4 / 3)
    assert found.between == pytest.approx(4.5)
    assert found.share == pytest.approx(4.5 / (4.5 + 4 / 3))


def test_chains_of_one_law_disagree_by_noise_alone():
    """E[B] = W / S: 2,000 values of 4 chains of 100 draws, so a relative error of the mean of √(2/3/2000) = 0.018."""
    values = xr.DataArray(np.random.default_rng(1).normal(size=(4, 100, 2000)), dims=("chain", "draw", "row"))
    found = chain_disagreement(values)
    assert abs(found.between.mean() * 100 - 1) < 5 * np.sqrt(2 / 3 / 2000)
    assert abs(found.within.mean() - 1) < 5 * np.sqrt(2 / 400 / 2000)
    assert found.rhat.max() < 1.1
    of_draws = values.var(("chain", "draw"))  # the mutant that takes the variance of all draws for the part between
    assert abs(of_draws.mean() * 100 - 1) > 5 * np.sqrt(2 / 3 / 2000)


def test_chains_that_do_not_move_share_everything():
    values = xr.DataArray(np.broadcast_to(np.arange(3.0)[:, None], (3, 10)), dims=("chain", "draw"))
    found = chain_disagreement(values)
    assert found.share == 1
    assert np.isnan(found.rhat)
    assert chain_disagreement(0 * values).share == 0
    with pytest.raises(ValueError, match="'chain' with at least 2"):
        chain_disagreement(values.isel(chain=[0]))
    with pytest.raises(TypeError, match="from function_draws"):
        chain_disagreement(values.values)


def test_hidden_units_permuted_change_every_weight_and_not_the_function():
    """Four chains of the same draws, hidden units in another order in each: R-hat of weights is far off, of the function 1."""
    generator = np.random.default_rng(2)
    inner, outer = generator.normal(size=(2, 1, 200, 4)) * 0.1 + np.array([[-3.0, -1.0, 1.0, 3.0]])
    orders = [generator.permutation(4) for _ in range(4)]
    a, b = (np.concatenate([w[..., order] for order in orders]).astype(np.float32) for w in (inner, outer))
    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t["a"] ** 2), initial={"a": jnp.zeros(4), "b": jnp.zeros(4)})
    x = jnp.linspace(-1.0, 1.0, 5)
    found = function_draws(
        draws_of(a=a, b=b), posterior, lambda t, x: jnp.tanh(x[:, None] * t["a"][None]) @ t["b"], x + 0.3
    )
    assert chain_disagreement(found).rhat.max() < 1.05
    assert az.rhat(draws_of(a=a))["a"].max() > 2
