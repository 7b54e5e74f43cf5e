"""Implicit reparameterisation of mixtures: against quadrature, linear algebra, and NumPyro's silent failure."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO
from scipy.special import betainc

from ergodica.estimators import ELBO, IWELBO, Reparam, SiteError
from ergodica.estimators.variational.sites import implicit
from ergodica.estimators.variational.sites.implicit import LAWS, Components, implicit_value
from ergodica.estimators.variational.sites.incomplete_beta import parameter_derivatives
from tests.support.replicates import replicates
from tests.support.statistics import assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def same(family):
    """A mixture of two of a family: one logit, and the family's parameters by component."""
    return lambda t: dist.MixtureSameFamily(dist.Categorical(logits=jnp.stack([t["logit"], 0.0])), family(*t["of"]))


def general(*families, support=None):
    def make(t):
        laws = [family(*of) for family, of in zip(families, t["of"], strict=True)]
        return dist.MixtureGeneral(dist.Categorical(logits=jnp.stack([t["logit"], 0.0])), laws, support=support)

    return make


def log_normal_by_hand(loc, scale):
    return dist.TransformedDistribution(dist.Normal(loc, scale), dist.transforms.ExpTransform())


MIXTURES = {
    "Beta": (same(dist.Beta), [[0.8, 3.0], [5.5, 4.0]]),
    "Cauchy": (same(dist.Cauchy), [[-0.5, 1.2], [0.6, 0.9]]),
    "Chi2": (same(dist.Chi2), [[3.0, 5.0]]),
    "Exponential": (same(dist.Exponential), [[0.7, 2.0]]),
    "Gamma": (same(dist.Gamma), [[0.8, 3.0], [1.2, 2.0]]),
    "Gumbel": (same(dist.Gumbel), [[-0.5, 1.0], [0.7, 0.9]]),
    "HalfCauchy": (same(dist.HalfCauchy), [[0.7, 1.5]]),
    "HalfNormal": (same(dist.HalfNormal), [[0.6, 1.7]]),
    "InverseGamma": (same(dist.InverseGamma), [[2.0, 3.0], [1.5, 4.0]]),
    "Laplace": (same(dist.Laplace), [[0.0, 1.0], [0.8, 0.6]]),
    "LogNormal": (same(log_normal_by_hand), [[-0.3, 0.6], [0.5, 0.7]]),
    "Logistic": (same(dist.Logistic), [[-0.5, 0.9], [0.5, 0.8]]),
    "Normal": (same(dist.Normal), [[-1.0, 1.2], [0.6, 0.8]]),
    "StudentT": (same(dist.StudentT), [[3.0, 8.0], [-0.7, 0.9], [0.8, 0.6]]),
    "Weibull": (same(dist.Weibull), [[0.9, 1.8], [1.4, 2.2]]),
    "Normal and Student's t": (general(dist.Normal, dist.StudentT), [[-0.8, 0.7], [4.0, 0.9, 0.6]]),
    "positive, two families": (general(dist.Gamma, dist.LogNormal), [[2.5, 1.5], [0.2, 0.5]]),
    "a half line and a line": (
        general(dist.HalfNormal, dist.Normal, support=dist.constraints.real),
        [[0.8], [-0.4, 0.9]],
    ),
}


def theta(name):
    return {"logit": jnp.array(0.4), "of": [jnp.array(p) for p in MIXTURES[name][1]]}


def f(z):
    return jnp.exp(-(z**2) / 8) * jnp.sin(1.7 * z + 0.3)


def grid(law):
    """Gauss–Legendre in pieces that end at 0 and at ±1, where densities have kinks and poles."""
    t, w = np.polynomial.legendre.leggauss(300)
    t, w = (t + 1) / 2, w / 2
    x, w = np.concatenate([t**6, 1 + 30 * t**2]), np.concatenate([6 * t**5 * w, 60 * t * w])
    x, w = np.concatenate([-x[::-1], x]), np.concatenate([w[::-1], w])
    with jax.ensure_compile_time_eval():
        inside = np.asarray(law.support(jnp.asarray(x)))
    return jnp.asarray(x[inside]), jnp.asarray(w[inside])


def derivatives(make, theta, implicit_value=implicit_value):
    """By the density's derivative, and along the draws' implicit ones: both by quadrature."""
    x, w = grid(make(theta))
    mass = w * jnp.exp(make(theta).log_prob(x))
    by_density = jax.grad(lambda t: jnp.sum(w * jnp.exp(make(t).log_prob(x)) * f(x)))
    by_value = jax.grad(lambda t: jnp.sum(mass * f(implicit_value(make(t), x))))
    return by_density(theta), by_value(theta)


def missing_density(fn, value):
    """Mutant: the distribution function's derivative alone."""
    moved = implicit_value(fn, value)
    density = jax.lax.stop_gradient(jnp.exp(fn.log_prob(value)))
    return value + (moved - jax.lax.stop_gradient(moved)) * density


def nearest_component(fn, value):
    """Mutant: a draw moves with the component that most likely made it."""
    at = implicit.components(fn, value)
    best = jnp.argmax(at.log_density, axis=-1, keepdims=True)
    one = Components(*(jnp.take_along_axis(x, best, axis=-1)[..., None] for x in at))
    return implicit.mixture_value(jnp.zeros((*value.shape, 1)), one, value[..., None])[..., 0]


def relative_error(pair):
    exact, found = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(side)]) for side in pair)
    return np.max(np.abs(found - exact)) / np.max(np.abs(exact))


FAST = ["Laplace", "LogNormal", "Normal", "a half line and a line"]
OTHERS = [name for name in MIXTURES if name not in FAST]
"""Among them incomplete beta and gamma functions, which take a minute to compile."""


@pytest.mark.parametrize("names", [FAST, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["fast", "others"])
def test_every_law_has_the_derivative_of_its_mean(names):
    """By the weights and by all parameters of all components, to nine digits of the largest."""
    run = jax.jit(lambda thetas: {name: derivatives(MIXTURES[name][0], t) for name, t in thetas.items()})
    found = run({name: theta(name) for name in names})
    errors = {name: relative_error(pair) for name, pair in found.items()}
    assert max(errors.values()) < 1e-9, errors


def test_every_law_is_tested():
    laws = {type(law).__name__ for name, (make, _) in MIXTURES.items() for law in implicit._laws(make(theta(name)))}
    assert set(LAWS) <= laws


@pytest.mark.parametrize("mutant", [missing_density, nearest_component])
def test_mutants_are_off_in_the_first_two_digits(mutant):
    pair = jax.jit(lambda t: derivatives(MIXTURES["Normal"][0], t, mutant))(theta("Normal"))
    assert relative_error(pair) > 0.05


def test_incomplete_beta_function_by_its_parameters():
    """Against extrapolated differences of SciPy's values."""
    points = np.array([[1.7, 2.0, 0.3], [1.7, 2.0, 0.8], [0.05, 0.05, 1e-8], [30.0, 200.0, 0.12], [2.5, 0.5, 0.999]]).T

    def slope(value, at):
        first, second = ((value(at * (1 + h)) - value(at * (1 - h))) / (2 * at * h) for h in (1e-3, 5e-4))
        return (4 * second - first) / 3

    a, b, x = points
    expected = slope(lambda t: betainc(t, b, x), a), slope(lambda t: betainc(a, t, x), b)
    found = jax.jit(parameter_derivatives)(*map(jnp.asarray, (a, b, x, 1 - x)))
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-7)
    single = jax.jit(parameter_derivatives)(*(jnp.asarray(v, jnp.float32) for v in (a, b, x, 1 - x)))
    np.testing.assert_allclose(np.stack(single), np.stack(expected), rtol=3e-5)


# --- vectors -----------------------------------------------------------------------------------------------------------


def vectors(t):
    """Three components of 2 × 2 elements, independent given the component."""
    law = dist.Normal(t["loc"], jnp.exp(t["log_scale"])).to_event(2)
    return dist.MixtureSameFamily(dist.Categorical(logits=t["logits"]), law)


def of_vectors():
    key = jax.random.key(3)
    shapes = {"logits": (3,), "loc": (3, 2, 2), "log_scale": (3, 2, 2)}
    keys = jax.random.split(key, 3)
    return {n: 0.7 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def transform(t, z):
    """Rosenblatt's transform of `vectors`, by hand."""
    loc, scale = t["loc"].reshape(3, 4), jnp.exp(t["log_scale"]).reshape(3, 4)
    log_q = jax.scipy.stats.norm.logpdf(z, loc, scale)
    before = jnp.concatenate([jnp.zeros((3, 1)), jnp.cumsum(log_q, axis=1)[:, :-1]], axis=1)
    weights = jax.nn.softmax(t["logits"][:, None] + before, axis=0)
    return jnp.sum(weights * jax.scipy.stats.norm.cdf(z, loc, scale), axis=0)


class WithoutHistory:
    """Mutant: weights given the elements before, as if those did not move."""

    def __enter__(self):
        self.kept = implicit.components

        def held(mixture, value):
            return self.kept(mixture, value)._replace(slope=jnp.zeros_like(self.kept(mixture, value).slope))

        implicit.components = held

    def __exit__(self, *_):
        implicit.components = self.kept


def test_vectors_keep_their_distributional_transform():
    """Against a solve with the transform's Jacobian, to rounding, for a batch of draws."""
    t = of_vectors()
    draws = vectors(t).sample(jax.random.key(4), (5,))

    def solved(z):
        by_z, by_t = jax.jacobian(transform, 1)(t, z), jax.jacobian(transform)(t, z)
        return jax.tree.map(lambda x: -jnp.linalg.solve(by_z, x.reshape(4, -1)).reshape(x.shape), by_t)

    def found(t):
        return implicit_value(vectors(t).expand([5]), draws).reshape(5, 4)

    @jax.jit
    def errors(t):
        expected, right = jax.vmap(solved)(draws.reshape(5, 4)), jax.jacobian(found)(t)
        with WithoutHistory():
            wrong = jax.jacobian(found)(t)
        return [
            jnp.max(jnp.stack([jnp.max(jnp.abs(x - expected[n])) for n, x in jacobian.items()]))
            for jacobian in (right, wrong)
        ]

    right, wrong = errors(t)
    assert right < 1e-11
    assert wrong > 0.1
    np.testing.assert_array_equal(found(t), draws.reshape(5, 4))


# --- programs ----------------------------------------------------------------------------------------------------------


def guide_law(t):
    return dist.MixtureSameFamily(
        dist.Categorical(logits=jnp.stack([t, 0.0])), dist.Normal(jnp.array([-1.0, 1.5]), 0.8)
    )


def model():
    numpyro.sample("w", dist.Normal(0.4, 1.0))


def guide():
    numpyro.sample("w", guide_law(numpyro.param("t", jnp.array(0.3))))


def exact_of_one_logit(num_particles=1):
    """Derivative of the bound by the logit, by quadrature over one draw or over pairs."""
    nodes, weights = np.polynomial.legendre.leggauss(160)
    z, mass = 1.0 * nodes * 7, 7 * weights

    def bound(t):
        q = jnp.exp(guide_law(t).log_prob(z)) * mass
        log_w = dist.Normal(0.4, 1.0).log_prob(z) - guide_law(t).log_prob(z)
        if num_particles == 1:
            return jnp.sum(q * log_w)
        return jnp.sum(q[:, None] * q * (jnp.logaddexp(log_w[:, None], log_w) - jnp.log(2.0)))

    return float(jax.grad(bound)(jnp.array(0.3)))


def repeats(loss, num_repeats=20_000):
    return replicates(loss, {"t": jnp.array(0.3)}, model, guide, num_repeats=num_repeats)


def test_numpyros_gradient_at_a_mixture_is_wrong_and_ours_is_right():
    """`Trace_ELBO` says nothing and is near zero; ours by rule. Sees an error of 20% of the derivative."""
    exact = np.array([exact_of_one_logit()])
    assert_mean(repeats(ELBO(2)), exact, smallest_error=0.2)
    assert np.max(np.abs(z_scores(repeats(Trace_ELBO(2)), exact))) > 50


@pytest.mark.slow
def test_bounds_with_and_without_sticking_the_landing():
    """The ELBO and two particles of IWELBO. Sees an error of 45%."""
    for loss in (ELBO(2, {"w": Reparam(stl=True)}), IWELBO(2), IWELBO(2, {"w": Reparam(stl=True)})):
        exact = np.array([exact_of_one_logit(1 if loss.linear else 2)])
        assert_mean(repeats(loss, 80_000), exact, smallest_error=0.45)


def test_plates_vectors_and_strangers():
    """Shapes inside plates, with reinterpreted dimensions; laws without a distribution function are told of."""

    def model():
        with numpyro.plate("rows", 3):
            numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))

    def guide(component=lambda loc: dist.Normal(loc, 1.0).to_event(1)):
        loc = numpyro.param("loc", jnp.arange(4.0).reshape(2, 2))
        mixture = dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.3, 0.7])), component(loc))
        with numpyro.plate("rows", 3):
            numpyro.sample("w", mixture.expand([4]).to_event(1))

    row = ELBO(1).plan(model, guide).rows[0]
    assert (row.estimator, row.unbiased, row.runs) == ("Reparam()", True, 1)
    assert "implicitly" in row.why
    gradient = jax.jit(jax.grad(lambda p: ELBO(1).loss(jax.random.key(0), p, model, guide)))
    assert gradient({"loc": jnp.arange(4.0).reshape(2, 2)})["loc"].shape == (2, 2)

    def correlated():
        guide(lambda loc: dist.MultivariateNormal(loc, jnp.eye(2)))

    with pytest.raises(
        SiteError, match=r"at site 'w' \(MixtureSameFamily.*not all of single, independent elements with"
    ):
        ELBO(2, {"w": Reparam()}).plan(model, correlated)
    assert ELBO(2).plan(model, correlated).rows[0].estimator == "LeaveOneOut()"


@pytest.mark.slow
def test_single_precision_and_the_ends_of_the_support():
    """A beta draw that was rounded to 1 does not move, and nothing is infinite; other derivatives are those of double precision."""

    def derivative(t, z):
        law = dist.MixtureSameFamily(dist.Categorical(logits=t["of"][0]), dist.Beta(t["of"][1], t["of"][2]))
        return implicit_value(law, z)

    of = {"of": [jnp.array([0.3, -0.2]), jnp.array([0.3, 2.0]), jnp.array([0.4, 3.0])]}
    z = jnp.array([1e-6, 0.02, 0.6, 0.999, 1.0])

    @jax.jit
    def jacobian(t, z):
        return jax.tree.leaves(jax.vmap(jax.jacrev(derivative), (None, 0))(t, z))

    single = jacobian(*jax.tree.map(lambda x: x.astype(jnp.float32), (of, z)))
    for x, y in zip(single, jacobian(of, z), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x[:-1], y[:-1], rtol=2e-3)
        np.testing.assert_array_equal(x[-1], 0)
