"""Laws that BlackJAX's `sghmc` samples on a standard normal, beside what its step implies exactly and beside the target's.

    python benchmarks/peers/blackjax_laws.py

Exact gradients unless stated; about ten seconds.
"""

import argparse
import importlib.metadata
import json
import pathlib

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from exact import explicit_euler, redrawn, row, show

CHAINS, WARMUP, CALLS = 2048, 500, 1500
RESULT = pathlib.Path(__file__).parents[1] / "results" / "peers_blackjax.json"


def sampled_variance(key, step_size, num_inner, alpha, temperature, noise=0.0):
    """Mean square of many chains of one coordinate, by group of chains: replicates of the variance about the true mean 0."""

    def gradient(position, batch):
        return -position + batch

    kernel = blackjax.sgmcmc.sghmc.build_kernel(alpha)

    @jax.jit
    def run(key):
        def call(state, key):
            key_batch, key_step = jax.random.split(key)
            batch = jnp.sqrt(noise) * jax.random.normal(key_batch, (CHAINS, 1))
            keys = jax.random.split(key_step, CHAINS)
            state = jax.vmap(lambda key, x, batch: kernel(key, x, gradient, batch, step_size, num_inner, temperature))(
                keys, state, batch
            )
            return state, state[:, 0] ** 2

        start = jax.random.normal(jax.random.fold_in(key, 0), (CHAINS, 1))
        squares = jax.lax.scan(call, start, jax.random.split(jax.random.fold_in(key, 1), WARMUP + CALLS))[1]
        return squares[WARMUP:].mean(axis=0)

    return np.asarray(run(key), float).reshape(32, -1).mean(axis=1)


def findings():
    """The settings of the page, each with its target, law and sample."""
    cases = [
        (0.1, 10, 0.01, 1.0, 0.0, "explicit Euler at the default friction: too hot"),
        (0.1, 10, 1.0, 1.0, 0.0, "more friction does not cure it: it is the refreshed momentum and Euler"),
        (0.1, 10, 0.01, 0.1, 0.0, "momenta are redrawn from N(0, 1) whatever the temperature"),
        (0.1, 10, 1.0, 0.1, 0.0, "likewise at a larger friction"),
        (0.1, 10, 0.01, 1.0, 1.0, "one batch is held for all inner steps (gradient noise of variance 1)"),
        (
            0.1,
            2,
            0.01,
            1.0,
            0.0,
            "two inner steps: the first gradient reaches the position a step late; L / (L - 1) for small steps",
        ),
        (0.01, 100, 0.01, 1.0, 0.0, "small steps and many of them: the bias goes"),
        (0.3, 10, 0.01, 1.0, 0.0, "a step that leapfrog would take easily"),
    ]
    rows = []
    for i, (h, inner, alpha, temperature, noise, what) in enumerate(cases):
        law = redrawn(*explicit_euler(h, alpha, temperature), 1.0, inner, [0.0, h], noise)
        sample = sampled_variance(jax.random.key(i), h, inner, alpha, temperature, noise)
        settings = f"step {h:g}, {inner} inner steps, alpha {alpha:g}, temperature {temperature:g}" + (
            f", gradient noise {noise:g}" if noise else ""
        )
        rows.append(row("sghmc", settings, temperature, law, sample, what))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("blackjax", "jax")}
    rows = findings()
    show("BlackJAX", versions, rows)
    arguments.output.write_text(
        json.dumps({"package": "BlackJAX", "versions": versions, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
