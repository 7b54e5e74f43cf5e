"""Time of one step against the bare gradient, in one process.

Bayesian logistic regression, N = 100,000 rows, d = 50, batches of 100, float32. The floor is what any minibatch sampler
with random rows must do: random indices, gather, autodiff gradient, in a scan. All variants run in turn within each
repeat; what is reported is the median of the ratios to the floor of the same repeat, and their spread. On a machine
that others use, the times vary and the ratios much less.

    python benchmarks/step_time.py [--repeats 15] [--steps 3000] [--output benchmarks/results]
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg

NUM_DATA, SIZE, BATCH_SIZE = 100_000, 50, 100
NUM_CHAINS, THIN = 4, 10
TARGETS = {
    "SGLD, uniform": 1.15,
    "SGLD, blocks": 0.40,
    "4 chains, erg.sample, BAOAB, blocks, probes (per chain-step)": 0.55,
    "64 chains, own blocks": 0.90,
    "64 chains, shared blocks": 0.45,
}


def make_data():
    key_x, key_theta, key_y = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(key_x, (NUM_DATA, SIZE))
    logits = x @ (jax.random.normal(key_theta, (SIZE,)) / np.sqrt(SIZE))
    return x, (jax.random.uniform(key_y, (NUM_DATA,)) < jax.nn.sigmoid(logits)).astype(jnp.float32)


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, rows):
    x, y = rows
    logits = x @ theta
    return y * logits - jax.nn.softplus(logits)


def numpyro_model(x, y):
    import numpyro
    import numpyro.distributions as dist

    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([SIZE]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ theta), obs=y)


def floor(data, num_steps):
    """Indices, gather, gradient."""

    @jax.jit
    def run(data, key, theta):
        def body(theta, key):
            index = jax.random.randint(key, (BATCH_SIZE,), 0, NUM_DATA)
            rows = jax.tree.map(lambda leaf: leaf[index], data)

            def log_density(theta):
                return log_prior(theta) + NUM_DATA / BATCH_SIZE * jnp.sum(log_likelihood(theta, rows))

            return theta + 1e-7 * jax.grad(log_density)(theta), None

        return jax.lax.scan(body, theta, jax.random.split(key, num_steps))[0]

    return lambda key: run(data, key, jnp.zeros(SIZE))


def fixed_rows(data, num_steps):
    """The gradient alone: what no sampler can go below."""

    @jax.jit
    def run(rows, theta):
        def body(theta, _):
            def log_density(theta):
                return log_prior(theta) + NUM_DATA / BATCH_SIZE * jnp.sum(log_likelihood(theta, rows))

            return theta + 1e-7 * jax.grad(log_density)(theta), None

        return jax.lax.scan(body, theta, None, num_steps)[0]

    rows = jax.tree.map(lambda leaf: leaf[:BATCH_SIZE], data)
    return lambda key: run(rows, jnp.zeros(SIZE))  # noqa: ARG005


def blackjax_sgld(data, num_steps):
    """`blackjax.sgld` with its own gradient estimator, in a scan."""
    import blackjax

    def log_likelihood_of_one(theta, row):
        return log_likelihood(theta, row)

    sgld = blackjax.sgld(blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood_of_one, NUM_DATA))

    @jax.jit
    def run(data, key, theta):
        def body(theta, key):
            key_rows, key_noise = jax.random.split(key)
            index = jax.random.randint(key_rows, (BATCH_SIZE,), 0, NUM_DATA)
            return sgld.step(key_noise, theta, jax.tree.map(lambda leaf: leaf[index], data), 1e-6), None

        return jax.lax.scan(body, theta, jax.random.split(key, num_steps))[0]

    return lambda key: run(data, key, jnp.zeros(SIZE))


def in_scan(sampler, num_steps, position):
    """One of our kernels, with all that its info reports."""

    @jax.jit
    def run(sampler, key, position):
        key_init, key_steps = jax.random.split(key)

        def body(carry, i):
            state, _ = carry
            return sampler.step(jax.random.fold_in(key_steps, i), state), None

        state = sampler.init(key_init, position)
        _, info = jax.eval_shape(sampler.step, key_init, state)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), info)
        return jax.lax.scan(body, (state, blank), jnp.arange(num_steps))[0]

    return lambda key: run(sampler, key, position)


def variants(data, num_steps):
    posterior = erg.Posterior(log_prior, log_likelihood, data, initial=jnp.zeros(SIZE))
    named = erg.from_numpyro(numpyro_model, data={"x": data[0], "y": data[1]})
    start = named.start(jax.random.key(0))
    minibatch, samplers = erg.estimators.Minibatch, erg.samplers
    uniform, blocks = minibatch(posterior, BATCH_SIZE, "uniform"), minibatch(posterior, BATCH_SIZE)
    theta = jnp.zeros(SIZE)
    probabilities = erg.estimators.importance_probabilities(posterior, theta)
    wrapped = {
        "blocks, control variate": erg.estimators.ControlVariate(blocks, theta),
        "blocks, SVRG": erg.estimators.SVRG(blocks, centre=theta),
        "blocks, SAGA": erg.estimators.SAGA(blocks, centre=theta),
        "importance": minibatch(posterior, BATCH_SIZE, "importance", probabilities=probabilities),
        "blocks, clipped": erg.estimators.Clipped(blocks, 1.0),
        "blocks, median of 10 groups": erg.estimators.RobustAggregate(blocks, 10),
    }
    return {
        "floor": floor(data, num_steps),
        "gradient on fixed rows": fixed_rows(data, num_steps),
        "blackjax.sgld in a scan": blackjax_sgld(data, num_steps),
        "SGLD, uniform": in_scan(samplers.SGLD(uniform, 1e-6), num_steps, theta),
        "SGLD, uniform, from_numpyro": in_scan(
            samplers.SGLD(minibatch(named, BATCH_SIZE, "uniform"), 1e-6), num_steps, start
        ),
        "SGLD, blocks": in_scan(samplers.SGLD(blocks, 1e-6), num_steps, theta),
        "SGLD, blocks, from_numpyro": in_scan(samplers.SGLD(minibatch(named, BATCH_SIZE), 1e-6), num_steps, start),
        "BAOAB, blocks": in_scan(samplers.BAOAB(blocks, 1e-4), num_steps, theta),
        **{
            f"SGLD, {name}": in_scan(samplers.SGLD(gradient, 1e-6), num_steps, theta)
            for name, gradient in wrapped.items()
        },
    }


def timed(run, key):
    begin = time.perf_counter()
    jax.block_until_ready(run(key))
    return time.perf_counter() - begin


def measure(runs, num_steps, repeats):
    """Microseconds a step: {name: [one a repeat]}."""
    for run in runs.values():
        jax.block_until_ready(run(jax.random.key(0)))
    times = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            times[name].append(1e6 * timed(run, jax.random.key(repeat)) / num_steps)
    return times


def measure_sample(data, floor_run, num_floor_steps, repeats, num_samples=(500, 3_000)):
    """Marginal time of a chain-step of `erg.sample`: a long run less a short one, beside the floor of the same repeat."""
    posterior = erg.Posterior(log_prior, log_likelihood, data, initial=jnp.zeros(SIZE))
    sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, BATCH_SIZE), 1e-4)

    def run(count, key):
        begin = time.perf_counter()
        result = erg.sample(key, sampler, count, 10, NUM_CHAINS, THIN, progress=False)
        return time.perf_counter() - begin - float(result.attrs["compile_time"])

    short, long = num_samples
    times, floors = [], []
    for repeat in range(-1, repeats):
        key = jax.random.key(repeat + 1)
        seconds = run(long, key) - run(short, key)
        if repeat >= 0:  # the first compiles
            times.append(1e6 * seconds / ((long - short) * THIN * NUM_CHAINS))
            floors.append(1e6 * timed(floor_run, key) / num_floor_steps)
    return times, floors


def measure_many_chains(data, repeats, num_chains=64, num_steps=(1_000, 5_000)):
    """Marginal time of a chain-step of `erg.sample` with many chains, own batches and shared ones, beside one chain's."""
    posterior = erg.Posterior(log_prior, log_likelihood, data, initial=jnp.zeros(SIZE))
    sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, BATCH_SIZE), 1e-4)
    cases = {
        "1 chain": {"num_chains": 1},
        f"{num_chains} chains, own blocks": {"num_chains": num_chains},
        f"{num_chains} chains, shared blocks": {"num_chains": num_chains, "shared_batches": True},
    }

    def run(count, key, options):
        begin = time.perf_counter()
        result = erg.sample(key, sampler, count, 10, thin=100, progress=False, probes=False, **options)
        return time.perf_counter() - begin - float(result.attrs["compile_time"])

    times = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        key = jax.random.key(repeat + 1)
        for name, options in cases.items():
            short, long = (steps // 100 for steps in num_steps)
            if options["num_chains"] == 1:
                short, long = 10 * short, 10 * long
            seconds = run(long, key, options) - run(short, key, options)
            if repeat >= 0:  # the first compiles
                times[name].append(1e6 * seconds / ((long - short) * 100 * options["num_chains"]))
    return {name: summary(values, times["1 chain"]) for name, values in times.items()}


def summary(times, floors):
    ratios = sorted(t / f for t, f in zip(times, floors, strict=True))
    quarter = len(ratios) // 4
    return {
        "microseconds": statistics.median(times),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }


def environment():
    packages = ("ergodica", "jax", "jaxlib", "equinox", "blackjax", "numpyro")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "load_average": os.getloadavg()[0],
    }


def table(results, reference="the floor"):
    lines = [f"| variant | us a step | ratio to {reference} (quartiles) | target |", "|---|---|---|---|"]
    for name, row in results.items():
        low, high = row["ratio_quartiles"]
        target = f"<= {TARGETS[name]:.2f}" if name in TARGETS else ""
        lines.append(
            f"| {name} | {row['microseconds']:.2f} | {row['ratio']:.3f} ({low:.2f} to {high:.2f}) | {target} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()

    data = make_data()
    runs = variants(data, arguments.steps)
    times = measure(runs, arguments.steps, arguments.repeats)
    results = {name: summary(values, times["floor"]) for name, values in times.items()}
    for name in ("SGLD, uniform", "SGLD, blocks"):
        results[f"{name}, from_numpyro"]["ratio_to_hand_written"] = summary(
            times[f"{name}, from_numpyro"], times[name]
        )["ratio"]
    (sampled,) = [name for name in TARGETS if "erg.sample" in name]
    results[sampled] = summary(*measure_sample(data, runs["floor"], arguments.steps, max(3, arguments.repeats // 3)))

    many = measure_many_chains(data, max(5, arguments.repeats // 3))
    text = table(results) + "\n\n" + table(many, "one chain")
    print(text)
    for name in ("SGLD, uniform", "SGLD, blocks"):
        print(f"{name}: from_numpyro / hand-written = {results[f'{name}, from_numpyro']['ratio_to_hand_written']:.3f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment(),
        "settings": vars(arguments) | {"output": None},
        "results": results,
        "chains": many,
    }
    (arguments.output / "step_time.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.output / "step_time.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
