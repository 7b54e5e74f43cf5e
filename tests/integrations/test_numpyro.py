"""Samplers inside `numpyro.infer.MCMC`: the same draws whatever the chain method, and the right law."""

import os
import subprocess
import sys
import textwrap

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import ergodica as erg
from ergodica.integrations import numpyro as integration
from ergodica.integrations.numpyro import Kernel
from tests.support.laws import sgld_variance
from tests.support.statistics import REJECTION, assert_mean, z_scores

NUM_DATA, BATCH_SIZE = 40, 8
Y = 1.0 + jax.random.normal(jax.random.key(1), (NUM_DATA,))


def model(y=None, scale=1.0, size=NUM_DATA):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("datum", size if y is None else y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, scale * sigma), obs=y)


def model_that_subsamples(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("datum", y.shape[0], subsample_size=5) as rows:
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y[rows])


def build(posterior):
    return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, BATCH_SIZE), 1e-4)


KEY = jax.random.key(0)


def run(kernel=None, key=KEY, *args, extra_fields=(), init_params=None, **options):
    settings = {
        "num_warmup": 10,
        "num_samples": 30,
        "num_chains": 2,
        "chain_method": "vectorized",
        "progress_bar": False,
    }
    mcmc = MCMC(Kernel(model, build, data="y") if kernel is None else kernel, **settings | options)
    mcmc.run(key, *(args or (Y,)), extra_fields=extra_fields, init_params=init_params)
    return mcmc


def same_draws(a, b):
    a, b = a.get_samples(group_by_chain=True), b.get_samples(group_by_chain=True)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


# NumPyro's loop donates buffers of flags that XLA cannot reuse, and JAX says so (with NUTS too)
donated = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


class TestChainMethods:
    @donated
    @pytest.mark.parametrize("method", ["sequential", jax.vmap])
    def test_same_draws(self, method):
        same_draws(run(), run(chain_method=method))

    def test_progress_bar_changes_nothing(self):
        same_draws(run(), run(chain_method="sequential", progress_bar=True))

    def test_what_the_progress_bar_shows(self):
        mcmc = run(num_chains=1)
        assert "grad_norm" in mcmc.sampler.get_diagnostics_str(mcmc.last_state)

    @pytest.mark.slow
    def test_parallel(self, tmp_path):
        """On two devices, which takes a process of its own."""
        script = tmp_path / "parallel.py"
        script.write_text(
            textwrap.dedent("""
            import jax, numpy as np, sys
            from tests.integrations.test_numpyro import run
            assert jax.local_device_count() == 2
            np.savez(sys.argv[1], **run(chain_method="parallel").get_samples(group_by_chain=True))
            """)
        )
        subprocess.run(
            [sys.executable, script, tmp_path / "draws.npz"],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": "."},
            check=True,
        )
        expected = run().get_samples(group_by_chain=True)
        with np.load(tmp_path / "draws.npz") as draws:
            for name in expected:
                np.testing.assert_allclose(draws[name], expected[name], rtol=2e-5)

    def test_raw_keys(self):
        same_draws(run(), run(key=jax.random.PRNGKey(0)))

    def test_one_chain(self):
        assert run(num_chains=1).get_samples()["mu"].shape == (30,)

    def test_thinning_picks_every_nth(self):
        every, third = run().get_samples(group_by_chain=True), run(thinning=3).get_samples(group_by_chain=True)
        np.testing.assert_array_equal(every["mu"][:, 2::3], third["mu"])

    def test_chains_differ(self):
        mu = run().get_samples(group_by_chain=True)["mu"]
        assert not np.any(mu[0] == mu[1])


def conjugate(y):
    """Precision 20.04: known data variance 2, prior variance 25."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    numpyro.sample("y", dist.Normal(mu, np.sqrt(2.0)), obs=y)


def draws_of_conjugate(num_chains):
    """Standardised deviations and squares, averaged over each chain that starts in the exact law."""
    precision = NUM_DATA / 2.0 + 1 / 25.0
    noise = (NUM_DATA / 2.0) ** 2 * np.asarray(Y, np.float64).var() / BATCH_SIZE
    h = 0.2 / precision
    mean = np.asarray(Y, np.float64).sum() / 2.0 / precision
    scale = np.sqrt(sgld_variance(h, precision, 1.0, noise))

    def sgld(posterior):
        return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform"), h)

    start = {"mu": jnp.float32(mean) + jnp.float32(scale) * jax.random.normal(jax.random.key(2), (num_chains,))}
    kernel = Kernel(conjugate, sgld, data="y")
    mcmc = run(kernel, init_params=start, num_chains=num_chains, num_warmup=60, num_samples=200)
    deviation = (np.asarray(mcmc.get_samples(group_by_chain=True)["mu"], np.float64) - mean) / scale
    return np.stack([deviation.mean(1), (deviation**2).mean(1)], axis=1)


def test_stationary_law():
    assert_mean(draws_of_conjugate(4096), np.array([0.0, 1.0]), smallest_error=0.03)


def test_mutant_whose_key_stands_still_is_rejected(monkeypatch):
    monkeypatch.setattr(integration, "_as_given", lambda key, given: given)
    assert np.max(np.abs(z_scores(draws_of_conjugate(256), np.array([0.0, 1.0])))) > REJECTION


class TestExtraFields:
    def test_what_the_sampler_reports(self):
        fields = run(extra_fields=("grad_norm", "lp_minibatch", "n_grad", "step_size")).get_extra_fields()
        assert set(fields) == {"diverging", "grad_norm", "lp_minibatch", "n_grad", "step_size"}
        np.testing.assert_array_equal(fields["n_grad"], BATCH_SIZE)
        assert not np.any(fields["diverging"])

    def test_a_minibatch_value_is_not_passed_off_as_potential_energy(self):
        with pytest.raises(AttributeError, match="lp_minibatch"):
            run(extra_fields=("potential_energy",))

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match=r"'energy' is no field.*grad_norm"):
            run(extra_fields=("energy",))


class TestArviz:
    def test_from_numpyro(self):
        dt = arviz.from_numpyro(run(extra_fields=("grad_norm", "lp_minibatch")), log_likelihood=True)
        assert set(dt.posterior.data_vars) == {"mu", "sigma", "twice"}
        assert {"lp_minibatch", "diverging"} <= set(dt.sample_stats.data_vars)
        assert "lp" not in dt.sample_stats
        np.testing.assert_array_equal(dt.observed_data["y"], Y)
        assert dt.log_likelihood["y"].shape == (2, 30, NUM_DATA)
        assert arviz.summary(dt).loc["mu", "r_hat"] > 0

    @pytest.mark.parametrize("y", [Y, np.asarray(Y)], ids=["jax", "numpy"])
    def test_observed_data_of_a_model_that_subsamples_are_all(self, y):
        dt = arviz.from_numpyro(run(Kernel(model_that_subsamples, build), KEY, y), log_likelihood=True)
        np.testing.assert_array_equal(dt.observed_data["y"], Y)
        assert dt.log_likelihood["y"].shape == (2, 30, NUM_DATA)


def test_a_subsampled_plate_gives_the_draws_of_named_data():
    same_draws(run(), run(Kernel(model_that_subsamples, build)))


def test_goes_on_from_the_last_state():
    mcmc, whole = run(num_samples=10), run(num_samples=30)
    first = mcmc.get_samples(group_by_chain=True)["mu"]
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key, Y)
    second = mcmc.get_samples(group_by_chain=True)["mu"]
    mu = whole.get_samples(group_by_chain=True)["mu"]
    np.testing.assert_allclose(np.concatenate([first, second], 1), mu[:, :20], rtol=1e-6)


def test_other_data_are_not_the_old_ones():
    """A run that goes on from a state is on the data that it is given, not on those of the run before."""
    mcmc = run()
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(3), Y + 100.0, extra_fields=("grad_norm",))
    assert mcmc.get_extra_fields(group_by_chain=True)["grad_norm"][:, 0].min() > 1000


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Kernel("model", build), TypeError, "model must be a function"),
        (lambda: Kernel(model, 3), TypeError, "build must be a function"),
        (lambda: Kernel(model, build, deterministic="some"), ValueError, "deterministic must be one of"),
        (lambda: run(Kernel(model, build, data="x")), ValueError, r"data names \['x'\].*\['y'\]"),
        (lambda: run(Kernel(model, lambda p: p, data="y")), TypeError, r"build\(posterior\) must be an AbstractKernel"),
        (lambda: run(Kernel(lambda *y: model(*y), build, data="y")), TypeError, "arguments without a name"),
        (lambda: run(None, KEY, Y, 1.0, NUM_DATA, 4), TypeError, "do not fit the model"),
        (lambda: run(jit_model_args=True), ValueError, "jit_model_args=False"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
