"""Persistent evolution strategies and ES-Single on unrolled systems whose moments are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import rng, tree
from ergodica.estimators import EvolutionSingle, EvolutionStrategy, PersistentEvolution
from tests.support.quadrature import moments, normal_rule, normals
from tests.support.statistics import REJECTION, THRESHOLD, z_scores

CLASSES = [PersistentEvolution, EvolutionSingle]
NUM_STEPS, WINDOW = 4, 2
TRANSITION = np.array([[0.9, 0.2], [-0.3, 0.8]])
INPUT = np.array([[1.0, 0.5], [-0.4, 0.7]])
SLOPE, CURVATURE = np.array([0.6, -1.1]), np.array([[1.4, 0.3], [0.3, 0.8]])
THETA = np.array([0.5, -0.3])


def linear_system(params, inner, index):
    """A linear recursion that is fed the parameters, and a quadratic objective of its state, with a weight of each step."""
    inner = TRANSITION @ inner + INPUT @ params
    weight = 1.0 + 0.5 * index.astype(inner.dtype)
    return inner, weight * (SLOPE @ inner - inner @ CURVATURE @ inner / 2)


def exact_windows(steps_seen=None):
    """Gradient of each window's objective, by linear algebra; ``steps_seen`` of them count towards the derivative, all by default.

    The inner state after step t is s_t, its derivative J_t = A J_{t-1} + B, which a truncated method sets to 0 at a window's start.
    """
    state, jacobian, gradients = np.array([0.2, -0.1]), np.zeros((2, 2)), []
    for window in range(NUM_STEPS // WINDOW):
        if steps_seen == "window":
            jacobian = np.zeros((2, 2))
        total = np.zeros(2)
        for index in range(window * WINDOW, (window + 1) * WINDOW):
            state, jacobian = TRANSITION @ state + INPUT @ THETA, TRANSITION @ jacobian + INPUT
            total += (1 + 0.5 * index) * jacobian.T @ (SLOPE - CURVATURE @ state)
        gradients.append(total)
    return np.array(gradients)


class Forgetful(PersistentEvolution):
    """The mutant: truncated ES, which holds a window against its own perturbation alone."""

    def perturb(self, fresh, before, starts):
        return fresh, fresh


def make(cls, step=linear_system, num_pairs=1, **options):
    settings = {"num_steps": NUM_STEPS, "window": WINDOW, "sigma": 0.4} | options
    return cls(step, jnp.array([0.2, -0.1]), num_pairs=num_pairs, **settings)


def episode(estimator, vectors, params):
    """Gradients (windows, D) of one episode that is driven by given normals (windows, D)."""
    state, found = estimator.init(jax.random.key(0), params), []
    for vector in vectors:
        with rng.normals_from(normals(vector)):
            estimate, state = estimator.estimate(jax.random.key(1), params, state)
        found.append(tree.ravel(estimate.gradient))
    return jnp.stack(found)


def all_episodes(estimator, num_windows, params):
    """Gradients (P, windows, D) at every point of the rule for all normals of an episode, with weights (P,)."""
    points, weights = normal_rule(num_windows * params.size)
    points = jnp.asarray(points.reshape(-1, num_windows, params.size))
    return np.asarray(jax.jit(jax.vmap(lambda v: episode(estimator, v, params)))(points)), weights


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cls", CLASSES)
def test_no_truncation_bias_on_a_linear_system(cls):
    """Every perturbation of both windows: the mean is the gradient of each window, to rounding."""
    found, weights = all_episodes(make(cls), 2, jnp.asarray(THETA))
    exact = exact_windows()
    reference = jax.grad(lambda p: whole(p))(jnp.asarray(THETA))
    np.testing.assert_allclose(exact.sum(axis=0), reference, rtol=1e-12)
    np.testing.assert_allclose(np.tensordot(weights, found, 1), exact, rtol=1e-11)


def whole(params):
    inner, total = jnp.array([0.2, -0.1]), 0.0
    for index in range(NUM_STEPS):
        inner, value = linear_system(params, inner, jnp.asarray(index))
        total = total + value
    return total


@pytest.mark.usefixtures("x64")
def test_truncated_evolution_is_biased_as_linear_algebra_says():
    """The mutant: its mean is the derivative within the window alone, and in the second window that is far off."""
    found, weights = all_episodes(make(Forgetful), 2, jnp.asarray(THETA))
    mean, truncated, exact = np.tensordot(weights, found, 1), exact_windows("window"), exact_windows()
    np.testing.assert_allclose(mean, truncated, rtol=1e-11)
    np.testing.assert_allclose(mean[0], exact[0], rtol=1e-11)
    assert np.linalg.norm(mean[1] - exact[1]) > 0.3 * np.linalg.norm(exact[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cls", CLASSES)
def test_variance_along_an_episode(cls):
    """Objective g·θ at each of three windows, d = 2: each window, and the sum over the episode."""
    g, num_windows, d = jnp.array([0.8, -1.5]), 3, 2
    estimator = make(cls, lambda p, inner, index: (inner, g @ p), num_steps=num_windows, window=1)
    found, weights = all_episodes(estimator, num_windows, jnp.zeros(2))
    square = float(g @ g)
    total = [np.trace(moments(found[:, t], weights)[1]) for t in range(num_windows)]
    summed = np.trace(moments(found.sum(axis=1), weights)[1])
    if cls is EvolutionSingle:
        np.testing.assert_allclose(total, [square * (d + 1)] * num_windows, rtol=1e-11)
        np.testing.assert_allclose(summed, num_windows**2 * square * (d + 1), rtol=1e-11)
    else:
        np.testing.assert_allclose(total, [square * (t * d + 1) for t in (1, 2, 3)], rtol=1e-11)
        assert summed < 0.8 * num_windows**2 * square * (d + 1)


@pytest.mark.usefixtures("x64")
def test_pairs_average_and_episodes_begin_anew():
    """Shipped key handling: 300 episodes of 8 pairs; errors of 10% are seen, truncation is. The second episode is as the first."""
    params, exact = jnp.asarray(THETA), exact_windows().ravel()

    def run(estimator):
        def one(key):
            def body(state, key):
                estimate, state = estimator.estimate(key, params, state)
                return state, estimate.gradient

            return jax.lax.scan(body, estimator.init(key, params), jax.random.split(key, 4))[1].reshape(2, -1)

        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(2), 300)))

    for cls in (*CLASSES, Forgetful):
        found = run(make(cls, num_pairs=8))
        for one_episode in (found[:, 0], found[:, 1]):
            z = z_scores(one_episode, exact)
            if cls is Forgetful:
                assert np.abs(z).max() > REJECTION
            else:
                assert np.abs(z).max() < THRESHOLD


@pytest.mark.usefixtures("x64")
@pytest.mark.sweep
def test_compare_gradients_takes_them():
    """One window is the whole episode here, and all three agree with each other; costs are calls of step."""
    estimators = {cls.__name__: make(cls, window=NUM_STEPS, num_pairs=16) for cls in CLASSES}
    estimators["ES"] = EvolutionStrategy(whole, 0.4, 16)
    table = erg.compare_gradients(jax.random.key(0), estimators, jnp.asarray(THETA), num_repeats=960, num_timings=0)
    assert table.attrs["reference"] == "pooled"
    assert table.verdict.sel(point=0).values.tolist() == ["unbiased"] * 3
    assert table.datum_gradients.sel(point=0).values.tolist() == [2 * 16 * NUM_STEPS] * 2 + [2 * 16]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_steps must be a multiple of window, 3; got 4"):
        make(PersistentEvolution, window=3)
    with pytest.raises(TypeError, match="step must be a function"):
        make(EvolutionSingle, step=3.0)
    with pytest.raises(ValueError, match="initial must hold at least one array"):
        PersistentEvolution(linear_system, None, num_steps=2, window=1, sigma=0.1)
    estimator = make(PersistentEvolution, step=lambda p, inner, index: (inner, p))
    with pytest.raises(ValueError, match="The second value of step must return a scalar"):
        estimator.estimate(jax.random.key(0), jnp.ones(2), estimator.init(jax.random.key(1), jnp.ones(2)))
