"""Time of one federated step against one of SGLD, in one process.

Bayesian logistic regression, N = 100,000 rows, d = 50, batches of 100 random rows, float32. The floor is SGLD on the pooled
data. All variants run in turn within each repeat; what is reported is the median of the ratios to the floor of the same
repeat, and their quartiles. Unequal shards: client s has about s + 1 times as many rows as client 0.

    python benchmarks/federated_step.py [--repeats 9] [--steps 2000] [--output benchmarks/results]
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from step_time import BATCH_SIZE, NUM_DATA, SIZE, environment, in_scan, log_likelihood, log_prior, make_data

import ergodica as erg

CLIENTS = (2, 10, 100, 1000)
TARGET = 1.3
STEP_SIZE, LOCAL_STEPS = 1e-6, 20


def shards_of(posterior, num_clients):
    share = np.arange(1, num_clients + 1) / (num_clients * (num_clients + 1) / 2)
    return erg.Shards(posterior, np.searchsorted(np.cumsum(share)[:-1], np.random.default_rng(0).random(NUM_DATA)))


def surrogates_of(shards, kind):
    """Of about the right size; their values do not matter for the time."""
    key = jax.random.key(2)
    precision = 0.05 * np.asarray(shards.sizes, np.float64)
    means = 0.1 * jax.random.normal(key, (shards.num_clients, SIZE))
    if kind == "diagonal":
        return erg.estimators.GaussianSurrogates(means, jnp.asarray(np.tile(precision[:, None], (1, SIZE)), float))
    full = erg.estimators.GaussianSurrogates(means, precision[:, None, None] * np.eye(SIZE))
    return full if kind == "full" else full.low_rank(5)


def variants(data, num_steps):
    posterior = erg.Posterior(log_prior, log_likelihood, data, initial=jnp.zeros(SIZE))
    start = jnp.zeros(SIZE)
    pooled = erg.estimators.Minibatch(posterior, BATCH_SIZE, "uniform")
    runs = {"SGLD": in_scan(erg.samplers.SGLD(pooled, STEP_SIZE), num_steps, start)}

    def add(name, shards, surrogates, schedule="independent", **options):
        gradient = erg.estimators.Conducive(shards, surrogates, BATCH_SIZE, **options)
        sampler = erg.samplers.Federated(erg.samplers.SGLD(gradient, STEP_SIZE), LOCAL_STEPS, schedule)
        runs[name] = in_scan(sampler, num_steps, start)

    for count in CLIENTS:
        shards = shards_of(posterior, count)
        add(f"diagonal, {count} clients", shards, surrogates_of(shards, "diagonal"))
    shards = shards_of(posterior, 10)
    add("none (DSGLD), 10 clients", shards, None)
    add("full, 10 clients", shards, surrogates_of(shards, "full"))
    add("low rank 5, 10 clients", shards, surrogates_of(shards, "low rank"))
    add(
        "diagonal, 10 clients, permutation",
        shards,
        surrogates_of(shards, "diagonal"),
        "permutation",
        probabilities="uniform",
    )
    many = shards_of(posterior, 1000)
    add("full, 1000 clients", many, surrogates_of(many, "full"))
    return runs


def measure(runs, num_steps, repeats):
    """Seconds a step, each variant in turn within each repeat."""
    for run in runs.values():
        jax.block_until_ready(run(jax.random.key(0)))
    times = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(repeat)))
            times[name].append((time.perf_counter() - began) / num_steps)
    return times


def summary(times):
    found = {}
    for name, values in times.items():
        ratios = sorted(x / y for x, y in zip(values, times["SGLD"], strict=True))
        quarter = len(ratios) // 4
        found[name] = {
            "microseconds": 1e6 * statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        }
    return found


def table(results):
    lines = ["| variant | us a step | ratio to SGLD (quartiles) | target |", "|---|---|---|---|"]
    for name, row in results.items():
        low, high = row["ratio_quartiles"]
        target = "" if name == "SGLD" else f"<= {TARGET:.2f}"
        lines.append(
            f"| {name} | {row['microseconds']:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {target} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    times = measure(variants(make_data(), arguments.steps), arguments.steps, arguments.repeats)
    results = summary(times)
    text = table(results)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "settings": vars(arguments) | {"output": None}, "results": results}
    (arguments.output / "federated_step.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.output / "federated_step.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
