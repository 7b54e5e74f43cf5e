"""DARN: its mean by enumeration (exact for quadratic costs, and the trapezoidal rule for others), and ReinMax's at a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from ergodica.estimators.variational.sites.reinmax import reinmax
from ergodica.estimators.variational.sites.relaxation import cost_and_slope
from tests.support.exact_programs import CASES, exact_elbo, exact_iwelbo
from tests.support.forced_bits import LOGITS, enumerated, exact_gradient_of, joint_cost
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


class OneSignal(erg.estimators.DARN):
    """Mutant: the expansions of all bits on the score of each, which is biased where a quadratic cost mixes bits."""

    def surrogate(self, site, downstream):
        log_probs, one_hot = downstream.record
        _, slope = cost_and_slope(site, downstream, one_hot)
        signal = jnp.sum(slope[..., 1:] * (one_hot[..., 1:] - 0.5), axis=(-2, -1), keepdims=True)
        return jax.lax.stop_gradient(signal) * jnp.sum(one_hot * log_probs, axis=-1, keepdims=True)


def quadratic(x):
    """A quadratic form that mixes the bits."""
    form = jnp.array([[0.7, -1.1, 0.4], [0.2, 0.5, 0.9], [-0.3, 0.8, -0.6]])
    return x @ form @ x + jnp.array([0.3, -0.2, 1.0]) @ x


def test_exact_for_quadratic_costs():
    """Three bits, over all outcomes; not so the mutant, nor the estimator itself for another cost."""
    exact = exact_gradient_of(LOGITS, quadratic)
    np.testing.assert_allclose(enumerated(erg.estimators.DARN(), LOGITS, quadratic, 1)[0], exact, rtol=1e-10)
    assert np.max(np.abs(enumerated(OneSignal(), LOGITS, quadratic, 1)[0] - exact)) > 0.05
    biased = enumerated(erg.estimators.DARN(), LOGITS, joint_cost, 1)[0]
    assert np.max(np.abs(biased - exact_gradient_of(LOGITS, joint_cost))) > 0.01


def test_it_is_reinmax_at_a_bit_and_the_trapezoidal_rule_on_average():
    """f'(b)(b - 1/2)(b - p), draw by draw; its mean is pq (f'(0) + f'(1)) / 2."""
    phi, p = np.array([0.6]), 1 / (1 + np.exp(-0.6))
    cost = lambda x: jnp.exp(1.2 * x[0]) - 0.5  # noqa: E731
    slopes = [float(jax.grad(lambda b: cost(b[None]))(1.0 * b)) for b in (0, 1)]
    mean, variance = enumerated(erg.estimators.DARN(), phi, cost, 1)
    np.testing.assert_allclose(mean, p * (1 - p) * sum(slopes) / 2, rtol=1e-12)
    by_bit = []
    for b in (0, 1):

        def value(phi, b=b):
            log_probs = jnp.stack([jax.nn.log_sigmoid(-phi), jax.nn.log_sigmoid(phi)])
            return cost(reinmax(log_probs, jnp.array([1.0 - b, b]))[1:])

        by_bit.append(float(jax.grad(value)(phi[0])))
        np.testing.assert_allclose(by_bit[b], slopes[b] * (b - 0.5) * (b - p), rtol=1e-12)
    np.testing.assert_allclose(variance, p * (1 - p) * (by_bit[1] - by_bit[0]) ** 2, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "objective", "sites"),
    [
        pytest.param("discrete", erg.estimators.ELBO, ("b",), marks=pytest.mark.sweep),
        pytest.param("mixed", erg.estimators.ELBO, ("z", "c"), marks=pytest.mark.sweep),
        pytest.param("nested", erg.estimators.ELBO, ("e",), marks=pytest.mark.sweep),
    ],
)
def test_programs_whose_costs_are_quadratic(name, objective, sites):
    """Normal likelihoods of sums of bits: no bias, and an error of 40% of the largest entry would be seen."""
    loss = objective(2, {site: erg.estimators.DARN() for site in sites})
    case, make_exact = CASES[name](), exact_elbo if loss.linear else exact_iwelbo
    assert_mean(gradients(loss, case, 6_000), exact_gradient(CASES[name], make_exact), smallest_error=0.4)


def test_refuses_plates_that_terms_are_outside_of_and_vectors():
    case = CASES["nested"]()
    loss = erg.estimators.ELBO(2, {"r": erg.estimators.DARN()})
    with pytest.raises(erg.estimators.SiteError, match=r"'r' .*outside of plate rows"):
        loss.plan(case.model, case.guide, *case.args)

    def one_hot():
        numpyro.sample("z", dist.Multinomial(1, probs=jnp.array([0.2, 0.3, 0.5])))

    with pytest.raises(erg.estimators.SiteError, match=r"'z' .*half way is between two values.*ReinMax"):
        erg.estimators.ELBO(2, {"z": erg.estimators.DARN()}).plan(one_hot, one_hot)
