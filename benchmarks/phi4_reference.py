r"""Reference values of :math:`\phi^4` theory on square lattices, which the package ships as
``ergodica/models/zoo/data/phi4.json``.

For 4, 6 and 8 sites a side, at coupling 0.022 and hopping 0.2 (one phase) and 0.3 (two signs of the field), in three ways:

- quadrature (4 and 6 sites): the largest eigenpairs of the transfer matrix between rows on products of Gauss nodes,
  found by Lanczos iteration; the error is the difference to a rule of fewer nodes, plus a bound on the eigenpairs left out;
- hybrid Monte Carlo (all): independent chains from independent starts; the standard error is that of the chains' means;
- annealed importance sampling (all) for the normaliser, from a free theory of the same hopping; the standard error is that of
  independent groups of particles.

What is shipped is the value of the smaller error: the quadrature where there is one, for all but |m|. Where two exist they are
held against each other: z scores are printed and stored. A second call goes on from what is stored.

    python benchmarks/phi4_reference.py [--sizes 4 6 8] [--chains 64] [--steps 40000] [--particles 8192] [--fresh]
"""

import argparse
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from ergodica.models.zoo.lattice_field import Phi4, phi4
from ergodica.models.zoo.phi4_reference import SlicedLattice, free_log_normaliser, sliced_lattice, transfer_reference

jax.config.update("jax_enable_x64", True)

OUTPUT = pathlib.Path(__file__).parent.parent / "ergodica" / "models" / "zoo" / "data" / "phi4.json"
COUPLING = 0.022
HOPPINGS = (0.2, 0.3)
NODES = {4: (14, 16), 6: (8, 10)}
EIGENPAIRS = {4: 160, 6: 40}
BONDS = 2.0
STEP_SIZE, LEAPFROG = 0.18, 8
WARMUP = 1000
GROUPS = 16
TEMPERATURES = {4: 400, 6: 400, 8: 1200}


# --- quadrature -------------------------------------------------------------------------------------------------------


def left_out(lattice: SlicedLattice, values: np.ndarray, num_rows: int) -> float:
    """Bound on the share of the partition function that the eigenpairs which were not computed have."""
    weight = (lattice.root**2).ravel()
    squared = SlicedLattice(lattice.nodes, lattice.kernel**2, np.ones_like(lattice.root), lattice.fields)
    trace_of_square = weight @ squared.apply(weight)
    rest = max(trace_of_square - np.sum(values**2), 0.0)
    return float(values.min() ** (num_rows - 2) * rest / np.sum(values**num_rows))


def quadrature(size: int, target: Phi4) -> dict:
    parameters = (target.hopping, target.quadratic, target.coupling)
    found = []
    for num_nodes in NODES[size]:
        lattice = sliced_lattice(size, *parameters, num_nodes, BONDS)
        number = lattice.root.size
        operator = LinearOperator((number, number), matvec=lattice.apply, dtype=np.float64)
        start = np.exp(-np.sum(lattice.fields**2, axis=0)).ravel() * (1 + 0.1 * lattice.fields[0].ravel())
        values, vectors = eigsh(operator, k=EIGENPAIRS[size], which="LA", v0=start)
        found.append(transfer_reference(lattice, size, parameters, (values, vectors)))
        bound = left_out(lattice, values, size)
    coarse, fine = found
    return {
        "values": {k: [v.value, abs(v.value - coarse[k].value)] for k, v in fine.items()},
        "left_out": bound,
        "nodes": NODES[size],
    }


# --- hybrid Monte Carlo -----------------------------------------------------------------------------------------------


def hmc_step(key, x, log_density, score):
    """One trajectory of random length 1 to ``LEAPFROG`` at a step size jittered by 20 %, with its acceptance test."""
    key_momentum, key_accept, key_length = jax.random.split(key, 3)
    momentum = jax.random.normal(key_momentum, x.shape)
    step = STEP_SIZE * (0.8 + 0.4 * jax.random.uniform(key_length))

    def leap(carry, _):
        x, p = carry
        x = x + step * p
        return (x, p + step * score(x)), None

    half = momentum + 0.5 * step * score(x)
    (moved, p), _ = jax.lax.scan(leap, (x, half), length=LEAPFROG)
    p = p - 0.5 * step * score(moved)
    log_ratio = log_density(moved) - log_density(x) + 0.5 * (jnp.sum(momentum**2) - jnp.sum(p**2))
    accepted = jnp.log1p(-jax.random.uniform(key_accept)) < log_ratio
    return jnp.where(accepted, moved, x), accepted


def hybrid_monte_carlo(key, target: Phi4, num_chains: int, num_steps: int) -> dict:
    def run(key):
        key_start, key_run = jax.random.split(key)
        x = target.start(key_start)

        def step(carry, i):
            x, sums, count = carry
            x, accepted = hmc_step(jax.random.fold_in(key_run, i), x, target.log_density, target.score)
            keep = i >= WARMUP
            sums = jax.tree.map(lambda s, v: s + jnp.where(keep, v, 0.0), sums, target.observables(x))
            return (x, sums, count + accepted), None

        zero = jax.tree.map(jnp.zeros_like, target.observables(x))
        (_, sums, count), _ = jax.lax.scan(step, (x, zero, jnp.zeros((), int)), jnp.arange(WARMUP + num_steps))
        return jax.tree.map(lambda s: s / num_steps, sums), count / (WARMUP + num_steps)

    means, accepted = jax.jit(jax.vmap(run))(jax.random.split(key, num_chains))
    values = {k: np.asarray(v) for k, v in means.items()}
    return {
        "values": {k: [float(v.mean()), float(v.std(ddof=1) / math.sqrt(num_chains))] for k, v in values.items()},
        "acceptance": float(accepted.mean()),
        "chains": num_chains,
        "steps": num_steps,
    }


# --- annealed importance sampling -------------------------------------------------------------------------------------


def annealed(key, target: Phi4, num_particles: int) -> dict:
    """From the free theory of this hopping whose zero mode has precision 0.4."""
    free = Phi4(target.shape, target.hopping, 4 * target.hopping + 0.2, 0.0)
    num = TEMPERATURES[target.shape[0]]
    betas = jnp.linspace(0.0, 1.0, num + 1) ** 1.5

    def log_density(x, beta):
        return (1 - beta) * free.log_density(x) + beta * target.log_density(x)

    def score(x, beta):
        return (1 - beta) * free.score(x) + beta * target.score(x)

    def one(key, x):
        def step(carry, i):
            x, log_weight = carry
            log_weight = log_weight + log_density(x, betas[i]) - log_density(x, betas[i - 1])
            x, _ = hmc_step(
                jax.random.fold_in(key, i), x, lambda y: log_density(y, betas[i]), lambda y: score(y, betas[i])
            )
            return (x, log_weight), None

        return jax.lax.scan(step, (x, jnp.zeros(())), jnp.arange(1, num + 1))[0][1]

    key_start, key_run = jax.random.split(key)
    starts = free.draws(key_start, num_particles)
    log_weights = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key_run, num_particles), starts))
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    groups = weights.reshape(GROUPS, -1).mean(axis=1)
    relative = groups.std(ddof=1) / math.sqrt(GROUPS) / groups.mean()
    value = free_log_normaliser(free.shape, free.hopping, free.quadratic).value + top + math.log(weights.mean())
    return {
        "values": {"log_normaliser": [float(value), float(relative)]},
        "ess_share": float(weights.mean() ** 2 / np.mean(weights**2)),
        "particles": num_particles,
        "temperatures": num,
    }


# --- what is stored ---------------------------------------------------------------------------------------------------


def combine(entry: dict) -> None:
    """Choose what is shipped, and hold the ways against each other."""
    methods = entry["methods"]
    monte_carlo = {k: v for m in ("hmc", "annealed") if m in methods for k, v in methods[m]["values"].items()}
    exact = methods.get("quadrature", {}).get("values", {})
    entry["z"] = {
        k: (monte_carlo[k][0] - v[0]) / math.hypot(monte_carlo[k][1], v[1])
        for k, v in exact.items()
        if k in monte_carlo
    }
    chosen = monte_carlo | {k: v for k, v in exact.items() if k not in monte_carlo or v[1] < monte_carlo[k][1]}
    entry["values"] = {k: v for k, v in chosen.items() if k not in ("magnetisation", "virial")}


def save(entries: dict) -> None:
    for entry in entries.values():
        combine(entry)
        print(entry["shape"], entry["kappa"], {k: round(z, 2) for k, z in entry["z"].items()})
    text = {"script": "benchmarks/phi4_reference.py", "entries": list(entries.values())}
    OUTPUT.write_text(json.dumps(text, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--methods", nargs="+", default=["quadrature", "hmc", "annealed"])
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--particles", type=int, default=8192)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    stored = [] if arguments.fresh or not OUTPUT.exists() else json.loads(OUTPUT.read_text())["entries"]
    entries = {(e["shape"][0], e["kappa"]): e for e in stored}
    for size in arguments.sizes:
        for kappa in HOPPINGS:
            blank = {"shape": [size, size], "kappa": kappa, "coupling": COUPLING, "values": {}, "methods": {}}
            entry = entries.setdefault((size, kappa), blank)
            target = phi4(size, kappa=kappa, coupling=COUPLING)
            seed = jax.random.key(1000 * size + round(10 * kappa))
            key_hmc, key_annealed = jax.random.split(seed)
            ways = {
                "quadrature": lambda size=size, target=target: quadrature(size, target),
                "hmc": lambda t=target, k=key_hmc: hybrid_monte_carlo(k, t, arguments.chains, arguments.steps),
                "annealed": lambda t=target, k=key_annealed: annealed(k, t, arguments.particles),
            }
            for name in arguments.methods:
                if name in entry["methods"] or (name == "quadrature" and size not in NODES):
                    continue
                begin = time.perf_counter()
                entry["methods"][name] = ways[name]()
                entry["methods"][name]["seconds"] = round(time.perf_counter() - begin, 1)
                print(size, kappa, name, json.dumps(entry["methods"][name]), flush=True)
                save(entries)
    save(entries)


if __name__ == "__main__":
    main()
