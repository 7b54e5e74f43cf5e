"""Where chains of NumPyro models start."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal

import ergodica as erg
from ergodica.models import start_at, start_from_guide
from tests.models.numpyro_cases import ARRAYS, CASES
from tests.support.marks import swept

Y = jnp.asarray(ARRAYS["y"], jnp.float32)


def model(y):
    low = numpyro.sample("low", dist.Normal(3.0, 0.5))
    high = numpyro.sample("high", dist.TruncatedNormal(0.0, 1.0, low=low))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.array([4.0, 2.0, 2.0])))
    with numpyro.plate("data", y.shape[0]):
        numpyro.sample("y", dist.Normal(low + weights[0], 1.0 + high - low), obs=y)


def posterior(**options):
    return erg.from_numpyro(model, data={"y": Y}, **options)


def starts(posterior, num):
    return jax.vmap(posterior.start)(jax.random.split(jax.random.key(0), num))


def p_value(draws, law):
    return scipy.stats.kstest(np.asarray(draws, np.float64).ravel(), law).pvalue


def test_uniform_starts_fill_the_interval_in_unconstrained_space():
    draws = starts(posterior(), 1000)
    assert {name: x.shape for name, x in draws.items()} == {
        "low": (1000,), "high": (1000,), "weights": (1000, 2),
    }  # fmt: skip
    law = scipy.stats.uniform(-2, 4).cdf
    for x in draws.values():
        assert p_value(x, law) > 1e-6
    # coordinates are independent: no key is used twice
    assert abs(np.corrcoef(draws["low"], draws["high"])[0, 1]) < 5 / np.sqrt(1000)


def test_prior_starts_are_draws_from_the_prior():
    p = posterior(initial="prior")
    values = jax.vmap(p.constrain)(starts(p, 2000))
    assert p_value(values["low"], scipy.stats.norm(3.0, 0.5).cdf) > 1e-6
    assert p_value(values["weights"][:, 0], scipy.stats.beta(4, 4).cdf) > 1e-6
    low, high = (np.asarray(values[name], np.float64) for name in ("low", "high"))
    tail = scipy.stats.norm.sf
    assert p_value(1 - tail(high) / tail(low), scipy.stats.uniform.cdf) > 1e-6


@pytest.mark.usefixtures("numpyro_promotion")
def test_improper_prior_cannot_be_drawn_from():
    case = CASES["improper"]
    with pytest.raises(ValueError, match=r"'slope'.*ImproperUniform.*initial='uniform'"):
        erg.from_numpyro(case.model, **case.arguments("B"), initial="prior")


def test_start_at_constrained_values():
    values = {"low": 2.5, "high": 3.0, "weights": np.array([0.2, 0.3, 0.5])}
    p = posterior(initial=start_at(constrained=values))
    back = p.constrain(p.start(jax.random.key(0)))
    for name, value in values.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-5)


def test_start_at_an_unconstrained_position_such_as_a_mode():
    mode = erg.find_mode(jax.random.key(0), posterior(), progress=False).position
    p = posterior(initial=start_at(unconstrained=mode))
    for name, value in p.start(jax.random.key(1)).items():
        np.testing.assert_array_equal(value, mode[name])


def test_start_by_a_function_of_a_key():
    def near_zero(key):
        return {"low": jax.random.normal(key), "high": jnp.array(0.0), "weights": jnp.zeros(2)}

    p = posterior(initial=near_zero)
    assert p.start(jax.random.key(3))["low"] == jax.random.normal(jax.random.key(3))


@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize("kind", [AutoNormal, swept(AutoLaplaceApproximation)])
def test_starts_from_a_fitted_autoguide(kind):
    guide = kind(model)
    svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())
    fit = svi.run(jax.random.key(0), 300, y=Y, progress_bar=False)
    p = posterior(initial=start_from_guide(guide, fit.params))
    values = jax.vmap(p.constrain)(starts(p, 500))
    expected = guide.sample_posterior(jax.random.key(9), fit.params, sample_shape=(500,))
    for name in ("low", "high", "weights"):
        np.testing.assert_array_less(
            scipy.stats.ks_2samp(
                np.asarray(values[name]).reshape(500, -1), np.asarray(expected[name]).reshape(500, -1)
            ).statistic,
            scipy.stats.kstwobign.isf(1e-6) / np.sqrt(250),
        )
    assert bool(jnp.all(values["high"] > values["low"]))


def test_starts_from_a_guide_function():
    def guide(shift):
        location = numpyro.param("location", jnp.array(0.0))
        low = numpyro.sample("low", dist.Normal(location + shift, 1e-3))
        numpyro.sample("high", dist.Delta(low + 1.0))
        numpyro.sample("weights", dist.Delta(jnp.array([0.2, 0.3, 0.5]), event_dim=1))

    p = posterior(initial=start_from_guide(guide, {"location": jnp.array(1.0)}, jnp.array(2.0)))
    values = jax.vmap(p.constrain)(starts(p, 5))
    np.testing.assert_allclose(values["low"], 3.0, atol=1e-2)
    np.testing.assert_allclose(values["high"] - values["low"], 1.0, rtol=1e-4)
    assert np.unique(values["low"]).size == 5


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        ("median", ValueError, "initial must be one of 'uniform', 'prior'"),
        ({"low": 0.0}, TypeError, r"start_at\(constrained=…\).*got dict"),
        (start_at(constrained={"low": 0.0}), ValueError, r"misses \['high', 'weights'\]"),
        (
            start_at(unconstrained={"low": 0.0, "high": 0.0, "weights": jnp.zeros(2), "a": 0.0}),
            ValueError,
            r"unknown \['a'\]",
        ),
        (
            start_at(unconstrained={"low": 0.0, "high": 0.0, "weights": jnp.zeros(3)}),
            ValueError,
            r"initial\['weights'\] must have the unconstrained shape \(2,\); got \(3,\)",
        ),
        (
            start_at(constrained={"low": 1.0, "high": 0.5, "weights": jnp.ones(3) / 3}),
            ValueError,
            r"initial\['high'\] must lie inside the support",
        ),
        (
            start_from_guide(lambda: numpyro.sample("low", dist.Normal()), {}),
            ValueError,
            r"guide must give a value.*misses \['high', 'weights'\]",
        ),
    ],
)
def test_starts_that_do_not_fit(initial, error, message):
    with pytest.raises(error, match=message):
        posterior(initial=initial)


def test_start_at_takes_one_of_two():
    with pytest.raises(ValueError, match="exactly one"):
        start_at()
    with pytest.raises(ValueError, match="exactly one"):
        start_at(constrained={}, unconstrained={})
