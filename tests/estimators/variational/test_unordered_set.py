"""Unordered sets: exact over all draws without replacement, beside leave-one-out, and equal to enumeration at full size."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ergodica.core import tree
from ergodica.estimators import ELBO, IWELBO, Enumerate, LeaveOneOut, SiteError, UnorderedSet, expectation_gradient
from ergodica.estimators.variational.sites import unordered_set
from ergodica.estimators.variational.sites.unordered_set import set_weights
from tests.support.exact_programs import CASES, exact_elbo
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

LOGITS, COSTS = np.array([0.9, -0.4, 0.2, -1.3]), np.array([1.2, 3.0, -0.7, 2.1])


def orders(size):
    """All draws without replacement (n, size), and their probabilities."""
    draws = np.array(list(itertools.permutations(range(4), size)))
    p = np.asarray(jax.nn.softmax(LOGITS))[draws]
    left = 1 - np.concatenate([np.zeros((len(p), 1)), np.cumsum(p, axis=1)[:, :-1]], axis=1)
    return draws, np.prod(p / left, axis=1)


def over_all_draws(size, f=lambda z: jnp.asarray(COSTS)[z], weights=set_weights):
    """Mean and total variance of the shipped estimate, over all draws of the set."""
    draws, p = orders(size)

    def one(draw):
        with (
            mock.patch.object(unordered_set, "draw_set", return_value=draw),
            mock.patch.object(unordered_set, "set_weights", weights),
        ):
            return expectation_gradient(
                jax.random.key(0), jnp.asarray(LOGITS), lambda t: dist.Categorical(logits=t), f, UnorderedSet(size)
            ).gradient

    found = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(draws)))
    mean = p @ found
    return mean, p @ np.sum((found - mean) ** 2, axis=1)


def exact_mean(f=lambda z: jnp.asarray(COSTS)[z]):
    return np.asarray(jax.grad(lambda t: jax.nn.softmax(t) @ jax.vmap(f)(jnp.arange(4)))(jnp.asarray(LOGITS)))


def leave_one_out_variance(size):
    """Total variance of leave-one-out with that many particles, over all draws."""
    p, f = np.asarray(jax.nn.softmax(LOGITS)), np.asarray(COSTS)
    draws = np.array(list(itertools.product(range(4), repeat=size)))
    weight, cost = np.prod(p[draws], axis=1), f[draws]
    signal = (cost - cost.mean(axis=1, keepdims=True)) * size / (size - 1)
    found = np.mean(signal[..., None] * (np.eye(4)[draws] - p), axis=1)
    return weight @ np.sum((found - weight @ found) ** 2, axis=1)


def normalised(log_probs, log_rest):
    """Mutant: probabilities normalised over the set, in the place of the ratio."""
    return set_weights(log_probs, log_rest)._replace(log_weight=jax.nn.log_softmax(log_probs, axis=-1))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_unbiased_over_all_draws_and_better_than_leave_one_out(size):
    mean, variance = over_all_draws(size)
    np.testing.assert_allclose(mean, exact_mean(), atol=1e-12)
    assert 0 < variance < 0.8 * leave_one_out_variance(size)


def test_set_of_all_values_has_no_noise():
    mean, variance = over_all_draws(4)
    np.testing.assert_allclose(mean, exact_mean(), atol=1e-12)
    assert variance < 1e-24


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_a_constant_in_the_cost_adds_no_noise(size):
    """Weights, and those of each baseline, sum to one."""
    shifted = over_all_draws(size, lambda z: jnp.asarray(COSTS)[z] + 10.0)
    np.testing.assert_allclose(shifted[1], over_all_draws(size)[1], rtol=1e-9)


def test_normalised_probabilities_are_seen_to_be_biased():
    mean, _ = over_all_draws(2, weights=normalised)
    assert np.max(np.abs(mean - exact_mean())) > 0.03 * np.max(np.abs(exact_mean()))


def test_probabilities_of_sets_sum_to_one():
    """Unordered, over all sets of three of four: ``p(S)`` is the weight's denominator."""
    log_p, total = jax.nn.log_softmax(LOGITS), 0.0
    for members in itertools.combinations(range(4), 3):
        rest = jax.nn.logsumexp(jnp.delete(log_p, np.array(members)))
        weights = set_weights(log_p[jnp.array(members)], rest)
        draws, p = orders(3)
        probability = sum(p[i] for i, draw in enumerate(draws) if set(draw) == set(members))
        first = sum(p[i] for i, draw in enumerate(draws) if set(draw) == set(members) and draw[0] == members[0])
        np.testing.assert_allclose(jnp.exp(weights.log_weight[0]), first / probability, rtol=1e-12)
        total += probability
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixed-chain", {"z": 2, "c": 2}),
        pytest.param("discrete", {"z": 2, "c": 3, "b": 4}, marks=pytest.mark.slow),
        pytest.param("nested", {"r": 4, "e": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.swept_after(1)
def test_full_sets_are_enumeration_number_by_number(name, sizes):
    """Value, and gradient by all parameters, of sites with plates, joint elements, and others downstream."""
    case = CASES[name]()

    @jax.jit
    def run(key):
        def value_and_gradient(sites):
            loss = ELBO(2, sites)
            return jax.value_and_grad(lambda p: loss.loss(key, p, case.model, case.guide, *case.args))(case.params)

        return [
            value_and_gradient({n: make(s) for n, s in sizes.items()}) for make in (UnorderedSet, lambda _: Enumerate())
        ]

    (value, gradient), (exact, exact_gradient) = run(jax.random.key(1))
    np.testing.assert_allclose(value, exact, rtol=1e-10)
    np.testing.assert_allclose(tree.ravel(gradient), tree.ravel(exact_gradient), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("discrete", {"c": UnorderedSet(2), "b": UnorderedSet(2)}),
        pytest.param("nested", {"r": UnorderedSet(3), "e": Enumerate()}, marks=pytest.mark.slow),
        pytest.param("plated", {"z": Enumerate(), "c": UnorderedSet(2)}, marks=pytest.mark.slow),
        pytest.param(
            "discrete", {"z": LeaveOneOut(), "c": UnorderedSet(2), "b": LeaveOneOut()}, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.swept_after(1)
def test_programs_against_enumeration(name, sites):
    """Against enumeration times quadrature; an error of 30% of the largest entry would be seen."""
    found = gradients(ELBO(2, sites), CASES[name](), 6_000)
    assert_mean(found, exact_gradient(CASES[name], exact_elbo), smallest_error=0.3)


def test_values_that_cannot_be_drawn_have_no_weight():
    """Two of four values have probability zero: a set of three holds both others, and has the exact derivative."""
    logits = jnp.array([0.3, -jnp.inf, -0.5, -jnp.inf])

    def weights(key):
        log_probs = jnp.maximum(jax.nn.log_softmax(logits), jnp.log(jnp.finfo(float).tiny))
        members = unordered_set.draw_set(key, log_probs, 3)
        rest = jax.nn.logsumexp(log_probs.at[members].set(-jnp.inf))
        found = set_weights(log_probs[members], rest)
        return jnp.zeros(4).at[members].set(jnp.exp(found.log_weight))

    found = jax.vmap(weights)(jax.random.split(jax.random.key(0), 20))
    np.testing.assert_allclose(found, np.broadcast_to(jax.nn.softmax(logits), found.shape), atol=1e-12)


def test_refusals_say_why():
    case = CASES["discrete"]()
    with pytest.raises(SiteError, match=r"'b' .*size is 5, and it has 4 values\. Use Enumerate"):
        ELBO(2, {"b": UnorderedSet(5)}).plan(case.model, case.guide, *case.args)
    with pytest.raises(SiteError, match="is no mean over particles"):
        IWELBO(2, {"z": UnorderedSet(2)}).plan(case.model, case.guide, *case.args)
    with pytest.raises(ValueError, match=r"size must be between 2 and 12; got 13\. The baseline takes two"):
        UnorderedSet(13)

    def count():
        numpyro.sample("n", dist.Poisson(2.0))

    with pytest.raises(SiteError, match="its support cannot be listed"):
        ELBO(2, {"n": UnorderedSet(2)}).plan(count, count)
    plan = ELBO(3, {"c": UnorderedSet(2), "*": Enumerate()}).plan(case.model, case.guide, *case.args)
    assert {row.site: row.runs for row in plan.rows} == {"z": 2, "c": 2, "b": 4}
