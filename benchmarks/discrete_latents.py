"""Gradient estimators for discrete latents, on the tasks of Jang, Gu and Poole (2017), and baselines of the score function.

Tasks, on pictures of fixed zeros and ones (each pixel is drawn once, with its grey value as the probability and seed 2017):

- vae_categories: 784 pixels - 20 one-hot vectors of ten - 200 tanh units - 784; vae_bits: 784 - 200 bits - 784; priors are learnt;
- half_bits, half_categories: the lower half from the upper, 392 - 200 - 200 - 392 (bits), and 392 - 20 x 10 - 20 x 10 - 392;
- deep_bits: generative belief network of two layers, 200 bits - 200 bits - 784, for baselines (with two particles each).

Protocol, the same for all: Adam, batches of 100, the rate constant for a fifth of the steps and then linearly down to zero. Seed 0
is run at rates of 0.003 and 0.01 from beginning to end; the one with the better bound on 1,000 pictures of the validation set
(10 draws) is kept, and serves the other seeds. Adam, and not momentum as in the paper, since it divides by the running size of each
gradient: the paper's normalisation of the variance, for all estimators alike. What is reported is the importance-weighted bound of
100 hard draws on the first 1,000 test pictures, after the last epoch. ``--data digits`` is the same on digits of 8 x 8 pixels with
50 units.

    python benchmarks/discrete_latents.py [--data digits|mnist] [--epochs 3] [--seeds 0 1 2] [--resume] [--only vae_bits:gumbel]
    python benchmarks/discrete_latents.py --frozen

``--frozen`` measures bias and variance at frozen points of small networks, where gradients are exact by enumeration. Results are
written to benchmarks/results/discrete_latents.json after each cell. MNIST is read from the folder that ERGODICA_DATA names.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

import jax.numpy as jnp
from discrete_parts.methods import METHODS, cells
from discrete_parts.programs import make_tasks
from discrete_parts.training import BINARISATION_SEED, RATES, SPLIT_SEED, Settings, Trainer, load

OUTPUT = pathlib.Path(__file__).parent / "results"
EPOCHS = {"digits": 200, "mnist": 3}


def settings_for(data: str, epochs: int) -> Settings:
    """Sizes of a run: digits have few pictures and short epochs."""
    if data == "digits":
        return Settings(epochs, curve=(10, 200), final=(100, 400), choice=200)
    return Settings(epochs)


def read(path: pathlib.Path) -> dict[str, Any]:
    """What is there already."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Replace the file at once, so that a run that is killed leaves the last whole one."""
    results["versions"] = {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpyro", "numpy")}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rounded(results), indent=1) + "\n")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Numbers with six digits; what is not finite becomes None."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def protocol(settings: Settings) -> dict[str, Any]:
    """As stored; runs with another protocol are not mixed."""
    seeds = {"binarisation_seed": BINARISATION_SEED, "split_seed": SPLIT_SEED}
    return {**rounded(settings._asdict()), "rates": list(RATES), **seeds}


def best_rate(found: dict[str, float | None]) -> str:
    """The rate with the best bound; one that diverged has none."""
    return max(found, key=lambda rate: float("-inf") if found[rate] is None else found[rate])


def jobs(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """Seeds and cells, in an order of which every beginning is useful."""
    wanted = [f"{task}:{method}" for task, method in cells()]
    if arguments.only:
        wanted = [name for name in wanted if {name, name.split(":")[0]} & set(arguments.only)]
    late = [name for name in wanted if name.startswith("half_categories")]
    early = [name for name in wanted if name not in late]
    first, *rest = arguments.seeds
    pairs = [(first, name) for name in early]
    for seed in rest:
        pairs += [(seed, name) for name in early if name.startswith("vae")]
        pairs += [(earlier, name) for name in late for earlier in (first,) if seed == rest[0]]
        pairs += [(seed, name) for name in wanted if not name.startswith("vae")]
    return pairs if rest else pairs + [(first, name) for name in late]


def train(data: str, arguments: argparse.Namespace, path: pathlib.Path) -> None:
    """Run what is not there yet, and write after each cell."""
    settings = settings_for(data, arguments.epochs or EPOCHS[data])
    stored = read(path).get(data, {})
    if not arguments.resume or not stored:
        empty = {"protocol": protocol(settings), "rates": {}, "runs": {}, "cells": {}, "cpu_seconds": 0.0}
        write(path, read(path) | {data: empty})
    elif stored["protocol"] != protocol(settings):
        raise SystemExit(f"{path} holds {data} under another protocol, {stored['protocol']}; run without --resume.")
    pictures = load(data)
    tasks = make_tasks(jnp.mean(pictures.train, axis=0), pictures.units)
    trainers: dict[str, Trainer] = {}
    bounds: dict = {}
    for seed, name in jobs(arguments):
        stored = read(path)[data]  # another process may have done some of it
        if str(seed) in stored["cells"].get(name, {}):
            continue
        began, (task, method) = time.process_time(), name.split(":")
        if name not in trainers:
            trainers[name] = Trainer(tasks[task], METHODS[method], pictures, settings, bounds)
        trainer, rates = trainers[name], stored["rates"].get(name)
        if rates:
            record, state = trainer.run(seed, float(best_rate(rates)))
        else:
            record, state, rates = trainer.best(seed)
        record = rounded(record | {"bound": trainer.test(seed, state)})
        results = read(path)
        stored = results[data]
        stored["rates"][name], stored["runs"][name] = rounded(rates), trainer.runs()
        stored["cells"].setdefault(name, {})[str(seed)] = record
        stored["cpu_seconds"] += time.process_time() - began
        write(path, results)
        line = {k: round(v, 4) for k, v in record.items() if isinstance(v, float)}
        print(f"{time.strftime('%H:%M:%S')} {data} seed {seed} {name}: {line}", flush=True)


def frozen(arguments: argparse.Namespace, path: pathlib.Path) -> None:
    """Bias and variance, part by part."""
    from discrete_parts.frozen import parts

    for name, run in parts(mnist=bool(os.environ.get("ERGODICA_DATA"))).items():
        stored = read(path).get("frozen", {})
        if (arguments.resume and name in stored) or (arguments.only and name not in arguments.only):
            continue
        began = time.process_time()
        found = run() | {"cpu_seconds": time.process_time() - began}
        print(f"{name}: {found['cpu_seconds']:.0f} s", flush=True)
        results = read(path)
        write(path, results | {"frozen": results.get("frozen", {}) | {name: rounded(found)}})


def main() -> None:
    """Train, or measure at frozen points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--epochs", type=int, help="200 for digits and 3 for MNIST unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="tasks, or task:estimator")
    parser.add_argument("--resume", action="store_true", help="keep what the file of results holds already")
    parser.add_argument("--frozen", action="store_true", help="bias and variance at frozen points")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "discrete_latents.json"
    if arguments.frozen:
        frozen(arguments, path)
        return
    if arguments.data == "mnist" and not os.environ.get("ERGODICA_DATA"):
        print("mnist: skipped, since ERGODICA_DATA does not say where mnist.npz is")
        return
    train(arguments.data, arguments, path)


if __name__ == "__main__":
    main()
