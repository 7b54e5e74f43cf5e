"""Laws that SGMCMCJax 0.2.13 samples on standard normals, beside what its step implies exactly and beside the target's.

It needs an old JAX (0.4.25 here); `make bench-peers` makes an environment for it. Gradients are exact: the data do not enter.
"""

import argparse
import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from exact import explicit_euler, redrawn, row, show
from sgmcmcjax import kernels

CHAINS, WARMUP, STEPS = 1024, 1000, 3000
DATA = (jnp.zeros(4),)
RESULT = pathlib.Path(__file__).parents[1] / "results" / "peers_sgmcmcjax.json"


def log_likelihood(theta, _):
    """A quarter of the log density of N(0, I): there are four data, which do not matter."""
    return -0.5 * jnp.sum(theta**2) / 4


def log_prior(theta):
    return 0.0 * jnp.sum(theta)


def sampled_variance(key, built, size=1):
    """Mean square of the coordinates, by group of chains."""
    init, kernel, position = built

    @jax.jit
    def run(key):
        start = jax.random.normal(jax.random.fold_in(key, 0), (CHAINS, size))
        states = jax.vmap(init)(jax.random.split(jax.random.fold_in(key, 1), CHAINS), start)

        def step(carry, i):
            states, key = carry
            key, key_step = jax.random.split(key)
            states = jax.vmap(kernel, (None, 0, 0))(i, jax.random.split(key_step, CHAINS), states)
            at = jax.vmap(position)(states)
            return (states, key), (at**2).mean(axis=1)

        carry = (states, jax.random.fold_in(key, 2))
        (states, _), squares = jax.lax.scan(step, carry, jnp.arange(WARMUP + STEPS))
        moved = jnp.abs(jax.vmap(position)(states) - start).max()
        return squares[WARMUP:].mean(axis=0), moved

    squares, moved = run(key)
    return np.asarray(squares, float).reshape(16, -1).mean(axis=1), float(moved)


def findings():
    model = (log_likelihood, log_prior, DATA, 4)
    rows = []

    h, inner, alpha = 0.1, 10, 0.1  # dt = h**2, and its alpha is a friction times h
    built = kernels.build_sghmc_kernel(h**2, inner, *model, alpha=alpha * h)
    law = redrawn(*explicit_euler(h, alpha, 1.0), 1.0, inner)
    sample, _ = sampled_variance(jax.random.key(0), built)
    what = "explicit Euler with refreshed momenta: too hot"
    rows.append(row("sghmc", f"dt {h**2:g}, {inner} inner steps, alpha {alpha * h:g}", 1.0, law, sample, what))

    for name, built in (
        ("baoab", kernels.build_baoab_kernel(0.1, *model, 1.0)),
        ("badodab", kernels.build_badodab_kernel(0.1, *model, 1.0)),
    ):
        sample, moved = sampled_variance(jax.random.key(1), built, 10)
        what = (
            f"no position changed in {WARMUP + STEPS} steps: largest change {moved:g}; what was sampled are the starts"
        )
        found = row(name, "step 0.1, friction 1, 10 coordinates", 1.0, None, sample, what)
        rows.append(found | {"largest_move": moved})

    built = kernels.build_sgld_kernel(0.1, *model)
    sample, _ = sampled_variance(jax.random.key(2), built)
    rows.append(row("sgld", "dt 0.1", 1.0, 2 / (2 - 0.1), sample, "as it should be: the law of SGLD itself"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("sgmcmcjax", "jax")}
    rows = findings()
    show("SGMCMCJax", versions, rows)
    arguments.output.write_text(
        json.dumps({"package": "SGMCMCJax", "versions": versions, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
