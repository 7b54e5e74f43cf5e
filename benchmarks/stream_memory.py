"""Data four times larger than the memory that the process may have: the run must complete, and shows what it needed.

Bayesian logistic regression with d = 50, rows on disk as .npy, read through a memory map by `ergodica.run.stream` for one
epoch. The limit is RLIMIT_DATA, the process's own memory; pages of the mapped file are the kernel's cache, which it takes back
at need, and are reported apart. As a control, the same process with the data read into memory must fail.

    python benchmarks/stream_memory.py [--limit 512] [--output benchmarks/results]
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

SIZE, BATCH_SIZE, NUM_CHAINS = 50, 1000, 4
BYTES_A_ROW = 4 * (SIZE + 1)
MIB = 1 << 20


def write_data(folder, num_data, rows_at_once=200_000):
    """Simulate rows piece by piece."""
    random = np.random.default_rng(0)
    theta = random.normal(size=SIZE) / np.sqrt(SIZE)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (num_data, SIZE))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (num_data,))
    for begin in range(0, num_data, rows_at_once):
        rows = slice(begin, min(begin + rows_at_once, num_data))
        x[rows] = random.standard_normal((rows.stop - rows.start, SIZE), dtype=np.float32)
        y[rows] = random.random(rows.stop - rows.start) < 1 / (1 + np.exp(-x[rows] @ theta))


def memory():
    """Resident memory (MiB): the process's own, and pages of files."""
    with open("/proc/self/status") as status:
        kilobytes = dict(line.split(":") for line in status if line.startswith(("RssAnon", "RssFile", "VmData")))
    return {name: int(value.split()[0]) / 1024 for name, value in kilobytes.items()}


class Peak(threading.Thread):
    """Watch the memory of this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = memory()

    def run(self):
        while True:
            self.peak = {name: max(self.peak[name], value) for name, value in memory().items()}
            time.sleep(0.02)


def log_prior(theta):
    import jax.numpy as jnp

    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, rows):
    import jax

    logits = rows["x"] @ theta
    return rows["y"] * logits - jax.nn.softplus(logits)


def child(folder, how, limit):
    """Run one epoch under the limit and print what it took, as JSON."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit * MIB, limit * MIB))
    import jax
    import jax.numpy as jnp

    import ergodica as erg

    watch = Peak()
    watch.start()
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r" if how == "stream" else None) for name in ("x", "y")}
    num_data = len(arrays["y"])
    held = {} if how == "stream" else {"data": arrays}
    posterior = erg.Posterior(log_prior, log_likelihood, num_data=num_data, initial=jnp.zeros(SIZE), **held)
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, BATCH_SIZE), step_size=0.2 / num_data)
    blocks = erg.run.RowBlocks(arrays, BATCH_SIZE)
    thin = 100
    dt = erg.run.stream(
        jax.random.key(0),
        sampler,
        blocks,
        num_samples=blocks.batches_per_epoch // thin,
        num_warmup=blocks.batches_per_epoch % thin,
        num_chains=NUM_CHAINS,
        thin=thin,
    )
    steps = blocks.batches_per_epoch
    print(
        json.dumps(
            {
                "result": dt.attrs["result"],
                "steps": steps,
                "microseconds a step": 1e6 * dt.attrs["wall_time"] / steps,
                "peak own memory": watch.peak["RssAnon"],
                "peak data segment": watch.peak["VmData"],
                "peak file pages": watch.peak["RssFile"],
            }
        )
    )


def run_child(folder, how, limit):
    command = [sys.executable, __file__, "--child", how, "--folder", str(folder), "--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return (
        json.loads(lines[-1]) if done.returncode == 0 else {"result": (done.stderr.strip().splitlines() or ["?"])[-1]}
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512, help="MiB that the process may have")
    parser.add_argument("--output", type=pathlib.Path, default=None)
    parser.add_argument("--child", choices=("stream", "memory"), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.folder, arguments.child, arguments.limit)
        return
    num_data = 4 * arguments.limit * MIB // BYTES_A_ROW + 1
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_data(folder, num_data)
        streamed = run_child(folder, "stream", arguments.limit)
        in_memory = run_child(folder, "memory", arguments.limit)
    report = {
        "limit (MiB)": arguments.limit,
        "data (MiB)": round(num_data * BYTES_A_ROW / MIB),
        "rows": num_data,
        "stream": streamed,
        "control: data in memory": in_memory,
    }
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        (arguments.output / "stream_memory.json").write_text(json.dumps(report, indent=1) + "\n")
    completed = streamed["result"] == "successful" and in_memory["result"] != "successful"
    sys.exit(0 if completed else 1)


if __name__ == "__main__":
    main()
