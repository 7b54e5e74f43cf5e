"""MuProp: exact moments on one bit, no noise for linear costs, programs against enumeration; DARN is ReinMax at a bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators.variational import muprop
from ergodica.estimators.variational.muprop import mean_value
from ergodica.estimators.variational.reinmax import reinmax
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.one_hot import one_hot_program
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

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


def test_darn_is_reinmax_at_a_bit():
    """DARN expands about the draw: f'(b)(b - 1/2) ∇ log q(b)."""
    for b in (0, 1):
        one_hot, slope = jnp.array([1.0 - b, b]), jax.grad(cost)(1.0 * b)

        def value(phi, one_hot=one_hot):
            log_probs = jnp.stack([jax.nn.log_sigmoid(-phi), jax.nn.log_sigmoid(phi)])
            return cost(reinmax(log_probs, one_hot)[1])

        np.testing.assert_allclose(jax.grad(value)(PHI), slope * (b - 0.5) * (b - P), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "objective", "sites"),
    [
        ("discrete", erg.estimators.ELBO, ("b",)),
        pytest.param("mixed-chain", erg.estimators.ELBO, ("z", "c"), marks=pytest.mark.slow),
        pytest.param("discrete", erg.estimators.IWELBO, ("b",), marks=pytest.mark.slow),
    ],
)
def test_programs_against_enumeration(name, objective, sites):
    """Joint bits, bits in plates, laws that depend on other sites; an error of 30% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.MuProp() for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    assert_mean(gradients(loss, case, 6_000), exact_gradient(CASES[name], make_exact), smallest_error=0.3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def without_own_gradient(log_probs, one_hot, axes):
    """Mutant: the mean of the control variate is not put back."""
    return jnp.exp(log_probs)


without_own_gradient.defvjp(
    lambda log_probs, one_hot, axes: (jnp.exp(log_probs), (jnp.exp(log_probs), one_hot)),
    lambda axes, kept, slope: (-jnp.sum(slope * (kept[1] - kept[0]), axes, keepdims=True) * kept[1], 0 * kept[1]),
)


def test_linear_terms_have_mean_zero():
    """By enumeration: what is subtracted from the score term is what is put back, and not in the mutant."""
    logits, slope = jnp.array([0.3, -0.8, 0.5]), jnp.array([1.0, -2.0, 0.4])

    def mean_of(function):
        def gradient(one_hot):
            return jax.grad(lambda t: slope @ function(jax.nn.log_softmax(t), one_hot, (0,)))(logits)

        return jax.nn.softmax(logits) @ jax.vmap(gradient)(jnp.eye(3))

    np.testing.assert_allclose(mean_of(mean_value), 0.0, atol=1e-14)
    assert np.max(np.abs(mean_of(without_own_gradient))) > 0.2


def test_a_mean_that_is_not_put_back_fails_against_the_exact_gradient(monkeypatch):
    monkeypatch.setattr(muprop, "mean_value", without_own_gradient)
    law = lambda phi: dist.Bernoulli(logits=phi)  # noqa: E731

    def one(key):
        return erg.estimators.expectation_gradient(key, jnp.array(PHI), law, cost, erg.estimators.MuProp()).gradient

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2_000)))[:, None]
    assert abs(z_scores(found, float(P * (1 - P) * (cost(1.0) - cost(0.0))))[0]) > REJECTION


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
