"""Objectives written as programs: against their exact expectations by enumeration and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ergodica.core import tree
from ergodica.estimators import (
    ELBO,
    Enumerate,
    GumbelSoftmax,
    LeaveOneOut,
    ProgrammedObjective,
    Reparam,
    Score,
    marginal,
    normalise,
)
from ergodica.estimators.variational.programmed import resampling
from tests.support import resampled_tables as tables
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo, on_grid
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")
ALL = {"*": Enumerate()}


def value_and_gradient(loss, case, seed=5):
    def value(params):
        return -loss.loss(jax.random.key(seed), params, case.model, case.guide, *case.args)

    return jax.jit(jax.value_and_grad(value))(case.params)


def assert_same(found, exact):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), found, exact)


# --- programs ----------------------------------------------------------------------------------------------------------


def elbo(model, guide):
    z, log_q = guide.sample()
    return model.log_density(z) - log_q


def held_elbo(model, guide):
    z, _ = guide.sample()
    return model.log_density(z) - guide.held.log_density(z)


def log_weights(model, guide, num):
    pairs = [guide.sample() for _ in range(num)]
    return jnp.stack([model.log_density(z) - log_q for z, log_q in pairs])


def iwelbo(model, guide):
    return jax.nn.logsumexp(log_weights(model, guide, 2)) - jnp.log(2.0)


def renyi(alpha):
    def objective(model, guide):
        return (jax.nn.logsumexp((1 - alpha) * log_weights(model, guide, 2)) - jnp.log(2.0)) / (1 - alpha)

    return objective


def wake(model, guide):
    """Importance-weighted forward KL for the guide: draws, weights and model are held."""
    draws = [guide.held.sample() for _ in range(2)]
    weights = jax.nn.softmax(jnp.stack([model.held.log_density(z) - log_q for z, log_q in draws]))
    return sum(guide.log_density(z) * jax.lax.stop_gradient(w) for (z, _), w in zip(draws, weights, strict=True))


def hvi(num_particles, own_proposal=False, num_outer=1):
    """HVI, IWHVI and, with several draws, DIWHVI."""

    def objective(model, guide):
        q = marginal(guide, ["z"], num_particles, tables.proposal if own_proposal else None)
        weights = log_weights(model, q, num_outer)
        return jax.nn.logsumexp(weights) - jnp.log(1.0 * num_outer)

    return objective


# --- exact, number by number -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n == "plated" else pytest.param(n, marks=pytest.mark.sweep) for n in CASES])
def test_a_program_for_the_elbo_is_the_elbo(name):
    """Costs downstream and elements of plates kept apart: value and gradient to rounding, by rule."""
    case = CASES[name]()
    assert_same(value_and_gradient(ProgrammedObjective(elbo, 2), case), value_and_gradient(ELBO(2), case))


@pytest.mark.parametrize(
    ("sites", "same"),
    [
        ({"z": LeaveOneOut(), "c": Score(-1.0)}, {"z": LeaveOneOut(), "c": Score(-1.0), "w": Reparam(stl=True)}),
        pytest.param({"*": LeaveOneOut()}, {"*": LeaveOneOut()}, marks=pytest.mark.sweep),
    ],
)
def test_held_parameters_are_stuck_landings(sites, same):
    case = CASES["mixed"]()
    assert_same(
        value_and_gradient(ProgrammedObjective(held_elbo, 3, sites), case), value_and_gradient(ELBO(3, same), case)
    )


@pytest.mark.sweep
def test_relaxed_values_have_the_densities_of_their_estimator():
    case, sites = CASES["mixed"](), {"z": GumbelSoftmax(0.5)}
    assert_same(value_and_gradient(ProgrammedObjective(elbo, 2, sites), case), value_and_gradient(ELBO(2, sites), case))


def exact_renyi(alpha, case, params):
    log_q, log_w = on_grid(case, params)
    pairs = jnp.logaddexp((1 - alpha) * log_w[:, None], (1 - alpha) * log_w[None, :]) - jnp.log(2.0)
    return jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pairs) / (1 - alpha)


def exact_wake(case, params):
    """Its value, and the derivative with draws, weights and model held."""
    log_q, log_w = on_grid(case, params)
    weight = jax.nn.softmax(jnp.stack(jnp.broadcast_arrays(log_w[:, None], log_w[None, :])), axis=0)[0]
    held = jax.lax.stop_gradient(jnp.exp(log_q[:, None] + log_q[None, :]) * weight)
    return 2 * jnp.sum(held * log_q[:, None])  # both places of a pair alike


@pytest.mark.parametrize(
    ("objective", "exact"),
    [
        pytest.param(iwelbo, exact_iwelbo, marks=pytest.mark.sweep),
        (renyi(0.5), lambda *given: exact_renyi(0.5, *given)),
        (wake, exact_wake),
    ],
    ids=["iwelbo", "renyi", "wake"],
)
def test_nonlinear_programs_are_exact_when_all_draws_are_summed_over(objective, exact):
    case = CASES["discrete"]()
    found = value_and_gradient(ProgrammedObjective(objective, 1, ALL), case)
    assert_same(found, jax.jit(jax.value_and_grad(lambda p: exact(case, p)))(case.params))


HIERARCHICAL = {
    "hvi": (1, False, 1),
    "iwhvi": (3, False, 1),
    "iwhvi, own proposal": (2, True, 1),
    "diwhvi": (2, True, 2),
}


@pytest.mark.parametrize(
    "label", [n if n == "diwhvi" else pytest.param(n, marks=pytest.mark.sweep) for n in HIERARCHICAL]
)
def test_hierarchical_bounds_are_exact_when_all_draws_are_summed_over(label):
    num_particles, own_proposal, num_outer = HIERARCHICAL[label]
    case = tables.discrete()
    found = value_and_gradient(ProgrammedObjective(hvi(num_particles, own_proposal, num_outer), 1, ALL), case)

    def exact(params):
        return tables.exact_hvi(tables.discrete_table, num_particles, own_proposal, num_outer, params)

    assert_same(found, jax.jit(jax.value_and_grad(exact))(case.params))


@pytest.mark.sweep
def test_a_normalised_program_as_guide_gives_the_importance_weighted_bound():
    """The choice of the particle cancels: value for value the program that draws the same and averages the weights."""
    case = CASES["discrete"]()

    def resampled(model, guide):
        z, log_q = normalise(model, 2, proposal=guide).sample()
        return model.log_density(z) - log_q

    found = value_and_gradient(ProgrammedObjective(resampled, 1, ALL), case)
    assert_same(found, jax.jit(jax.value_and_grad(lambda p: exact_iwelbo(case, p)))(case.params))


# --- densities ---------------------------------------------------------------------------------------------------------


def expectations(*kinds):
    """Expectation of ``kind(z)``, a program, by the sum over all draws: an array for each kind, an entry for each z."""
    case = tables.discrete()

    def of(kind, z):
        loss = ProgrammedObjective(kind(z), 1, ALL)
        return -loss.loss(jax.random.key(0), case.params, case.model, case.guide, *case.args)

    found = jax.jit(jax.vmap(lambda z: [of(kind, z) for kind in kinds]))(jnp.arange(3))
    return [np.asarray(x) for x in found]


def over_draws(density, f):
    """Programs for E 1{z} f(log q̂) over the draws of a density."""

    def kind(z):
        def objective(model, guide):
            values, log_q = density(model, guide).sample()
            return jnp.asarray(values["z"] == z, jnp.result_type(float)) * f(log_q)

        return objective

    return kind


def evaluated(density):
    """Programs for E q̂(z)."""
    return lambda z: lambda model, guide: jnp.exp(density(model, guide).log_density({"z": z}))


def reciprocal(log_q):
    return jnp.exp(-log_q)


def marginal_of(num_particles, own_proposal=True):
    return lambda model, guide: marginal(guide, ["z"], num_particles, tables.proposal if own_proposal else None)


def normalised_of(num_particles):
    return lambda model, guide: normalise(model, num_particles)


def exact_marginal():
    table = tables.discrete_table(tables.discrete().params)
    return np.asarray(jnp.sum(jnp.exp(table.log_joint), axis=0))


def exact_normalised(num_particles):
    table = tables.discrete_table(tables.discrete().params)
    log_prior = jnp.log(jnp.array(tables.PRIOR))
    return np.asarray(tables.resampled_law(log_prior, table.log_target(jnp.arange(3)), num_particles))


@pytest.mark.parametrize("own_proposal", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_estimates_of_a_marginal_and_of_its_reciprocal_are_unbiased(own_proposal):
    """E q̂(z) = q(z) in log_density; E[1/q̂(z) | z] = 1/q(z) in sample, so that E 1{z}/q̂ = 1."""
    of = marginal_of(3, own_proposal)
    density, ones = expectations(evaluated(of), over_draws(of, reciprocal))
    np.testing.assert_allclose(density, exact_marginal(), rtol=1e-12)
    np.testing.assert_allclose(ones, np.ones(3), rtol=1e-12)


def test_estimates_of_a_resampled_density_and_of_its_reciprocal_are_unbiased():
    """And its draws have the law that all sets of particles give."""
    of = normalised_of(3)
    density, ones, law = expectations(evaluated(of), over_draws(of, reciprocal), over_draws(of, jnp.ones_like))
    np.testing.assert_allclose(law, exact_normalised(3), rtol=1e-12)
    np.testing.assert_allclose(density, exact_normalised(3), rtol=1e-12)
    np.testing.assert_allclose(ones, np.ones(3), rtol=1e-12)


def without_count(log_weights):
    return jax.nn.logsumexp(jnp.stack([jnp.asarray(x) for x in log_weights]))


def without_first(log_weights):
    rest = jnp.stack([jnp.asarray(x) for x in log_weights[1:]])
    return jax.nn.logsumexp(rest) - jnp.log(1.0 * rest.shape[0])


@pytest.mark.parametrize("mutant", [without_count, without_first])
def test_mutants_of_the_estimate_are_rejected(mutant, monkeypatch):
    """A missing -log m, and a retained particle that is not counted: means that must be 1, or the law, are off by 5%."""
    monkeypatch.setattr(resampling, "log_mean_weight", mutant)
    marginal, normalised = marginal_of(2), normalised_of(2)
    ones, density = expectations(over_draws(marginal, reciprocal), evaluated(normalised))
    assert np.max(np.abs(ones - 1)) > 0.05
    assert np.max(np.abs(density / exact_normalised(2) - 1)) > 0.05


# --- continuous latents ------------------------------------------------------------------------------------------------

STATISTICAL = {
    "by rule": ((2, True, 1), 1, {}, 4_000),
    "leave one out": ((2, True, 1), 2, {"u": LeaveOneOut()}, 8_000),
    "score everywhere": ((2, False, 1), 2, {"*": LeaveOneOut()}, 20_000),
    "diwhvi": ((2, True, 2), 1, {}, 4_000),
}


@pytest.mark.parametrize(
    "label", [n if n == "leave one out" else pytest.param(n, marks=pytest.mark.sweep) for n in STATISTICAL]
)
def test_continuous_latent_and_discrete_auxiliary(label):
    """Sees an error of 20% of the largest entry."""
    setting, num_particles, sites, num_repeats = STATISTICAL[label]

    def exact(case, params):
        return tables.exact_hvi(tables.continuous_table, *setting, params)

    loss = ProgrammedObjective(hvi(*setting), num_particles, sites)
    replicates = gradients(loss, tables.continuous(), num_repeats)
    gradient = exact_gradient(tables.continuous, exact)
    noisy = replicates.std(axis=0) > 1e-12  # a proposal that is not used has no gradient
    np.testing.assert_allclose(replicates.mean(axis=0)[~noisy], gradient[~noisy], atol=1e-12)
    assert_mean(replicates[:, noisy], gradient[noisy], smallest_error=0.2)


def test_a_gradient_without_the_law_of_the_draws_is_rejected():
    """The mutant: parameters of the draws held, so that the auxiliary bit's law has no derivative by its estimator."""

    def mutant(model, guide):
        z, _ = guide.held.sample()
        return model.log_density(z) - guide.log_density(z)

    case = CASES["mixed"]()
    replicates = gradients(ProgrammedObjective(mutant, 1), case, 1_000)
    noisy = replicates.std(axis=0) > 1e-12
    exact = exact_gradient(CASES["mixed"], exact_elbo)
    assert np.max(np.abs(z_scores(replicates[:, noisy], exact[noisy]))) > REJECTION


@pytest.mark.sweep
def test_score_function_gradient_of_a_nonlinear_program():
    """Rényi bound with score functions. Sees an error of 60% of the largest entry."""
    case = CASES["discrete"]()
    exact = tree.ravel(jax.jit(jax.grad(lambda p: exact_renyi(0.5, case, p)))(case.params))
    replicates = gradients(ProgrammedObjective(renyi(0.5), 2, {"*": LeaveOneOut()}), case, 12_000)
    assert_mean(replicates, np.asarray(exact), smallest_error=0.6)


def test_a_multiple_by_a_weight_joins_the_elements_of_a_plate():
    """A weight depends on all elements: enumerating each for itself would see two of the four values only."""
    x = jnp.array([0.3, 1.2])

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    def guide():
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.array([0.4, -1.0]))))

    def weighted(model, guide):
        z, log_q = guide.sample()
        return log_q * jnp.exp(model.log_density(z) - log_q)

    def exact(params):
        p = jax.nn.sigmoid(params["logits"])
        values = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        log_q = jnp.sum(jnp.where(values == 1, jnp.log(p), jnp.log1p(-p)), axis=1)
        log_p = jnp.sum(jnp.log(0.5) + dist.Normal(values, 1.0).log_prob(x), axis=1)
        return jnp.sum(jnp.exp(log_p) * log_q)

    params = {"logits": jnp.array([0.4, -1.0])}
    loss = ProgrammedObjective(weighted, sites=ALL)
    found = jax.value_and_grad(lambda p: -loss.loss(jax.random.key(0), p, model, guide))(params)
    assert_same(found, jax.value_and_grad(exact)(params))
