"""Order of the stationary bias in the step size: independent batches against reshuffled ones, without Monte Carlo.

For each of K batches the shipped kernel, fed with that batch through ``batch=``, is an affine map with noise (see
`tests.support.affine`). The first two moments under random choices of these maps obey linear equations, so the
stationary covariance is computed and not sampled.

BAOAB and OBABO reuse their closing gradient as the opening one of the next step, and so carry the gradient of one
batch into the step of another, over the end of an epoch too. The carried gradient is therefore part of ``z``; with it
the chain is Markov at epoch boundaries, where the next permutation is independent of everything before.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.samplers import BAOA, BAOAB, OBABO, UBU
from tests.support.affine import NoisyQuadratic, step_map

pytestmark = pytest.mark.usefixtures("x64")

FRICTION = 1.5
SCHEMES = {"BAOA": BAOA, "BAOAB": BAOAB, "OBABO": OBABO}
ONE_BATCH = {
    "BAOAB, one batch": functools.partial(BAOAB, one_batch=True),
    "UBU, one batch": functools.partial(UBU, one_batch=True),
}
STEPS = (0.02, 0.01, 0.005, 0.0025)


def quadratic_batches(num_batches):
    """Curvatures that do not commute, and different centres: terms -theta' A_k theta / 2 + b_k' theta."""
    curvatures, shifts = [], []
    for k in range(num_batches):
        angle = 0.4 + 2.0 * k
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        curvatures.append(turn @ np.diag([0.9, 0.15 + 0.1 * k]) @ turn.T)
        shifts.append([np.cos(1.7 * k), np.sin(1.1 * k)])
    return np.array(curvatures), np.array(shifts)


class Maps(NamedTuple):
    """One affine map a batch: (K, D, D), (K, D, D) and (K, D)."""

    transition: np.ndarray
    covariance: np.ndarray
    offset: np.ndarray


@functools.cache
def maps_over_steps(scheme, num_batches):
    """Compile the maps of all batches over an array of step sizes."""
    curvatures, shifts = quadratic_batches(num_batches)
    posterior = erg.Posterior(
        lambda theta: 0.0 * jnp.sum(theta),
        lambda theta, rows: -0.5 * jnp.einsum("nij,i,j->n", rows[0], theta, theta) + rows[1] @ theta,
        (jnp.asarray(curvatures), jnp.asarray(shifts)),
        initial=jnp.zeros(2),
    )
    gradient = erg.estimators.Minibatch(posterior, 1)

    def at(h, rows):
        batch = Batch(jax.tree.map(lambda x: x[None], rows), jnp.ones(1))
        return step_map((SCHEMES | ONE_BATCH)[scheme](gradient, h, FRICTION), jnp.zeros(2), batch)

    over_batches = jax.vmap(at, in_axes=(None, 0))
    maps = jax.jit(jax.vmap(over_batches, in_axes=(0, None)))(jnp.array(STEPS), posterior.data)
    transition, loading, offset = map(np.asarray, maps)
    covariance = loading @ np.swapaxes(loading, -1, -2)
    return [Maps(transition[i], covariance[i], offset[i]) for i in range(len(STEPS))]


def push(maps, k, mean, second):
    """Carry mean and second moment through the step of batch k."""
    F, Q, b = maps.transition[k], maps.covariance[k], maps.offset[k]
    cross = np.outer(F @ mean, b)
    return F @ mean + b, F @ second @ F.T + cross + cross.T + np.outer(b, b) + Q


def averaged(maps, orders, mean, second):
    """Moments after each step of an epoch, averaged over the orders: lists over the steps."""
    means, seconds = [], []
    for order in orders:
        m, s = mean, second
        path = []
        for k in order:
            m, s = push(maps, k, m, s)
            path.append((m, s))
        means.append([m for m, _ in path])
        seconds.append([s for _, s in path])
    return np.mean(means, axis=0), np.mean(seconds, axis=0)


def stationary_moments(maps, orders):
    """Fixed point of the averaged epoch map, found by linear solves."""
    size = maps.offset.shape[1]
    zero, none = np.zeros(size), np.zeros((size, size))

    def epoch(mean, second):
        means, seconds = averaged(maps, orders, mean, second)
        return means[-1], seconds[-1]

    offset, _ = epoch(zero, none)
    linear = np.stack([epoch(unit, none)[0] - offset for unit in np.eye(size)], axis=1)
    mean = np.linalg.solve(np.eye(size) - linear, offset)
    _, base = epoch(mean, none)
    units = np.eye(size * size).reshape(-1, size, size)
    quadratic = np.stack([(epoch(mean, unit)[1] - base).ravel() for unit in units], axis=1)
    assert np.max(np.abs(np.linalg.eigvals(quadratic))) < 1
    second = np.linalg.solve(np.eye(size * size) - quadratic, base.ravel()).reshape(size, size)
    return mean, second


def biases(scheme, num_batches, orders, where):
    """Frobenius norm of the covariance bias of the position at each step size."""
    curvatures, _ = quadratic_batches(num_batches)
    exact = np.linalg.inv(curvatures.sum(axis=0))
    errors = []
    for maps in maps_over_steps(scheme, num_batches):
        mean, second = stationary_moments(maps, orders)
        if where == "all iterates":
            means, seconds = averaged(maps, orders, mean, second)
            mean, second = means.mean(axis=0), seconds.mean(axis=0)
        covariance = second - np.outer(mean, mean)
        errors.append(np.linalg.norm(covariance[:2, :2] - exact))
    return np.array(errors)


def slopes(errors):
    return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize("where", ["epoch boundaries", "all iterates"])
@pytest.mark.parametrize("num_batches", [3, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.swept_after(4)
def test_reshuffled_blocks_give_second_order(scheme, num_batches, where):
    curvatures, _ = quadratic_batches(num_batches)
    assert num_batches * STEPS[0] * np.linalg.eigvalsh(curvatures.sum(axis=0))[-1] <= 1
    orders = list(itertools.permutations(range(num_batches)))
    coarse, _, fine = slopes(biases(scheme, num_batches, orders, where))
    assert coarse >= 1.7
    assert fine >= 1.9


@pytest.mark.parametrize("num_batches", [3, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_independent_batches_give_first_order(scheme, num_batches):
    orders = [(k,) for k in range(num_batches)]
    errors = biases(scheme, num_batches, orders, "all iterates")
    assert np.all(slopes(errors) <= 1.2)
    # and at h = .01 they are many times worse than the same batches reshuffled
    shuffled = biases(scheme, num_batches, list(itertools.permutations(range(num_batches))), "all iterates")
    assert errors[1] > 20 * shuffled[1]


def test_one_batch_serves_all_kicks_of_a_step():
    """On data whose blocks pull apart: the two kicks of BAOAB with one batch are those of that batch."""
    posterior = erg.Posterior(
        lambda theta: 0.0 * theta, lambda theta, rows: rows * theta, jnp.array([1.0, -1.0]), initial=jnp.array(0.0)
    )
    gradient = erg.estimators.Minibatch(posterior, 1, "symmetric")
    kernel = BAOAB(gradient, 0.1, 0.0, temperature=0.0, one_batch=True)
    state, pulls = kernel.init(jax.random.key(0), jnp.array(0.0)), []
    for i in range(8):
        after, info = kernel.step(jax.random.key(i), state)
        pulls.append(float(after.momentum - state.momentum))
        assert info.n_grad == 2
        state = after
    np.testing.assert_allclose(np.abs(pulls), 0.2, rtol=1e-12)  # twice h / 2, times a gradient of 2
    assert pulls[:4] == pulls[3::-1]


def test_one_batch_needs_an_estimator_that_draws():
    with pytest.raises(TypeError, match="one_batch needs an estimator that draws a batch"):
        BAOAB(NoisyQuadratic(jnp.ones((1, 1)), jnp.ones(())), 0.1, one_batch=True)


def there_and_back(num_batches):
    return [order + order[::-1] for order in itertools.permutations(range(num_batches))]


@pytest.mark.parametrize("where", ["epoch boundaries", "all iterates"])
@pytest.mark.parametrize("num_batches", [3, 4])
@pytest.mark.parametrize("scheme", ONE_BATCH)
@pytest.mark.swept_after(3)
def test_symmetric_sweeps_give_second_order(scheme, num_batches, where):
    coarse, _, fine = slopes(biases(scheme, num_batches, there_and_back(num_batches), where))
    assert coarse >= 1.7
    assert fine >= 1.9


@pytest.mark.parametrize("num_batches", [3, 4])
@pytest.mark.parametrize("scheme", ONE_BATCH)
def test_each_symmetric_sweep_is_of_second_order_by_itself(scheme, num_batches):
    """No average over the orders is needed: the same one each time will do, and an odd error term is nowhere seen."""
    for order in there_and_back(num_batches)[:3]:
        assert slopes(biases(scheme, num_batches, [order], "epoch boundaries"))[-1] >= 1.97


@pytest.mark.parametrize("scheme", ONE_BATCH)
def test_one_batch_a_step_does_not_help_independent_batches(scheme):
    assert np.all(slopes(biases(scheme, 3, [(k,) for k in range(3)], "all iterates")) <= 1.2)
