"""MuProp: exact moments on one bit and on three, no noise for linear costs, programs against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators.variational.sites.relaxation import cost_and_slope
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.forced_bits import LOGITS, enumerated, exact_gradient_of, joint_cost
from tests.support.one_hot import one_hot_program
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

P = 0.3
PHI = float(np.log(P / (1 - P)))


def cost(b):
    return jnp.exp(1.2 * b) - 0.5


def by_bit():
    """Each bit's estimate of d/dφ E f, from the formula."""
    slope = jax.grad(cost)(P)
    return [(cost(1.0 * b) - cost(P) - slope * (b - P)) * (b - P) + slope * P * (1 - P) for b in (0, 1)]


def test_estimates_on_one_bit_are_those_of_the_formula():
    """The two values of the estimate; their mean is exact, and a linear cost leaves no noise."""
    law = lambda phi: dist.Bernoulli(logits=phi)  # noqa: E731

    def one(key):
        def estimate(f):
            found = erg.estimators.expectation_gradient(key, jnp.array(PHI), law, f, erg.estimators.MuProp())
            return found.gradient

        return estimate(cost), estimate(lambda b: 3.0 * b + 1.0)

    found, linear = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200))
    zero, one_ = (float(g) for g in by_bit())
    np.testing.assert_allclose(np.unique(np.round(found, 12)), np.sort([zero, one_]), rtol=1e-9)
    exact = P * (1 - P) * (cost(1.0) - cost(0.0))
    np.testing.assert_allclose((1 - P) * zero + P * one_, exact, rtol=1e-12)
    np.testing.assert_allclose(linear, 3 * P * (1 - P), rtol=1e-12)
    score = [float(cost(1.0 * b)) * (b - P) for b in (0, 1)]
    assert abs(one_ - zero) < 0.5 * abs(score[1] - score[0])


@pytest.mark.parametrize(
    ("name", "objective", "sites"),
    [
        ("discrete", erg.estimators.ELBO, ("b",)),
        pytest.param("mixed-chain", erg.estimators.ELBO, ("z", "c"), marks=pytest.mark.slow),
        pytest.param("discrete", erg.estimators.IWELBO, ("b",), marks=pytest.mark.slow),
    ],
)
@pytest.mark.sweep
def test_programs_against_enumeration(name, objective, sites):
    """Joint bits, bits in plates, laws that depend on other sites; an error of 30% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.MuProp() for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    assert_mean(gradients(loss, case, 6_000), exact_gradient(CASES[name], make_exact), smallest_error=0.3)


class WithoutOwnGradient(erg.estimators.MuProp):
    """Mutant: the gradient of the control variate's mean is not put back."""

    def surrogate(self, site, downstream):
        log_probs, _ = downstream.record
        _, slope = cost_and_slope(site, downstream, jax.lax.stop_gradient(jnp.exp(log_probs)))
        return super().surrogate(site, downstream) - jnp.sum(jax.lax.stop_gradient(slope) * jnp.exp(log_probs))


def test_three_bits_that_share_a_cost_by_enumeration():
    """The mean over all outcomes is exact, and the mutant's is not; there is less noise than the plain score function's."""
    exact = exact_gradient_of(LOGITS, joint_cost)
    mean, variance = enumerated(erg.estimators.MuProp(), LOGITS, joint_cost, 1)
    np.testing.assert_allclose(mean, exact, rtol=1e-10)
    mutant, _ = enumerated(WithoutOwnGradient(), LOGITS, joint_cost, 1)
    assert np.max(np.abs(mutant - exact)) > 0.1
    _, score = enumerated(erg.estimators.Score(), LOGITS, joint_cost, 1)
    assert np.sum(variance) < 0.5 * np.sum(score)


@pytest.mark.slow
def test_one_hot_vectors_in_a_plate():
    """An error of 20% of the largest entry would be seen."""
    case, exact = one_hot_program()
    found = gradients(erg.estimators.ELBO(2, {"z": erg.estimators.MuProp()}), case, 6_000)
    assert_mean(found, exact, smallest_error=0.2)


def test_refuses_plates_that_terms_are_outside_of():
    case = CASES["nested"]()
    loss = erg.estimators.ELBO(2, {"r": erg.estimators.MuProp()})
    with pytest.raises(erg.estimators.SiteError, match=r"'r' .*outside of plate rows"):
        loss.plan(case.model, case.guide, *case.args)
