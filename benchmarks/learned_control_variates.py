"""Variance of gradients at bits before and after the control variates have learned, with the guide held.

Three problems. One bit: E (b - p0)² with p0 = .499, at a probability of .3; three bits with a joint cost that is neither linear nor
quadratic; and a layer of 20 bits under 64 binary pixels, p(x | z) = Bernoulli(sigmoid(W z + c)), whose bound's gradient by the
layer's logits is estimated at a guide that leans to the bits that made the pixels (logits of about 1). Learning is by Adam,
2,000 steps of a rate that falls from .02 to 0 along a cosine. Variances are sums over the logits, with 95% intervals from the
spread of squared deviations over replicates. Times are of one gradient on the layer, all in turn within one process: quartiles of
the ratios to LeaveOneOut with two particles.

    python benchmarks/learned_control_variates.py [--replicates 20000] [--steps 2000] [--repeats 30] [--output benchmarks/results]
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from step_time import environment

from ergodica.estimators import (
    DARN,
    ELBO,
    REBAR,
    RELAX,
    RODEO,
    DoubleControlVariate,
    LeaveOneOut,
    MuProp,
    Score,
    VariationalGradient,
)

HIDDEN = 10
LEARNED = "$learned"
PEER = "LeaveOneOut(), 2 particles"
TIMED = "layer of 20 bits"
"""On the others a gradient takes less time than its dispatch."""


# --- problems: a model, a guide, and the parameter by which the gradient is taken -----------------------------------------


def bits(cost, logits):
    """A bound that is the mean of a cost."""

    def guide():
        logit = numpyro.param("logits", jnp.asarray(logits, jnp.float32))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("z", dist.Bernoulli(logits=logit).to_event(1))

    def model():
        with numpyro.handlers.mask(mask=False):
            z = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(len(logits))).to_event(1))
        numpyro.factor("f", cost(z))

    return model, guide


def joint_cost(z):
    return jnp.exp(0.7 * z[0] - 0.4 * z[1]) + 0.5 * z[0] * z[1] * z[2] + jnp.cos(z[2] + z[0]) + 1.0


def layer(num_bits=20, num_pixels=64):
    """Bits under pixels, with fixed weights; the guide leans to the bits that made the pixels."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(num_bits, num_pixels)) * 1.2, jnp.float32)
    level = jnp.asarray(rng.normal(size=num_pixels) - 1.0, jnp.float32)
    made_by = rng.integers(0, 2, num_bits)
    pixels = jnp.asarray(rng.random(num_pixels) < jax.nn.sigmoid(made_by @ weights + level), jnp.float32)
    logits = jnp.asarray(2.0 * made_by - 1.0 + 0.5 * rng.normal(size=num_bits), jnp.float32)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", logits)).to_event(1))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(num_bits)).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=z @ weights + level).to_event(1), obs=pixels)

    return model, guide


PROBLEMS = {
    "one bit": lambda: bits(lambda z: jnp.sum((z - 0.499) ** 2), [np.log(0.3 / 0.7)]),
    "three bits": lambda: bits(joint_cost, [-0.8, 0.5, 0.2]),
    "layer of 20 bits": layer,
}


# --- estimators -----------------------------------------------------------------------------------------------------------


def network(psi, z):
    """One hidden layer on the relaxed noise."""
    return jnp.tanh(z @ psi["in"] + psi["bias"]) @ psi["out"] + psi["level"]


def start(num_bits):
    key_in, key_bias = jax.random.split(jax.random.key(1))
    return {
        "in": jax.random.normal(key_in, (num_bits, HIDDEN)) / jnp.sqrt(num_bits),
        "bias": jax.random.normal(key_bias, (HIDDEN,)),
        "out": jnp.zeros(HIDDEN),
        "level": jnp.zeros(()),
    }


def entrants(num_bits):
    """Estimators, and their particles."""
    return {
        "Score()": (Score(), 1),
        PEER: (LeaveOneOut(), 2),
        "LeaveOneOut(), 4 particles": (LeaveOneOut(), 4),
        "MuProp()": (MuProp(), 1),
        "DARN(), biased": (DARN(), 1),
        "REBAR(tuned=True)": (REBAR(tuned=True), 1),
        "RELAX(…)": (RELAX(network, start(num_bits)), 1),
        "RELAX(…, relaxed_cost=False)": (RELAX(network, start(num_bits), relaxed_cost=False), 1),
        "DoubleControlVariate(tuned=True), 2 particles": (DoubleControlVariate(tuned=True), 2),
        "RODEO(tuned=True), 2 particles": (RODEO(tuned=True), 2),
    }


def gradient_of(problem, estimator, num_particles):
    model, guide = problem
    loss = ELBO(num_particles, {"z": estimator})
    gradient = VariationalGradient(loss, model, loss.guide(model, guide))
    runs = num_particles * loss.plan(model, guide).rows[0].runs
    return gradient, gradient.start(jax.random.key(0)), runs


def learn(gradient, params, num_steps):
    """Adam on what is learned alone."""
    own = {name: x for name, x in params.items() if name.endswith(LEARNED)}
    if not own:
        return params
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, num_steps))

    def step(carry, key):
        own, state = carry
        ascent = gradient.probe(key, params | own, {}).gradient
        updates, state = optimiser.update(jax.tree.map(jnp.negative, {name: ascent[name] for name in own}), state)
        return (optax.apply_updates(own, updates), state), None

    keys = jax.random.split(jax.random.key(2), num_steps)
    (own, _), _ = jax.jit(lambda own: jax.lax.scan(step, (own, optimiser.init(own)), keys))(own)
    return params | own


def variance(run, params, replicates):
    """Sum of variances over the logits, half the width of its 95% interval, and the mean gradient."""
    found = np.asarray(run(params, jax.random.split(jax.random.key(3), replicates)), np.float64)
    squares = np.sum((found - found.mean(axis=0)) ** 2, axis=1)
    return squares.mean(), 1.96 * squares.std() / np.sqrt(replicates), found.mean(axis=0).tolist()


def times(runs, repeats):
    """Ratios of the time of one gradient to the peer's: median and quartiles."""
    found = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            found[name].append(time.perf_counter() - begin)
    ratios = {name: [a / b for a, b in zip(t, found[PEER], strict=True)] for name, t in found.items()}
    return {name: statistics.quantiles(r, n=4) for name, r in ratios.items()}


def study(name, replicates, num_steps, repeats):
    problem = PROBLEMS[name]()
    num_bits = len(numpyro.handlers.trace(numpyro.handlers.seed(problem[1], 0)).get_trace()["logits"]["value"])
    rows, calls = [], {}
    for label, (estimator, num_particles) in entrants(num_bits).items():
        gradient, before, runs = gradient_of(problem, estimator, num_particles)

        @jax.jit
        def run(params, keys, gradient=gradient):
            return jax.lax.map(lambda key: gradient.probe(key, params, {}).gradient["logits"], keys, batch_size=500)

        once = jax.jit(lambda params, gradient=gradient: gradient.probe(jax.random.key(4), params, {}).gradient)
        after = learn(gradient, before, num_steps)
        row = {"estimator": label, "runs": runs, "learns": after is not before}
        for when, params in {"before": before, "after": after}.items():
            value, half, mean = variance(run, params, replicates)
            row[when] = {"variance": value, "half_width": half, "mean": mean}
        row["learned"] = {k: float(v) for k, v in after.get("z" + LEARNED, {}).items() if k != "psi"}
        jax.block_until_ready(once(after))
        calls[label] = lambda once=once, after=after: once(after)
        rows.append(row)
        print(f"{name:18s} {label:46s} {row['before']['variance']:.3g} -> {row['after']['variance']:.3g}", flush=True)
    if name != TIMED:
        return rows
    ratios = times(calls, repeats)
    return [row | {"time": ratios[row["estimator"]]} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    path = arguments.output / "learned_control_variates.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {"problems": {}}
    record |= {"environment": environment(), "replicates": arguments.replicates, "steps": arguments.steps}
    for name in arguments.problems:
        record["problems"][name] = study(name, arguments.replicates, arguments.steps, arguments.repeats)
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
