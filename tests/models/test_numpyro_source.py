"""What a posterior reports of its NumPyro model: names of axes, observed data, predictions, pointwise likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.infer import log_likelihood

import ergodica as erg
from tests.models.numpyro_cases import ARRAYS, CASES, N

PATTERNS = ["A", "B"]


def posterior_of(name, pattern, **options):
    return erg.from_numpyro(CASES[name].model, **CASES[name].arguments(pattern), **options)


def draws(posterior, chains=2, num=3):
    positions = jax.vmap(posterior.start)(jax.random.split(jax.random.key(0), chains * num))
    values = jax.vmap(posterior.constrain)(positions)
    return {name: np.asarray(x).reshape(chains, num, *x.shape[1:]) for name, x in values.items()}


def reported(x, group, y, n=None):
    with numpyro.plate("groups", 4):
        effect = numpyro.sample("effect", dist.Normal(jnp.zeros(2), 1.0).to_event(1), infer={"event_dims": ["side"]})
        numpyro.deterministic("doubled", 2 * effect)
    numpyro.deterministic("total", effect.sum())
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with numpyro.plate("data", x.shape[0], subsample_size=n) as i:
        mean = numpyro.deterministic("mean", effect[group[i], 0] + x[i] @ slope)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[i])


def reported_posterior(pattern, **options):
    rows = {name: ARRAYS[name] for name in ("x", "group", "y")}
    arguments = {**rows, "n": 4} if pattern == "A" else {"data": rows}
    return erg.from_numpyro(reported, **arguments, **options)


@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_of_axes_come_from_plates(pattern):
    posterior = reported_posterior(pattern, dims={"slope": ["feature"]}, coords={"feature": ["a", "b", "c"]})
    assert posterior.dims == {
        "effect": ("groups", "side"),
        "doubled": ("groups", "doubled_dim_1"),
        "slope": ("feature",),
        "y": ("data",),
    }
    assert posterior.coords == {"feature": ("a", "b", "c")}


@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_deterministic_sites_of_data_length_are_dropped_by_default(pattern):
    def names(**options):
        posterior = reported_posterior(pattern, **options)
        return set(posterior.constrain(posterior.start(jax.random.key(0))))

    latents = {"effect", "slope"}
    assert names() == latents | {"doubled", "total"}
    assert names(deterministic="all") == latents | {"doubled", "total", "mean"}
    assert names(deterministic="none") == latents
    posterior = reported_posterior(pattern, deterministic="all")
    assert posterior.dims["mean"] == ("data",)
    assert posterior.constrain(posterior.start(jax.random.key(0)))["mean"].shape == (N,)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_observed_data_are_whole_and_in_order(pattern):
    observed = posterior_of("several observed", pattern).observed_data()
    assert set(observed) == {"y", "count", "pilot"}
    np.testing.assert_array_equal(observed["y"], ARRAYS["y"].astype(np.float32))
    np.testing.assert_array_equal(observed["count"], ARRAYS["count"])
    np.testing.assert_array_equal(posterior_of("factors", pattern).observed_data().keys(), {"y"})
    series = posterior_of("time by data", pattern)
    np.testing.assert_array_equal(series.observed_data()["series"], ARRAYS["series_t"].astype(np.float32))
    assert series.dims["series"] == ("data", "time")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_size", [1000, 11, 4, 1])
@pytest.mark.swept_after(3)
def test_pointwise_log_likelihood_is_numpyros(pattern, batch_size):
    posterior = posterior_of("several observed", pattern)
    samples = draws(posterior)
    values = posterior.source.log_likelihood(samples, batch_size=batch_size)
    expected = log_likelihood(
        CASES["several observed"].model, samples, batch_ndims=2, **CASES["several observed"].everything()
    )
    assert set(values) == {"y", "count"}  # not the observation outside the data plate
    for name, value in values.items():
        assert value.shape == (2, 3, N)
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["factors", "masked", "scaled", "time by data"])
@pytest.mark.swept_after(3)
def test_pointwise_terms_add_up_to_the_likelihood_sampled(name, pattern):
    posterior = posterior_of(name, pattern)
    position = posterior.start(jax.random.key(4))
    samples = {k: np.asarray(v)[None, None] for k, v in posterior.constrain(position).items()}
    values = posterior.source.log_likelihood(samples, batch_size=3)
    total = sum(value[0, 0] for value in values.values())
    expected = posterior.log_likelihood(position, posterior.data)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_held_out_data(pattern):
    posterior = posterior_of("linear", pattern)
    samples = draws(posterior)
    held_out = {"x": ARRAYS["x"][:3] + 1.0, "y": ARRAYS["y"][:3]}
    values = posterior.source.log_likelihood(samples, held_out, batch_size=2)["y"]
    as_jax = {name: jnp.asarray(x) for name, x in held_out.items()}
    expected = log_likelihood(CASES["linear"].model, samples, batch_ndims=2, **as_jax)["y"]
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-5)
    assert posterior.source.predictive(jax.random.key(0), samples, held_out)["y"].shape == (2, 3, 3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_predictions_follow_the_model_and_do_not_look_at_the_observations(pattern):
    posterior = posterior_of("linear", pattern)
    one = posterior.constrain(posterior.start(jax.random.key(0)))
    samples = {name: np.broadcast_to(x, (2, 500, *x.shape)) for name, x in one.items()}
    y = posterior.source.predictive(jax.random.key(1), samples, batch_size=4)["y"]
    assert y.shape == (2, 500, N)
    mean = np.asarray(one["intercept"] + jnp.asarray(ARRAYS["x"], jnp.float32) @ one["slope"])
    standardised = ((y - mean) / np.asarray(one["sigma"])).astype(np.float64)
    assert scipy.stats.kstest(standardised.ravel(), scipy.stats.norm.cdf).pvalue > 1e-6
    correlation = np.corrcoef(standardised.reshape(-1, N).T)[np.triu_indices(N, 1)]
    assert np.abs(correlation).max() < 6 / np.sqrt(1000)  # rows of different chunks have different noise
    changed = {"x": ARRAYS["x"], "y": np.full(N, 1e6)}
    again = posterior.source.predictive(jax.random.key(1), samples, changed, batch_size=4)["y"]
    np.testing.assert_array_equal(y, again)


@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_predictions_of_several_sites(pattern):
    posterior = posterior_of("several observed", pattern)
    predictions = posterior.source.predictive(jax.random.key(1), draws(posterior), batch_size=4)
    assert {name: x.shape for name, x in predictions.items()} == {
        "y": (2, 3, N), "count": (2, 3, N), "pilot": (2, 3, 3),
    }  # fmt: skip
    series = posterior_of("time by data", pattern)
    assert series.source.predictive(jax.random.key(1), draws(series))["series"].shape == (2, 3, N, 5)


def test_observations_left_out_of_new_data_are_none():
    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal())
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    posterior = erg.from_numpyro(model, data={"x": ARRAYS["x"][:, 0], "y": ARRAYS["y"]})
    samples, new = draws(posterior), {"x": np.arange(4.0)}
    assert posterior.source.predictive(jax.random.key(0), samples, new)["y"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"must hold all arrays.*misses \['y'\]"):
        posterior.source.log_likelihood(samples, new)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bad_input(pattern):
    source = posterior_of("linear", pattern).source
    samples = draws(posterior_of("linear", pattern))
    with pytest.raises(ValueError, match=r"unknown name 'z'"):
        source.log_likelihood(samples, {"z": np.zeros(3)})
    with pytest.raises(ValueError, match=r"every latent site.*misses \['sigma'\]"):
        source.log_likelihood({k: v for k, v in samples.items() if k != "sigma"})
    with pytest.raises(ValueError, match=r"leading axes \(chain, draw\)"):
        source.log_likelihood({**samples, "sigma": samples["sigma"][:1]})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        source.log_likelihood(samples, batch_size=0)


def test_scoped_names_survive_the_way_into_a_result_and_back():
    posterior = posterior_of("network", "B")
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 4), 1e-4)
    dt = erg.sample(jax.random.key(0), sampler, num_samples=3, num_warmup=1, num_chains=2, progress=False, probes=False)
    assert set(dt["posterior"].data_vars) == {"layer.weight"}
    samples = {name: x.values for name, x in dt["posterior"].data_vars.items()}
    values = posterior.source.log_likelihood(samples)["y"]
    position = {"layer/weight": jnp.asarray(samples["layer.weight"][1, 2])}
    expected = posterior.log_likelihood(position, posterior.data)
    np.testing.assert_allclose(values[1, 2], expected, rtol=1e-5, atol=1e-6)
