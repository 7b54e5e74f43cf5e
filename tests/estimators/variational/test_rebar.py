"""REBAR: unbiased at every temperature and strength, on a bit, on programs, and not without the derivative of z̃."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators.variational.sites.rebar import (
    controlled_score,
    perturbed_two_ways,
    relaxation_parameters,
    relaxed_cost,
)
from ergodica.estimators.variational.wrap import LEARNED
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.forced_bits import LOGITS, bits_program, exact_gradient_of, joint_cost
from tests.support.learning import learned, learning_and_slopes, replicates_at
from tests.support.one_hot import one_hot_program
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

PHI = -0.8


class WithoutSecondPath(erg.estimators.REBAR):
    """Mutant, and a published mistake: the derivative through z̃ is left out."""

    def surrogate(self, site, downstream):
        log_probs, gumbel = downstream.record
        settings = relaxation_parameters(self.temperature, self.strength)
        _, z, given = perturbed_two_ways(log_probs, gumbel)
        slope = jax.grad(lambda z: jnp.sum(relaxed_cost(site, downstream, settings)(z)[0]))(jax.lax.stop_gradient(z))
        return super().surrogate(site, downstream) + jnp.sum(jax.lax.stop_gradient(slope) * given)


def test_the_two_perturbations_agree_in_value_and_in_mean_derivative():
    """z̃ = z; d/dφ E h(z) = E h(z̃) ∇ log q(D) + E d/dφ h(z̃), which is what the estimator rests on, an error of 3% seen."""
    logits = jnp.array([0.4, -1.0, 0.3])

    def one(gumbel):
        def value(logits, which):
            return jnp.sin(perturbed_two_ways(jax.nn.log_softmax(logits), gumbel)[which][0])

        one_hot, z, given = perturbed_two_ways(jax.nn.log_softmax(logits), gumbel)
        score = one_hot - jax.nn.softmax(logits)
        path, path_given = jax.grad(value)(logits, 1), jax.grad(value)(logits, 2)
        return z - given, path, path_given + jnp.sin(given[0]) * score

    difference, path, other = jax.vmap(one)(jax.random.gumbel(jax.random.key(0), (100_000, 3)))
    np.testing.assert_allclose(difference, 0.0, atol=1e-12)
    assert_mean(np.asarray(path - other) + 0.3, np.full(3, 0.3), smallest_error=0.03)


def test_the_mean_on_one_bit_is_exact_at_every_setting():
    """An error of 10% would be seen at strength 1; the mutant is rejected; noise is below the score function's."""
    p = 1 / (1 + np.exp(-PHI))
    exact = np.array([p * (1 - p) * 2.0])
    settings = {
        "score": erg.estimators.REBAR(0.5, 0.0),
        "cool": erg.estimators.REBAR(0.2),
        "warm": erg.estimators.REBAR(1.0),
        "half": erg.estimators.REBAR(0.5, 0.5),
        "mutant": WithoutSecondPath(0.5),
    }

    def one(key):
        def estimate(estimator):
            law = lambda phi: dist.Bernoulli(logits=phi)  # noqa: E731
            cost = lambda b: (b + 0.5) ** 2 + 1.0  # noqa: E731
            return erg.estimators.expectation_gradient(key, jnp.array(PHI), law, cost, estimator).gradient

        return {name: estimate(estimator) for name, estimator in settings.items()}

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 20_000))
    found = {name: np.asarray(x)[:, None] for name, x in found.items()}
    mutant = found.pop("mutant")
    for replicates in found.values():
        assert_mean(replicates, exact, smallest_error=0.15)
    assert abs(z_scores(mutant, exact)[0]) > REJECTION
    for name in ("cool", "warm", "half"):
        assert found[name].var() < 0.5 * found["score"].var()


def three_bits(estimator, num_particles=1):
    """The gradient's estimator at three bits that share a cost, and its parameters, the learned ones included."""
    case = bits_program(joint_cost, LOGITS)
    loss = erg.estimators.ELBO(num_particles, {"x": estimator})
    gradient = erg.estimators.VariationalGradient(loss, case.model, loss.guide(case.model, case.guide))
    return gradient, gradient.start(jax.random.key(0))


def one_hot(estimator, num_particles=1):
    case, _ = one_hot_program()
    loss = erg.estimators.ELBO(num_particles, {"z": estimator})
    gradient = erg.estimators.VariationalGradient(loss, case.model, loss.guide(case.model, case.guide), *case.args)
    return gradient, case.params | {
        name: x for name, x in gradient.start(jax.random.key(0)).items() if name.endswith(LEARNED)
    }


@pytest.mark.slow
def test_three_bits_that_share_a_cost():
    """Fixed and tuned, at temperatures and strengths that are not the defaults; an error of 20% would be seen."""
    exact = exact_gradient_of(LOGITS, joint_cost)
    for estimator in (erg.estimators.REBAR(0.4, 0.8), erg.estimators.REBAR(0.7, 1.3, tuned=True)):
        gradient, params = three_bits(estimator)
        found = replicates_at(gradient, params, 12_000)["logits"]
        assert_mean(found, exact, smallest_error=0.2)


@pytest.mark.parametrize("make", [three_bits, pytest.param(one_hot, marks=pytest.mark.sweep)])
def test_tuning_leaves_the_guides_gradient_alone(make):
    """Number by number."""
    key, found = jax.random.key(5), []
    for tuned in (False, True):
        gradient, params = make(erg.estimators.REBAR(0.6, 0.9, tuned=tuned), 2)
        estimate = jax.jit(lambda params, gradient=gradient: gradient.probe(key, params, {}).gradient)(params)
        found.append(tree.ravel({name: g for name, g in estimate.items() if not name.endswith(LEARNED)}))
    np.testing.assert_allclose(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [three_bits, pytest.param(one_hot, marks=pytest.mark.sweep)])
def test_what_tunes_is_the_derivative_of_the_square(make):
    """Draw by draw, the slope of -1/2 the square of the shipped gradient by the logits, from both sides; nothing like no slope."""
    found, slopes = learning_and_slopes(*make(erg.estimators.REBAR(0.6, 0.9, tuned=True)))
    for name, slope in slopes.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-5, atol=1e-7)
        assert np.max(np.abs(slope)) > 1e-2


def test_tuning_without_a_path_is_found():
    """Mutant: the square of the score term alone."""

    class WithoutPath(erg.estimators.REBAR):
        def surrogate(self, site, downstream):
            log_probs, gumbel = downstream.record
            main, _ = controlled_score(
                site, downstream, relaxed_cost(site, downstream, downstream.params), learns=False
            )
            one_hot, z, _ = perturbed_two_ways(jax.lax.stop_gradient(log_probs), gumbel)
            (c,) = relaxed_cost(site, downstream, downstream.params)(z)
            signal = jax.lax.stop_gradient(downstream.cost) - c
            score = jax.lax.stop_gradient(one_hot - jnp.exp(log_probs))[..., 1]
            return main - 0.5 * jnp.sum((signal * score) ** 2)

    found, slopes = learning_and_slopes(*three_bits(WithoutPath(0.6, 0.9, tuned=True)))
    assert all(np.max(np.abs(found[name] - slope)) > 1e-2 for name, slope in slopes.items())


@pytest.mark.parametrize(
    "p0", [pytest.param(0.49, marks=pytest.mark.slow), pytest.param(0.499, marks=pytest.mark.sweep)]
)
def test_tuning_lowers_the_variance(p0):
    """On E (b - p0)² at p = .3, guide held: from 1.4 times the score function's variance, which is known, to no more than that."""
    p, f0, f1 = 0.3, p0**2, (1 - p0) ** 2
    case = bits_program(lambda x: jnp.sum((x - p0) ** 2), np.log([p / (1 - p)]))
    loss = erg.estimators.ELBO(1, {"x": erg.estimators.REBAR(tuned=True)})
    gradient = erg.estimators.VariationalGradient(loss, case.model, loss.guide(case.model, case.guide))
    before = gradient.start(jax.random.key(0))
    after = learned(gradient, before, num_steps=400)
    variance = [np.var(replicates_at(gradient, params, 8_000)["logits"]) for params in (before, after)]
    score = p * (1 - p) * ((1 - p) * f1 + p * f0) ** 2
    assert variance[0] > 1.3 * score
    assert variance[1] < 1.03 * score


def test_refuses_to_tune_what_is_not_declared():
    case = bits_program(joint_cost, LOGITS)
    loss = erg.estimators.ELBO(1, {"x": erg.estimators.REBAR(tuned=True)})
    with pytest.raises(
        erg.estimators.SiteError, match=r"'x' .*parameters of its own, which SVI keeps only if the guide"
    ):
        loss.loss(jax.random.key(0), case.params, case.model, case.guide)


@pytest.mark.parametrize(
    ("name", "objective", "sites"),
    [
        pytest.param("discrete", erg.estimators.ELBO, ("b",), marks=pytest.mark.slow),
        pytest.param("mixed-chain", erg.estimators.ELBO, ("z", "c"), marks=pytest.mark.slow),
        pytest.param("nested", erg.estimators.ELBO, ("e",), marks=pytest.mark.slow),
        pytest.param("discrete", erg.estimators.IWELBO, ("b",), marks=pytest.mark.slow),
    ],
)
def test_programs_against_enumeration(name, objective, sites):
    """Joint bits, bits in plates, laws that depend on other sites; an error of 30% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.REBAR(0.5) for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    assert_mean(gradients(loss, case, 6_000), exact_gradient(CASES[name], make_exact), smallest_error=0.3)


@pytest.mark.sweep
def test_one_hot_vectors_in_a_plate():
    """An error of 20% of the largest entry would be seen."""
    case, exact = one_hot_program()
    found = gradients(erg.estimators.ELBO(2, {"z": erg.estimators.REBAR(0.5)}), case, 6_000)
    assert_mean(found, exact, smallest_error=0.2)


def test_refuses_plates_that_terms_are_outside_of():
    case = CASES["nested"]()
    loss = erg.estimators.ELBO(2, {"r": erg.estimators.REBAR()})
    with pytest.raises(
        erg.estimators.SiteError, match=r"'r' .*outside of plate rows, and would be counted once for each"
    ):
        loss.plan(case.model, case.guide, *case.args)

    def index():
        numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))

    with pytest.raises(erg.estimators.SiteError, match=r"'z' .*its value is an index"):
        erg.estimators.ELBO(2, {"z": erg.estimators.REBAR()}).plan(index, index)
