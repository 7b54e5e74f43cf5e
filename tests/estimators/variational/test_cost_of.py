"""Costs at values of an estimator's own: what the program has there, on all branches of other sites, and under weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.estimators import ELBO, IWELBO, REBAR, RODEO, DoubleControlVariate, Enumerate, MuProp
from ergodica.estimators.variational.facts import Draw
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.relaxation import log_mass
from tests.support.exact_programs import CASES, exact_elbo
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


class Looks(AbstractSiteEstimator):
    """Draws bits, keeps what it is told, and probes the other value on a branch of its own as well."""

    branches: int = eqx.field(static=True)

    def num_branches(self, site):
        return self.branches

    def num_reruns(self, site):
        return 1

    def draw(self, key, fn, branch, site, noise):
        bit = jax.lax.stop_gradient(fn(rng_key=key)).astype(float)
        value = jnp.where(branch == 0, bit, 1 - bit)
        return Draw(value, value)

    def log_prob(self, fn, value, intermediates=None):
        return log_mass(fn, value)

    def surrogate(self, site, downstream):
        value, cost = downstream.record, downstream.cost
        same, other = downstream.cost_of(value), downstream.cost_of(1 - value)
        LOOKED.append((cost, same, other))
        return 0.0 * jnp.sum(cost)


LOOKED = []


def look(loss, case, params):
    """What the estimator saw."""
    LOOKED.clear()
    loss.loss(jax.random.key(1), params, case.model, case.guide, *case.args)
    return LOOKED.pop()


@pytest.mark.parametrize(
    ("objective", "site", "sites"),
    [
        (ELBO, "c", {"z": Enumerate()}),
        pytest.param(ELBO, "z", {"c": Enumerate()}, marks=pytest.mark.sweep),
        pytest.param(ELBO, "c", {"z": REBAR()}, marks=pytest.mark.sweep),
        pytest.param(IWELBO, "c", {}, marks=pytest.mark.sweep),
    ],
)
def test_it_is_the_cost_of_a_branch(objective, site, sites):
    """At the draw it is the cost of branch 0, and at the other value that of a branch which has it; with other sites' branches."""
    case = CASES["mixed-chain"]()
    for branches in (1, 2):
        loss = objective(3, {site: Looks(branches), **sites})
        cost, same, other = jax.jit(lambda params, loss=loss: look(loss, case, params))(case.params)
        np.testing.assert_allclose(same, cost, rtol=1e-12)
        if branches == 2:
            np.testing.assert_allclose(other, cost[:, ::-1], rtol=1e-12)
            assert np.max(np.abs(cost[:, 0] - cost[:, 1])) > 0.1


def test_parameters_are_held_and_values_are_not():
    """No derivative by the parameters; by the value that of the program."""
    case = CASES["mixed"]()

    class Differentiates(Looks):
        def surrogate(self, site, downstream):
            value = downstream.record
            slope = jax.grad(lambda v: jnp.sum(downstream.cost_of(v)))(value)
            steps = (downstream.cost_of(value + h) for h in (1e-5, -1e-5))
            LOOKED.append((slope, (next(steps) - next(steps)) / 2e-5))
            return jnp.sum(downstream.cost_of(value))

    def loss(estimator):
        return ELBO(2, {"z": erg.estimators.Score(), "c": estimator})

    @jax.jit
    def of(estimator):
        value = lambda p: loss(estimator).loss(jax.random.key(1), p, case.model, case.guide, *case.args)  # noqa: E731
        return jax.grad(value)(case.params)

    class Nothing(Looks):
        def surrogate(self, site, downstream):
            return 0.0 * jnp.sum(downstream.cost)

    jax.tree.map(np.testing.assert_array_equal, of(Differentiates(1)), of(Nothing(1)))
    slope, by_steps = jax.jit(lambda params: look(loss(Differentiates(1)), case, params))(case.params)
    np.testing.assert_allclose(slope, by_steps, rtol=1e-6, atol=1e-8)
    assert np.max(np.abs(slope)) > 0.1


def test_runs_are_counted():
    case = CASES["mixed-chain"]()
    loss = ELBO(3, {"z": Enumerate(), "c": MuProp()})
    plan = loss.plan(case.model, case.guide, *case.args)
    assert {row.site: row.runs for row in plan.rows} == {"z": 2, "w": 1, "c": 2}
    assert "12 runs of model and guide" in plan.title
    gradient, counted = erg.estimators.VariationalGradient(loss, case.model, case.guide, *case.args), []

    def probe():
        estimate = gradient.probe(jax.random.key(0), case.params, {})
        counted.append(estimate.n_grad)
        return estimate.gradient

    jax.eval_shape(probe)
    assert counted == [12]


@pytest.mark.sweep
@pytest.mark.parametrize(
    "estimator", [REBAR(0.5), MuProp(), DoubleControlVariate(0.8), RODEO()], ids=lambda e: type(e).__name__
)
def test_below_an_enumerated_site(estimator):
    """Bits whose law depends on a site that is summed over; an error of 30% of the largest entry would be seen."""
    found = gradients(ELBO(3, {"z": Enumerate(), "c": estimator}), CASES["mixed-chain"](), 6_000)
    assert_mean(found, exact_gradient(CASES["mixed-chain"], exact_elbo), smallest_error=0.3)
