"""Enumeration times quadrature against closed forms, brute force and errors that are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from scipy.special import logsumexp
from scipy.stats import norm

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators import ELBO, IWELBO, ExactGradient, LeaveOneOut, VariationalGradient
from ergodica.estimators.variational import lanes
from ergodica.estimators.variational.exact.bounds import Bound, evaluate_on_grid
from ergodica.estimators.variational.exact.gradient import bound_of
from ergodica.estimators.variational.exact.grid import GridError, make_grid
from tests.support.exact_programs import CASES, exact_iwelbo, on_grid
from tests.support.replicates import exact_gradient
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def param(name, value):
    return numpyro.param(name, jnp.asarray(value, jnp.result_type(float)))


def program_of(prior, guide_law, **params):
    """A model without data and a guide of one site: minus the ELBO is the divergence of the guide from the prior."""

    def model():
        numpyro.sample("w", prior)

    def guide():
        numpyro.sample("w", guide_law(**{name: param(name, value) for name, value in params.items()}))

    return model, guide, {name: jnp.asarray(value) for name, value in params.items()}


PAIRS = {
    "normal": (dist.Normal(0.3, 1.2), lambda a, b: dist.Normal(a, jnp.exp(b))),
    "log-normal": (dist.LogNormal(0.3, 1.2), lambda a, b: dist.LogNormal(a, jnp.exp(b))),
    "gamma": (dist.Gamma(2.0, 1.5), lambda a, b: dist.Gamma(jnp.exp(a), jnp.exp(b))),
    "beta": (dist.Beta(2.0, 1.5), lambda a, b: dist.Beta(jnp.exp(a), jnp.exp(b))),
    "far": (dist.Normal(3000.0, 0.02), lambda a, b: dist.Normal(3000.0 + 0.01 * a, 0.02 * jnp.exp(b)).mask(True)),
}


def divergence(name, a, b):
    """By NumPyro's closed forms; a log-normal's is that of the normals."""
    prior, law = PAIRS["normal" if name == "log-normal" else name]
    if name == "far":
        return dist.kl_divergence(dist.Normal(3000.0 + 0.01 * a, 0.02 * jnp.exp(b)), prior)
    return dist.kl_divergence(law(a, b), prior)


@pytest.mark.parametrize(
    "name",
    [
        "normal",
        pytest.param("log-normal", marks=pytest.mark.sweep),
        pytest.param("gamma", marks=pytest.mark.sweep),
        pytest.param("beta", marks=pytest.mark.sweep),
        "far",
    ],
)
def test_divergences_of_laws_of_a_number(name):
    prior, law = PAIRS[name]
    model, guide, params = program_of(prior, law, a=0.4, b=-0.3)
    reference = VariationalGradient(ELBO(), model, guide).reference(params)
    exact = jax.grad(lambda p: -divergence(name, p["a"], p["b"]))(params)
    for key in params:
        np.testing.assert_allclose(reference.gradient[key], exact[key], rtol=1e-6, atol=1e-8)
        assert abs(reference.gradient[key] - exact[key]) <= reference.error[key] + 1e-9


def test_mixtures_have_the_nodes_of_their_components():
    """Narrow components far apart; the divergence from a wide normal by a fine sum."""

    def law(a):
        return dist.MixtureSameFamily(
            dist.Categorical(logits=jnp.stack([a, 0.0 * a])),
            dist.Normal(jnp.array([-2.0, 1.0]), jnp.array([0.01, 0.7])),
        )

    model, guide, params = program_of(dist.Normal(0.0, 1.0), law, a=0.5)
    x = np.concatenate(
        [np.linspace(-2.1, -1.9, 4001), np.linspace(-1.8999, 8.0, 40001), np.linspace(-8.0, -2.1001, 9001)]
    )
    x = np.sort(x)
    share = 1 / (1 + np.exp(-0.5))
    parts = np.stack([norm.pdf(x, -2.0, 0.01), norm.pdf(x, 1.0, 0.7)])
    cost = norm.logpdf(x) - np.log(share * parts[0] + (1 - share) * parts[1])
    exact = share * (1 - share) * np.trapezoid((parts[0] - parts[1]) * cost, x)
    reference = VariationalGradient(TraceGraph_ELBO(), model, guide).reference(params)
    np.testing.assert_allclose(reference.gradient["a"], exact, rtol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["discrete", "mixed-chain"])
def test_bounds_of_two_particles_are_sums_over_pairs(name):
    """The integral over t against brute force; the mutant has one particle too many."""
    case = CASES[name]()
    gradient = VariationalGradient(IWELBO(2), case.model, case.guide, *case.args)
    brute = exact_gradient(CASES[name], exact_iwelbo)
    found = gradient.reference(case.params)
    np.testing.assert_allclose(tree.ravel(found.gradient), brute, atol=1e-5)
    assert np.all(np.abs(tree.ravel(found.gradient) - brute) < tree.ravel(found.error) + 1e-9)
    value = ExactGradient(gradient, 24).estimate(jax.random.key(0), case.params, ())[0].value
    np.testing.assert_allclose(value, exact_iwelbo(case, case.params), atol=1e-6)
    wrong = evaluate_on_grid(
        gradient.program, make_grid(gradient.program, case.params, 24), Bound(1.0, 3), case.params, gradient.constrain
    )
    assert np.max(np.abs(tree.ravel(wrong.gradient) - brute)) > 100 * float(jnp.max(tree.ravel(found.error)) + 1e-5)


@pytest.mark.sweep
def test_renyi_bound_of_three_particles_is_a_sum_over_triples():
    case, alpha = CASES["discrete"](), -0.6
    loss = RenyiELBO(alpha, 3)
    assert bound_of(VariationalGradient(loss, case.model, case.guide).loss) == Bound(1.6, 3)

    def brute(params):
        log_q, log_w = on_grid(case, params)
        i = np.array(list(itertools.product(range(log_q.shape[0]), repeat=3)))
        bound = (jax.nn.logsumexp(1.6 * log_w[i], axis=1) - np.log(3)) / 1.6
        return jnp.sum(jnp.exp(log_q[i].sum(1)) * bound)

    estimate, _ = ExactGradient(VariationalGradient(loss, case.model, case.guide, *case.args)).estimate(
        jax.random.key(0), case.params, ()
    )
    value, gradient = jax.value_and_grad(brute)(case.params)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-10)
    np.testing.assert_allclose(tree.ravel(estimate.gradient), tree.ravel(gradient), atol=1e-10)


def test_bounds_are_apart_along_plates_that_enclose_everything():
    """Two bits in a plate, K = 2: the sum of two bounds, each over four pairs; scaled terms too."""

    def model():
        with numpyro.plate("data", 2), numpyro.handlers.scale(scale=0.5):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(1.0 * z, 0.7), obs=jnp.array([0.2, 1.1]))

    def guide():
        with numpyro.plate("data", 2), numpyro.handlers.scale(scale=0.5):
            numpyro.sample("z", dist.Bernoulli(logits=param("logit", [0.2, -0.4])))

    gradient = VariationalGradient(IWELBO(2), model, guide)
    exact = ExactGradient(gradient).estimate(jax.random.key(0), {"logit": jnp.array([0.2, -0.4])}, ())[0]
    total = 0.0
    for x, logit in ((0.2, 0.2), (1.1, -0.4)):
        q = 1 / (1 + np.exp(-logit))
        log_q = np.log([1 - q, q])
        log_w = 0.5 * (np.log([0.7, 0.3]) + norm.logpdf(x, [0.0, 1.0], 0.7) - log_q)
        for i, j in itertools.product(range(2), repeat=2):
            total += np.exp(log_q[i] + log_q[j]) * (logsumexp(log_w[[i, j]]) - np.log(2))
    np.testing.assert_allclose(exact.value, total, rtol=1e-10)
    mutant = ExactGradient(VariationalGradient(IWELBO(3), model, guide))
    assert abs(mutant.estimate(jax.random.key(0), {"logit": jnp.array([0.2, -0.4])}, ())[0].value - total) > 0.01


def test_the_stated_error_holds_where_quadrature_converges_slowly():
    """A kink: the mean of |w| of a normal has the derivative 2 Φ(μ/σ) - 1 by its mean."""

    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.factor("kink", 3.0 * jnp.abs(w))

    def guide():
        numpyro.sample("w", dist.Normal(param("loc", 0.1), 1.0))

    reference = VariationalGradient(Trace_ELBO(), model, guide).reference({"loc": jnp.array(0.1)})
    exact = -0.1 + 3 * (2 * norm.cdf(0.1) - 1)
    assert 1e-5 < abs(reference.gradient["loc"] - exact) < reference.error["loc"]


def test_what_the_estimators_do_at_the_sites_does_not_matter():
    """A biased relaxation is held against the ELBO itself; constrained parameters are differentiated as the optimiser sees them."""

    def model():
        numpyro.sample("z", dist.Bernoulli(0.2))

    def guide():
        p = numpyro.param("p", jnp.array(0.4), constraint=dist.constraints.unit_interval)
        numpyro.sample("z", dist.Bernoulli(p))

    gradient = VariationalGradient(ELBO(1, {"z": erg.estimators.StraightThrough()}), model, guide)
    position = gradient.start(jax.random.key(0))
    found = gradient.reference(position).gradient["p"]
    np.testing.assert_allclose(found, 0.4 * 0.6 * (np.log(0.2 / 0.8) - np.log(0.4 / 0.6)), rtol=1e-10)


def plated_guide(size, law):
    def program():
        with numpyro.plate("data", 8, subsample_size=size):
            numpyro.sample("w", law())

    return program


def scanned():
    scan(lambda carry, _: (numpyro.sample("w", dist.Bernoulli(0.5)), None), jnp.array(0), jnp.arange(3))


def four():
    numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))


REFUSED = {
    "subsampled": (plated_guide(4, lambda: dist.Bernoulli(0.5)), "plate is subsampled"),
    "seventeen bits": (
        lambda: numpyro.sample("w", dist.Bernoulli(0.5).expand([17]).to_event(1)),
        "131,072 joint values",
    ),
    "four normals": (four, "4 dimensions, and 3 are the most"),
    "scan": (scanned, "inside a scan"),
    "Poisson": (lambda: numpyro.sample("w", dist.Poisson(2.0)), "cannot be listed"),
    "Dirichlet": (lambda: numpyro.sample("w", dist.Dirichlet(jnp.ones(3))), "no quadrature for it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    program, message = REFUSED[name]
    gradient = VariationalGradient(TraceGraph_ELBO(), program, program)
    with pytest.raises(GridError, match=message):
        ExactGradient(gradient).estimate(jax.random.key(0), {}, ())
    assert gradient.reference({}) is None


def test_errors():
    class Own:
        def loss(self, key, params, model, guide):
            return jnp.zeros(())

    gradient = VariationalGradient(Own(), four, four)
    assert gradient.reference({}) is None
    with pytest.raises(TypeError, match="objective of Own is not one that is known"):
        ExactGradient(gradient)
    with pytest.raises(TypeError, match="gradient must be an VariationalGradient"):
        ExactGradient(ELBO())
    with pytest.raises(TypeError, match="loss must be one of ergodica's"):
        VariationalGradient(3, four, four)
    with pytest.raises(TypeError, match="does not say what it does"):
        gradient.loss.explain(four, four)


def test_supports_that_parameters_move():
    """Nodes move with the end of the support: the ELBO of a uniform guide on (0, t) is log t - log 5 plus t / 2."""

    def model():
        w = numpyro.sample("w", dist.Uniform(0.0, 5.0))
        numpyro.factor("f", w)

    def guide():
        numpyro.sample("w", dist.Uniform(0.0, param("t", 2.0)))

    exact = ExactGradient(VariationalGradient(ELBO(), model, guide)).estimate(
        jax.random.key(0), {"t": jnp.array(2.0)}, ()
    )[0]
    np.testing.assert_allclose(exact.value, np.log(2.0 / 5.0) + 1.0, rtol=1e-8)
    np.testing.assert_allclose(exact.gradient["t"], 0.5 + 0.5, rtol=1e-8)


def test_a_dependence_that_leaves_a_plate_and_comes_back(monkeypatch):
    """Elements of a plate meet in a sum that all data depend on: each has the cost of all data. Smallest error seen: 0.5."""
    x = jnp.array([1.5, -0.5])

    def model():
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(0.5))
        y = numpyro.sample("y", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 2):
            numpyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def guide():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=param("logits", [0.3, -0.4])))
        numpyro.sample("y", dist.Normal(jnp.sum(z) - 0.5, 0.7))

    gradient = VariationalGradient(ELBO(4, {"z": LeaveOneOut()}), model, guide)
    params = {"logits": jnp.array([0.3, -0.4])}
    exact = ExactGradient(gradient).estimate(jax.random.key(0), params, ())[0].gradient["logits"]
    keys = jax.random.split(jax.random.key(1), 4000)

    def replicates():
        return np.asarray(jax.jit(jax.vmap(lambda k: gradient.estimate(k, params, {})[0].gradient["logits"]))(keys))

    assert_mean(replicates(), np.asarray(exact), smallest_error=0.5)
    monkeypatch.setattr(lanes, "separate_plates", lambda structure, name, term: structure.sites[name].plates)
    assert np.abs(z_scores(replicates(), np.asarray(exact))).max() > REJECTION
