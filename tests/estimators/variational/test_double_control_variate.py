"""Double control variates: exact moments over all outcomes, leave-one-out where the strength is 0, tuning, mutants, programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators import DoubleControlVariate, LeaveOneOut
from ergodica.estimators.variational.sites import double_control_variate
from ergodica.estimators.variational.wrap import LEARNED
from tests.support.exact_programs import CASES, exact_elbo
from tests.support.forced_bits import (
    LOGITS,
    bits_program,
    enumerated,
    every_estimate,
    exact_gradient_of,
    joint_cost,
)
from tests.support.learning import learned, learning_and_slopes
from tests.support.one_hot import one_hot_program
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


@pytest.mark.parametrize(
    ("num_particles", "strength"),
    [(2, 0.7), *(pytest.param(*c, marks=pytest.mark.sweep) for c in [(3, 0.7), (2, 1.9)])],
)
def test_three_bits_that_share_a_cost(num_particles, strength):
    """The mean over all outcomes of all particles is exact."""
    mean, _ = enumerated(DoubleControlVariate(strength), LOGITS, joint_cost, num_particles)
    np.testing.assert_allclose(mean, exact_gradient_of(LOGITS, joint_cost), rtol=1e-9, atol=1e-12)


def test_strength_0_is_leave_one_out():
    """At every outcome; on one bit with the variance that is known."""
    found = [every_estimate(e, LOGITS, joint_cost, 2)[0] for e in (DoubleControlVariate(0.0), LeaveOneOut())]
    np.testing.assert_allclose(*found, rtol=1e-10, atol=1e-13)
    p0, phi = 0.49, np.array([-0.85])
    p = 1 / (1 + np.exp(-phi))
    _, variance = enumerated(DoubleControlVariate(0.0), phi, lambda x: jnp.sum((x - p0) ** 2), 2)
    np.testing.assert_allclose(variance, (1 - 2 * p0) ** 2 * p * (1 - p) * (0.5 - p * (1 - p)), rtol=1e-8)


@pytest.mark.slow
def test_the_same_draws_as_leave_one_out():
    """Drawn by the same key, to rounding."""
    case = CASES["mixed"]()

    def gradient(estimator):
        loss = erg.estimators.ELBO(3, {"z": estimator, "c": estimator})
        return jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(5), p, case.model, case.guide, *case.args)))(
            case.params
        )

    ours, theirs = gradient(DoubleControlVariate(0.0)), gradient(LeaveOneOut())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), ours, theirs)


def test_a_linear_cost_leaves_no_noise():
    linear = lambda x: jnp.array([0.7, -1.2, 2.0]) @ x + 3.0  # noqa: E731
    mean, variance = enumerated(DoubleControlVariate(), LOGITS, linear, 2)
    np.testing.assert_allclose(mean, exact_gradient_of(LOGITS, linear), rtol=1e-10)
    np.testing.assert_allclose(variance, 0.0, atol=1e-24)


class NotPutBack(DoubleControlVariate):
    """Mutant: the mean of the linear cost times the score is left out."""

    def surrogate(self, site, downstream):
        log_probs, one_hot = downstream.record
        _, slope = double_control_variate.cost_and_slope(site, downstream, one_hot)
        slope = jax.lax.stop_gradient(double_control_variate.leave_one_out_mean(slope))
        return super().surrogate(site, downstream) - self.strength * jnp.sum(slope * jnp.exp(log_probs))


def test_mutants_have_another_mean(monkeypatch):
    """What is put back left out; and the particle's own slope among the others."""
    exact = exact_gradient_of(LOGITS, joint_cost)
    assert np.max(np.abs(enumerated(NotPutBack(), LOGITS, joint_cost, 2)[0] - exact)) > 5e-3
    monkeypatch.setattr(double_control_variate, "leave_one_out_mean", lambda x: jnp.mean(x, axis=0, keepdims=True))
    assert np.max(np.abs(enumerated(DoubleControlVariate(), LOGITS, joint_cost, 2)[0] - exact)) > 5e-3


def tuned(f, logits, strength, num_particles=2):
    case = bits_program(f, logits)
    loss = erg.estimators.ELBO(num_particles, {"x": DoubleControlVariate(strength, tuned=True)})
    gradient = erg.estimators.VariationalGradient(loss, case.model, loss.guide(case.model, case.guide))
    return gradient, gradient.start(jax.random.key(0))


def test_what_tunes_is_the_derivative_of_the_square():
    """Draw by draw, of the particles' mean."""
    found, slopes = learning_and_slopes(*tuned(joint_cost, LOGITS, 0.8))
    np.testing.assert_allclose(found["strength"], slopes["strength"], rtol=1e-5, atol=1e-8)
    assert np.max(np.abs(slopes["strength"])) > 1e-3


@pytest.mark.parametrize(
    ("cost", "logits", "start"),
    [
        (lambda x: jnp.sum((x - 0.49) ** 2), np.array([-0.85]), 1.0),
        pytest.param(lambda x: jnp.sum((x - 0.499) ** 2), np.array([-0.85]), 1.0, marks=pytest.mark.sweep),
        pytest.param(joint_cost, LOGITS, 0.0, marks=pytest.mark.sweep),
    ],
)
def test_tuning_lowers_the_variance_to_the_least_there_is(cost, logits, start):
    """Exact variances: a parabola in the strength, whose least value is nearly reached; the start's was far from it."""
    low, middle, high = (np.sum(enumerated(DoubleControlVariate(a), logits, cost, 2)[1]) for a in (0.0, 1.0, 2.0))
    slope, curvature = (high - low) / 2, low - 2 * middle + high
    variance = lambda a: middle + (a - 1) * slope + (a - 1) ** 2 * curvature / 2  # noqa: E731
    least = variance(1 - slope / curvature)
    gradient, params = tuned(cost, logits, start)
    after = learned(gradient, params, num_steps=1_500, learning_rate=0.01)["x" + LEARNED]["strength"]
    assert variance(start) > 1.1 * least
    assert variance(float(after)) - least < 0.1 * (variance(start) - least)


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
    loss = erg.estimators.ELBO(3, {site: DoubleControlVariate(0.8) for site in sites})
    found = gradients(loss, CASES[name](), 6_000)
    assert_mean(found, exact_gradient(CASES[name], exact_elbo), smallest_error=0.3)


@pytest.mark.sweep
def test_one_hot_vectors_in_a_plate():
    """An error of 20% of the largest entry would be seen."""
    case, exact = one_hot_program()
    found = gradients(erg.estimators.ELBO(2, {"z": DoubleControlVariate()}), case, 6_000)
    assert_mean(found, exact, smallest_error=0.2)


def test_refusals():
    case = CASES["nested"]()
    for objective, num_particles, site, words in [
        (erg.estimators.ELBO, 2, "r", "outside of plate rows"),
        (erg.estimators.ELBO, 1, "e", "there are no other particles"),
        (erg.estimators.IWELBO, 2, "e", "IWELBO is no mean over particles"),
    ]:
        with pytest.raises(erg.estimators.SiteError, match=f"'{site}' .*{words}"):
            objective(num_particles, {site: DoubleControlVariate()}).plan(case.model, case.guide, *case.args)

    def index():
        numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))

    with pytest.raises(erg.estimators.SiteError, match=r"'z' .*its value is an index"):
        erg.estimators.ELBO(2, {"z": DoubleControlVariate()}).plan(index, index)
