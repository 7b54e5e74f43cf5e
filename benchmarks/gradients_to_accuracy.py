"""Datum-gradients, and seconds, until moments are right: samplers of this library beside those of BlackJAX.

Two problems with known moments: the mean of a Gaussian (N = 10,000, d = 10, exact) and the logistic regression of
`step_time.py` (N = 100,000, d = 50; reference: a long run of HMC with full gradients, stored with its errors). Batches of 100. What
is counted are gradients of the likelihood of one datum. `accuracy/run.py` says what is to be reached, `accuracy/methods.py` what is
compared.

The rule by which settings are chosen is one for all: the exact law of the kernel on a Gaussian gives the first point; from
there to the best neighbour (step size by a factor of sqrt 2, friction by 2, number of inner steps by a notch) by simulation (4
replicates; 8 on the Gaussian), until no neighbour is better; then twice as many fresh replicates with another key, which
are what is reported.

    python benchmarks/gradients_to_accuracy.py --reference    # about two minutes
    python benchmarks/gradients_to_accuracy.py                # about half an hour; resumes where it was stopped
    python benchmarks/gradients_to_accuracy.py --seconds      # then: time of a call, all in one process

BlackJAX gets independent rows drawn with replacement, which is what its kernels are written for.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy.figures import describe, draw_gradients, epochs, gradient_table, number, seconds_table
from accuracy.methods import families
from accuracy.problems import PROBLEMS, RESULTS, make_reference
from accuracy.run import (
    AFTER,
    MAX_THRESHOLD,
    THRESHOLD,
    Choice,
    advance,
    best_by_law,
    gradients_a_call,
    run,
    search,
    start,
)
from step_time import environment, summary

OUTPUT = RESULTS / "gradients_to_accuracy.json"
STEPS = np.geomspace(1e-5, 2.0, 107)  # where the law is evaluated; a notch is 12%
REPLICATES = {"gaussian": 16, "logistic": 8}
MOST_EPOCHS = {"gaussian": 10_000, "logistic": 4_000}  # what a replicate may spend
HOPELESS_EPOCHS = {"gaussian": 4_000, "logistic": 2_000}  # what it spends where the law asks for more than that
PEER = "blackjax.sgld"
BUDGET, SEARCH_KEY, FINAL_KEY = 4.0, 101, 202


def as_json(values: np.ndarray) -> list[float | None]:
    """Numbers, with ``None`` for what was not reached."""
    return [float(v) if np.isfinite(v) else None for v in values]


def measure(name: str, family: Any, problem: Any) -> dict[str, Any]:
    """Choose settings, then run the replicates that are reported.

    Where the law asks for more than `MOST_EPOCHS`, its settings are taken as they are, and run for `HOPELESS_EPOCHS`.
    """
    cap, num_replicates = float(MOST_EPOCHS[name] * problem.num_data), REPLICATES[name]
    first, predicted = best_by_law(family, problem, STEPS)
    if predicted < cap:
        few = num_replicates // (4 if family.own_batches else 2)
        choice = search(family, problem, jax.random.key(SEARCH_KEY), first, few, cap)
        expected, most = min(choice.best, cap), min(BUDGET * choice.best, cap)
    else:
        choice = Choice(first, np.inf, [])
        expected = most = float(HOPELESS_EPOCHS[name] * problem.num_data)
    method, key = family.make(*choice.point), jax.random.key(FINAL_KEY)
    calls = expected / gradients_a_call(family, problem, choice.point)
    found = run(method, problem, key, num_replicates, calls, most, np.inf)
    gradients = found.gradients
    return {
        "step_size": choice.point[0],
        "friction": choice.point[1],
        "inner_steps": choice.point[2],
        "law": {"point": first, "gradients": predicted if np.isfinite(predicted) else None},
        "tried": [row | {"median": row["median"] if np.isfinite(row["median"]) else None} for row in choice.tried],
        "gradients": as_json(gradients),
        "median": as_json(np.median(gradients)[None])[0],
        "quartiles": as_json(np.quantile(gradients, [0.25, 0.75], method="nearest")),
        "gradients_max": as_json(found.gradients_max),
        "budget": found.budget,
        "gradients_a_call": gradients_a_call(family, problem, choice.point),
        "setup": family.setup,
        "variance_ratio": found.variance_ratio,
        "seconds_of_benchmark": found.seconds,
    }


def accuracy(names: list[str], methods: list[str] | None, record: dict[str, Any], output: pathlib.Path) -> None:
    """Fill in what the record does not have yet; write it after each method."""
    for name in names:
        problem = PROBLEMS[name]()
        of_problem = record["problems"].setdefault(
            name,
            {
                "num_data": problem.num_data,
                "size": len(problem.mean),
                "batch_size": problem.batch_size,
                "curvatures": [float(problem.curvatures.min()), float(problem.curvatures.max())],
                "methods": {},
            },
        )
        found = families(problem)
        for method in methods or found:
            if method in of_problem["methods"] or method not in found:
                continue
            family = found[method]
            print(f"{name}: {method}", flush=True)
            of_problem["methods"][method] = row = measure(name, family, problem)
            print(f"  {describe(row)}: {number(np.median(epochs(row, problem.num_data)))} epochs", flush=True)
            output.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def seconds(
    record: dict[str, Any], methods: list[str] | None, output: pathlib.Path, repeats: int, num_calls: int
) -> None:
    """Time of a call of each method at its settings, for one chain with running moments; ratios are within a repeat."""
    for name, of_problem in record["problems"].items():
        problem, runs = PROBLEMS[name](), {}
        for method, family in families(problem).items():
            row = of_problem["methods"].get(method)
            if row is not None and (methods is None or method in methods):
                made = family.make(row["step_size"], row["friction"], row["inner_steps"])
                runs[method] = one_chain(made, problem, num_calls)
        times: dict[str, list[float]] = {method: [] for method in runs}
        for repeat in range(-1, repeats):
            for method, call in runs.items():
                begin = time.perf_counter()
                jax.block_until_ready(call(jax.random.key(repeat + 1)))
                if repeat >= 0:  # the first compiles
                    times[method].append(1e6 * (time.perf_counter() - begin) / num_calls)
        of_problem["seconds"] = {
            method: summary(values, times[PEER]) | {"repeats": repeats, "calls": num_calls}
            for method, values in times.items()
        }
        of_problem["seconds_environment"] = environment()
        output.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def one_chain(method: Any, problem: Any, num_calls: int) -> Any:
    carry = start(method, jax.random.key(0), problem.start(jax.random.key(1), 1))
    mean, sd = jnp.asarray(problem.mean, jnp.float32), jnp.asarray(problem.sd, jnp.float32)
    return lambda key: advance(method, carry, key, jnp.asarray(0), jnp.asarray(num_calls), mean, sd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", action="store_true", help="make the reference of the logistic regression, and stop"
    )
    parser.add_argument("--seconds", action="store_true", help="measure the time of a call, and stop")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--fresh", action="store_true", help="do not resume")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.reference:
        record = make_reference()
        print({k: v for k, v in record.items() if not isinstance(v, list)})
        return
    record: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "blackjax", "numpy")},
        "threshold": THRESHOLD,
        "max_threshold": MAX_THRESHOLD,
        "after": AFTER,
        "replicates": REPLICATES,
        "most_epochs": MOST_EPOCHS,
        "hopeless_epochs": HOPELESS_EPOCHS,
        "problems": {},
    }
    if arguments.output.exists() and not arguments.fresh:
        record = json.loads(arguments.output.read_text())
    if arguments.seconds:
        seconds(record, arguments.methods, arguments.output, arguments.repeats, arguments.calls)
    else:
        accuracy(arguments.problems, arguments.methods, record, arguments.output)
    for name, problem in record["problems"].items():
        print(f"\n{name}\n{gradient_table(problem)}")
        if "seconds" in problem:
            print(f"\n{seconds_table(problem)}")
    draw_gradients(record).savefig(arguments.output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
