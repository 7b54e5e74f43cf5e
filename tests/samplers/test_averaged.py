"""Averages kept along a chain: their exact law on a Gaussian, and their agreement with averages of stored draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.samplers import SGLD, Averaged, averaged
from ergodica.samplers.averaged import RunningMoments
from tests.support.affine import NoisyQuadratic, noise_from
from tests.support.laws import sgld_variance
from tests.support.problems import linear_regression

NOISES_A_STEP = 2  # that of the gradient and that of the dynamics


def variance_of_average(lam, h, temperature, spread, num_iterates, *, start=0, stride=1):
    """Exact variance of the shipped kernel's average, for a chain that starts in its stationary law.

    The average is affine in the start and the noises; automatic differentiation of the whole run gives the loadings.
    """
    gradient = NoisyQuadratic(jnp.full((1, 1), lam), jnp.asarray(spread))
    kernel = Averaged(SGLD(gradient, h, temperature=temperature), start=start, stride=stride)
    key = jax.random.key(0)

    def average(first, noises):
        with noise_from(jnp.zeros(NOISES_A_STEP)):
            state = kernel.init(key, jnp.zeros(1))
        state = state._replace(inner=state.inner._replace(position=first))

        def body(state, noise):
            with noise_from(noise):
                return kernel.step(key, state)[0], None

        state, _ = jax.lax.scan(body, state, noises)
        return state.moments.mean[0]

    noises = jnp.zeros((start + num_iterates * stride, NOISES_A_STEP))
    of_start, of_noises = jax.jit(jax.grad(average, argnums=(0, 1)))(jnp.zeros(1), noises)
    stationary = sgld_variance(h, lam, temperature, spread**2)
    return float(stationary * of_start[0] ** 2 + jnp.sum(of_noises**2))


def closed_form(lam, h, temperature, spread, num_iterates, stride=1):
    rho, k = (1 - h * lam) ** stride, num_iterates
    correlation = (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**k) / (k * (1 - rho) ** 2)
    return sgld_variance(h, lam, temperature, spread**2) / k * correlation


class TestVarianceOfTheAverage:
    pytestmark = pytest.mark.usefixtures("x64")

    def test_anchor(self):
        assert abs(variance_of_average(2.0, 0.1, 1.0, 0.0, 200) - 0.024444) < 1e-6

    @pytest.mark.parametrize("stride", [1, 3])
    @pytest.mark.parametrize("start", [0, 7])
    @pytest.mark.parametrize("setting", [(2.0, 0.1, 1.0, 0.0), (0.5, 0.3, 0.7, 1.5)])
    def test_closed_form(self, setting, start, stride):
        exact = closed_form(*setting, 20, stride=stride)
        np.testing.assert_allclose(variance_of_average(*setting, 20, start=start, stride=stride), exact, rtol=1e-11)

    @pytest.mark.parametrize("share", [lambda count: 1 / (count + 1), lambda count: 0.1 + 0 * count])
    def test_mutants_are_rejected(self, share, monkeypatch):
        """A count that is off by one, and an exponential average, miss the anchor's test by far."""

        def mutant(moments, x):
            weight = share((moments.count + 1).astype(x.dtype))
            mean = moments.mean + weight * (x - moments.mean)
            return RunningMoments(moments.count + 1, mean, moments.residue, moments.covariance)

        monkeypatch.setattr(averaged, "with_iterate", mutant)
        assert abs(variance_of_average(2.0, 0.1, 1.0, 0.0, 200) - 0.024444) > 1e-4


def run(covariance, *, num_warmup=20, thin=3, **options):
    inner = SGLD(erg.estimators.Minibatch(linear_regression(), 4), 2e-3)
    sampler = Averaged(inner, start=20, stride=3, covariance=covariance, **options)
    return erg.sample(jax.random.key(1), sampler, 50, num_warmup, num_chains=2, thin=thin, progress=False)


def moments_of(draws):
    """Mean, variance and covariance of stored draws (chain, draw, D), divided by their number."""
    deviation = draws - draws.mean(1, keepdims=True)
    covariance = np.einsum("cni,cnj->cij", deviation, deviation) / draws.shape[1]
    return draws.mean(1), deviation.var(1), covariance


@pytest.mark.usefixtures("x64")
class TestAgainstStoredDraws:
    def test_full(self):
        dt = run("full")
        mean, _, covariance = moments_of(dt.posterior["position"].values)
        np.testing.assert_allclose(dt["summary/mean"]["position"], mean, rtol=1e-12)
        np.testing.assert_allclose(dt["summary"]["covariance"], covariance, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(dt["summary"]["count"], 50)

    def test_diagonal(self):
        dt = run("diagonal")
        mean, variance, _ = moments_of(dt.posterior["position"].values)
        np.testing.assert_allclose(dt["summary/mean"]["position"], mean, rtol=1e-12)
        np.testing.assert_allclose(dt["summary/variance"]["position"], variance, rtol=1e-10)

    def test_mean_alone(self):
        dt = run(None)
        assert set(dt["summary"].children) == {"mean"}
        assert set(dt["summary"].data_vars) == {"count"}

    def test_of_a_function(self):
        dt = run("diagonal", of=lambda theta: {"square": theta**2, "first": theta[0]})
        draws = dt.posterior["position"].values
        np.testing.assert_allclose(dt["summary/mean"]["square"], (draws**2).mean(1), rtol=1e-12)
        np.testing.assert_allclose(dt["summary/variance"]["first"], draws[..., 0].var(1), rtol=1e-10)

    def test_draws_are_those_of_the_inner_kernel(self):
        inner = SGLD(erg.estimators.Minibatch(linear_regression(), 4), 2e-3)
        plain = erg.sample(jax.random.key(1), inner, 50, 20, num_chains=2, thin=3, progress=False)
        np.testing.assert_array_equal(plain.posterior["position"], run("full").posterior["position"])
        assert "summary" not in plain.children


def test_resumed_average_is_that_of_the_unbroken_run(tmp_path):
    inner = SGLD(erg.estimators.Minibatch(linear_regression(), 4), 2e-3)
    arguments = {"num_warmup": 20, "num_chains": 2, "thin": 3, "progress": False}
    sampler = Averaged(inner, start=20)
    erg.sample(jax.random.key(1), sampler, 20, checkpoint=tmp_path / "run", **arguments)
    resumed = erg.sample(jax.random.key(1), sampler, 50, checkpoint=tmp_path / "run", **arguments)
    whole = erg.sample(jax.random.key(1), sampler, 50, **arguments)
    assert resumed.attrs["resumed_from"] == 20
    for group in ("summary", "summary/mean", "summary/variance"):
        for name in whole[group].data_vars:
            np.testing.assert_array_equal(resumed[group][name], whole[group][name])


def test_nothing_averaged_yet_is_nan():
    kernel = Averaged(SGLD(NoisyQuadratic(jnp.eye(2), jnp.asarray(0.0)), 0.1), start=5, covariance="full")
    summary = kernel.summary(kernel.init(jax.random.key(0), jnp.zeros(2)))
    assert np.all(np.isnan(summary["mean"]["position"]))
    assert np.all(np.isnan(summary["covariance"]))


def test_what_comes_before_the_start_leaves_no_trace():
    """A transient that overflows when squared does not reach the covariance."""
    posterior = erg.Posterior(lambda x: -0.5 * x**2, initial=jnp.array(1e30))
    kernel = Averaged(SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 1.0, temperature=0.0), start=1)
    state = kernel.init(jax.random.key(0), posterior.initial)
    for i in range(3):
        state, _ = kernel.step(jax.random.key(i), state)
    assert float(state.moments.covariance) == 0.0


def rounding_error(with_iterate, offset=1000.0, num=200_000):
    """Error of the mean of float32 numbers far from zero, in units of their last place."""
    x = offset + jax.random.normal(jax.random.key(3), (num,))
    zero = jnp.zeros(())
    start = RunningMoments(jnp.zeros((), jnp.int32), zero, zero, None)
    moments, _ = jax.lax.scan(lambda m, xi: (with_iterate(m, xi), None), start, x)
    return abs(float(moments.mean) - np.asarray(x, np.float64).mean()) / np.spacing(np.float32(offset))


def test_single_precision():
    def uncompensated(moments, x):
        return averaged.with_iterate(moments._replace(residue=tree.scale(moments.residue, 0.0)), x)

    assert rounding_error(averaged.with_iterate) <= 1.0
    assert rounding_error(uncompensated) > 4.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda k: Averaged("SGLD"), TypeError, "kernel must be an AbstractKernel"),
        (lambda k: Averaged(k, start=-1), ValueError, "start must be at least 0; got -1"),
        (lambda k: Averaged(k, stride=0), ValueError, "stride must be at least 1; got 0"),
        (lambda k: Averaged(k, stride=1.5), TypeError, "stride must be an integer"),
        (lambda k: Averaged(k, covariance="dense"), ValueError, "covariance must be one of 'diagonal', 'full'"),
        (lambda k: Averaged(k, of=3), TypeError, "of must be a function"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make(SGLD(NoisyQuadratic(jnp.eye(2), jnp.asarray(0.0)), 0.1))


def test_statistics_of_whole_numbers_are_refused():
    kernel = Averaged(SGLD(NoisyQuadratic(jnp.eye(2), jnp.asarray(0.0)), 0.1), of=lambda x: x > 0)
    with pytest.raises(TypeError, match=r"of\(position\) must be of floating point"):
        kernel.init(jax.random.key(0), jnp.zeros(2))
