"""A posterior in the coordinates of a flow's base: exact densities, unbiased batches, the laws of chains."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.core.flow import Chain, Flow, UniformTorus
from ergodica.models.flows.neutra import neutra
from tests.support.affine import stationary_covariance, step_map
from tests.support.flow_layers import Triangular, funnel, normals
from tests.support.statistics import assert_mean, z_scores

LOWER = np.array([[2.0, 0.0, 0.0], [-1.5, 0.5, 0.0], [30.0, 1.0, 0.1]])
MEAN = np.array([3.0, -1.0, 50.0])


def affine():
    return Flow(3, Triangular(jnp.asarray(LOWER, jnp.result_type(float)), jnp.asarray(MEAN, jnp.result_type(float))))


def gaussian():
    """A regression on three badly scaled coefficients, in a tree, whose posterior is N(MEAN, LOWER LOWER')."""
    precision = np.linalg.inv(LOWER @ LOWER.T)
    rows = np.sqrt(0.5) * np.linalg.cholesky(precision).T
    data = {"x": jnp.asarray(rows), "y": jnp.asarray(rows @ MEAN)}

    def log_likelihood(position, rows):
        return -0.5 * (rows["y"] - rows["x"] @ vector(position)) ** 2

    def log_prior(position):
        return -0.5 * jnp.sum((jnp.asarray(rows) @ (vector(position) - MEAN)) ** 2)

    return erg.Posterior(
        log_prior, log_likelihood, data, initial={"a": jnp.zeros(2), "b": jnp.zeros(())}, dims={"a": ["axis"]}
    )


def vector(position):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(position)])


@pytest.mark.usefixtures("x64")
def test_a_gaussian_becomes_a_standard_normal():
    """Log density up to a constant, Jacobian and likelihood together."""
    easier = neutra(gaussian(), affine())
    z = jax.random.normal(jax.random.key(0), (20, 3))
    excess = jax.vmap(easier.log_density)(z) + 0.5 * jnp.sum(z**2, axis=-1)
    np.testing.assert_allclose(excess - excess[0], 0.0, atol=1e-9)  # of residuals between numbers of some hundreds
    # the constant is the log determinant: both are densities of the same mass
    expected = gaussian().log_density(unravelled(MEAN)) + np.log(np.diag(LOWER)).sum()
    np.testing.assert_allclose(excess[0], expected, rtol=1e-10)


def unravelled(x):
    return {"a": jnp.asarray(x[:2]), "b": jnp.asarray(x[2])}


@pytest.mark.usefixtures("x64")
def test_the_density_is_that_of_the_change_of_variables():
    """Against the determinant of the Jacobian by automatic differentiation, for a map that is not affine."""
    posterior = erg.Posterior(lambda p: -jnp.sum(jnp.cosh(p["w"])), initial={"w": jnp.zeros(3)})
    flow = funnel(dim=3, width=1.5)
    easier = neutra(posterior, flow)
    for z in jax.random.normal(jax.random.key(0), (5, 3)):
        forward = lambda z: flow.layer.forward(z)[0]  # noqa: E731
        expected = posterior.log_density({"w": forward(z)}) + jnp.linalg.slogdet(jax.jacobian(forward)(z))[1]
        np.testing.assert_allclose(easier.log_density(z), expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_batches_estimate_the_same_gradient():
    """Unbiased over the partition, as before: the likelihood's rows are those of the model."""
    easier = neutra(gaussian(), affine())
    z = jnp.array([0.3, -0.2, 0.1])
    minibatch = erg.estimators.Minibatch(easier, 1)
    state = minibatch.init(jax.random.key(0), z)
    total = []
    for i in range(3):
        estimate, state = minibatch.estimate(jax.random.key(i), z, state)
        total.append(estimate.gradient)
    np.testing.assert_allclose(np.mean(total, axis=0), -z, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_langevin_has_the_law_of_a_standard_normal():
    """SGLD's stationary covariance is 2 / (2 - h) in each coordinate, at scales that differ by a thousand before."""
    h = 0.4
    kernel = erg.samplers.SGLD(erg.estimators.Minibatch(neutra(gaussian(), affine()), scheme="full"), h)
    covariance = stationary_covariance(step_map(kernel, jnp.zeros(3)))
    np.testing.assert_allclose(covariance, 2 / (2 - h) * np.eye(3), atol=1e-8)


def test_a_run_reports_the_models_own_variables():
    posterior = gaussian()
    easier = neutra(posterior, affine())
    assert easier.dims == posterior.dims
    assert easier.num_data == 3
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(easier, 2), 0.05)
    dt = erg.sample(jax.random.key(1), sampler, num_samples=20, num_warmup=5, num_chains=2, progress=False)
    z = dt["unconstrained_posterior"]["position"].values
    x = z @ LOWER.T + MEAN
    np.testing.assert_allclose(dt.posterior["a"].values, x[..., :2], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dt.posterior["b"].values, x[..., 2], rtol=1e-4, atol=1e-3)
    assert dt.posterior["a"].dims == ("chain", "draw", "axis")
    assert set(dt.observed_data.data_vars) == set(posterior.observed_data())
    assert np.all(np.asarray(jax.vmap(easier.start)(jax.random.split(jax.random.key(0), 9))).std(0) > 0)


# --- the funnel ----------------------------------------------------------------------------------------------------

DIM, WIDTH = 4, 3.0


def funnel_posterior():
    """Neal's funnel: the logarithm of the variance of the others has standard deviation 3."""

    def log_prior(p):
        return -0.5 * (p["v"] / WIDTH) ** 2 - 0.5 * jnp.sum(p["x"] ** 2) * jnp.exp(-p["v"]) - (DIM - 1) * p["v"] / 2

    return erg.Posterior(log_prior, initial={"v": jnp.zeros(()), "x": jnp.zeros(DIM - 1)})


def test_the_funnel_becomes_a_standard_normal():
    easier = neutra(funnel_posterior(), funnel(dim=DIM, width=WIDTH))
    z = jax.random.normal(jax.random.key(0), (50, DIM))
    excess = jax.vmap(easier.log_density)(z) + 0.5 * jnp.sum(z**2, axis=-1)
    np.testing.assert_allclose(excess, np.log(WIDTH), atol=2e-4)


def necks():
    """Neck coordinates (chain, draw) by NUTS in the coordinates of a flow, at one step size and unit mass."""
    easier = neutra(funnel_posterior(), funnel(dim=DIM, width=WIDTH))
    algorithm = blackjax.nuts(easier.log_density, 0.8, jnp.ones(DIM))
    kernel = erg.from_blackjax(algorithm, posterior=easier, exact=True)
    dt = erg.sample(jax.random.key(2), kernel, 250, 20, 64, progress=False)
    return dt.posterior["v"].values / WIDTH


def test_nuts_reaches_both_ends_of_the_funnel():
    v = necks()
    assert_mean((v**2).mean(1), 1.0, smallest_error=0.1)
    assert np.max(np.abs(z_scores(v.mean(1), 0.0))) < 5
    # the ends beyond two standard deviations, the lower of which unadapted chains in the model's own coordinates hardly enter
    for end in (v < -2, v > 2):
        assert_mean(end.mean(1), 0.02275, smallest_error=0.5)


def test_a_map_without_its_jacobian_is_rejected(monkeypatch):
    """Mutant: a layer that keeps its log determinant to itself."""
    monkeypatch.setattr(Chain, "forward", lambda self, x, whole=Chain.forward: (whole(self, x)[0], jnp.zeros(())))
    with pytest.raises(AssertionError):
        test_the_funnel_becomes_a_standard_normal()


def test_bad_input_raises():
    with pytest.raises(TypeError, match="posterior must be an Posterior"):
        neutra(lambda x: -jnp.sum(x**2), normals(1.0, dim=2))
    with pytest.raises(TypeError, match="flow must be an Flow"):
        neutra(gaussian(), gaussian())
    with pytest.raises(ValueError, match="flow has dimension 2, the positions of the posterior have 3"):
        neutra(gaussian(), normals(1.0, dim=2))
    with pytest.raises(ValueError, match="base of standard normals, on all of R\\^D; got UniformTorus"):
        neutra(gaussian(), Flow(UniformTorus(3), *normals(1.0, dim=3).layer.layers))
    latent = erg.models.LatentPosterior(
        lambda t: -0.5 * jnp.sum(t**2),
        lambda t, z, x: -0.5 * (z["z"] - t[0]) ** 2 - 0.5 * (x - z["z"]) ** 2,
        jnp.arange(3.0),
        latents={"z": ()},
        initial=jnp.zeros(2),
    )
    with pytest.raises(TypeError, match="this LatentPosterior has an integral"):
        neutra(latent, normals(1.0, dim=2))


def test_streamed_data_stay_streamed():
    posterior = erg.Posterior(
        lambda t: -0.5 * jnp.sum(t**2), lambda t, x: -0.5 * (x - t[0]) ** 2, num_data=7, initial=jnp.zeros(2)
    )
    easier = neutra(posterior, normals(2.0, dim=2))
    assert easier.num_data == 7
    z = jnp.array([0.5, 0.1])
    kernel = erg.samplers.SGLD(erg.estimators.Minibatch(easier, 7), 0.1)
    batch = jnp.arange(7.0)
    state = kernel.init(jax.random.key(0), z, batch)
    estimate, _ = kernel.gradient.estimate(jax.random.key(1), z, state.gradient, batch)
    expected = jax.grad(lambda z: -0.5 * jnp.sum((2 * z) ** 2) - 0.5 * jnp.sum((batch - 2 * z[0]) ** 2))(z)
    np.testing.assert_allclose(estimate.gradient, expected, rtol=1e-5)
    assert tree.size(easier.shape()) == 2
