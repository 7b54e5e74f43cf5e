"""Laws that jax-sgmc 0.1.5's `sghmc` samples on a standard normal, beside what its step implies exactly and beside the target's.

It needs an old JAX (0.4.25 here); `make bench-peers` makes an environment for it. Gradients are exact: the data do not enter.
"""

import argparse
import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from exact import new_position_euler, redrawn, row, show
from jax_sgmc import data, integrator, potential, scheduler
from jax_sgmc.data.numpy_loader import DeviceNumpyDataLoader

CHAINS, WARMUP, CALLS = 1024, 500, 1500
RESULT = pathlib.Path(__file__).parents[1] / "results" / "peers_jax_sgmc.json"


def sampled_variance(key, step_size, num_inner, friction):
    """Mean square by group of chains, from the integrator that the package's `alias.sghmc` runs; it redraws momenta."""

    def likelihood(sample, observation):
        return -0.125 * jnp.sum(sample["x"] ** 2) + 0.0 * observation["y"]

    def prior(sample):
        return 0.0 * jnp.sum(sample["x"])

    stochastic = potential.minibatch_potential(prior=prior, likelihood=likelihood, strategy="vmap")
    loader = DeviceNumpyDataLoader(y=np.zeros(4))
    batches = data.random_reference_data(loader, 1, 4)
    init, integrate, _ = integrator.friction_leapfrog(stochastic, batches, steps=num_inner, friction=friction)
    schedule = scheduler.schedule(
        step_size=jnp.asarray(step_size), temperature=jnp.asarray(1.0), burn_in=1.0, accept=True
    )
    one = init({"x": jnp.zeros(1)}, key=jax.random.PRNGKey(0))

    @jax.jit
    def run(key):
        starts = jax.random.normal(jax.random.fold_in(key, 0), (CHAINS, 1))
        keys = jax.random.split(jax.random.fold_in(key, 1), CHAINS)
        states = jax.vmap(lambda x, k: one._replace(positions={"x": x}, momentum={"x": x}, key=k))(starts, keys)

        def call(states, _):
            states = jax.vmap(lambda s: integrate(s, schedule))(states)
            return states, states.positions["x"][:, 0] ** 2

        return jax.lax.scan(call, states, None, WARMUP + CALLS)[1][WARMUP:].mean(axis=0)

    return np.asarray(run(jax.random.PRNGKey(key)), float).reshape(16, -1).mean(axis=1)


def findings():
    h, inner, rows = 0.1, 10, []
    for friction in (0.25, 1.0, 4.0):
        sample = sampled_variance(7, h, inner, friction)
        law = redrawn(*new_position_euler(h, friction, friction), 1.0, inner)
        right = redrawn(*new_position_euler(h, friction, friction**0.5), 1.0, inner)
        what = f"noise is multiplied by the friction, not by its square root, which would give {right:.3f}"
        if friction == 1.0:
            what = "at friction 1, the default, the two are the same"
        rows.append(row("sghmc", f"step {h:g}, {inner} inner steps, friction {friction:g}", 1.0, law, sample, what))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax-sgmc", "jax")}
    rows = findings()
    show("jax-sgmc", versions, rows)
    arguments.output.write_text(
        json.dumps({"package": "jax-sgmc", "versions": versions, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
