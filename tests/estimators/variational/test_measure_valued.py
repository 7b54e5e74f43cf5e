"""Measure-valued derivatives: every law against quadrature or enumeration, variances in closed form, and programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import dawsn

import ergodica as erg
from ergodica.estimators.variational.facts import Draw
from ergodica.estimators.variational.sites import weak_derivatives
from ergodica.estimators.variational.sites.weak_derivatives import LAWS, Probe
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

FAMILIES = {
    "BernoulliProbs": (lambda t: dist.Bernoulli(probs=t), 0.3),
    "BernoulliLogits": (lambda t: dist.Bernoulli(logits=t), -0.7),
    "BinomialProbs": (lambda t: dist.Binomial(5, probs=t), 0.35),
    "BinomialLogits": (lambda t: dist.Binomial(3, logits=t), 0.4),
    "CategoricalProbs": (lambda t: dist.Categorical(probs=t / t.sum()), [0.2, 0.5, 0.3]),
    "CategoricalLogits": (lambda t: dist.Categorical(logits=t), [0.1, -0.4, 0.6, 0.2]),
    "Exponential": (dist.Exponential, 1.3),
    "Gamma": (lambda t: dist.Gamma(t[0], t[1]), [1.7, 1.2]),
    "GeometricProbs": (lambda t: dist.Geometric(probs=t), 0.4),
    "GeometricLogits": (lambda t: dist.Geometric(logits=t), -0.2),
    "LogNormal": (lambda t: dist.LogNormal(t[0], t[1]), [-0.2, 0.6]),
    "Normal": (lambda t: dist.Normal(t[0], t[1]), [0.4, 0.9]),
    "Poisson": (dist.Poisson, 1.8),
    "Weibull": (lambda t: dist.Weibull(t[0], t[1]), [1.2, 1.6]),
}
NUM_DRAWS = 20_000


def cost(x):
    """Neither smooth nor continuous, with the jump at 1."""
    x = x * 1.0
    return jnp.cos(1.3 * x) + jnp.where(x > 1, 0.6, 0.0) - 0.3 * x


def grid(law):
    """Nodes and weights: the values of a discrete law, or Gauss–Legendre on both sides of the jump."""
    if law.support.is_discrete:
        x = jnp.arange(80) if law.support is dist.constraints.nonnegative_integer else law.enumerate_support()
        return x, jnp.ones(len(x))
    t, w = np.polynomial.legendre.leggauss(400)
    t, w = (t + 1) / 2, w / 2
    x = np.concatenate([t**4, 1 + 30 * t**2])
    w = np.concatenate([4 * t**3 * w, 60 * t * w])
    return (jnp.asarray(np.concatenate([-x[::-1], x])), jnp.asarray(np.concatenate([w[::-1], w])))


def exact(make, theta):
    x, w = grid(make(theta))

    def mean(theta):
        law = make(theta)
        inside = law.support(x)
        log_prob = jnp.where(inside, law.log_prob(jnp.where(inside, x, law.support.feasible_like(x))), -jnp.inf)
        return jnp.sum(w * jnp.exp(log_prob) * cost(x))

    return jax.grad(mean)(theta)


def one_estimate(probes, make, theta, key):
    """The estimate at one draw, straight from the functions."""
    key_draw, key_probe = jax.random.split(key)

    def surrogate(theta):
        law = make(theta)
        x = jax.lax.stop_gradient(law.sample(key_draw))
        found = probes(key_probe, law, x)
        return sum(jax.lax.stop_gradient(cost(p.value) - cost(x)) * p.coefficient for p in found)

    return jax.grad(surrogate)(theta)


def missing_weight(key, fn, x):
    """Mutant: jumps of the gamma process without their weight."""
    first, second = weak_derivatives.gamma(key, fn, x)
    return [first, Probe(second.value, 1.0 * fn.concentration)]


def gaussian_for_rayleigh(key, fn, x):
    """Mutant: probes of the mean at standard normal distances."""
    first, second, third = weak_derivatives.normal(key, fn, x)
    n = jnp.abs(jax.random.normal(key, x.shape))
    return [first._replace(value=fn.loc + fn.scale * n), second._replace(value=fn.loc - fn.scale * n), third]


@pytest.mark.sweep
def test_every_law_has_the_derivative_of_its_mean():
    """Against enumeration or quadrature; an error of 15% of the largest derivative would be seen."""
    assert set(FAMILIES) == set(LAWS)
    thetas = {name: jnp.asarray(theta) for name, (_, theta) in FAMILIES.items()}
    mutants = {"Gamma": missing_weight, "Normal": gaussian_for_rayleigh}

    @jax.jit
    def run(keys):
        make = {name: family[0] for name, family in FAMILIES.items()}
        over = {
            name: jax.vmap(lambda k, n=name: one_estimate(LAWS[n].probes, make[n], thetas[n], k))(keys) for name in make
        }
        wrong = {
            name: jax.vmap(lambda k, n=name: one_estimate(mutants[n], make[n], thetas[n], k))(keys) for name in mutants
        }
        return over, wrong, {name: exact(make[name], thetas[name]) for name in make}

    right, wrong, derivative = run(jax.random.split(jax.random.key(0), NUM_DRAWS))
    for name in FAMILIES:
        replicates, expected = np.asarray(right[name]), np.asarray(derivative[name])
        if name.startswith(("Bernoulli", "Categorical")):  # no noise
            np.testing.assert_allclose(replicates, np.broadcast_to(expected, replicates.shape), atol=1e-12)
        else:
            assert_mean(replicates, expected, smallest_error=0.15)
    for name in mutants:
        assert np.max(np.abs(z_scores(wrong[name], np.asarray(derivative[name])))) > REJECTION


def test_variances_under_a_normal_law_are_those_in_closed_form():
    """Quadratic cost: d²(16/π − 4) and 4d² + 4σ². Cosine: Dawson's function. Errors of 7% would be seen."""
    law = lambda t: dist.Normal(t[0], t[1])  # noqa: E731
    points = jnp.array([[1.0, 0.5], [-2.0, 1.0], [1.0, 1.5]])
    k = 0.8

    def one(key, theta):
        quadratic = erg.estimators.expectation_gradient(key, theta, law, lambda x: x**2, erg.estimators.MeasureValued())
        cosine = erg.estimators.expectation_gradient(
            key, theta, law, lambda x: jnp.cos(k * x), erg.estimators.MeasureValued()
        )
        return quadratic.gradient, cosine.gradient

    keys = jax.random.split(jax.random.key(1), 40_000)
    quadratic, cosine = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(keys, points)
    for i, (d, s) in enumerate(np.asarray(points)):
        mean = np.array([2 * d, 2 * s])
        variance = np.array([d**2 * (16 / np.pi - 4), 4 * d**2 + 4 * s**2])
        assert_mean(np.asarray(quadratic[i]), mean, smallest_error=0.1)
        assert_mean((np.asarray(quadratic[i]) - mean) ** 2, variance, smallest_error=0.1)
        a, sine = (k * s) ** 2, np.sin(k * d)
        slope = -k * sine * np.exp(-a / 2)
        variance = sine**2 * (2 * np.sqrt(2) * k / (np.pi * s) * dawsn(np.sqrt(2) * k * s) - k**2 * np.exp(-a))
        assert_mean((np.asarray(cosine[i, :, 0]) - slope) ** 2, variance, smallest_error=0.1)
    np.testing.assert_allclose(variance, 0.01422090656, rtol=1e-9)


class AllAtOnce(erg.estimators.AbstractSiteEstimator):
    """Mutant: a probe replaces all joint elements."""

    right: erg.estimators.MeasureValued = erg.estimators.MeasureValued()

    def num_branches(self, site):
        return self.right.num_branches(site)

    def draw(self, key, fn, branch, site, noise):
        value, record = self.right.draw(key, fn, 0, site, noise)
        return Draw(jnp.where(branch > 0, 1 - value, value), record)

    def surrogate(self, site, downstream):
        return self.right.surrogate(site, downstream)


@pytest.mark.parametrize(
    ("name", "objective", "sites"),
    [
        ("discrete", erg.estimators.ELBO, ("z", "c", "b")),
        pytest.param("nested", erg.estimators.ELBO, ("r", "e"), marks=pytest.mark.slow),
        pytest.param("mixed-chain", erg.estimators.ELBO, ("w", "c"), marks=pytest.mark.slow),
        pytest.param("discrete", erg.estimators.IWELBO, ("z", "b"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.sweep
def test_programs_with_joint_and_nested_elements(name, objective, sites):
    """Against enumeration times quadrature; an error of 20% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.MeasureValued() for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    found = gradients(loss, case, 4_000)
    assert_mean(found, exact_gradient(CASES[name], make_exact), smallest_error=0.2)


@pytest.mark.slow
def test_probes_that_replace_all_joint_elements_are_seen():
    case = CASES["discrete"]()
    wrong = gradients(erg.estimators.ELBO(2, {"b": AllAtOnce()}), case, 4_000)
    assert np.max(np.abs(z_scores(wrong, exact_gradient(CASES["discrete"], exact_elbo)))) > REJECTION


def test_runs_grow_linearly_with_joint_elements():
    case = CASES["discrete"]()
    plan = erg.estimators.ELBO(1, {"b": erg.estimators.MeasureValued(), "*": erg.estimators.Score()}).plan(
        case.model, case.guide, *case.args
    )
    assert {row.site: row.runs for row in plan.rows} == {"z": 1, "c": 1, "b": 1 + 2}


def test_refuses_laws_that_it_does_not_know_and_plates_under_a_bound():
    def circle():
        numpyro.sample("angle", dist.VonMises(0.0, 1.0))

    with pytest.raises(
        erg.estimators.SiteError, match=r"'angle' .*weak derivative is not known .*those of Bernoulli, "
    ):
        erg.estimators.ELBO(2, {"angle": erg.estimators.MeasureValued()}).plan(circle, circle)
    case = CASES["plated"]()
    loss = erg.estimators.IWELBO(2, {"c": erg.estimators.MeasureValued()})
    with pytest.raises(erg.estimators.SiteError, match=r"'c' .*is no sum over the elements of plate data"):
        loss.plan(case.model, case.guide, *case.args)


def test_a_derivative_of_the_exponential_tilt_has_mass_one():
    """The weights' mean is the mass of (E - 1) log E exp(-E)."""
    _, weight = weak_derivatives.tilted_exponential(jax.random.key(2), (100_000,), jnp.dtype(float))
    assert_mean(np.asarray(weight)[:, None], np.ones(1), smallest_error=0.02)
