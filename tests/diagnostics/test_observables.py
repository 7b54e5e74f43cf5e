"""Expectations with errors: formulas by hand, coverage over replicates, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import ergodica as erg
from ergodica.diagnostics.observables import normalised_weights, ratio_delta, ratio_jackknife
from ergodica.models.zoo import gaussian_mixture_cube
from tests.support.statistics import THRESHOLD


def small():
    generator = np.random.default_rng(0)
    return normalised_weights(generator.normal(size=12)), generator.normal(size=12)


def test_the_jackknife_is_what_leaving_out_one_draw_gives():
    weights, f = small()
    without = np.array([np.delete(weights, i) @ np.delete(f, i) / np.delete(weights, i).sum() for i in range(12)])
    mean, se = ratio_jackknife(weights, f)
    assert mean == pytest.approx(12 * (weights @ f) - 11 * without.mean(), rel=1e-12)
    assert se == pytest.approx(np.sqrt(11 / 12 * np.sum((without - without.mean()) ** 2)), rel=1e-12)


def test_the_delta_method_is_the_derivative_of_the_ratio():
    """Influence of a draw: the derivative of the weighted mean by a multiple of its weight."""
    weights, f = small()

    def mean(logs):
        shares = jax.nn.softmax(jnp.log(jnp.asarray(weights)) + logs)
        return shares @ jnp.asarray(f)

    with jax.enable_x64(True):
        influence = np.asarray(jax.grad(mean)(jnp.zeros(12)))
    assert ratio_delta(weights, f)[1] == pytest.approx(np.sqrt(np.sum(influence**2)), rel=1e-10)


def test_equal_weights_give_the_plain_mean():
    f = np.random.default_rng(1).normal(size=50)
    weights = np.full(50, 1 / 50)
    assert ratio_delta(weights, f) == pytest.approx((f.mean(), f.std() / np.sqrt(50)))
    assert ratio_jackknife(weights, f) == pytest.approx((f.mean(), f.std(ddof=1) / np.sqrt(50)))


def replicates(estimate, num=2000, size=200):
    """Draws of N(0, 1.4^2) for the second moment of N(0.3, 1): estimates and their standard errors."""
    x = 1.4 * np.random.default_rng(2).normal(size=(num, size))
    logs = -0.5 * (x - 0.3) ** 2 + 0.5 * (x / 1.4) ** 2
    return np.array([estimate(normalised_weights(one), f) for one, f in zip(logs, x**2, strict=True)])


def spread_of_z(estimate):
    """Mean of z^2 over replicates: 1 where errors are right."""
    found = replicates(estimate)
    return np.mean(((found[:, 0] - 1.09) / found[:, 1]) ** 2)


@pytest.mark.parametrize("estimate", [ratio_delta, ratio_jackknife])
def test_errors_cover(estimate):
    """2,000 replicates: an error that is 10 % off would give 0.81 or 1.23, beyond 5 standard errors of 0.032."""
    assert abs(spread_of_z(estimate) - 1) < 0.16


def test_errors_that_forget_the_weights_are_noticed():
    def wrong(weights, f):
        mean = weights @ f
        return mean, np.sqrt(weights @ (f - mean) ** 2 / len(f))

    assert abs(spread_of_z(wrong) - 1) > 0.16


def test_the_jackknife_takes_the_bias_away():
    """The weights' covariance with f makes the plain ratio biased by order 1/n; at n = 10 it shows."""
    plain, corrected = (replicates(e, 20_000, 10)[:, 0] for e in (ratio_delta, ratio_jackknife))
    z = [(x.mean() - 1.09) / (x.std() / np.sqrt(len(x))) for x in (plain, corrected)]
    assert abs(z[0]) > 8
    assert abs(z[1]) < abs(z[0]) / 2


def test_a_table_of_weighted_draws():
    target = gaussian_mixture_cube(2)
    x = 1.6 * jax.random.normal(jax.random.key(0), (20_000, 2))
    log_q = -0.5 * jnp.sum((x / 1.6) ** 2, axis=1)
    log_weights = jax.vmap(target.log_density)(x) - log_q
    table = erg.diagnostics.importance_expectation(x, log_weights, target)
    assert list(table.columns) == ["mean", "se", "ess", "reference", "reference_se", "z"]
    assert set(table.index) == set(target.reference)
    assert table["z"].abs().max() < THRESHOLD
    assert (table["se"] < 0.03).all()
    assert (table["ess"] > 4000).all()
    weights = normalised_weights(log_weights)
    assert table.attrs["ess_weights"] == pytest.approx(1 / np.sum(weights**2))
    assert table.attrs["notes"] == []
    other = erg.diagnostics.importance_expectation(x, log_weights, target, error="jackknife", reference={"mean": 0.5})
    np.testing.assert_allclose(other["se"], table["se"], rtol=0.02)
    assert other.loc["mean", "z"] < -8
    assert np.isnan(other.loc["product", "z"])


def test_heavy_weights_are_told():
    """Weights of a Pareto law of shape 0.95, which has no variance."""
    x = jax.random.normal(jax.random.key(1), (4000,))
    heavy = 0.95 * jax.random.exponential(jax.random.key(2), (4000,))
    table = erg.diagnostics.importance_expectation(x, heavy, lambda x: {"x": x})
    assert table.attrs["pareto_k"] > table.attrs["threshold"]
    assert "standard errors" in table.attrs["notes"][0]
    few = erg.diagnostics.importance_expectation(x[:10], jnp.zeros(10), lambda x: {"x": x})
    assert "too few" in few.attrs["notes"][0]


def test_draws_without_weight_do_not_count():
    x = jnp.array([1.0, 2.0, jnp.nan, 3.0])
    logs = jnp.array([0.0, 0.0, -jnp.inf, 0.0])
    table = erg.diagnostics.importance_expectation(x, logs, lambda x: {"x": x, "square": x**2})
    assert table.loc["x", "mean"] == pytest.approx(2.0)
    assert table.loc["square", "mean"] == pytest.approx(14 / 3)


def test_a_table_of_chains_is_arviz():
    import arviz_stats

    values = np.random.default_rng(3).normal(size=(4, 500, 2))
    dt = xr.DataTree.from_dict({"posterior": xr.Dataset({"theta": (("chain", "draw", "i"), values)})})
    table = erg.diagnostics.chain_expectation(dt, reference={"theta[0]": (0.0, 0.1), "unknown": 1.0})
    assert list(table.index) == ["theta[0]", "theta[1]"]
    expected = float(arviz_stats.mcse(dt["posterior"]["theta"].sel(i=0), method="mean"))
    assert table.loc["theta[0]", "se"] == pytest.approx(expected)
    assert table.loc["theta[0]", "z"] == pytest.approx(table.loc["theta[0]", "mean"] / np.hypot(expected, 0.1))
    squares = erg.diagnostics.chain_expectation(dt, lambda draws: draws**2)
    assert squares.loc["theta[1]", "mean"] == pytest.approx(np.mean(values[..., 1] ** 2))
    assert "z" not in squares


@pytest.mark.parametrize(
    ("logs", "observables", "match"),
    [
        ([0.0, np.nan], lambda x: {"x": x}, "NaN or"),
        ([0.0, np.inf], lambda x: {"x": x}, "NaN or"),
        ([-np.inf, -np.inf], lambda x: {"x": x}, "All weights are zero"),
        ([[0.0, 0.0]], lambda x: {"x": x}, r"shape \(n,\)"),
        ([0.0, 0.0, 0.0], lambda x: {"x": x}, "one row a weight"),
        ([0.0, 0.0], lambda x: {"x": jnp.stack([x, x])}, "must be a scalar"),
        ([0.0, 0.0], lambda x: {"x": jnp.log(-x)}, "NaN or infinite"),
    ],
)
def test_bad_input(logs, observables, match):
    with pytest.raises(ValueError, match=match):
        erg.diagnostics.importance_expectation(jnp.ones(2), np.array(logs), observables)


def test_more_bad_input():
    with pytest.raises(TypeError, match="dict"):
        erg.diagnostics.importance_expectation(jnp.ones(2), np.zeros(2), lambda x: x)
    with pytest.raises(TypeError, match="observables must be a function"):
        erg.diagnostics.importance_expectation(jnp.ones(2), np.zeros(2), 3)
    with pytest.raises(ValueError, match="error must be one of"):
        erg.diagnostics.importance_expectation(jnp.ones(2), np.zeros(2), lambda x: {"x": x}, error="bootstrap")
    with pytest.raises(ValueError, match="all of the weight"):
        erg.diagnostics.importance_expectation(
            jnp.ones(2), np.array([0.0, -200.0]), lambda x: {"x": x}, error="jackknife"
        )
    with pytest.raises(ValueError, match="pair"):
        erg.diagnostics.importance_expectation(jnp.ones(2), np.zeros(2), lambda x: {"x": x}, reference={"x": [1, 2, 3]})
    with pytest.raises(ValueError, match="group 'posterior'"):
        erg.diagnostics.chain_expectation(xr.DataTree())
    nan = xr.Dataset({"x": (("chain", "draw"), np.full((2, 5), np.nan))})
    with pytest.raises(ValueError, match="NaN or infinite"):
        erg.diagnostics.chain_expectation(xr.DataTree.from_dict({"posterior": nan}))
