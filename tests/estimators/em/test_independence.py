"""Kernels with independent proposals: their transition matrices, exactly, on a latent with three values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.estimators.em import independence
from tests.support.statistics import assert_mean

pytestmark = pytest.mark.usefixtures("x64")

POSTERIOR = np.array([0.6, 0.3, 0.1])
GUIDE = np.array([0.2, 0.3, 0.5])
LOG_WEIGHTS = np.log(POSTERIOR / GUIDE) + 1.7
K = 2
STATES = len(GUIDE)

# all states of the chain with all proposals (B, 1 + K), and the probability of the proposals (B,)
PARTICLES = np.array(list(itertools.product(range(STATES), repeat=1 + K)))
PROPOSED = np.prod(GUIDE[PARTICLES[:, 1:]], axis=1)


def matrix(weights_of_particles):
    """Transition matrix, from weights (1 + K, B) of where the chain is next."""
    transition = np.zeros((STATES, STATES))
    weights = np.asarray(weights_of_particles)
    for k in range(1 + K):
        np.add.at(transition, (PARTICLES[:, 0], PARTICLES[:, k]), PROPOSED * weights[k])
    return transition


def cells():
    """Probability and a point of each cell of the uniforms between whose borders no acceptance changes: all (C, K)."""
    ratios = np.exp(LOG_WEIGHTS[:, None] - LOG_WEIGHTS[None, :]).ravel()
    borders = np.unique(np.round(np.concatenate([[0.0, 1.0], ratios[ratios < 1]]), 12))
    middle, width = (borders[1:] + borders[:-1]) / 2, np.diff(borders)
    return np.array(list(itertools.product(middle, repeat=K))), np.prod(
        list(itertools.product(width, repeat=K)), axis=1
    )


def metropolis_weights(path_of, step):
    """Weights (1 + K, B) of where the chain is after a step, integrated over the uniforms exactly."""
    points, width = cells()
    log_weights = jnp.asarray(LOG_WEIGHTS[PARTICLES.T])

    def path(uniforms):
        return path_of(log_weights, jnp.broadcast_to(uniforms[:, None], (K, len(PARTICLES))))

    paths = np.asarray(jax.jit(jax.vmap(path))(jnp.asarray(points)))[:, step]
    return np.stack([width @ (paths == k) for k in range(1 + K)])


def is_reversible(transition):
    flow = POSTERIOR[:, None] * transition
    return np.allclose(flow, flow.T, atol=1e-12)


def test_conditional_importance_sampling_is_reversible():
    transition = matrix(independence.conditional_weights(jnp.asarray(LOG_WEIGHTS[PARTICLES.T])))
    np.testing.assert_allclose(transition.sum(axis=1), 1, rtol=1e-12)
    assert is_reversible(transition)


def test_without_the_retained_state_it_has_another_law():
    """Self-normalised importance sampling is off by more than a tenth here."""
    weights = independence.conditional_weights(jnp.asarray(LOG_WEIGHTS[PARTICLES[:, 1:].T]))
    law = POSTERIOR @ matrix(np.concatenate([np.zeros((1, len(PARTICLES))), weights]))
    assert np.max(np.abs(law - POSTERIOR)) > 0.1


@pytest.mark.parametrize("step", range(K))
def test_metropolis_steps_are_powers_of_one_reversible_matrix(step):
    transition = matrix(metropolis_weights(independence.metropolis_path, step))
    ratio = np.minimum(1, np.exp(LOG_WEIGHTS[None, :] - LOG_WEIGHTS[:, None]))
    once = GUIDE * ratio
    once += np.diag(1 - once.sum(axis=1))
    np.testing.assert_allclose(transition, np.linalg.matrix_power(once, step + 1), atol=1e-11)
    assert is_reversible(transition)


def test_a_weight_that_is_not_updated_gives_another_law():
    """As in published code: every proposal is compared with the weight that the step began with."""

    def stale(log_weights, uniforms):
        accept = jnp.log(uniforms) < log_weights[1:] - log_weights[:1]
        numbers = jnp.where(accept, jnp.arange(1, K + 1)[:, None], 0)
        return jax.lax.cummax(numbers, axis=0)

    np.testing.assert_allclose(
        matrix(metropolis_weights(stale, 0)), matrix(metropolis_weights(independence.metropolis_path, 0)), atol=1e-12
    )
    law = POSTERIOR @ matrix(metropolis_weights(stale, 1))
    assert np.max(np.abs(law - POSTERIOR)) > 0.02


@pytest.mark.parametrize("kernel", ["conditional_importance", "metropolis_independence"])
def test_moves_are_drawn_by_these_matrices(kernel):
    """State, weights and acceptance of 20,000 moves from one state; an error of 3% would be seen."""
    log_weights = jnp.asarray(LOG_WEIGHTS[np.array([0, 2, 1])])
    keys = jax.random.split(jax.random.key(0), 20_000)
    move = getattr(independence, kernel)
    selection = jax.jit(jax.vmap(lambda key: move(key, log_weights)))(keys)
    if kernel == "conditional_importance":
        next_law = np.asarray(independence.conditional_weights(log_weights))
        mean_weights, accepted = next_law, 1 - next_law[0]
    else:
        a, b = np.exp(LOG_WEIGHTS[[2, 1]] - LOG_WEIGHTS[0])
        first = np.array([1 - a, a, 0])
        next_law = np.array([(1 - a) * (1 - b), 0, (1 - a) * b + a])  # from value 2 the weight only rises
        mean_weights, accepted = (first + next_law) / 2, (a + next_law[2]) / 2
    is_at = np.asarray(selection.index)[:, None] == np.arange(3)
    found = np.concatenate([is_at, selection.weights, selection.accepted[:, None]], axis=1)
    exact = np.concatenate([next_law, mean_weights, [accepted]])
    varies = found.std(axis=0) > 1e-12
    np.testing.assert_allclose(found.mean(axis=0)[~varies], exact[~varies], atol=1e-12)
    assert_mean(found[:, varies], exact[varies], smallest_error=0.03)


def test_both_weights_of_conditional_importance_have_one_mean():
    log_weights = jnp.asarray(LOG_WEIGHTS)
    keys = jax.random.split(jax.random.key(1), 20_000)
    alone = jax.vmap(lambda key: independence.conditional_importance(key, log_weights, rao_blackwell=False).weights)(
        keys
    )
    assert_mean(alone, np.asarray(independence.conditional_weights(log_weights)), smallest_error=0.03)


@pytest.mark.parametrize("kernel", ["conditional_importance", "metropolis_independence"])
def test_weights_out_of_range(kernel):
    """A chain without a state takes what it can get; what is no number is impossible; nothing gives NaN."""
    inf, nan = np.inf, np.nan
    columns = np.array([[-inf, -inf, -1.0], [-inf, -inf, -inf], [0.0, nan, -inf], [inf, 0.0, 1.0], [-inf, nan, 0.5]]).T
    selection = getattr(independence, kernel)(jax.random.key(0), jnp.asarray(columns))
    assert selection.index.tolist() == [2, 0, 0, 0, 2]
    np.testing.assert_allclose(selection.weights.sum(axis=0), [1, 0, 1, 1, 1])
    np.testing.assert_allclose(selection.weights[0], [0, 0, 1, 1, 0])
