"""SGLD of SGMCMCJax and jax-sgmc on the Gaussian problem of `gradients_to_accuracy.py`: gradients to accuracy, and time.

It needs an old JAX (0.4.25 here); `make bench-peers` makes an environment for it. All SGLDs with independent rows have one law,
so the step size is the one that was found best for BlackJAX's. Error, threshold and what "stays below" means are those of
`accuracy/run.py`. Times are ratios, in one process, to the bare random rows and gradient in a scan.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))
from accuracy.data import BATCH_SIZE, NUM_DATA, SIZE, gaussian_rows  # noqa: E402  (found by the path above)

RESULT = BENCHMARKS / "results" / "peers_old_accuracy.json"
TUNED = BENCHMARKS / "results" / "gradients_to_accuracy.json"
THRESHOLD, AFTER, REPLICATES, LOOKS, MOST = 0.01, 1.25, 8, 300, 2.5
LAST_STEP = 0.98  # of the first, in jax-sgmc, whose polynomial schedule is not finite where they are equal
ROWS, PRECISION = gaussian_rows()
MEAN, SD = ROWS.astype(float).mean(axis=0), PRECISION**-0.5
OF_ONE = jnp.asarray(PRECISION / NUM_DATA, jnp.float32)


def log_likelihood(theta, row):
    return -0.5 * jnp.sum(OF_ONE * (row - theta) ** 2)


def log_prior(theta):
    return 0.0 * jnp.sum(theta)


def first_lasting(errors, costs):
    """As `accuracy.run.stays_below`, for one replicate."""
    below = np.array(errors) < THRESHOLD
    lasting = np.logical_and.accumulate(below[::-1])[::-1]
    if not lasting.any():
        return None
    at = costs[int(lasting.argmax())]
    return float(at) if at * AFTER <= costs[-1] else None


def errors_of(sums, squares, steps):
    """The larger of two averages over coordinates, for each replicate."""
    first, second = (sums / steps) ** 2, (squares / steps - 1) ** 2 / 2
    return np.maximum(first.mean(-1), second.mean(-1))


def starts(num):
    return jnp.asarray(MEAN + SD * np.random.default_rng(8).normal(size=(num, SIZE)), jnp.float32)


def sgmcmcjax_gradients(step_size, most):
    """Gradients to accuracy of the package's SGLD kernel: replicates side by side, each with batches of its own."""
    from sgmcmcjax import kernels

    init, kernel, position = kernels.build_sgld_kernel(
        step_size, log_likelihood, log_prior, (jnp.asarray(ROWS),), BATCH_SIZE
    )
    states = jax.vmap(init)(jax.random.split(jax.random.PRNGKey(1), REPLICATES), starts(REPLICATES))
    mean, sd = jnp.asarray(MEAN, jnp.float32), jnp.asarray(SD, jnp.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def advance(states, key, count):
        def step(carry, i):
            states, key, total, square = carry
            key, now = jax.random.split(key)
            states = jax.vmap(kernel, (None, 0, 0))(i, jax.random.split(now, REPLICATES), states)
            z = (jax.vmap(position)(states) - mean) / sd
            return (states, key, total + z, square + z**2), None

        zero = jnp.zeros((REPLICATES, SIZE))
        return jax.lax.scan(step, (states, key, zero, zero), jnp.arange(count))[0]

    count = most // LOOKS
    key, sums, squares, errors, costs = jax.random.PRNGKey(2), 0.0, 0.0, [], []
    for look in range(1, LOOKS + 1):
        states, key, total, square = advance(states, key, count)
        sums, squares = sums + np.asarray(total, float), squares + np.asarray(square, float)
        errors.append(errors_of(sums, squares, look * count))
        costs.append(look * count * BATCH_SIZE)
    return [first_lasting([e[r] for e in errors], costs) for r in range(REPLICATES)]


def jax_sgmc_run(step_size, iterations, kept):
    """The package's own SGLD, with the data on the device: a function of a start that gives the draws."""
    from jax_sgmc import alias, potential
    from jax_sgmc.data.numpy_loader import DeviceNumpyDataLoader

    stochastic = potential.minibatch_potential(
        prior=lambda sample: log_prior(sample["x"]),
        likelihood=lambda sample, observation: log_likelihood(sample["x"], observation["row"]),
        strategy="vmap",
    )
    run = alias.sgld(
        stochastic,
        DeviceNumpyDataLoader(row=ROWS),
        cache_size=1,
        batch_size=BATCH_SIZE,
        first_step_size=step_size,
        last_step_size=LAST_STEP * step_size,
        burn_in=0,
        accepted_samples=kept,
        save_to_numpy=False,
        progress_bar=False,
    )
    return lambda *starts: run(*({"x": x} for x in starts), iterations=iterations)


def jax_sgmc_gradients(step_size, most, replicates=3, kept=20_000):
    """As above, from draws that the package thins at random; costs are those of the steps up to each draw, on average."""
    costs = np.linspace(0, most * BATCH_SIZE, kept + 1)[1:]
    found = []
    for out in jax_sgmc_run(step_size, most, kept)(*starts(replicates)):
        z = (np.asarray(out["samples"]["variables"]["x"], float) - MEAN) / SD
        count = np.arange(1, len(z) + 1)[:, None]
        errors = errors_of(np.cumsum(z, axis=0), np.cumsum(z**2, axis=0), count)
        found.append(first_lasting(errors, costs[: len(errors)]))
    return found


def jax_sgmc_distances(step_size=0.01, steps=3000):
    """Largest difference between two chains that the package runs side by side from different starts, at some steps."""
    first, second = (
        np.asarray(out["samples"]["variables"]["x"]) for out in jax_sgmc_run(step_size, steps, steps)(*starts(2))
    )
    return {str(i): float(np.abs(first[i] - second[i]).max()) for i in (0, 500, steps - 1)}


def floor(num_steps):
    """Random rows, gather, gradient."""
    data = jnp.asarray(ROWS)

    @jax.jit
    def run(data, key, theta):
        def body(theta, key):
            rows = data[jax.random.randint(key, (BATCH_SIZE,), 0, NUM_DATA)]
            gradient = jax.grad(lambda t: jax.vmap(log_likelihood, (None, 0))(t, rows).sum())(theta)
            return theta + 1e-5 * NUM_DATA / BATCH_SIZE * gradient, None

        return jax.lax.scan(body, theta, jax.random.split(key, num_steps))[0]

    return lambda key: run(data, key, jnp.zeros(SIZE))


def times(step_size, num_steps=10_000, repeats=7):
    """Microseconds a step, and ratios to the floor of the same repeat."""
    from sgmcmcjax import samplers

    sampler = samplers.build_sgld_sampler(
        step_size, log_likelihood, log_prior, (jnp.asarray(ROWS),), BATCH_SIZE, pbar=False
    )
    long, short = (jax_sgmc_run(step_size, n * num_steps, 1000) for n in (2, 1))
    runs = {
        "floor": floor(num_steps),
        "SGMCMCJax sgld": lambda key: sampler(key, num_steps, jnp.zeros(SIZE)),
        "jax-sgmc sgld, twice the steps": lambda _: long(starts(1)[0]),
        "jax-sgmc sgld, once": lambda _: short(starts(1)[0]),
    }
    found = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, call in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(jax.random.PRNGKey(repeat + 1)))
            if repeat >= 0:
                found[name].append(1e6 * (time.perf_counter() - begin) / num_steps)
    longer, shorter = found.pop("jax-sgmc sgld, twice the steps"), found.pop("jax-sgmc sgld, once")
    found["jax-sgmc sgld, data on the device"] = [a - b for a, b in zip(longer, shorter)]  # noqa: B905  (Python 3.9 has no strict=)
    rows = {}
    for name, values in found.items():
        ratios = sorted(v / f for v, f in zip(values, found["floor"]))  # noqa: B905  (Python 3.9 has no strict=)
        quarter = len(ratios) // 4
        rows[name] = {
            "microseconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--tuned", type=pathlib.Path, default=TUNED, help="what gradients_to_accuracy.py wrote")
    arguments = parser.parse_args()
    peer = json.loads(arguments.tuned.read_text())["problems"]["gaussian"]["methods"]["blackjax.sgld"]
    step_size, most = peer["step_size"], int(MOST * peer["median"] / BATCH_SIZE)
    record = {
        "versions": {name: importlib.metadata.version(name) for name in ("sgmcmcjax", "jax-sgmc", "jax")},
        "step_size": step_size,
        "num_data": NUM_DATA,
        "most": most * BATCH_SIZE,
        "gradients": {},
    }
    for name, call in (("SGMCMCJax sgld", sgmcmcjax_gradients), ("jax-sgmc sgld", jax_sgmc_gradients)):
        record["gradients"][name] = call(step_size, most)
        median = np.median([np.inf if v is None else v for v in record["gradients"][name]]) / NUM_DATA
        print(f"{name}: {median:.4g} epochs", flush=True)
    record["jax_sgmc_distances"] = jax_sgmc_distances()
    record["seconds"] = times(step_size)
    for name, row in record["seconds"].items():
        print(f"{name}: {row['microseconds']:.1f} us a step, {row['ratio']:.2f} x floor")
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
