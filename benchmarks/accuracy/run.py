"""Counting the datum-gradients that a method needs, and choosing its settings.

The error after a number of steps is the larger of two averages over the coordinates: of the squared standardised bias of
``theta_i``, and of that of ``((theta_i - m_i) / s_i)**2``, with ``m_i`` and ``s_i`` the reference's mean and sd:

    b2 = (E_est[f] - E_ref[f])**2 / Var_ref[f]

The square is taken about the reference's mean: about zero, from where a mean may be 20 sds away, it would hardly see a variance
that is wrong.
"""

import itertools
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from accuracy.laws import predicted_calls
from accuracy.methods import Family
from accuracy.problems import Problem

THRESHOLD, MAX_THRESHOLD = 0.01, 0.05
AFTER = 1.25  # the error must stay below until so many times the gradients that it took
CHUNKS = 150  # a chunk of steps, between two looks at the error, is this part of the steps predicted
BUDGET = 4.0  # times the gradients predicted, and at least LEAST epochs
LEAST_EPOCHS = 5.0
STEP_FACTOR = 2.0**0.5


class Outcome(NamedTuple):
    """What a run found.

    Attributes
    ----------
    gradients : array (R,)
        Datum-gradients until the error was and stayed below the threshold; infinite where it never was.
    gradients_max : array (R,)
        As ``gradients``, for the largest error among all coordinates and functions, with its own threshold; a run does not wait
        for it.
    budget : float
        Datum-gradients spent by each replicate.
    variance_ratio : float
        Variance over that of the reference, about its mean, averaged over coordinates and replicates.
    seconds : float
    """

    gradients: np.ndarray
    gradients_max: np.ndarray
    budget: float
    variance_ratio: float
    seconds: float


@eqx.filter_jit
def start(method: Any, key: Any, starts: Any) -> Any:
    return method.init(key, starts)


@eqx.filter_jit
def advance(method: Any, carry: Any, key: Any, first: Any, count: Any, mean: Any, sd: Any) -> tuple:
    """Make steps; sum the standardised positions and their squares after each."""

    def body(i, state):
        carry, total, squares, cost = state
        carry, position, n_grad = method.step(jax.random.fold_in(key, i), carry)
        z = (position - mean) / sd
        return carry, total + z, squares + z**2, cost + n_grad.astype(jnp.int32)

    zero = jnp.zeros_like(jax.eval_shape(method.step, key, carry)[1])
    return jax.lax.fori_loop(first, first + count, body, (carry, zero, zero, jnp.zeros((), jnp.int32)))


def stays_below(errors: list[np.ndarray], costs: list[float], threshold: float) -> np.ndarray:
    """Cost at which each replicate's error falls below for good, if it then stays there for long enough; else infinity."""
    below = np.array(errors) < threshold  # (time, R)
    lasting = np.logical_and.accumulate(below[::-1])[::-1]
    at = np.where(lasting.any(0), np.array(costs)[lasting.argmax(0)], np.inf)
    return np.where(at * AFTER <= costs[-1], at, np.inf)


def run(
    method: Any, problem: Problem, key: Any, num_replicates: int, predicted: float, most: float, give_up: float
) -> Outcome:
    """Run until all replicates have arrived, or the budget is spent, or half of them can no longer beat ``give_up``.

    ``predicted`` is in calls, ``most`` and ``give_up`` are in datum-gradients.
    """
    begin = time.perf_counter()
    key_start, key_init, key_run = jax.random.split(key, 3)
    mean, sd = jnp.asarray(problem.mean, jnp.float32), jnp.asarray(problem.sd, jnp.float32)
    carry = start(method, key_init, problem.start(key_start, num_replicates))
    count = max(1, round(predicted / CHUNKS))
    sums, squares, steps, cost = 0.0, 0.0, 0, 0.0
    averages, largest, costs = [], [], []
    while True:
        carry, total, square, spent = advance(method, carry, key_run, jnp.asarray(steps), jnp.asarray(count), mean, sd)
        sums, squares = sums + np.asarray(total, float), squares + np.asarray(square, float)
        steps, cost = steps + count, cost + float(spent)
        first = (sums / steps) ** 2
        second = (squares / steps - 1) ** 2 / problem.square_variance
        averages.append(np.nan_to_num(np.maximum(first.mean(1), second.mean(1)), nan=np.inf))
        largest.append(np.nan_to_num(np.maximum(first.max(1), second.max(1)), nan=np.inf))
        costs.append(cost)
        arrived = stays_below(averages, costs, THRESHOLD)
        hopeless = cost > give_up and np.mean(averages[-1] >= THRESHOLD) > 0.5
        if np.all(np.isfinite(arrived)) or cost >= most or hopeless or not np.isfinite(averages[-1]).any():
            break
    ratio = float(np.mean(squares / steps))
    at_max = stays_below(largest, costs, MAX_THRESHOLD)
    return Outcome(arrived, at_max, cost, ratio, time.perf_counter() - begin)


class Choice(NamedTuple):
    """Settings of a method, and how they were found."""

    point: tuple
    best: float  # median of the datum-gradients there, or what was allowed
    tried: list[dict[str, Any]]


def best_by_law(family: Family, problem: Problem, steps: np.ndarray) -> tuple[tuple, float]:
    """The point with the fewest predicted datum-gradients; the smallest step among those within a tenth of it."""
    found = []
    for h, gamma, inner in itertools.product(steps, family.frictions, family.inner):
        point = (float(h), gamma, inner)
        calls = predicted_calls(family.law(*point), problem.curvatures)
        found.append((calls * gradients_a_call(family, problem, point), point))
    least = min(cost for cost, _ in found)
    return min((p for cost, p in found if cost <= 1.1 * least), key=lambda p: p[0]), least


def gradients_a_call(family: Family, problem: Problem, point: tuple) -> int:
    """Datum-gradients of one call of the kernel."""
    return family.batches * (point[2] or 1) * problem.batch_size


def same_point(point: tuple, tried: Any) -> tuple:
    """The point that was tried already, where the step size differs by rounding alone."""
    same = (p for p in tried if p[1:] == point[1:] and abs(p[0] / point[0] - 1) < 1e-6)
    return next(same, point)


def neighbours(point: tuple, family: Family) -> list[tuple]:
    """Points one notch away: step size, friction, inner steps."""
    h, gamma, inner = point
    near = [(h * factor, gamma, inner) for factor in (STEP_FACTOR, 1 / STEP_FACTOR)]
    for place, values in ((1, family.frictions), (2, family.inner)):
        at = values.index(point[place])
        near += [(*point[:place], values[i], *point[place + 1 :]) for i in (at - 1, at + 1) if 0 <= i < len(values)]
    return near


def search(family: Family, problem: Problem, key: Any, start: tuple, num_replicates: int, cap: float) -> Choice:
    """Climb from the point of the law to the best of its neighbours, until no neighbour is better.

    The same key for all points. A point is given up once it has spent a tenth more than the best median so far; ``cap`` bounds the
    datum-gradients of each.
    """
    tried: dict[tuple, Outcome] = {}

    def cost(point: tuple, best: float) -> float:
        point = same_point(point, tried)
        if point not in tried:
            method = family.make(*point)
            calls = predicted_calls(family.law(*point), problem.curvatures)
            per_call = gradients_a_call(family, problem, point)
            expected = min(calls, 1e9) * per_call
            if not np.isfinite(calls):
                expected = best if np.isfinite(best) else 100.0 * problem.num_data
            most = min(max(BUDGET * expected, LEAST_EPOCHS * problem.num_data), cap)
            tried[point] = run(method, problem, key, num_replicates, expected / per_call, most, 1.1 * best)
            print(
                "   ",
                point,
                np.median(tried[point].gradients) / problem.num_data,
                round(tried[point].seconds, 1),
                flush=True,
            )
        return float(np.median(tried[point].gradients))

    here, best = start, cost(start, np.inf)
    while True:
        better = min((p for p in neighbours(here, family)), key=lambda p: cost(p, best))
        if not cost(better, best) < best:
            break
        here, best = better, cost(better, best)
    record = [
        {"point": point, "median": float(np.median(out.gradients)), "variance_ratio": out.variance_ratio}
        for point, out in tried.items()
    ]
    return Choice(here, best, record)
