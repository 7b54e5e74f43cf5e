"""Stein controls of the ELBO's gradient: what is left at Gaussian targets, the draws' noise, means, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators import ELBO, LeaveOneOut, Reparam, Score, SteinControl
from ergodica.estimators.stein.control import SteinState
from ergodica.estimators.variational.facts import base
from ergodica.estimators.variational.per_draw import noise_shape, value_of_noise
from tests.estimators.test_stein_control import PRECISION, of_key
from tests.support.exact_programs import CASES, exact_elbo
from tests.support.replicates import exact_gradient
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion")


def gaussian_model():
    numpyro.sample("x", dist.MultivariateNormal(jnp.array([1.0, -2.0, 0.5]), precision_matrix=jnp.asarray(PRECISION)))


def at_gaussian(guide, num_particles, reparam=None):
    """Gradient of the ELBO at a Gaussian target, away from the optimum."""
    sites = {} if reparam is None else {"*": reparam}
    gradient = erg.estimators.VariationalGradient(ELBO(num_particles, sites), gaussian_model, guide(gaussian_model))
    start = gradient.start(jax.random.key(0))
    return gradient, jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), start
    )


def spreads(estimator, params, num=6):
    """Variance of each leaf's gradient and of the value, summed over entries."""

    def one(key):
        state = estimator.init(key, params)
        estimate = estimator.estimate(key, params, state)[0]
        return estimate.gradient, estimate.value

    gradient, value = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), num))
    return {k: float(jnp.sum(jnp.var(v, axis=0))) for k, v in gradient.items()} | {"value": float(jnp.var(value))}


@pytest.mark.usefixtures("x64")
def test_nothing_is_left_of_the_noise_of_a_gaussian():
    """Linear controls for the locations, quadratic ones for all; the expansion for the locations, with two draws."""
    from numpyro.infer.autoguide import AutoMultivariateNormal

    gradient, params = at_gaussian(AutoMultivariateNormal, 14)
    plain = spreads(gradient, params)
    assert min(plain.values()) > 1e-3
    quadratic = spreads(SteinControl(gradient, "quadratic"), params)
    assert max(quadratic.values()) < 1e-20
    linear = spreads(SteinControl(gradient, "linear"), params)
    assert linear["auto_loc"] < 1e-24
    assert linear["auto_scale_tril"] > 1e-4
    two, _ = at_gaussian(AutoMultivariateNormal, 2)
    assert spreads(SteinControl(two, "linearised", "fixed"), params)["auto_loc"] < 1e-24


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoNormal"])
def test_draws_are_those_of_the_estimate(name):
    """Their mean is the estimate with the same key, and the noise is what the values were made of."""
    from numpyro.infer import autoguide

    gradient, params = at_gaussian(getattr(autoguide, name), 5)
    draws = jax.jit(lambda k: gradient.per_draw(k, params, {})[0])(jax.random.key(3))
    estimate = jax.jit(lambda k: gradient.estimate(k, params, {})[0])(jax.random.key(3))
    assert draws.n_grad == estimate.n_grad == 5
    mean = jax.tree.map(lambda x: x.mean(axis=0), (draws.gradient, draws.value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), mean, (estimate.gradient, estimate.value))
    assert draws.points.shape == (5, 3)


def low_rank_law():
    factor = jnp.array([[0.5, -0.2], [0.1, 0.9], [0.3, 0.3]])
    return dist.LowRankMultivariateNormal(jnp.array([0.1, -0.4, 2.0]), factor, jnp.array([0.4, 0.2, 0.9]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make",
    [
        low_rank_law,
        lambda: dist.MultivariateNormal(jnp.arange(3.0), precision_matrix=jnp.asarray(PRECISION)).expand([2]),
        lambda: dist.Normal(jnp.array([0.1, -0.4]), 0.3).expand([3, 2]).to_event(1),
    ],
    ids=["low-rank", "expanded multivariate", "expanded normal"],
)
def test_values_have_the_law_they_should(make):
    """The value is affine in the noise: its mean and covariance, read off the map, are the law's."""
    law = make()
    shape = noise_shape(law)
    jacobian = jax.jacobian(lambda e: value_of_noise(law, e).ravel())(jnp.zeros(shape)).reshape(-1, np.prod(shape))
    np.testing.assert_allclose(
        value_of_noise(law, jnp.zeros(shape)), jnp.broadcast_to(law.mean, law.shape()), rtol=1e-12
    )
    inner = base(law)
    size = inner.event_shape[0] if inner.event_shape else 1
    covariance = jacobian @ jacobian.T
    blocks = [covariance[i : i + size, i : i + size] for i in range(0, len(covariance), size)]
    own = inner.covariance_matrix if size > 1 else jnp.broadcast_to(law.variance, law.shape()).reshape(-1, 1, 1)
    own = jnp.broadcast_to(own, (len(blocks), size, size))
    np.testing.assert_allclose(np.stack(blocks), own, rtol=1e-12)
    rest = covariance - jax.scipy.linalg.block_diag(*blocks)
    np.testing.assert_allclose(rest, 0.0, atol=1e-14)


def log_normal(x):
    numpyro.sample(
        "w", dist.LogNormal(numpyro.param("loc", jnp.array(0.2)), jnp.exp(numpyro.param("spread", jnp.array(-0.5))))
    )


@pytest.mark.usefixtures("x64")
def test_transformed_normals_are_normals():
    """A log-normal guide of a log-normal: quadratic in the noise, so nothing is left."""

    def model(x):
        numpyro.sample("w", dist.LogNormal(1.0, 0.7))

    gradient = erg.estimators.VariationalGradient(ELBO(8), model, log_normal, jnp.zeros(()))
    assert max(spreads(SteinControl(gradient, "quadratic"), gradient.start(jax.random.key(0))).values()) < 1e-20


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "controls", "num"),
    [("continuous", "quadratic", 16), ("continuous", "linearised", 16), ("mixed-chain", "linear", 12)],
)
def test_means_are_those_of_the_exact_gradient(case, controls, num):
    """A chain of normals; a normal among bits, which are enumerated. Sees an error of 6% of the largest entry."""
    program = CASES[case]()
    sites = {"z": erg.estimators.Enumerate(), "c": Score()} if case == "mixed-chain" else {}
    gradient = erg.estimators.VariationalGradient(ELBO(num, sites), program.model, program.guide, *program.args)
    control = SteinControl(gradient, controls)
    keys = jax.random.split(jax.random.key(2), 16_000)
    found = jax.jit(lambda k: jax.lax.map(lambda k: of_key(control, k, program.params), k, batch_size=1000))(keys)
    assert_mean(found, exact_gradient(CASES[case], exact_elbo), smallest_error=0.06)


@pytest.mark.parametrize(
    "loss",
    [
        erg.estimators.IWELBO(4),
        ELBO(20, {"*": LeaveOneOut()}),
        ELBO(20, {"u": Score(baseline=erg.estimators.MovingAverage()), "w": Reparam()}),
        ELBO(20, {"*": Score()}),
    ],
    ids=["bound", "others", "memory", "no noise"],
)
def test_objectives_without_independent_noise_are_refused(loss):
    program = CASES["continuous"]()
    gradient = erg.estimators.VariationalGradient(loss, program.model, program.guide, *program.args)
    with pytest.raises(ValueError, match="this VariationalGradient cannot"):
        SteinControl(gradient, ridge=1.0).estimate(jax.random.key(0), program.params, SteinState({}, None))
