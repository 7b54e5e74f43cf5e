"""Effective sample size of flows that are fitted by path gradients and by the standard gradient, in the same time.

For each problem and seed both estimators start from the same flow and take turns in one process, a quarter of a second each,
until each has used its budget of processor time on one core; compilation does not count. Both use Adam with a rate that falls as a
half cosine of the share of the budget that is used. The rate at the start is the best of three for each estimator and problem by
itself, by the mean log of the final sample size on two seeds that are not among those reported.

The sample size is that of 8,192 fresh draws, the same base draws for both, over 8,192: 1 where the flow is the target. The ratio
between the estimators is taken within a seed; intervals are of the mean log ratio over seeds (Student's t, 95%).

    python benchmarks/flow_training.py [--seconds 8] [--seeds 10] [--problems mixture ...] [--fresh]

Results go to benchmarks/results/flow_training.json after each seed, and a second call goes on from there. For one core per
process: ``taskset -c 0``. The page "Path gradients" of the documentation draws them.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flow_problems import PROBLEMS
from scipy import stats
from step_time import environment

from ergodica.core import tree
from ergodica.estimators import PathGradient, ReverseKL

NUM_SAMPLES = 256
NUM_EVALUATED = 8192
TURN = 0.25
NUM_POINTS = 8
RATES = (3e-4, 1e-3, 3e-3)
PILOTS = (1001, 1002)
ESTIMATORS = {"standard": ReverseKL, "path": PathGradient}


# --- one estimator's run ----------------------------------------------------------------------------------------------


class Runner:
    """A flow that is fitted in turns; time is counted by the processor."""

    def __init__(self, make, problem, rate, key):
        self.gradient = make(problem.flow(), problem.target, num_samples=NUM_SAMPLES)
        self.params = jax.tree.map(jnp.copy, self.gradient.params)
        self.optimiser = optax.inject_hyperparams(optax.adam)(rate)
        self.state = self.optimiser.init(self.params)
        self.rate, self.key = rate, key
        self.used, self.steps, self.at_once = 0.0, 0, 8
        self.turn(0, 1.0)  # compiles

    @functools.cached_property
    def compiled(self):
        @jax.jit
        def turn(gradient, params, state, key, first, num, rate):
            def step(i, carry):
                params, state = carry
                estimate, _ = gradient.estimate(jax.random.fold_in(key, i), params, None)
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = self.optimiser.update(tree.scale(estimate.gradient, -1.0), state, params)
                return optax.apply_updates(params, updates), state

            state.hyperparams["learning_rate"] = rate
            return jax.lax.fori_loop(first, first + num, step, (params, state))

        return turn

    def turn(self, num, share):
        rate = jnp.asarray(self.rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))), jnp.float32)
        first, count = jnp.asarray(self.steps), jnp.asarray(num)
        self.params, self.state = jax.block_until_ready(
            self.compiled(self.gradient, self.params, self.state, self.key, first, count, rate)
        )
        self.steps += num

    def until(self, end, budget):
        """Go on until so much processor time is used."""
        while self.used < end:
            start = time.process_time()
            self.turn(self.at_once, self.used / budget)
            spent = time.process_time() - start
            self.used += spent
            self.at_once = max(1, min(4 * self.at_once, int(self.at_once * TURN / max(spent, 1e-4))))


@eqx.filter_jit
def sample_size(flow, target, key):
    """Share of effective draws among fresh ones."""
    x, log_q = flow.sample_and_log_prob(key, NUM_EVALUATED)
    log_w = jax.lax.map(target, x, batch_size=1024) - log_q
    return jnp.exp(2 * jax.nn.logsumexp(log_w) - jax.nn.logsumexp(2 * log_w)) / NUM_EVALUATED


def compare(problem, rates, seed, budget, names=tuple(ESTIMATORS)):
    """Sample sizes of the estimators on one seed at points of the budget."""
    key_run, key_evaluate = jax.random.split(jax.random.key(seed))
    problem = problem(seed)
    runners = {name: Runner(ESTIMATORS[name], problem, rates[name], key_run) for name in names}
    found = {name: [] for name in names}
    for i in range(NUM_POINTS * 4):
        end = budget * (i + 1) / (NUM_POINTS * 4)
        for runner in runners.values():
            runner.until(end, budget)
        if (i + 1) % 4 == 0:
            for name, r in runners.items():
                value = float(sample_size(r.gradient.flow(r.params), r.gradient.target, key_evaluate))
                found[name].append(value if math.isfinite(value) else 0.0)
    return {n: {"ess": found[n], "steps": r.steps, "seconds": r.used} for n, r in runners.items()}


# --- all of them ------------------------------------------------------------------------------------------------------


def tune(problem, budget):
    """The rate that each estimator does best with, on seeds of its own."""
    scores = {}
    for name in ESTIMATORS:
        scores[name] = {}
        for rate in RATES:
            ends = [compare(problem, {name: rate}, s, budget, (name,))[name]["ess"][-1] for s in PILOTS]
            scores[name][rate] = float(np.mean(np.log(np.maximum(ends, 1 / NUM_EVALUATED))))
    return {name: max(found, key=found.get) for name, found in scores.items()}, scores


def summary(rows, point=-1):
    """Geometric mean of the ratio and its interval over seeds."""
    logs = [math.log(row["path"]["ess"][point] / row["standard"]["ess"][point]) for row in rows]
    mean, n = statistics.fmean(logs), len(logs)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.inf
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "logs": logs}


def interval(found):
    """In words."""
    return f"{found['ratio']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def table(results):
    """One row a problem, and all problems together."""
    lines = [
        "| problem | D | ESS standard | ESS path | ratio (95%) | at a quarter of the time | steps path / standard |",
        "|---|---|---|---|---|---|---|",
    ]
    means = []
    for name, found in results["problems"].items():
        rows = list(found["seeds"].values())
        if len(rows) < 2:
            continue
        end, early = summary(rows), summary(rows, NUM_POINTS // 4 - 1)
        medians = [statistics.median(row[e]["ess"][-1] for row in rows) for e in ("standard", "path")]
        steps = statistics.median(row["path"]["steps"] / row["standard"]["steps"] for row in rows)
        means.append(statistics.fmean(end["logs"]))
        lines.append(
            f"| {name} | {found['dim']} | {medians[0]:.3f} | {medians[1]:.3f} | {interval(end)} | {interval(early)} | {steps:.2f} |"
        )
    if means:
        lines.append(f"| all | | | | {math.exp(statistics.fmean(means)):.2f} | | |")
    return "\n".join(lines)


def main():
    """Run what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of processor time for each run")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/flow_training.json"))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    results = {"problems": {}}
    if options.output.exists() and not options.fresh:
        results = json.loads(options.output.read_text())
    for name in options.problems:
        problem = PROBLEMS[name]
        found = results["problems"].setdefault(name, {"seconds": options.seconds, "seeds": {}})
        if found["seconds"] != options.seconds:
            raise SystemExit(f"{name} was run with {found['seconds']} seconds; give --fresh or the same --seconds.")
        if "rates" not in found:
            found["rates"], found["rate_scores"] = tune(problem, options.seconds / 2)
            found["dim"] = problem(0).flow().dim
        for seed in range(options.seeds):
            if str(seed) not in found["seeds"]:
                found["seeds"][str(seed)] = compare(problem, found["rates"], seed, options.seconds)
                row = found["seeds"][str(seed)]
                print(name, seed, {e: (round(row[e]["ess"][-1], 4), row[e]["steps"]) for e in ESTIMATORS}, flush=True)
            results["environment"] = environment()
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
