"""What a visit over Flower costs on loopback: seconds a message, bytes, and the part that is steps.

Three SuperNodes and one SuperLink of this machine, two parameters, 45 rows a client, batches of 20; one chain, so that one
site works at a time. Visits of 100 and of 100,000 steps, each after one with the same program, in which it may be compiled. What is
reported is the median and range over visits, from the moment the server hands the order over to the moment it has the
answer; and the time of the same steps in one warm process, without Flower.

    python benchmarks/flower_round.py [--visits 6] [--output benchmarks/results]

Needs ``pip install ergodica[flower]``; says so and ends without it.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from ergodica.integrations.flower.client import make_visits
from ergodica.integrations.flower.server import surrogate_arrays
from ergodica.run.orders import Visit
from tests.integrations import federated_study, flower_network

LENGTHS = (100, 100_000)
APP = pathlib.Path(flower_network.__file__).parent / "flower_app"


def summary(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "count": len(values)}


def over_flower(folder, steps, num_visits):
    """Seconds of each visit, and bytes of arrays each way."""
    folder.mkdir()
    record, output = folder / "messages.jsonl", folder / "result.nc"
    config = {"journal": str(folder / "journal"), "output": str(output), "record": str(record)}
    with flower_network.Network(folder) as network:
        for name in federated_study.NAMES:
            network.node(name)
        network.run(APP, **config, visits=num_visits, chains=1, **{"local-steps": steps, "stride": steps // 100})
        network.wait(output.exists, 3000, "there is a result")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    visits = [line for line in lines if line["type"] == "train.visit"]
    out, back = ([v for v in visits if v["way"] == way] for way in ("out", "back"))
    seconds = [b["at"] - o["at"] for o, b in zip(out, back, strict=True)]
    numbers = [sum(int(np.prod(s)) for shapes in v["arrays"].values() for s in shapes) for v in (out[-1], back[-1])]
    return seconds, {"numbers_out": numbers[0], "numbers_back": numbers[1]}


def in_process(steps, repeats=5):
    """Seconds of the same visit in one warm process."""
    spec = federated_study.study(local_steps=steps, stride=steps // 100, num_visits=2)
    centre = jax.numpy.zeros(2)
    posterior = federated_study.make(federated_study.rows("west"))
    surrogates = surrogate_arrays(centre, [spec.expand(posterior, i, centre) for i in range(3)])[2]
    order = Visit(
        "0.0.0", 0, 2, np.array([1, 2], np.uint32), 0, 0, steps, steps // 100, 1 / 3, (np.zeros(2, np.float32),)
    )
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        (reply,) = make_visits(spec, posterior, [order], surrogates, None)
        found.append(time.perf_counter() - begin)
        assert reply.error is None
    return found[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=6)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if (reason := flower_network.why_not()) is not None:
        print(f"Nothing is measured: {reason}.")
        return
    versions = {name: importlib.metadata.version(name) for name in ("ergodica", "flwr", "jax")}
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    results = {"versions": versions, "machine": machine, "visits": {}}
    for steps in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            seconds, size = over_flower(pathlib.Path(folder) / "run", steps, arguments.visits)
        warm = summary(in_process(steps))
        results["visits"][str(steps)] = {"first": seconds[0], "later": summary(seconds[1:]), "in_process": warm, **size}
        print(f"{steps} steps: {results['visits'][str(steps)]}", flush=True)
        (arguments.output / "flower_round.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
