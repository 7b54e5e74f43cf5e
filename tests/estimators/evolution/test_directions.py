"""Forward gradients, SPSA and evolution strategies against their moments in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators import SPSA, EvolutionStrategy, ForwardGradient, LowRankEvolution, Minibatch
from ergodica.estimators.evolution.forward import forward_gradient
from ergodica.estimators.evolution.spsa import simultaneous_perturbation
from ergodica.estimators.evolution.strategy import antithetic_weights, centred_ranks, single_weights
from tests.support.problems import linear_regression
from tests.support.quadrature import exact_moments, moments, normal_rule
from tests.support.statistics import REJECTION, assert_mean, z_scores

THETA = {"a": jnp.array(0.4), "b": jnp.array([-0.7, 1.1])}
HESSIAN = np.array([[1.3, 0.4, -0.2], [0.4, 0.7, 0.1], [-0.2, 0.1, -0.9]])
SLOPE = np.array([0.5, -1.0, 2.0])
CUBE = np.array([0.3, -0.6, 0.9])
SIGMA = 0.7


def vector(params):
    return jnp.concatenate([jnp.atleast_1d(x) for x in jax.tree.leaves(params)])


def quadratic(params):
    x = vector(params)
    return 2.0 + x @ SLOPE + x @ HESSIAN @ x / 2


def cubic(params):
    return jnp.sum(CUBE * vector(params) ** 3)


def linear(params):
    return 2.0 + vector(params) @ SLOPE


def theta64():
    return jax.tree.map(lambda x: jnp.asarray(x, float), THETA)


def gradient_of(f):
    return np.asarray(tree.ravel(jax.grad(f)(theta64())))


def gaussian_covariance(g):
    return g @ g * np.eye(len(g)) + np.outer(g, g)


@pytest.mark.usefixtures("x64")
def test_forward_gradient_has_its_moments():
    """Any function; one Gaussian direction, every point of a rule that is exact for the degrees at hand."""
    g = gradient_of(cubic)
    mean, covariance = exact_moments(ForwardGradient(cubic), theta64(), 3)
    np.testing.assert_allclose(mean, g, rtol=1e-12)
    np.testing.assert_allclose(covariance, gaussian_covariance(g), rtol=1e-12)
    np.testing.assert_allclose(np.trace(covariance), 4 * g @ g, rtol=1e-12)


def all_signs(dimension):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=dimension)))


@pytest.mark.usefixtures("x64")
def test_signs_by_enumeration():
    """Every vector of signs: forward gradients, SPSA on a quadratic, where it is the same, and its bias on a cubic."""
    signs, params = all_signs(3), np.asarray(vector(theta64()))
    weights = np.full(8, 1 / 8)
    g = gradient_of(quadratic)
    covariance = gaussian_covariance(g) - 2 * np.diag(g**2)
    forward = [forward_gradient(jnp.array([g @ v]), jnp.asarray(v[None])) for v in signs]

    def spsa(f, v):
        plus, minus = (jnp.array([f(params + c * v)]) for c in (SIGMA, -SIGMA))
        return simultaneous_perturbation(plus, minus, jnp.asarray(v[None]), jnp.asarray(SIGMA))

    for estimates in (forward, [spsa(quadratic, v) for v in signs]):
        mean, found = moments(np.stack(estimates), weights)
        np.testing.assert_allclose(mean, g, rtol=1e-12)
        np.testing.assert_allclose(found, covariance, atol=1e-12)
        np.testing.assert_allclose(np.trace(found), 2 * g @ g, rtol=1e-12)
    mean, _ = moments(np.stack([spsa(cubic, v) for v in signs]), weights)
    np.testing.assert_allclose(mean - gradient_of(cubic), SIGMA**2 * CUBE, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_mirrored_evolution_has_its_moments_and_its_bias():
    estimator = EvolutionStrategy(quadratic, SIGMA)
    g = gradient_of(quadratic)
    mean, covariance = exact_moments(estimator, theta64(), 3)
    np.testing.assert_allclose(mean, g, rtol=1e-12)
    np.testing.assert_allclose(covariance, gaussian_covariance(g), rtol=1e-12)
    mean, _ = exact_moments(EvolutionStrategy(cubic, SIGMA), theta64(), 3, num_points=4)
    np.testing.assert_allclose(mean - gradient_of(cubic), 3 * SIGMA**2 * CUBE, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_evolution_without_pairs_is_a_sample_covariance_times_the_gradient():
    """Two points in three dimensions; on a linear function the law is Wishart, with one degree of freedom fewer than points."""
    g = gradient_of(linear)
    mean, covariance = exact_moments(EvolutionStrategy(linear, SIGMA, antithetic=False), theta64(), 6)
    np.testing.assert_allclose(mean, g, rtol=1e-12)
    np.testing.assert_allclose(covariance, gaussian_covariance(g) / (2 - 1), rtol=1e-12)
    mean, _ = exact_moments(EvolutionStrategy(quadratic, SIGMA, antithetic=False), theta64(), 6)
    np.testing.assert_allclose(mean, gradient_of(quadratic), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_baseline_that_includes_itself_is_seen():
    """The mutant: the plain mean as a baseline shrinks the gradient by 1 - 1/m."""
    g, noise = gradient_of(linear), normal_rule(2 * 3)
    points = noise[0].reshape(-1, 2, 3)
    fitness = 2.0 + (np.asarray(vector(theta64())) + SIGMA * points) @ SLOPE
    right = jax.vmap(lambda f, e: single_weights(f, jnp.asarray(SIGMA)) @ e)(jnp.asarray(fitness), jnp.asarray(points))
    wrong = np.einsum("pi,pid->pd", fitness - fitness.mean(axis=1, keepdims=True), points) / (2 * SIGMA)
    np.testing.assert_allclose(noise[1] @ np.asarray(right), g, rtol=1e-12)
    np.testing.assert_allclose(noise[1] @ wrong, g / 2, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_has_its_moments(rank):
    """A 2 x 2 matrix, every point for all entries of both factors; exact in the mean on a quadratic, and its bias on a cubic."""
    rng = np.random.default_rng(0)
    slope, curvature = rng.normal(size=(2, 2)), rng.normal(size=(4, 4))
    w = jnp.array([[0.3, -0.4], [1.2, 0.1]])

    def f(w):
        x = w.reshape(-1)
        return jnp.sum(slope * w) + x @ (curvature + curvature.T) @ x / 2

    g = np.asarray(jax.grad(f)(w))
    mean, covariance = exact_moments(LowRankEvolution(f, SIGMA, rank=rank), w, 4 * rank)
    np.testing.assert_allclose(mean, g.ravel(), rtol=1e-11)
    np.testing.assert_allclose(np.trace(covariance), np.sum(g**2) * (4 + 1 + 2 * (2 + 2 + 1) / rank), rtol=1e-11)
    mean, _ = exact_moments(LowRankEvolution(lambda w: jnp.sum(slope * w**3), SIGMA, rank=rank), w, 4 * rank)
    bias = SIGMA**2 * slope * (3 + 6 / rank)
    np.testing.assert_allclose(mean, (3 * slope * np.asarray(w) ** 2 + bias).ravel(), rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_factored_products_are_those_of_the_matrix_that_is_formed():
    params = {"w": jnp.arange(6.0).reshape(2, 3) / 7, "b": jnp.array([0.1, 0.2, 0.3])}
    x, y = jnp.array([[0.3, -1.0], [0.7, 0.2], [0.1, 0.1]]), jnp.array([0.5, -0.2, 0.9])

    def f(p):
        hidden = jnp.tanh(x @ p["w"] + p["b"][None])
        return -jnp.sum((hidden @ (p["w"].T @ jnp.ones(2)) - y) ** 2) + jnp.sum(p["w"] @ y)

    def gradient(factored):
        estimator = LowRankEvolution(f, 0.3, 4, 2, factored=factored)
        return jax.jit(lambda key: estimator.estimate(key, params, None)[0].gradient)(jax.random.key(0))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), gradient(True), gradient(False))


@pytest.mark.usefixtures("x64")
def test_ranks():
    fitness = jnp.array([3.0, -1.0, 3.0, 1e9, 0.0])
    np.testing.assert_allclose(centred_ranks(fitness), [0.125, -0.5, 0.125, 0.5, -0.25])
    plus, minus, sigma = jnp.array([7.0, 6.5]), jnp.array([-1.0, 6.0]), jnp.asarray(0.5)
    np.testing.assert_allclose(antithetic_weights(plus, minus, sigma, "rank"), np.array([3, 1]) / 3 / (2 * 2 * 0.5))
    np.testing.assert_allclose(antithetic_weights(plus, minus, sigma), np.array([8, 0.5]) / (2 * 2 * 0.5))
    assert np.sum(single_weights(plus, sigma, "rank")) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [EvolutionStrategy, LowRankEvolution])
def test_ranks_do_not_see_increasing_transformations(make):
    def estimate(f):
        return make(f, 0.3, 5, shaping="rank").estimate(jax.random.key(0), theta64(), None)[0].gradient

    plain, bent = estimate(quadratic), estimate(lambda p: jnp.exp(3 * quadratic(p)))
    jax.tree.map(np.testing.assert_array_equal, plain, bent)


ESTIMATORS = {
    "forward": lambda f: ForwardGradient(f, 4),
    "forward, signs": lambda f: ForwardGradient(f, 4, directions="signs"),
    "SPSA": lambda f: SPSA(f, 0.1, 4),
    "ES": lambda f: EvolutionStrategy(f, 0.1, 4),
    "ES, low rank": lambda f: LowRankEvolution(f, 0.1, 4),
}


@pytest.mark.usefixtures("x64")
def test_all_estimate_the_gradient_of_a_posterior():
    """3,000 estimates on reshuffled blocks of a regression; errors of 15% of the largest entry are seen. A forgotten sigma is."""
    posterior, theta = linear_regression(13), jnp.array([0.3, -1.2, 0.8])
    exact = np.asarray(jax.grad(posterior.log_density)(theta))
    estimators = {name: make(Minibatch(posterior, 5)) for name, make in ESTIMATORS.items()}

    def all_of_them(key):
        key_init, key = jax.random.split(key)
        return {
            name: estimator.estimate(key, theta, estimator.init(key_init, theta))[0].gradient
            for name, estimator in estimators.items()
        }

    keys = jax.random.split(jax.random.key(1), 3000)
    draws = jax.jit(lambda keys: jax.lax.map(all_of_them, keys, batch_size=500))(keys)
    for found in draws.values():
        assert_mean(np.asarray(found), exact, smallest_error=0.15)
    assert np.abs(z_scores(np.asarray(draws["ES"]) * 0.1, exact)).max() > REJECTION


@pytest.mark.usefixtures("x64")
@pytest.mark.sweep
def test_compare_gradients_takes_them():
    """The bias of smoothing is seen, unbiased ones are called so, costs are evaluations."""
    posterior = erg.Posterior(lambda x: -jnp.sum(x**4) - jnp.sum(x**2), initial=jnp.ones(2))
    estimators = {
        "forward": ForwardGradient(posterior, 3),
        "ES": EvolutionStrategy(posterior, 0.5, 3),
        "SPSA": SPSA(posterior, 1e-3, 3),
    }
    table = erg.compare_gradients(
        jax.random.key(0), estimators, jnp.array([1.0, -0.5]), num_repeats=4000, num_timings=0
    )
    assert table.attrs["reference"] == "exact"
    assert dict(zip(table.estimator.values.tolist(), table.verdict.sel(point=0).values.tolist(), strict=True)) == {
        "forward": "unbiased",
        "ES": "biased",
        "SPSA": "unbiased",
    }
    assert table.datum_gradients.sel(point=0).values.tolist() == [3.0, 6.0, 6.0]
    assert table.value_evaluations.sel(point=0).values.tolist() == [3.0, 6.0, 6.0]
    assert table.derivative_evaluations.sel(point=0).values.tolist() == [3.0, 0.0, 0.0]


@pytest.mark.usefixtures("x64")
def test_all_evaluations_of_an_estimate_share_their_random_numbers():
    """A large noise that does not depend on the parameters cancels; without a common key it would swamp the difference."""

    def noisy(params, key):
        return quadratic(params) + 1e6 * jax.random.normal(key, ())

    def gradient(f, takes_key):
        estimator = EvolutionStrategy(f, SIGMA, 3, takes_key=takes_key)
        return tree.ravel(estimator.estimate(jax.random.key(0), theta64(), None)[0].gradient)

    np.testing.assert_allclose(gradient(noisy, True), gradient(quadratic, False), atol=1e-8)


def test_bad_objectives_are_refused():
    params = jnp.ones(2)
    with pytest.raises(TypeError, match="objective must be a function of the parameters"):
        ForwardGradient(3.0)
    with pytest.raises(ValueError, match=r"objective must return a scalar.*shape \(2,\)"):
        ForwardGradient(lambda x: x).estimate(jax.random.key(0), params, None)
    with pytest.raises(ValueError, match="takes_key=True is for functions"):
        SPSA(linear_regression(5), 0.1, takes_key=True)
    with pytest.raises(ValueError, match="takes no batch that is handed over"):
        SPSA(jnp.sum, 0.1).estimate(jax.random.key(0), params, None, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="shaping must be 'rank' or None"):
        EvolutionStrategy(jnp.sum, 0.1, shaping="ranks")
