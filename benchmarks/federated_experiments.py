"""Federated experiments: FSGLD and DSGLD with 1, 20 and 200 local steps, predicted before the run and then run.

The parts, each a module of `federated_parts`:

- blobs: the mean of a Gaussian from ten clients far apart, where every law is known;
- regression: Bayesian linear regression on cars (`models.zoo.auto_mpg`), sorted over eight clients by weight;
- metric: which distance tells digits apart, from pairs within two classes a client (Yang, Jin and Sukthankar 2007);
- network: a Bayesian neural network on digits, labels spread unevenly over ten clients;
- heterogeneity: the variance of the gradient against the skew of the labels.

    python benchmarks/federated_experiments.py [--only blobs metric] [--fresh] [--output benchmarks/results]

Results are written after each cell, and a second call goes on from what is there.
"""

import argparse
import importlib
import importlib.metadata
import json
import pathlib
import time
from typing import Any

PARTS = ("blobs", "regression", "metric", "network", "heterogeneity")
OUTPUT = pathlib.Path(__file__).parent / "results"


def rounded(value: Any) -> Any:
    """Numbers with six digits, for a file that can be read; what is not finite becomes None."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def load(path: pathlib.Path) -> dict[str, Any]:
    """What is there already."""
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    """Run what is not there yet, and write after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--fresh", action="store_true", help="make these parts anew")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "federated_experiments.json"
    for part in arguments.only:
        stored = {} if arguments.fresh else load(path).get(part, {})
        done, seconds = stored.setdefault("cells", {}), stored.setdefault("cpu_seconds", {})
        for name, run in importlib.import_module(f"federated_parts.{part}").cells():
            if name in done:
                continue
            began = time.process_time()
            done[name] = rounded(run())
            seconds[name] = round(time.process_time() - began, 1)
            print(f"{part}: {name}: {seconds[name]} s of processor time", flush=True)
            versions = {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpy")}
            results = load(path) | {"versions": versions, part: stored}  # other parts may be running too
            path.write_text(json.dumps(results, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
