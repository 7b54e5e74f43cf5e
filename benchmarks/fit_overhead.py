"""What `ergodica.run.fit` costs beside the estimator and the optimiser: against a bare scan, and against NumPyro's SVI.

Two problems whose steps take microseconds, so that nothing hides the loop: a minibatch gradient of a regression with 20
coefficients (50 rows of 1,000), and the ELBO of a normal guide of 3 coefficients with 10 particles. All variants run in one
process, one after the other within each repeat; ratios are between two times of one repeat. Compilation is left out: of `fit`,
by its own record, of the others by a first run.

    python benchmarks/fit_overhead.py [--repeats 11] [--output benchmarks/results]
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import ergodica as erg

NUM_STEPS, NEVER = 20_000, 10**9
OPTIMISER = optax.adam(1e-3)


def minibatch():
    """A regression, and where to start."""
    x = jax.random.normal(jax.random.key(1), (1000, 20))
    posterior = erg.Posterior(
        lambda t: -0.5 * jnp.sum(t**2),
        lambda t, rows: -0.5 * (rows[1] - rows[0] @ t) ** 2,
        (x, x @ jnp.ones(20)),
        initial=jnp.zeros(20),
    )
    return erg.estimators.Minibatch(posterior, 50), jnp.zeros(20)


def model(x, y):
    """A regression with three coefficients."""
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
    numpyro.sample("y", dist.Normal(x @ slope, 0.5).to_event(1), obs=y)


def guide(x, y):  # noqa: ARG001  (those of the model)
    """Independent normals."""
    loc = numpyro.param("loc", jnp.zeros(3))
    scale = numpyro.param("scale", 0.1 * jnp.ones(3), constraint=dist.constraints.positive)
    numpyro.sample("slope", dist.Normal(loc, scale).to_event(1))


def elbo():
    """An ELBO, its data, and where to start."""
    x = jax.random.normal(jax.random.key(0), (40, 3))
    data = (x, x @ jnp.array([1.0, -0.5, 2.0]))
    gradient = erg.estimators.VariationalGradient(erg.estimators.ELBO(10), model, guide, *data)
    return gradient, data, gradient.start(jax.random.key(0))


def bare(gradient, params):
    """A scan over the estimator and the optimiser, as one writes it by hand."""

    @jax.jit
    def run(gradient, params, key):
        def one(carry, i):
            params, state, memory = carry
            estimate, memory = gradient.estimate(jax.random.fold_in(key, i), params, memory)
            updates, state = OPTIMISER.update(jax.tree.map(jnp.negative, estimate.gradient), state, params)
            return (optax.apply_updates(params, updates), state, memory), estimate.value

        start = (params, OPTIMISER.init(params), gradient.init(key, params))
        return jax.lax.scan(one, start, jnp.arange(NUM_STEPS))

    jax.block_until_ready(run(gradient, params, jax.random.key(0)))
    return lambda key: timed(lambda: jax.block_until_ready(run(gradient, params, key)))


def by_fit(gradient, params, **settings):
    """Seconds of a fit without its compilation; metrics and evaluations count."""
    arguments = {"num_steps": NUM_STEPS, "optimiser": OPTIMISER, "progress": False, **settings}

    def run(key):
        began = time.perf_counter()
        done = erg.run.fit(key, gradient, params, **arguments)
        assert done.history.attrs["num_steps"] == NUM_STEPS
        return time.perf_counter() - began - done.history.attrs["compile_time"]

    run(jax.random.key(0))
    return run


def by_svi(gradient, data):
    """Seconds of NumPyro's loop, which compiles at each call: a long run less a short one."""
    svi = numpyro.infer.SVI(model, guide, OPTIMISER, gradient.loss)

    def run(key):
        short, long = (
            timed(lambda n=n: jax.block_until_ready(svi.run(key, n, *data, progress_bar=False)))
            for n in (10, NUM_STEPS + 10)
        )
        return long - short

    return run


def timed(run):
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(variants, repeats):
    """Microseconds a step: median and quartiles; and the ratio to the bare scan within each repeat."""
    times = {name: [] for name in variants}
    for i in range(repeats):
        for name, run in variants.items():
            times[name].append(1e6 * run(jax.random.key(i)) / NUM_STEPS)
    table = {}
    for name, seconds in times.items():
        ratios = np.array(seconds) / np.array(times["bare scan"])
        quartiles = [np.percentile(values, (25, 50, 75)).round(3).tolist() for values in (seconds, ratios)]
        table[name] = dict(
            zip(("microseconds a step: quartiles", "ratio to the bare scan: quartiles"), quartiles, strict=True)
        )
    return table


def main():
    """Measure both problems, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    gradient, params = minibatch()
    variational, data, start = elbo()
    report = {
        "steps": NUM_STEPS,
        "repeats": arguments.repeats,
        "minibatch": measure(
            {
                "bare scan": bare(gradient, params),
                "fit, no evaluation": by_fit(gradient, params, evaluate_every=NEVER),
                "fit, skipping": by_fit(gradient, params, evaluate_every=NEVER, on_nonfinite="skip"),
                "fit, evaluation every 100 steps": by_fit(gradient, params),
            },
            arguments.repeats,
        ),
        "ELBO": measure(
            {
                "bare scan": bare(variational, start),
                "fit, no evaluation": by_fit(variational, start, evaluate_every=NEVER),
                "fit, evaluation every 100 steps": by_fit(variational, start),
                "NumPyro's SVI": by_svi(variational, data),
            },
            arguments.repeats,
        ),
    }
    print(json.dumps(report, indent=1))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "fit_overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
