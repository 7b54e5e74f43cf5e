"""Antithetic bits: mean and variance by integration over the noise, and programs against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.estimators.variational.sites.disarm import antithetic_bits, arm_weight, disarm_weight
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

NUM_NODES = 200_000
DELTA = 1 - 2 * 0.49


def moments(weight, p):
    """Mean and variance over u, at midpoints, of the estimate for one bit with f(1) - f(0) = DELTA."""
    u, phi = (jnp.arange(NUM_NODES) + 0.5) / NUM_NODES, jnp.log(p / (1 - p))
    bit, other = antithetic_bits(u, phi)
    estimate = DELTA * (1.0 * bit - 1.0 * other) * weight(u, bit, other, phi)
    return float(estimate.mean()), float(estimate.var())


def disarm(u, bit, other, phi):
    return disarm_weight(bit, other, phi)


def arm(u, bit, other, phi):
    return arm_weight(u)


def signed(u, bit, other, phi):
    """Mutant: the sigmoid of the logit for that of its absolute value."""
    return disarm_weight(bit, other, phi) * jax.nn.sigmoid(phi) / jax.nn.sigmoid(jnp.abs(phi))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8])
def test_mean_and_variance_on_one_bit_are_those_in_closed_form(p):
    q, least, most = 1 - p, min(p, 1 - p), max(p, 1 - p)
    mean, variance = moments(disarm, p)
    np.testing.assert_allclose(mean, p * q * DELTA, rtol=2e-5)
    np.testing.assert_allclose(variance, 0.5 * DELTA**2 * most**2 * least * (1 - 2 * least), rtol=5e-5, atol=1e-15)
    arm_mean, arm_variance = moments(arm, p)
    np.testing.assert_allclose(arm_mean, p * q * DELTA, rtol=2e-5)
    expected = (2 / 3) * DELTA**2 * (1 / 8 - (0.5 - least) ** 3) - DELTA**2 * (p * q) ** 2
    np.testing.assert_allclose(arm_variance, expected, rtol=5e-5)
    assert variance < arm_variance
    two_particles = DELTA**2 * p * q * (0.5 - p * q)  # leave-one-out with as many runs
    assert variance < two_particles
    if p < 0.5:
        assert abs(moments(signed, p)[0] - p * q * DELTA) > 0.1 * p * q * DELTA


class Unpaired(erg.estimators.DisARM):
    """Mutant: the cost is compared with that of the next pair, on the wrong bit."""

    def surrogate(self, site, downstream):
        other = jnp.roll(downstream.cost, 1, axis=0)[:, 0]
        return super().surrogate(site, downstream._replace(cost=downstream.cost.at[:, 1].set(other)))


@pytest.mark.parametrize(
    ("name", "objective", "sites", "coupled"),
    [
        ("discrete", erg.estimators.ELBO, ("z", "b"), False),
        pytest.param("discrete", erg.estimators.ELBO, ("z", "b"), True, marks=pytest.mark.slow),
        pytest.param("nested", erg.estimators.ELBO, ("r", "e"), False, marks=pytest.mark.slow),
        ("mixed", erg.estimators.ELBO, ("z", "c"), True),
        pytest.param("discrete", erg.estimators.IWELBO, ("z", "b"), False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.swept_after(1)
def test_programs_against_enumeration(name, objective, sites, coupled):
    """Bits outside of plates and in them; an error of 30% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.DisARM(coupled) for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    assert_mean(gradients(loss, case, 10_000), exact_gradient(CASES[name], make_exact), smallest_error=0.3)


@pytest.mark.slow
def test_costs_of_the_wrong_pair_are_seen():
    case = CASES["discrete"]()
    wrong = gradients(erg.estimators.ELBO(2, {"b": Unpaired()}), case, 10_000)
    assert np.max(np.abs(z_scores(wrong, exact_gradient(CASES["discrete"], exact_elbo)))) > REJECTION


def test_what_cannot_be_right_is_refused():
    def plan(name, objective, num_particles, sites):
        case = CASES[name]()
        return objective(num_particles, sites).plan(case.model, case.guide, *case.args)

    elbo, error, disarm = erg.estimators.ELBO, erg.estimators.SiteError, erg.estimators.DisARM
    coupled = disarm(coupled=True)
    with pytest.raises(error, match=r"'c' .*it is not Bernoulli"):
        plan("discrete", elbo, 2, {"c": disarm()})
    with pytest.raises(error, match=r"'z' .*needs pairs of particles, and num_particles is 3"):
        plan("mixed", elbo, 3, {"z": coupled})
    with pytest.raises(error, match=r"'c' .*needs one law for both of a pair, and it depends on w"):
        plan("mixed-chain", elbo, 2, {"c": coupled})
    with pytest.raises(error, match=r"'z' .*are independent in IWELBO"):
        plan("mixed", erg.estimators.IWELBO, 2, {"z": coupled})
    assert {row.site: row.runs for row in plan("mixed", elbo, 2, {"z": disarm(), "c": coupled}).rows}["z"] == 2
