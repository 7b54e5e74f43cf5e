"""How long a call of a gradient estimator takes, inside a compiled loop as a sampler runs it."""

import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Key, PyTree

_SHORTEST = 0.02
_MOST_CALLS = 1 << 20


class Times(NamedTuple):
    """Seconds a call, and ratios to the first estimator with the range over the rounds, in the order of the estimators."""

    seconds: np.ndarray
    ratio: np.ndarray
    ratio_lower: np.ndarray
    ratio_upper: np.ndarray


def time_estimators(estimators: dict[str, AbstractGradientEstimator], point: PyTree, num_rounds: int) -> Times:
    """Time the estimators round by round, so that a disturbance of the machine falls on all of them.

    A round runs each estimator for some hundredths of a second in one compiled loop: a dispatch from Python would cost more than
    most calls. Medians are over the rounds; the range of the ratios is their smallest and largest.
    """
    calls = [_calls_that_can_be_timed(estimator, point) for estimator in estimators.values()]
    seconds = np.array(
        [
            [_seconds(e, point, n) / n for e, n in zip(estimators.values(), calls, strict=True)]
            for _ in range(num_rounds)
        ]
    )
    ratios = seconds / seconds[:, :1]
    return Times(np.median(seconds, axis=0), np.median(ratios, axis=0), ratios.min(axis=0), ratios.max(axis=0))


def _calls_that_can_be_timed(estimator: AbstractGradientEstimator, point: PyTree) -> int:
    """Double the number of calls until a run is long enough; the first run compiles."""
    calls = 1
    _seconds(estimator, point, calls)
    while _seconds(estimator, point, calls) < _SHORTEST and calls < _MOST_CALLS:
        calls *= 2
    return calls


def _seconds(estimator: AbstractGradientEstimator, point: PyTree, calls: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(_run(estimator, jax.random.key(0), point, jnp.asarray(calls, jnp.int32)))
    return time.perf_counter() - start


@eqx.filter_jit
def _run(estimator: AbstractGradientEstimator, key: Key, point: PyTree, calls: Array) -> PyTree:
    """Call the estimator so many times in a row; return the sum of the gradients, so that none can be left out."""
    key_init, key_run = jax.random.split(key)

    def call(i: Array, carry: tuple) -> tuple:
        params, state, total = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key_run, i), params, state)
        # tied to the estimate, the point is no constant of the loop: a full gradient would be hoisted out of it
        params, gradient = jax.lax.optimization_barrier((params, estimate.gradient))
        return params, state, tree.add(total, gradient)

    zero = tree.scale(point, 0.0)
    return jax.lax.fori_loop(0, calls, call, (point, estimator.init(key_init, point), zero))[2]
