"""Policy gradients by enumeration of all samples of small discrete policies, and allocations by brute force."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.estimators import (
    BetaNormalised,
    ExpectedReward,
    MaxAtK,
    PolicyGradient,
    gradient_variance_allocation,
    optimal_allocation,
)
from ergodica.estimators.policy.advantages import beta_normalised, leave_one_out_weights, matched_beta, max_at_k
from tests.support.quadrature import moments
from tests.support.statistics import assert_mean

LOGITS = np.array([0.2, -0.5, 0.4])
REWARDS = np.array([1.3, 0.2, -0.6])
NUM_SAMPLES = 4


class Scripted(eqx.Module):
    """A categorical law of one or several questions whose samples are given beforehand, or drawn."""

    logits: jax.Array
    outcome: jax.Array | None = None

    def sample(self, key, sample_shape):
        if self.outcome is not None:
            return self.outcome
        return jax.random.categorical(key, self.logits, shape=(*sample_shape, *self.logits.shape[:-1]))

    def log_prob(self, value):
        return jnp.sum(jax.nn.one_hot(value, 3) * jax.nn.log_softmax(self.logits)[None], axis=-1)


def reward(y):
    return jnp.asarray(REWARDS)[y]


def all_outcomes(num_samples):
    outcomes = np.array(list(itertools.product(range(3), repeat=num_samples)))
    return outcomes, np.prod(np.asarray(jax.nn.softmax(LOGITS))[outcomes], axis=1)


def by_enumeration(advantage, num_samples=NUM_SAMPLES):
    """Mean and covariance of the shipped gradient over every outcome, and of the value the mean."""
    outcomes, weights = all_outcomes(num_samples)

    def of(outcome):
        gradient = PolicyGradient(lambda logits: Scripted(logits, outcome), reward, num_samples, advantage)
        estimate, _ = gradient.estimate(jax.random.key(0), jnp.asarray(LOGITS), None)
        return estimate.gradient, estimate.value

    gradients, values = jax.jit(jax.vmap(of))(jnp.asarray(outcomes))
    return *moments(gradients, weights), weights @ np.asarray(values)


def exact_max_at_k(k):
    """Gradient and value of E max of k samples, by enumeration of k samples."""
    outcomes = np.array(list(itertools.product(range(3), repeat=k)))
    best = REWARDS[outcomes].max(axis=1)

    def value(logits):
        return jnp.sum(jnp.prod(jax.nn.softmax(logits)[outcomes], axis=1) * best)

    return np.asarray(jax.grad(value)(jnp.asarray(LOGITS))), float(value(jnp.asarray(LOGITS)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.swept_after(1)
def test_best_of_k_by_enumeration(k):
    """Both forms have the gradient of the best of k for their mean; leaving one out has the smaller variance."""
    gradient, value = exact_max_at_k(k)
    plain, left_out = (by_enumeration(MaxAtK(k, leave_one_out=flag)) for flag in (False, True))
    for mean, _, found in (plain, left_out):
        np.testing.assert_allclose(mean, gradient, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(found, value, rtol=1e-12)
    assert np.trace(left_out[1]) < 0.8 * np.trace(plain[1])


@pytest.mark.usefixtures("x64")
def test_expected_reward_by_enumeration():
    """The mean, and for two samples the closed form; the mutant with the mean of all is short by 1 - 1/n."""
    gradient, value = exact_max_at_k(1)
    mean, _, found = by_enumeration(ExpectedReward())
    np.testing.assert_allclose(mean, gradient, rtol=1e-12)
    np.testing.assert_allclose(found, value, rtol=1e-12)

    class IncludesItself(ExpectedReward):
        def weights(self, rewards):
            return (rewards - jnp.mean(rewards, axis=0, keepdims=True)) / rewards.shape[0]

    mean, _, _ = by_enumeration(IncludesItself())
    np.testing.assert_allclose(mean, gradient * (1 - 1 / NUM_SAMPLES), rtol=1e-12)
    rewards = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(leave_one_out_weights(rewards), [1.5, -1.5])


@pytest.mark.usefixtures("x64")
def test_mutants_of_the_best_of_k_are_seen():
    """Crediting the best of all samples, or dropping what larger rewards add, has another mean."""
    gradient, _ = exact_max_at_k(2)

    class BestOfAll(MaxAtK):
        def weights(self, rewards):
            return jnp.broadcast_to(jnp.max(rewards, axis=0) / rewards.shape[0], rewards.shape)

    class OwnRankOnly(MaxAtK):
        def weights(self, rewards):
            ranks = jnp.argsort(jnp.argsort(rewards, axis=0), axis=0)
            return ranks / math.comb(rewards.shape[0], 2) * rewards

    for mutant in (BestOfAll(2), OwnRankOnly(2)):
        mean, _, _ = by_enumeration(mutant)
        assert np.linalg.norm(mean - gradient) > 0.1 * np.linalg.norm(gradient)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_known_formula(k):
    for right in range(8):
        rewards = jnp.asarray(np.arange(7) < right, float)
        np.testing.assert_allclose(
            max_at_k(rewards, k), 1 - math.comb(7 - min(right, 7), k) / math.comb(7, k), atol=1e-14
        )


@pytest.mark.usefixtures("x64")
def test_weights_are_those_of_the_definition():
    """All subsets one by one, with ties and in any order, along the leading axis of two questions."""
    rewards = np.array([[0.3, 1.0], [2.0, 0.0], [0.3, 0.0], [-1.0, 1.0], [0.9, 1.0]])
    for k, flag in itertools.product((2, 3), (False, True)):
        expected = np.zeros_like(rewards)
        for subset in itertools.combinations(range(5), k):
            for i in subset:
                others = [j for j in subset if j != i]
                expected[i] += rewards[list(subset)].max(axis=0) - flag * rewards[others].max(axis=0)
        found = MaxAtK(k, leave_one_out=flag).weights(jnp.asarray(rewards))
        # equal rewards may exchange their weights; their sum is what the definition says
        np.testing.assert_allclose(np.sum(found, axis=0), expected.sum(axis=0) / math.comb(5, k), atol=1e-14)
        distinct = [1, 3, 4]
        np.testing.assert_allclose(np.asarray(found)[distinct, 0], expected[distinct, 0] / math.comb(5, k), atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_beta_normalisation():
    """Known special cases, and parameters from moments that a Beta law has exactly."""
    rewards = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    one, three_halves = jnp.asarray(1.0), jnp.asarray(1.5)
    p = np.asarray(rewards).mean(axis=0)
    np.testing.assert_allclose(beta_normalised(rewards, one, one), np.asarray(rewards) - p, atol=1e-15)
    found = np.asarray(beta_normalised(rewards, three_halves, three_halves))[:, :2]
    np.testing.assert_allclose(
        found, np.pi / 8 * (np.asarray(rewards) - p)[:, :2] / np.sqrt(p * (1 - p))[:2], rtol=1e-12
    )
    np.testing.assert_array_equal(beta_normalised(rewards, three_halves, three_halves)[:, 2], 0.0)
    a, b = 2.0, 5.0
    m, v = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    rates = m + np.sqrt(v) * jnp.array([1.0, -1.0])
    np.testing.assert_allclose(matched_beta(rates), [1 + a / 3, 1 + b / 3], rtol=1e-12)
    np.testing.assert_allclose(matched_beta(jnp.array([0.0, 1.0])), [1, 1])  # as spread as can be: uniform
    np.testing.assert_allclose(matched_beta(jnp.full(3, 0.25), 60.0), [1 + 15 / 3, 1 + 45 / 3])  # no spread: the bound
    np.testing.assert_allclose(matched_beta(jnp.ones(3)), [1, 1])


@pytest.mark.usefixtures("x64")
def test_beta_normalisation_is_biased():
    """Two questions, three samples each, all 64 outcomes of rewards 0 and 1: how far the mean is from that of leave-one-out."""
    p = np.array([0.2, 0.6])
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=6))).reshape(-1, 3, 2)
    weights = np.prod(np.where(outcomes == 1, p, 1 - p), axis=(1, 2))

    def mean(advantage):
        """Of the gradient with respect to the logits, where the score is y - p: exactly p (1 - p) if unbiased."""
        found = jax.vmap(lambda r: jnp.sum(advantage.weights(r) * (r - p[None]), axis=0))(jnp.asarray(outcomes))
        return weights @ np.asarray(found)

    exact = p * (1 - p)
    np.testing.assert_allclose(mean(ExpectedReward()), exact, rtol=1e-12)
    ratio = mean(BetaNormalised()) / exact
    assert np.all(np.abs(ratio - 1) > 0.02)
    assert abs(ratio[0] / ratio[1] - 1) > 0.02  # its direction differs too


@pytest.mark.usefixtures("x64")
def test_drawn_samples_give_the_gradient():
    """Two questions, 3,000 estimates; errors of 15% are seen."""
    logits = jnp.stack([jnp.asarray(LOGITS), -jnp.asarray(LOGITS)])
    estimator = PolicyGradient(Scripted, reward, 8, MaxAtK(2))
    keys = jax.random.split(jax.random.key(3), 3000)
    found = jax.jit(jax.vmap(lambda key: estimator.estimate(key, logits, None)[0].gradient))(keys)
    exact, _ = exact_max_at_k(2)
    assert_mean(np.asarray(found)[:, 0], exact / 2, smallest_error=0.15)


def test_bad_policies_are_refused():
    def estimate(reward, advantage=None):
        return PolicyGradient(Scripted, reward, 4, advantage).estimate(jax.random.key(0), jnp.zeros(3), None)

    with pytest.raises(ValueError, match="num_samples must be at least 4; got 3"):
        PolicyGradient(Scripted, reward, 3, MaxAtK(4))
    with pytest.raises(ValueError, match="For k=1 use ExpectedReward"):
        MaxAtK(1)
    with pytest.raises(TypeError, match="reward must return floating point"):
        estimate(lambda y: y)
    with pytest.raises(ValueError, match="leading axis 4"):
        estimate(lambda y: jnp.sum(y.astype(float)))
    with pytest.raises(ValueError, match="shape of the log probabilities"):
        estimate(lambda y: jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="several questions"):
        estimate(lambda y: y.astype(float), BetaNormalised())


@pytest.mark.parametrize("total", [4, 7, 12])
def test_allocation_is_optimal_by_brute_force(total):
    deviations = np.array([1.0, 2.5, 0.4, 0.0, 1.7])
    used = np.flatnonzero(deviations)

    def variance(numbers):
        return np.sum(deviations[used] ** 2 / numbers)

    found = optimal_allocation(deviations, total)
    assert found.sum() == total
    assert found[3] == 0
    every = (n for n in itertools.product(range(1, total), repeat=4) if sum(n) == total)
    assert variance(found[used]) <= min(variance(np.array(n)) for n in every) * (1 + 1e-12)
    if total == 12:
        even = np.full(4, 3)  # the mutant: the same for all
        assert variance(even) > 1.15 * variance(found[used])


def test_gradient_variance_allocation():
    """Shares of the formula for many samples; parts that cannot be helped get none."""
    norms, rates = np.array([1.0, 2.0, 0.5, 3.0, 0.0]), np.array([0.5, 0.1, 0.9, 0.0, 0.5])
    s = norms[:3] / np.sqrt(rates[:3] + 1e-3 / rates[:3])
    found = gradient_variance_allocation(norms, rates, 100_000)
    np.testing.assert_allclose(found[:3] / 100_000, s / s.sum(), atol=2e-5)
    assert found[3:].tolist() == [0, 0]
    with pytest.raises(ValueError, match="total must be at least 3; got 2"):
        gradient_variance_allocation(norms, rates, 2)
    with pytest.raises(ValueError, match="acceptance_rates must be between 0 and 1"):
        gradient_variance_allocation([1.0], [1.5], 2)
    with pytest.raises(ValueError, match="deviations must be one finite value"):
        optimal_allocation([0.0, 0.0], 3)
