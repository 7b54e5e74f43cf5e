"""RODEO: mean zero of the operator and exact moments over all outcomes, leave-one-out where h is 0, learning, mutants, programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.core.stein import flip_probability, gibbs_stein_flips
from ergodica.estimators import RODEO, LeaveOneOut
from ergodica.estimators.variational.sites import rodeo
from ergodica.estimators.variational.sites.rodeo import scored_stein
from ergodica.estimators.variational.wrap import LEARNED
from tests.support.exact_programs import CASES, exact_elbo
from tests.support.forced_bits import (
    LOGITS,
    bits_program,
    enumerated,
    every_estimate,
    exact_gradient_of,
    joint_cost,
    outcomes,
)
from tests.support.learning import learned, learning_and_slopes
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def bent(psi, cost, difference):
    """A function of the expansions that is not their sum."""
    return psi["a"] * jnp.tanh(cost + difference) + psi["b"] * difference


BENT = {"a": jnp.array(0.8), "b": jnp.array(0.4)}
LEARNED_AT = {"alpha": jnp.array(0.9), "beta": jnp.array(0.3), "psi": BENT}


def means_of_the_operator(flip_of):
    """Mean over three bits of A h, and of A ((h - c)(x - p)), for a function h with random values."""
    values = np.random.default_rng(0).normal(size=(2, 2, 2))
    bits, weights = outcomes(LOGITS, 1)
    bits, p = bits[:, 0], 1 / (1 + np.exp(-LOGITS))
    at_draw = values[tuple(bits.T)][:, None]
    flipped = [np.abs(bits - np.eye(3, dtype=int)[i]) for i in range(3)]
    at_flips = np.stack([values[tuple(f.T)] for f in flipped], axis=-1)
    flip = flip_of(bits, p)
    total = gibbs_stein_flips(at_draw, at_flips, flip).sum(axis=-1, keepdims=True)
    return weights @ total, weights @ scored_stein(bits, p, total, at_flips, 0.37, flip)


def test_the_operator_has_mean_zero():
    """Over all values of three bits, of any function; and not with the probability of the value that there is."""
    for mean in means_of_the_operator(flip_probability):
        np.testing.assert_allclose(mean, 0.0, atol=1e-15)
    for mean in means_of_the_operator(lambda bits, p: 1 - flip_probability(bits, p)):
        assert np.max(np.abs(mean)) > 0.05


CHOICES = {
    "linear": (RODEO(alpha=0.8, beta=0.6), None),
    "user": (RODEO(bent, BENT), LEARNED_AT),
}


@pytest.mark.parametrize(
    ("label", "num_particles"),
    [("user", 2), *(pytest.param(*c, marks=pytest.mark.sweep) for c in [("linear", 2), ("user", 3)])],
)
def test_three_bits_that_share_a_cost(label, num_particles):
    """The mean over all outcomes of all particles is exact."""
    estimator, params = CHOICES[label]
    mean, _ = enumerated(estimator, LOGITS, joint_cost, num_particles, params)
    np.testing.assert_allclose(mean, exact_gradient_of(LOGITS, joint_cost), rtol=1e-9, atol=1e-12)


def test_without_the_operator_it_is_leave_one_out():
    """At every outcome, with both strengths 0 and with h = 0 in the baselines alone."""
    found = [every_estimate(e, LOGITS, joint_cost, 2)[0] for e in (RODEO(alpha=0.0, beta=0.0), LeaveOneOut())]
    np.testing.assert_allclose(*found, rtol=1e-10, atol=1e-13)
    nothing = RODEO(lambda psi, cost, difference: 0.0 * difference, {})
    params = {"alpha": jnp.array(1.0), "beta": jnp.array(0.0)}
    by_function, _ = every_estimate(nothing, LOGITS, joint_cost, 2, params)
    np.testing.assert_allclose(by_function, found[1], rtol=1e-10, atol=1e-13)


def test_a_linear_cost_of_one_bit_leaves_no_noise():
    linear = lambda x: -1.2 * x[0] + 3.0  # noqa: E731
    mean, variance = enumerated(RODEO(alpha=1.0, beta=1.0), np.array([0.6]), linear, 2)
    np.testing.assert_allclose(mean, exact_gradient_of(np.array([0.6]), linear), rtol=1e-10)
    np.testing.assert_allclose(variance, 0.0, atol=1e-24)


def with_own_particle(x):
    return jnp.mean(x, axis=0)


@pytest.mark.parametrize("mutant", ["operator", "own particle"])
def test_mutants_have_another_mean(mutant, monkeypatch):
    """The operator with the probability of the value that there is; functions that depend on the particle's own draw."""
    if mutant == "operator":
        monkeypatch.setattr(rodeo, "flip_probability", lambda bits, p: 1 - flip_probability(bits, p))
    else:
        monkeypatch.setattr(RODEO, "_mean_of_others", staticmethod(with_own_particle))
    found, _ = enumerated(RODEO(), LOGITS, joint_cost, 2)
    assert np.max(np.abs(found - exact_gradient_of(LOGITS, joint_cost))) > 5e-3


def learning(f, logits, estimator, num_particles=2):
    case = bits_program(f, logits)
    loss = erg.estimators.ELBO(num_particles, {"x": estimator})
    gradient = erg.estimators.VariationalGradient(loss, case.model, loss.guide(case.model, case.guide))
    return gradient, gradient.start(jax.random.key(0))


def test_what_learns_is_the_derivative_of_the_square():
    """Draw by draw, of the particles' mean."""
    found, slopes = learning_and_slopes(*learning(joint_cost, LOGITS, RODEO(bent, BENT, alpha=0.9, beta=0.3)))
    assert set(slopes) == {"alpha", "beta"}
    for name, slope in slopes.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-5, atol=1e-8)
        assert np.max(np.abs(slope)) > 1e-3


def logistic(psi, cost, difference):
    """One hidden layer."""
    return jnp.tanh(psi["cost"] * cost + psi["difference"] * difference + psi["bias"]) @ psi["out"]


def start(key):
    keys = jax.random.split(key, 3)
    weights = {name: jax.random.normal(k, (8,)) for name, k in zip(("cost", "difference", "bias"), keys, strict=True)}
    return weights | {"out": jnp.zeros(8)}


@pytest.mark.parametrize(
    ("cost", "logits", "make"),
    [
        (joint_cost, LOGITS, lambda: RODEO(alpha=0.0, beta=0.0, tuned=True)),
        pytest.param(
            lambda x: jnp.sum((x - 0.49) ** 2),
            np.array([-0.85]),
            lambda: RODEO(logistic, start),
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            lambda x: jnp.sum((x - 0.499) ** 2),
            np.array([-0.85]),
            lambda: RODEO(logistic, start),
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_learning_lowers_the_variance(cost, logits, make):
    """Exact variances: below that of leave-one-out, at which it starts, with no more than two thirds left."""
    estimator = make()
    gradient, params = learning(cost, logits, estimator)
    after = learned(gradient, params, num_steps=1_500, learning_rate=0.01)["x" + LEARNED]
    mean, variance = enumerated(estimator, logits, cost, 2, after)
    np.testing.assert_allclose(mean, exact_gradient_of(logits, cost), rtol=1e-8, atol=1e-12)
    assert np.sum(variance) < 0.67 * np.sum(enumerated(LeaveOneOut(), logits, cost, 2)[1])


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        pytest.param("discrete", ("b",), marks=pytest.mark.sweep),
        pytest.param("mixed-chain", ("z", "c"), marks=pytest.mark.sweep),
        pytest.param("nested", ("e",), marks=pytest.mark.sweep),
    ],
)
def test_programs_against_enumeration(name, sites):
    """Joint bits, bits in plates, laws that depend on other sites; an error of 30% of the largest entry would be seen."""
    loss = erg.estimators.ELBO(3, {site: RODEO(alpha=0.8) for site in sites})
    found = gradients(loss, CASES[name](), 6_000)
    assert_mean(found, exact_gradient(CASES[name], exact_elbo), smallest_error=0.3)


def test_refusals():
    case = CASES["nested"]()
    for objective, num_particles, site, words in [
        (erg.estimators.ELBO, 2, "r", "outside of plate rows"),
        (erg.estimators.ELBO, 1, "e", "there are no other particles"),
        (erg.estimators.IWELBO, 2, "e", "IWELBO is no mean over particles"),
    ]:
        with pytest.raises(erg.estimators.SiteError, match=f"'{site}' .*{words}"):
            objective(num_particles, {site: RODEO()}).plan(case.model, case.guide, *case.args)

    def one_hot():
        numpyro.sample("z", dist.Multinomial(1, probs=jnp.array([0.2, 0.3, 0.5])))

    with pytest.raises(erg.estimators.SiteError, match=r"'z' .*changes a bit.*Use DoubleControlVariate"):
        erg.estimators.ELBO(2, {"z": RODEO()}).plan(one_hot, one_hot)
    with pytest.raises(TypeError, match="apply must be a function"):
        RODEO(1.0, BENT)
