"""Bayesian neural networks at several temperatures, beside deep ensembles, SWAG and Laplace on the same gradients.

For each problem, seed (split of the data, starts, batches) and temperature, four chains of BAOAB on the posterior to the power
1/T: scores of the predictions on held-out data, the measured temperature, and how far the chains disagree. For one seed, chains
four times as long at temperature 1 show whether the others are long enough. The problems:

- auto_mpg: 313 cars, 8 inputs, 32 tanh units, noise learnt, prior standard deviation 1 / √fan-in;
- digits: 1,197 pictures of 64 pixels, 32 units, prior standard deviation 4 / √fan-in;
- digits_unit: the same under a prior standard deviation of 1 for every weight;
- mnist, with --mnist alone: 10,000 pictures of 784 pixels, 50 units, from the folder that ERGODICA_DATA names; prior 4 / √fan-in,
  one seed.

    python benchmarks/bayesian_networks.py [--output benchmarks/results] [--resume] [--mnist] [--quick]
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import arviz_stats
import jax
import numpy as np
from bayesian_networks_methods import (
    PROBLEMS,
    Problem,
    Split,
    disagreement,
    laplace_predictions,
    predictions,
    run_chains,
    run_ensemble,
    run_swag,
    scores,
    split,
    swag_draws,
)

TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
SEEDS = (0, 1, 2)


def chains(key: jax.Array, problem: Problem, s: Split, temperature: float) -> dict[str, dict[str, Any]]:
    """Sample at a temperature."""
    dt = run_chains(key, problem, s, temperature)
    law, values = predictions(problem, s, dt)
    overall = dt["probe"]["temperature"].mean("coordinate").values / temperature
    measured = {  # over that of the run
        "mean": float(overall.mean()),
        "mcse": float(arviz_stats.mcse(overall, method="mean")),
        "kinetic": float(dt.sample_stats.kinetic_temperature.mean()) / temperature,
    }
    cost = {"gradients": int(dt.attrs["num_gradients"])}
    found = {"scores": scores(s, law), "temperature": measured, "chains": disagreement(problem, values, dt)}
    return {f"{temperature:g}": found | cost}


def ensemble(key: jax.Array, problem: Problem, s: Split) -> dict[str, dict[str, Any]]:
    """Fit four networks; predict by all, by each alone (scores are averaged), and by Laplace around each."""
    dt = run_ensemble(key, problem, s)
    cost = {"gradients": int(dt.attrs["num_gradients"])}
    last = dt.isel(draw=slice(-1, None))
    law, _ = predictions(problem, s, last)
    alone = [scores(s, predictions(problem, s, last.isel(chain=[i]))[0]) for i in range(last.posterior.sizes["chain"])]
    names = alone[0].keys()
    single = {name: [float(np.mean([one[name][0] for one in alone]))] for name in names}
    laplace = laplace_predictions(jax.random.fold_in(key, 1), problem, s, last)
    return {
        "ensemble": {"scores": scores(s, law)} | cost,
        "single": {"scores": single, "gradients": cost["gradients"] // len(alone)},
        "laplace": {"scores": scores(s, laplace)} | cost,
    }


def swag(key: jax.Array, problem: Problem, s: Split) -> dict[str, dict[str, Any]]:
    """Fit a Gaussian to the iterates of each of four climbs."""
    dt = run_swag(key, problem, s)
    law, _ = predictions(problem, s, swag_draws(jax.random.fold_in(key, 1), dt))
    return {"swag": {"scores": scores(s, law), "gradients": int(dt.attrs["num_gradients"])}}


def cells(problem: Problem, seed: int) -> Iterator[tuple[str, Callable[[Split], dict[str, dict[str, Any]]]]]:
    """Everything that is run for a problem and a seed, with the name of its first result."""
    key = jax.random.key(100 + seed)
    for temperature in TEMPERATURES:
        yield f"{temperature:g}", lambda s, t=temperature: chains(key, problem, s, t)
    if seed == SEEDS[0]:  # are the chains at temperature 1 long enough?
        longer = problem._replace(num_steps=4 * problem.num_steps)
        yield "long", lambda s: {"long": chains(key, longer, s, 1.0)["1"]}
    yield "ensemble", lambda s: ensemble(key, problem, s)
    yield "swag", lambda s: swag(key, problem, s)


def describe(problem: Problem) -> dict[str, Any]:
    """Settings, as stored."""
    skipped = ("load", "make", "likelihood")
    return {name: value for name, value in problem._asdict().items() if name not in skipped}


def selected(arguments: argparse.Namespace) -> list[tuple[Problem, tuple[int, ...]]]:
    """Problems and seeds to run."""
    if arguments.quick:
        return [(PROBLEMS["auto_mpg"]._replace(num_steps=1000), SEEDS[:1])]
    chosen = [(PROBLEMS[name], SEEDS) for name in ("auto_mpg", "digits", "digits_unit")]
    if not arguments.mnist:
        return chosen
    if not os.environ.get("ERGODICA_DATA"):
        print("mnist: skipped, since ERGODICA_DATA does not say where mnist.npz is")
        return chosen
    return [*chosen, (PROBLEMS["mnist"], SEEDS[:1])]


def main() -> None:
    """Run what is not there yet, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--resume", action="store_true", help="keep what the file of results holds already")
    parser.add_argument("--mnist", action="store_true", help="MNIST too, from the folder that ERGODICA_DATA names")
    parser.add_argument("--quick", action="store_true", help="a short run of one problem, not stored")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bayesian_networks.json"
    results: dict[str, Any] = {"cpu_seconds": 0.0, "problems": {}}
    if arguments.resume and path.exists():
        results = json.loads(path.read_text())
    results["versions"] = {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpy")}
    chosen = selected(arguments)
    for seed in SEEDS:  # a run that is cut short has all problems
        for problem in (problem for problem, seeds in chosen if seed in seeds):
            stored = results["problems"].setdefault(problem.name, {"settings": describe(problem), "seeds": {}})
            s, done = split(problem, seed), stored["seeds"].setdefault(str(seed), {})
            for name, run in cells(problem, seed):
                if name in done:
                    continue
                began = time.process_time()
                done |= run(s)
                results["cpu_seconds"] = round(results["cpu_seconds"] + time.process_time() - began, 1)
                line = {score: value[0] for score, value in done[name]["scores"].items()}
                print(f"{problem.name} seed {seed} {name:>8}: {line}", flush=True)
                if not arguments.quick:
                    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
