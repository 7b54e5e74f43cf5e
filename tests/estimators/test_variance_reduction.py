"""SVRG, its recentring sibling and SAGA: unbiased over a partition at every state, and exact where theory says so."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.estimators import SAGA, SVRG, ControlVariate, Minibatch, RecentringControlVariate
from ergodica.estimators.minibatch import saga as saga_module
from ergodica.estimators.minibatch.reshuffle import Cursor
from ergodica.estimators.minibatch.subsample import MinibatchState
from ergodica.estimators.minibatch.svrg import AbstractMovingControlVariate
from ergodica.samplers import SGLD
from tests.support.chains import time_averages
from tests.support.problems import gaussian_mean, logistic_regression
from tests.support.statistics import assert_mean

THETA = (0.3, -1.2, 0.8)
MOVING = (SVRG, RecentringControlVariate)
ALL = (*MOVING, SAGA)


def full(posterior, theta):
    return jax.value_and_grad(posterior.log_density)(theta)


def path(length, seed=3):
    """Positions of a chain that goes somewhere."""
    return jnp.array(THETA)[None] + jnp.cumsum(0.3 * jax.random.normal(jax.random.key(seed), (length, 3)), axis=0)


def states_on_the_way(estimator, positions):
    """The state before the first call and after each one."""
    state = estimator.init(jax.random.key(0), positions[0])
    states, estimate = [state], jax.jit(lambda e, *args: e.estimate(*args))
    for i, theta in enumerate(positions):
        _, state = estimate(estimator, jax.random.fold_in(jax.random.key(1), i), theta, state)
        states.append(state)
    return states


def at_each_block(estimator, theta, state):
    """Estimates at one state from each block in turn: (K,) values and (K, ...) gradients."""

    def at_place(j):
        cursor = Cursor(jnp.array([5, 9], jnp.uint32), j)
        with_cursor = (
            state._replace(cursor=cursor)
            if isinstance(estimator, SAGA)
            else state._replace(minibatch=MinibatchState(cursor))
        )
        estimate, _ = estimator.estimate(jax.random.key(7), theta, with_cursor)
        return estimate.value, estimate.gradient

    return jax.vmap(at_place)(jnp.arange(estimator.minibatch.num_blocks, dtype=jnp.int32))


def assert_unbiased_on_the_way(estimator, num_epochs=2):
    """Over the partition into blocks, at every state of some epochs, mid-epoch ones included."""
    posterior, num_blocks = estimator.posterior, estimator.minibatch.num_blocks
    theta = jnp.array([-0.5, 0.1, 1.0])
    value, gradient = full(posterior, theta)
    traced_anew = jax.jit(lambda *args: at_each_block(*args))  # mutants replace what it calls
    for state in states_on_the_way(estimator, path(num_epochs * num_blocks + 1)):
        values, gradients = traced_anew(estimator, theta, state)
        np.testing.assert_allclose(np.mean(gradients, axis=0), gradient, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.mean(values), value, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("num_data", "batch_size", "with_centre"), [(12, 3, True), (13, 5, False)])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.swept_after(3)
def test_blocks_average_to_the_full_gradient_at_every_state(kind, num_data, batch_size, with_centre):
    minibatch = Minibatch(logistic_regression(num_data), batch_size)
    assert_unbiased_on_the_way(kind(minibatch, centre=jnp.array([0.5, 0.5, -0.5]) if with_centre else None))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", MOVING)
def test_rows_average_to_the_full_gradient_with_uniform_batches(kind):
    """The pass for the next centre walks over blocks of rows, whatever the batches are."""
    posterior, theta = logistic_regression(13), jnp.array(THETA)
    estimator = kind(Minibatch(posterior, 5, "uniform"))
    value, gradient = full(posterior, theta)
    rows = Batch(jax.tree.map(lambda x: x[:, None], posterior.data), jnp.ones((13, 1)))
    at_row = jax.jit(
        jax.vmap(lambda row, state: estimator.estimate(jax.random.key(0), theta, state, row)[0], (0, None))
    )
    for state in states_on_the_way(estimator, path(7)):
        estimates = at_row(rows, state)
        np.testing.assert_allclose(np.mean(estimates.gradient, axis=0), gradient, rtol=1e-12)
        np.testing.assert_allclose(np.mean(estimates.value), value, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mutant", ["stale gradient", "weight of a block left out"])
@pytest.mark.parametrize("kind", MOVING)
def test_mutants_of_the_snapshot_are_rejected(kind, mutant, monkeypatch):
    walk = AbstractMovingControlVariate._walk

    def wrong(self, state, params, block):
        if mutant == "weight of a block left out":
            block = block._replace(weight=jnp.full_like(block.weight, 1 / block.weight.shape[0]))
            return walk(self, state, params, block)
        after = walk(self, state, params, block)
        return after._replace(active=after.active._replace(full=state.active.full))

    estimator = kind(Minibatch(logistic_regression(13), 5))
    monkeypatch.setattr(AbstractMovingControlVariate, "_walk", wrong)
    with pytest.raises(AssertionError):
        assert_unbiased_on_the_way(estimator)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mutant", ["row not entered", "mean not updated"])
def test_mutants_of_the_table_are_rejected(mutant, monkeypatch):
    estimator = SAGA(Minibatch(logistic_regression(13), 5))
    if mutant == "row not entered":
        monkeypatch.setattr(jax.lax, "dynamic_update_index_in_dim", lambda rows, x, index, axis: rows)
    else:
        monkeypatch.setattr(saga_module.tree, "axpy", lambda factor, x, y: y)
    with pytest.raises(AssertionError):
        assert_unbiased_on_the_way(estimator)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["blocks", "uniform"])
@pytest.mark.parametrize("kind", MOVING)
def test_centres_follow_the_chain(kind, scheme):
    """In use is the last position, or the mean, of the pass before the last; its gradient is that of all the data."""
    posterior, theta = logistic_regression(13), jnp.array(THETA)
    minibatch = Minibatch(posterior, 5, scheme)
    estimator, num_blocks = kind(minibatch, centre=theta), minibatch.num_blocks
    positions = path(4 * num_blocks)
    for steps, state in enumerate(states_on_the_way(estimator, positions)):
        passes = steps // num_blocks
        if passes < 2:
            centre = (theta, positions[0])[passes]
        else:
            seen = positions[(passes - 2) * num_blocks : (passes - 1) * num_blocks]
            centre = seen[-1] if kind is SVRG else jnp.mean(seen, axis=0)
        np.testing.assert_allclose(state.active.centre, centre, rtol=1e-12)
        expected = ControlVariate(minibatch, centre)
        block = minibatch.block(1)
        got, _ = estimator.estimate(jax.random.key(0), theta, state, block)
        np.testing.assert_allclose(got.gradient, expected.at(theta, block).gradient, rtol=1e-10)
        np.testing.assert_allclose(got.value, expected.at(theta, block).value, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["blocks", "uniform", "symmetric"])
@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.swept_after(2)
def test_on_equal_curvatures_sgld_moves_as_with_full_gradients(kind, scheme):
    """The noise is zero identically: the same noise keys give the same chain, step for step, through several centres."""
    posterior = gaussian_mean(num_data=12)
    reduced = SGLD(kind(Minibatch(posterior, 3, scheme)), 0.05)
    plain = SGLD(Minibatch(posterior, 3, scheme), 0.05)
    exact = SGLD(Minibatch(posterior, scheme="full"), 0.05)

    def run(kernel):
        def body(state, key):
            state, info = kernel.step(key, state)
            return state, (state.position, info.lp_minibatch)

        keys = jax.random.split(jax.random.key(2), 20)
        return jax.lax.scan(body, kernel.init(jax.random.key(1), jnp.array(3.0)), keys)[1]

    expected, got = run(exact), run(reduced)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
    assert np.max(np.abs(run(plain)[0] - expected[0])) > 0.1  # the comparison sees noise where there is some


@pytest.mark.usefixtures("x64")
def test_saga_noise_on_equal_curvatures_is_that_of_the_positions_in_its_table():
    """On N(theta, v0): variance over the blocks (N/v0)^2 Var_k(theta_k), for theta_k the position of the last visit."""
    num_data, v0 = 12, 2.0
    estimator = SAGA(Minibatch(gaussian_mean(num_data, v0), 3))
    positions = path(11)[:, 0]
    state = estimator.init(jax.random.key(0), positions[0])
    num_blocks = estimator.minibatch.num_blocks
    last = np.full(num_blocks, float(positions[0]))
    block_means = np.asarray(estimator.minibatch.rows).reshape(num_blocks, -1).mean(axis=1)
    for i, theta in enumerate(positions):
        before = state.table.gradient
        _, state = estimator.estimate(jax.random.key(i), theta, state)
        (visited,) = np.flatnonzero(np.asarray(before != state.table.gradient)) if i else [None]
        if visited is None:  # the first visit enters what is there already
            continue
        last[visited] = float(theta)
        np.testing.assert_allclose(state.table.gradient[visited], num_data / v0 * (block_means[visited] - theta))
        gradients = at_each_block(estimator, jnp.array(0.7), state)[1]
        np.testing.assert_allclose(np.var(gradients), (num_data / v0) ** 2 * np.var(last), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_freshly_filled_saga_is_a_control_variate():
    posterior, theta = logistic_regression(13), jnp.array(THETA)
    minibatch, centre = Minibatch(posterior, 5), jnp.array([0.5, 0.5, -0.5])
    state = SAGA(minibatch, centre=centre).init(jax.random.key(0), theta)
    estimates = at_each_block(SAGA(minibatch, centre=centre), theta, state)
    expected = [ControlVariate(minibatch, centre).at(theta, minibatch.block(k)) for k in range(minibatch.num_blocks)]
    for got, want in ((estimates[0], [e.value for e in expected]), (estimates[1], [e.gradient for e in expected])):
        np.testing.assert_allclose(np.sort(got, axis=0), np.sort(np.stack(want), axis=0), rtol=1e-10)


def test_saga_rounding_does_not_add_up():
    """After thousands of epochs in single precision the mean is that of the table, up to the rounding of one epoch."""
    estimator = SAGA(Minibatch(logistic_regression(12), 3))
    num_blocks = estimator.minibatch.num_blocks

    def body(state, key):
        key_position, key_estimate = jax.random.split(key)
        return estimator.estimate(key_estimate, 3 * jax.random.normal(key_position, (3,)), state)[1], None

    keys = jax.random.split(jax.random.key(0), num_blocks * 5_000)
    state, _ = jax.lax.scan(body, estimator.init(jax.random.key(1), jnp.zeros(3)), keys)
    rows = np.asarray(state.table.gradient, np.float64)
    bound = num_blocks * np.finfo(np.float32).eps * np.abs(rows).mean(axis=0)
    assert np.all(np.abs(state.mean.gradient - rows.mean(axis=0)) <= bound)


def saga_langevin_variance(h, precision, prior, num_blocks, temperature=1.0):
    """Stationary variance of theta, averaged over the steps of an epoch, in NumPy: textbook SAGA over random permutations.

    The likelihood is that of a Gaussian mean with blocks of equal size. The state is (theta, theta_1 … theta_K), where block
    k was visited last at theta_k. The gradient is -(prior + precision) theta + precision (theta_k - mean of all theta_j)
    after centring, so that one step is linear.
    """
    size = 1 + num_blocks
    transitions, noises, inner = [], [], []
    for order in itertools.permutations(range(num_blocks)):
        F, Q = np.eye(size), np.zeros((size, size))
        for block in order:
            step = np.eye(size)
            step[0, 0] -= h * (prior + precision)
            step[0, 1:] -= h * precision / num_blocks
            step[0, 1 + block] += h * precision
            step[1 + block] = 0.0
            step[1 + block, 0] = 1.0
            F, Q = step @ F, step @ Q @ step.T
            Q[0, 0] += 2 * h * temperature
            inner.append((F, Q))
        transitions.append(F)
        noises.append(Q)
    lifted = np.mean([np.kron(F, F) for F in transitions], axis=0)
    assert np.max(np.abs(np.linalg.eigvals(lifted))) < 1
    second = np.linalg.solve(np.eye(size**2) - lifted, np.mean(noises, axis=0).ravel()).reshape(size, size)
    return np.mean([(F @ second @ F.T + Q)[0, 0] for F, Q in inner])


def squared_deviation(position, mean):
    return (position - mean) ** 2


def test_saga_langevin_law():
    """By simulation against the exact law, at a step where the table's noise raises the variance by more than half."""
    num_data, v0, tau2, num_blocks, h = 12, 2.0, 25.0, 3, 0.12
    posterior = gaussian_mean(num_data, v0, tau2)
    precision, prior = num_data / v0, 1 / tau2
    exact = saga_langevin_variance(h, precision, prior, num_blocks)
    without_noise = 2 / ((prior + precision) * (2 - h * (prior + precision)))
    assert exact > 1.5 * without_noise
    mean = float(jnp.sum(posterior.data) / v0 / (prior + precision))
    kernel = SGLD(SAGA(Minibatch(posterior, num_data // num_blocks)), h)
    starts = mean + 0.4 * jax.random.normal(jax.random.key(3), (2000,))
    averages = time_averages(
        jax.random.key(4), kernel, starts, squared_deviation, mean, num_discarded=60, num_steps=num_blocks * 300
    )
    assert_mean(averages, exact, smallest_error=0.02)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.swept_after(2)
def test_cost(kind):
    """Three gradients a row (SAGA one); the pass at the start is counted once, unless a centre was given."""
    minibatch = Minibatch(logistic_regression(12), 3)
    rows = 1 if kind is SAGA else 3
    for estimator, first in ((kind(minibatch), 12), (kind(minibatch, centre=jnp.zeros(3)), 0)):
        state = estimator.init(jax.random.key(0), jnp.ones(3))
        costs = []
        for i in range(6):
            estimate, state = estimator.estimate(jax.random.key(i), jnp.ones(3), state)
            costs.append(int(estimate.n_grad))
        assert costs == [first + rows * 3] + [rows * 3] * 5
        assert int(estimator.probe(jax.random.key(0), jnp.ones(3), state).n_grad) == (3 if kind is SAGA else 6)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.swept_after(1)
def test_a_run_counts_all_gradients(kind):
    """Through `sample`: states of several chains are donated, stored and counted; the first pass of each chain too."""
    posterior = logistic_regression(12)
    sampler = SGLD(kind(Minibatch(posterior, 3)), 0.01)
    dt = erg.sample(
        jax.random.key(0), sampler, num_samples=6, num_warmup=5, num_chains=2, thin=2, progress=False, probes=False
    )
    steps = 5 + 6 * 2
    assert dt.attrs["num_gradients"] == 2 * (12 + steps * 3 * (1 if kind is SAGA else 3))


@pytest.mark.parametrize("kind", MOVING)
def test_batches_that_are_handed_over_leave_the_snapshot(kind):
    posterior, theta = logistic_regression(12), jnp.array(THETA)
    estimator = kind(Minibatch(posterior, 3))
    state = estimator.init(jax.random.key(0), jnp.zeros(3))
    estimate, after = estimator.estimate(jax.random.key(1), theta, state, posterior.data)
    np.testing.assert_allclose(estimate.gradient, full(posterior, theta)[1], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("kind", ALL)
def test_errors(kind):
    posterior = logistic_regression(12)
    minibatch = Minibatch(posterior, 3)
    with pytest.raises(TypeError, match="gradient must be a Minibatch; got Posterior"):
        kind(posterior)
    with pytest.raises(ValueError, match="centre must have the shape"):
        kind(minibatch, centre=jnp.zeros(2))
    with pytest.raises(ValueError, match="centre must be finite"):
        kind(minibatch, centre=jnp.full(3, jnp.nan))
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=100, initial=jnp.array(0.0))
    with pytest.raises(ValueError, match=f"{kind.__name__} needs all the data"):
        kind(Minibatch(streamed, 10))


def test_saga_errors():
    posterior = logistic_regression(12)
    minibatch = Minibatch(posterior, 3)
    for scheme in ("uniform", "symmetric", "full"):
        with pytest.raises(ValueError, match=f"scheme='blocks'.*got scheme='{scheme}'"):
            SAGA(Minibatch(posterior, None if scheme == "full" else 3, scheme))
    with pytest.raises(ValueError, match=r"48 bytes a chain \(4 blocks of 12 bytes\), and max_bytes is 47"):
        SAGA(minibatch, max_bytes=47).init(jax.random.key(0), jnp.zeros(3))
    with pytest.raises(ValueError, match="max_bytes is 47"):
        SAGA(minibatch, centre=jnp.zeros(3), max_bytes=47)
    SAGA(minibatch, max_bytes=48).init(jax.random.key(0), jnp.zeros(3))
    with pytest.raises(ValueError, match="takes no batch that is handed over"):
        SAGA(minibatch).init(jax.random.key(0), jnp.zeros(3), posterior.data)
