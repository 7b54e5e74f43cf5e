"""Relaxations of bits and one-hot vectors: means and variances against quadrature, biases in closed form, programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators.variational.sites.gumbel_softmax import gumbel_softmax, log_relaxed_density
from ergodica.estimators.variational.sites.rao_blackwell_gumbel import gumbels_given_argmax
from ergodica.estimators.variational.sites.rebar import perturbed_two_ways
from ergodica.estimators.variational.sites.reinmax import reinmax
from ergodica.estimators.variational.sites.straight_through import straight_through
from tests.support.exact_programs import Case
from tests.support.one_hot import one_hot_program
from tests.support.replicates import gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

P, P0 = 0.3, 0.49
PHI = float(np.log(P / (1 - P)))
TRUE = P * (1 - P) * (1 - 2 * P0)
TEMPERATURES = (0.1, 0.5, 1.0, 2.0)


@functools.cache
def logistic_grid(num=300):
    """Logit u at midpoints of the two parts of the unit interval where the bit is 0 and 1, and the weights."""
    parts = []
    for low, high in ((0.0, 1 - P), (1 - P, 1.0)):
        t, w = np.polynomial.legendre.leggauss(num)
        t = (t + 1) / 2
        u = low + (high - low) * t**2 * (3 - 2 * t)  # nodes crowd at both ends, where the derivative has its peaks
        parts.append((np.log(u) - np.log1p(-u), (high - low) * 6 * t * (1 - t) * w / 2))
    return parts


def one_bit(temperature, *, hard):
    """Gradient by the logit at each node, for the cost (b - P0)², bit by bit."""
    for logistic, weight in logistic_grid():
        y = 1 / (1 + np.exp(-(PHI + logistic) / temperature))
        value = (PHI + logistic > 0).astype(float) if hard else y
        yield 2 * (value - P0) * y * (1 - y) / temperature, weight


def exact_moments(temperature, *, hard):
    """Mean and variance of the estimate at one draw; mean over draws of its variance given the bit."""
    parts = list(one_bit(temperature, hard=hard))
    mean = sum(np.sum(w * g) for g, w in parts)
    square = sum(np.sum(w * g**2) for g, w in parts)
    within = square - sum(np.sum(w * g) ** 2 / np.sum(w) for g, w in parts)
    return mean, square - mean**2, within


def test_the_quadrature_gives_the_published_biases():
    """Biases and variances at p = .3, p0 = .49, as they were found by another quadrature, to their last digit."""
    soft = {0.1: (-0.0082, 0.0695), 0.5: (-0.0271, 0.0118), 1.0: (-0.0270, 0.0041), 2.0: (-0.0170, 0.00092)}
    hard = {0.1: (-0.0114, 0.349), 0.5: (-0.0413, 0.0654), 1.0: (-0.0482, 0.0279), 2.0: (-0.0398, 0.0100)}
    for temperature in TEMPERATURES:
        for table, is_hard in ((soft, False), (hard, True)):
            mean, variance, _ = exact_moments(temperature, hard=is_hard)
            np.testing.assert_allclose(mean - TRUE, table[temperature][0], atol=5.1e-5)
            np.testing.assert_allclose(variance, table[temperature][1], rtol=7e-3)


def bit_moments():
    """Each estimator, with the exact mean and variance of its estimate of d/dφ E (b - P0)²."""
    q, slope = 1 - P, 2.0
    derivative = slope / (4 * np.cosh(slope * PHI / 2) ** 2)
    mean_cost_slope = 2 * (P - P0)
    at = {b: 2 * (b - P0) * ((P + b) * (1 - (P + b) / 2) - 0.5 * P * q) for b in (0, 1)}
    soft, hard = exact_moments(1.0, hard=False), exact_moments(0.5, hard=True)
    return {
        "gumbel": (erg.estimators.GumbelSoftmax(1.0), soft[0], soft[1]),
        "gumbel-hard": (erg.estimators.GumbelSoftmax(0.5, straight_through=True), hard[0], hard[1]),
        "rao-blackwell": (erg.estimators.RaoBlackwellGumbel(0.5, 4), hard[0], hard[1] - 0.75 * hard[2]),
        "straight-through": (erg.estimators.StraightThrough(), P * q * mean_cost_slope, (P * q) ** 2 * 4 * P * q),
        "slope": (erg.estimators.StraightThrough(slope), derivative * mean_cost_slope, derivative**2 * 4 * P * q),
        "reinmax": (erg.estimators.ReinMax(), TRUE, P * q * (at[1] - at[0]) ** 2),
    }


def test_means_and_variances_on_one_bit():
    """Errors of 30% of the mean, and of 12% of the variance, would be seen; all but ReinMax are seen to be biased."""
    expected = bit_moments()
    cases = {name: estimator for name, (estimator, *_) in expected.items()}

    def one(key):
        def estimate(estimator):
            law = lambda phi: dist.Bernoulli(logits=phi)  # noqa: E731
            found = erg.estimators.expectation_gradient(key, jnp.array(PHI), law, lambda b: (b - P0) ** 2, estimator)
            return found.gradient

        return {name: estimate(estimator) for name, estimator in cases.items()}

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))
    for name, (estimator, mean, variance) in expected.items():
        replicates = np.asarray(found[name])[:, None]
        if name == "reinmax":  # its mean is a hundredth of its spread
            assert abs(z_scores(replicates, np.array([mean]))[0]) < 5
        else:
            assert_mean(replicates, np.array([mean]), smallest_error=0.3)
            assert not estimator.unbiased
            assert abs(z_scores(replicates, np.array([TRUE]))[0]) > REJECTION
        if name in ("straight-through", "slope", "reinmax"):  # the estimate takes two values
            values = np.unique(np.round(replicates, 12))
            assert len(values) == 2
            np.testing.assert_allclose(P * (1 - P) * (values[1] - values[0]) ** 2, variance, rtol=1e-9)
        else:
            assert_mean((replicates - mean) ** 2, np.array([variance]), smallest_error=0.12)
    ratio = np.var(found["rao-blackwell"]) / np.var(found["gumbel-hard"])
    assert ratio < 0.9


def test_straight_through_has_the_bias_of_its_closed_form():
    """pq(2p - 1), twenty times the derivative itself, for every p0."""
    _, mean, _ = bit_moments()["straight-through"]
    np.testing.assert_allclose(mean - TRUE, P * (1 - P) * (2 * P - 1), rtol=1e-12)
    assert abs(mean - TRUE) > 19 * abs(TRUE)


def enumerated(estimator, cost, logits):
    """Exact mean of an estimate, over all one-hot vectors."""

    def surrogate(logits, one_hot):
        return cost(estimator(jax.nn.log_softmax(logits), one_hot))

    def mean(logits):
        gradients = jax.vmap(jax.grad(surrogate), (None, 0))(logits, jnp.eye(len(logits)))
        return jax.nn.softmax(logits) @ gradients

    return jax.jit(mean)(logits)


def test_reinmax_is_exact_for_quadratic_costs_and_no_other():
    """By enumeration. For a cubic cost of a bit it is the trapezoidal rule; a mutant without its second term fails."""
    a, b, logits = jax.random.normal(jax.random.key(1), (4, 4)), jnp.arange(4.0), jnp.array([0.3, -0.8, 1.1, 0.2])

    def quadratic(x):
        return x @ a @ x + b @ x

    def exact(cost, logits):
        return jax.jit(jax.grad(lambda t: jax.nn.softmax(t) @ jax.vmap(cost)(jnp.eye(len(t)))))(logits)

    np.testing.assert_allclose(enumerated(reinmax, quadratic, logits), exact(quadratic, logits), atol=1e-13)

    def mutant(log_probs, one_hot):
        half = 0.5 * jax.nn.softmax(log_probs)
        return reinmax(log_probs, one_hot) + half - jax.lax.stop_gradient(half)

    for wrong in (mutant, straight_through, lambda p, d: reinmax(p, d, 2.0)):
        assert np.max(np.abs(enumerated(wrong, quadratic, logits) - exact(quadratic, logits))) > 0.05
    bit, pq = jnp.array([0.0, PHI]), P * (1 - P)
    cubic = lambda x: x[1] ** 3  # noqa: E731
    np.testing.assert_allclose(exact(cubic, bit)[1], pq, rtol=1e-12)
    np.testing.assert_allclose(enumerated(reinmax, cubic, bit)[1], pq * (0 + 3) / 2, rtol=1e-12)
    np.testing.assert_allclose(enumerated(straight_through, cubic, bit)[1], pq * P * 3, rtol=1e-12)


class WithoutEntropy(erg.estimators.ReinMax):
    """Mutant: the value moves, but not in the guide's own density."""

    entropy = "stop"


def test_reinmax_is_unbiased_in_a_program_with_one_hot_vectors():
    """The cost is quadratic in the vector. An error of 15% of the largest entry would be seen."""
    case, exact = one_hot_program()
    found = gradients(erg.estimators.ELBO(2, {"z": erg.estimators.ReinMax()}), case, 4_000)
    assert_mean(found, exact, smallest_error=0.15)
    wrong = gradients(erg.estimators.ELBO(2, {"z": WithoutEntropy()}), case, 4_000)
    assert np.max(np.abs(z_scores(wrong, exact))) > REJECTION


def test_relaxed_density_is_numpyros_for_bits_and_has_mass_one():
    temperature, y = 0.7, jnp.array([0.03, 0.4, 0.99])
    expected = dist.RelaxedBernoulliLogits(temperature, jnp.array(0.6)).log_prob(y)
    estimator = erg.estimators.GumbelSoftmax(temperature, density="relaxed")
    law = dist.Bernoulli(logits=jnp.array(0.6)).expand([3]).to_event(1).mask(True)
    np.testing.assert_allclose(estimator.log_prob(law, y), expected.sum(), rtol=1e-12)
    a = jnp.linspace(-60.0, 60.0, 481)
    log_y = jax.nn.log_softmax(jnp.stack([*jnp.meshgrid(a, a), jnp.zeros((481, 481))], axis=-1))
    density = log_relaxed_density(jnp.log(jnp.array([0.2, 0.5, 0.3])), jnp.exp(log_y), temperature)
    mass = jnp.sum(jnp.exp(density + jnp.sum(log_y, axis=-1))) * (a[1] - a[0]) ** 2
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)


@pytest.mark.slow
def test_with_the_relaxed_density_the_bound_is_that_of_the_relaxed_model():
    """Against quadrature over the logistic noise: bits of a plate in guide and model; an error of 15% would be seen."""
    temperature, prior, x = 0.8, 0.4, jnp.array([0.3, 1.2])

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(prior))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide():
        logits = numpyro.param("logits", jnp.zeros(2))
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=logits))

    params = {"logits": jnp.array([0.4, -0.7])}
    t, w = np.polynomial.legendre.leggauss(400)
    u = (t + 1) / 2
    noise = jnp.asarray(np.log(u) - np.log1p(-u))

    def exact(logits):
        y = jax.nn.sigmoid((logits[:, None] + noise) / temperature)
        law = dist.RelaxedBernoulliLogits
        log_p = law(temperature, jnp.log(prior / (1 - prior))).log_prob(y) + dist.Normal(y, 0.5).log_prob(x[:, None])
        return jnp.sum(jnp.asarray(w / 2) * (log_p - law(temperature, logits[:, None]).log_prob(y)))

    loss = erg.estimators.ELBO(2, {"z": erg.estimators.GumbelSoftmax(temperature, density="relaxed")})
    found = gradients(loss, Case("relaxed", model, guide, (), params), 4_000)
    assert_mean(found, np.asarray(jax.grad(exact)(params["logits"])), smallest_error=0.15)


def test_what_cannot_be_relaxed_is_refused():
    def plan(estimator, law, of_model=None):
        def program(law):
            return lambda: numpyro.sample("z", law)

        loss = erg.estimators.ELBO(2, {"z": estimator})
        loss.plan(program(of_model or law), program(law))
        return loss.loss(jax.random.key(0), {}, program(of_model or law), program(law))

    relaxed, error = erg.estimators.GumbelSoftmax(0.5), erg.estimators.SiteError
    with pytest.raises(
        error,
        match=r"'z' .*its value is an index.*Use numpyro.sample\('z', dist.Multinomial\(1, logits=….* z @ table is",
    ):
        plan(relaxed, dist.Categorical(jnp.array([0.4, 0.6])))
    with pytest.raises(error, match=r"'z' \(Poisson\): it is neither Bernoulli nor a one-hot"):
        plan(erg.estimators.StraightThrough(), dist.Poisson(1.0))
    with pytest.raises(error, match=r"'z' .*total_count is not the constant 1"):
        plan(erg.estimators.ReinMax(), dist.Multinomial(3, probs=jnp.array([0.4, 0.6])))
    with pytest.raises(error, match="no density under Poisson"):
        plan(relaxed, dist.Bernoulli(0.3), dist.Poisson(1.0))
    with pytest.raises(ValueError, match="density='relaxed' is the density of relaxed values"):
        erg.estimators.GumbelSoftmax(0.5, straight_through=True, density="relaxed")
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        erg.estimators.GumbelSoftmax(0.0)
    with pytest.raises(ValueError, match="temperature must be 1 or above"):
        erg.estimators.ReinMax(0.5)


def test_an_index_by_a_relaxed_value_is_an_error():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(jnp.array([0.0, 1.0])[z], 1.0), obs=0.5)

    loss = erg.estimators.ELBO(1, {"z": erg.estimators.StraightThrough()})
    with pytest.raises(TypeError, match=r"[Ii]nteger"):
        loss.loss(jax.random.key(0), {}, model, lambda: numpyro.sample("z", dist.Bernoulli(0.4)))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_extreme_noise_and_probabilities_stay_finite(dtype):
    """The smallest and the largest Gumbel variables that the generator can make, ties, and probabilities near 0 and 1."""
    info = jnp.finfo(dtype)
    ends = [-np.log(-np.log(float(info.tiny))), -np.log(float(info.epsneg)), 0.0, 0.0]
    gumbel = jnp.array(list(itertools.product(ends, repeat=3)), dtype)
    logits = jnp.array([[0.0, 0.0, 0.0], [80.0, -80.0, 0.0], [-0.5, 80.0, 79.0]], dtype)

    def relaxed(x, g):
        log_probs = jax.nn.log_softmax(x)
        one_hot, free, given = perturbed_two_ways(log_probs, g)
        noise = gumbels_given_argmax(g, jax.lax.stop_gradient(log_probs), one_hot)
        values = [gumbel_softmax(log_probs, noise, 0.5), jax.nn.softmax(free / 0.5), jax.nn.softmax(given / 0.5)]
        values += [reinmax(log_probs, one_hot), straight_through(log_probs, one_hot)]
        return jnp.stack([jnp.array([1.0, -2.0, 0.5], dtype) @ v for v in values])

    over = jax.vmap(jax.vmap(lambda x, g: (relaxed(x, g), jax.jacrev(relaxed)(x, g)), (None, 0)), (0, None))
    value, slope = jax.jit(over)(logits, gumbel)
    assert value.dtype == dtype
    assert bool(jnp.isfinite(value).all())
    assert bool(jnp.isfinite(slope).all())
