"""What credible intervals of molecular dynamics under a learnt pair potential cover, and what they do not.

Sixteen Lennard-Jones particles in a periodic box give noisy energies and forces at one density and temperature. A pair potential
network is fitted to them by one chain, by four chains, and by a deep ensemble, at the same number of gradients. Molecular
dynamics under each draw gives energy, pressure and g(r) where the data were taken, at a higher density, and at a higher
temperature. The whole is repeated with other data, and intervals that contain the truth are counted.

    python benchmarks/pair_potential.py [--output benchmarks/results] [--quick]

`--quick` makes two repeats with short runs, to see that all works; it writes to a directory of its own.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
from pair_potential_figures import FIGURES, table
from pair_potential_network import (
    BATCH,
    ENERGY_NOISE,
    FORCE_NOISE,
    FRICTION,
    NUM_DATA,
    STEP_SIZE,
    DataSet,
    Network,
    descend,
    langevin,
    make_posterior,
    observe,
)
from pair_potential_physics import (
    BINS,
    PairTable,
    State,
    System,
    lennard_jones,
    pair_distances,
    simulate,
    tabulate,
)
from scipy import stats

import ergodica as erg

NUM_PARTICLES = 16
STATES = {
    "training": State(density=0.4, temperature=1.0, step_size=0.01),
    "dense": State(density=0.7, temperature=1.0, step_size=0.01),
    "hot": State(density=0.4, temperature=5.0, step_size=0.005),
}
EMBEDDING = 0.1
LEVEL = 0.9
R_SHOWN = np.round(np.arange(0.8, 2.201, 0.02), 2)


class Sizes(NamedTuple):
    """How long things are. Gradients are counted in batches; each method has ``num_gradients`` of them."""

    num_gradients: int = 32_000
    num_descent: int = 2_000
    num_members: int = 8
    num_draws: int = 24
    draws_kept: int = 4
    truth_systems: int = 64
    truth_blocks: int = 20
    draw_blocks: int = 8
    warmup: int = 1_000
    repeats: int = 8
    repeats_other: int = 3


QUICK = Sizes(4_000, 500, 4, 8, 2, 16, 4, 4, 200, 2, 2)
MEASURE = {"block": 50, "every": 20}


# --- molecular dynamics -----------------------------------------------------------------------------------------------


def stack(system: System, count: int) -> System:
    """Repeat a system along a leading axis."""
    return jax.tree.map(lambda v: jnp.broadcast_to(v, (count, *v.shape)), system)


def settings(state: State) -> tuple[jax.Array, ...]:
    """What `simulate` needs to know of a state."""
    return tuple(jnp.asarray(v) for v in (state.box(NUM_PARTICLES), state.temperature, state.step_size))


def lattice(box: float) -> np.ndarray:
    """Sixteen places on a square lattice."""
    axis = (np.arange(4) + 0.5) * box / 4
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


class Truth(NamedTuple):
    """Means over a long run of the true system, their standard errors, and configurations of it (systems, blocks, N, 2)."""

    mean: dict[str, np.ndarray]
    se: dict[str, np.ndarray]
    configurations: np.ndarray


def true_values(key: jax.Array, system: System, state: State, sizes: Sizes) -> Truth:
    """Simulate the true system, from a lattice."""
    starts = jnp.broadcast_to(jnp.asarray(lattice(state.box(NUM_PARTICLES))), (sizes.truth_systems, NUM_PARTICLES, 2))
    systems = stack(system, sizes.truth_systems)
    found, x = simulate(key, systems, starts, settings(state), 4 * sizes.warmup, sizes.truth_blocks, **MEASURE)
    runs = {name: np.asarray(values).mean(axis=1) for name, values in found._asdict().items()}
    se = {name: v.std(axis=0, ddof=1) / np.sqrt(len(v)) for name, v in runs.items()}
    return Truth({name: v.mean(axis=0) for name, v in runs.items()}, se, np.asarray(x))


class Interval(NamedTuple):
    """Mean and sd over draws, and what finite runs add: the error of one draw's value (taken out of the sd), and of the mean."""

    mean: Any
    sd: Any
    run_error: Any
    mean_error: Any


def interval(blocks: np.ndarray) -> Interval:
    """Make an interval from block means (draws, blocks, ...): the spread over draws less that of the runs themselves."""
    runs = blocks.mean(axis=1)
    error = blocks.var(axis=1, ddof=1).mean(axis=0) / blocks.shape[1]
    spread = runs.var(axis=0, ddof=1)
    sd = np.sqrt(np.maximum(spread - error, 0))
    return Interval(runs.mean(axis=0), sd, np.sqrt(error), np.sqrt(error / len(runs)))


def covers(truth: Any, mean: Any, sd: Any, error: Any = 0.0, level: float = LEVEL) -> Any:
    """Whether the central interval of a normal contains the truth; ``error`` is a standard error of ``truth - mean``."""
    width = stats.norm.ppf((1 + level) / 2) * np.hypot(sd, error)
    return np.abs(np.asarray(truth) - mean) <= width


def coverage(hits: Any) -> dict[str, Any]:
    """Count hits; give the frequency with its exact 95% binomial interval."""
    hits = np.asarray(hits, bool)
    test = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95, "exact")
    return {"hits": int(hits.sum()), "of": hits.size, "low": float(test.low), "high": float(test.high)}


def observables(
    key: jax.Array, tables: PairTable, truth: dict[str, Truth], sizes: Sizes
) -> dict[str, dict[str, np.ndarray]]:
    """Block means of energy, pressure and g under each table (draws, blocks, ...), at each state."""
    count, found = len(tables.values), {}
    for key_state, (name, state) in zip(jax.random.split(key, len(STATES)), STATES.items(), strict=True):
        starts = jnp.asarray(np.resize(truth[name].configurations[:, -1], (count, NUM_PARTICLES, 2)))
        blocks, _ = simulate(
            key_state, System(tables), starts, settings(state), sizes.warmup, sizes.draw_blocks, **MEASURE
        )
        found[name] = {k: np.asarray(v) for k, v in blocks._asdict().items()}
        bad = ~np.isfinite(found[name]["energy"]).all(axis=1)
        if bad.any():
            raise RuntimeError(
                f"{bad.sum()} of {count} drawn potentials gave runs that are not finite at state {name!r}."
            )
    return found


# --- fits -------------------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """Parameters (draws, ...) by name, values of u at `R_SHOWN` (chains, draws, r), and what the run says of itself."""

    parameters: dict[str, np.ndarray]
    u: np.ndarray
    notes: dict[str, float]

    @property
    def count(self) -> int:
        """How many draws there are."""
        return len(self.parameters["b3"])


def run(key: jax.Array, posterior: erg.Posterior, num_chains: int, sizes: Sizes, *, halve: int = 1) -> Draws:
    """Descend from independent starts, then sample; in all ``sizes.num_gradients`` batches over the chains.

    ``halve=2`` takes half the step and four times the steps, as a check.
    """
    key_descent, key_run = jax.random.split(key)
    starts = descend(key_descent, posterior, num_chains, sizes.num_descent)
    left = (sizes.num_gradients // num_chains - sizes.num_descent) * halve**2
    num_samples = sizes.num_draws * sizes.draws_kept // num_chains
    num_warmup = left // 4
    dt = erg.sample(
        key_run,
        langevin(posterior, halve),
        num_samples=num_samples,
        num_warmup=num_warmup,
        thin=(left - num_warmup) // num_samples,
        num_chains=num_chains,
        initial=starts,
        progress=False,
    )
    kept = dt["unconstrained_posterior"].isel(draw=slice(sizes.draws_kept - 1, None, sizes.draws_kept))
    parameters = {str(k): v.values.reshape(-1, *v.shape[2:]) for k, v in kept.data_vars.items()}
    temperature = dt["sample_stats"].t_conf.values.mean(axis=1)
    notes = {
        "t_conf": float(temperature.mean()),
        "t_conf_se": float(temperature.std(ddof=1) / np.sqrt(num_chains)) if num_chains > 1 else None,
        "kinetic_temperature": float(dt["sample_stats"].kinetic_temperature.mean()),
    }
    return Draws(parameters, dt["posterior"].u.values, notes)


def ensemble(key: jax.Array, posterior: erg.Posterior, sizes: Sizes) -> Draws:
    """Descend from more starts and for longer, and stop there."""
    parameters = descend(key, posterior, sizes.num_members, sizes.num_gradients // sizes.num_members)
    u = np.asarray(jax.vmap(posterior.constrain)(parameters)["u"])
    return Draws({k: np.asarray(v) for k, v in parameters.items()}, u[None], {})


METHODS = {
    "one chain": lambda key, posterior, sizes: run(key, posterior, 1, sizes),
    "four chains": lambda key, posterior, sizes: run(key, posterior, 4, sizes),
    "deep ensemble": ensemble,
}


def tables_of(network: Network, draws: Draws, copies: int) -> PairTable:
    """Tables of the drawn potentials, in double precision, each as often as there are runs of it."""
    parameters = jax.tree.map(lambda v: jnp.asarray(v, float), draws.parameters)
    tables = jax.vmap(lambda theta: tabulate(lambda r: network(theta, r)))(parameters)
    return jax.tree.map(lambda v: jnp.repeat(v, copies, axis=0), tables)


def together(blocks: np.ndarray, count: int) -> np.ndarray:
    """Join the blocks of runs under the same draw: (runs, blocks, ...) to (draws, blocks of all its runs, ...)."""
    return blocks.reshape(count, -1, *blocks.shape[2:])


# --- the study --------------------------------------------------------------------------------------------------------


def study(
    key: jax.Array, system: System, network: Network, methods: tuple[str, ...], repeats: int, sizes: Sizes
) -> dict[str, Any]:
    """Fit ``repeats`` data sets by each method, simulate under the draws, and count what the intervals cover."""
    key_truth, key_data, key_repeats = jax.random.split(key, 3)
    with jax.enable_x64(True):
        keys = dict(zip(STATES, jax.random.split(key_truth, len(STATES)), strict=True))
        truth = {name: true_values(keys[name], system, state, sizes) for name, state in STATES.items()}
        data = training_data(key_data, system, truth["training"], repeats)
    u_true = np.asarray(jax.vmap(lennard_jones)(jnp.asarray(R_SHOWN)))
    closest = np.array([d.distances.min() for d in data], float)
    found: dict[str, Any] = {
        "truth": {n: {k: v.tolist() for k, v in t.mean.items()} for n, t in truth.items()},
        "truth_se": {n: {k: v.tolist() for k, v in t.se.items()} for n, t in truth.items()},
        "closest": closest.tolist(),
        "distances": np.histogram(data[0].distances, R_SHOWN)[0].tolist(),
        "pairs_closer": {
            n: pairs_closer(t.configurations, STATES[n], float(np.median(closest))) for n, t in truth.items()
        },
        "u_true": u_true.tolist(),
        "methods": {name: {"states": {s: {} for s in STATES}, "u": [], "notes": []} for name in methods},
    }
    raw: dict[str, list[Any]] = {name: [] for name in methods}
    for i, key_repeat in enumerate(jax.random.split(key_repeats, repeats)):
        began = time.process_time()
        key_fits, key_md = jax.random.split(key_repeat)
        posterior = make_posterior(network, data[i], R_SHOWN)
        fits = {
            name: METHODS[name](k, posterior, sizes)
            for name, k in zip(methods, jax.random.split(key_fits, len(methods)), strict=True)
        }
        with jax.enable_x64(True):
            tables = [tables_of(network, fit, sizes.num_draws // fit.count) for fit in fits.values()]
            joined = jax.tree.map(lambda *v: jnp.concatenate(v), *tables)
            blocks = observables(key_md, joined, truth, sizes)
        for j, (name, fit) in enumerate(fits.items()):
            part, count = slice(j * sizes.num_draws, (j + 1) * sizes.num_draws), fit.count
            raw[name].append(
                {s: {k: interval(together(v[part], count)) for k, v in b.items()} for s, b in blocks.items()}
            )
            found["methods"][name]["u"].append(
                [fit.u.mean(axis=(0, 1)).tolist(), fit.u.std(axis=(0, 1), ddof=1).tolist()]
            )
            found["methods"][name]["notes"].append(fit.notes | rhat_of(fit))
        print(f"repeat {i + 1} of {repeats}: {time.process_time() - began:.1f} s", flush=True)
    for name in methods:
        summarise(found["methods"][name], raw[name], truth, u_true)
    return found


def training_data(key: jax.Array, system: System, truth: Truth, repeats: int) -> list[DataSet]:
    """Data sets from configurations of runs of their own, one run a set, a few units of time apart."""
    state = STATES["training"]
    starts = jnp.asarray(truth.configurations[:repeats, 0])
    key_run, key_noise = jax.random.split(key)
    _, x = simulate(key_run, stack(system, repeats), starts, settings(state), 1000, NUM_DATA, block=1, every=200)
    box = jnp.asarray(state.box(NUM_PARTICLES))
    return [observe(k, system, c, box) for k, c in zip(jax.random.split(key_noise, repeats), x, strict=True)]


def pairs_closer(configurations: np.ndarray, state: State, distance: float) -> float:
    """Pairs a configuration that are closer than a distance, on average."""
    with jax.enable_x64(True):
        x = jnp.asarray(configurations.reshape(-1, NUM_PARTICLES, 2))
        r = jax.vmap(lambda x: pair_distances(x, jnp.asarray(state.box(NUM_PARTICLES))))(x)
        return float(jnp.mean(jnp.sum(r < distance, axis=1)))


def rhat_of(fit: Draws) -> dict[str, float]:
    """R-hat of the potential at distances that the data have (largest), and at a shorter one."""
    if len(fit.u) < 2:
        return {}
    rhat = np.array([float(arviz.rhat(fit.u[:, :, i])) for i in range(len(R_SHOWN))])
    return {
        "rhat_inside": float(rhat[R_SHOWN >= 0.96].max()),
        "rhat_short": float(rhat[np.argmin(abs(R_SHOWN - 0.86))]),
    }


def summarise(method: dict[str, Any], raw: list[Any], truth: dict[str, Truth], u_true: np.ndarray) -> None:
    """Turn intervals of all repeats into frequencies, in place."""
    for s, of_state in method["states"].items():
        for k in ("energy", "pressure", "g"):
            mean, sd, of_run, of_mean = (np.array([getattr(r[s][k], field) for r in raw]) for field in Interval._fields)
            error = np.hypot(of_mean, truth[s].se[k])
            hits = covers(truth[s].mean[k], mean, sd, error)
            if k == "g":
                seen = truth[s].mean["g"] > 0.02
                per_repeat = hits[:, seen].mean(axis=1)
                of_state[k] = {
                    "coverage": float(per_repeat.mean()),
                    "se": float(per_repeat.std(ddof=1) / np.sqrt(len(raw))),
                    "mean": mean[0].tolist(),
                    "sd": sd[0].tolist(),
                    "error": error[0].tolist(),
                }
            else:
                of_state[k] = coverage(hits) | {
                    "mean": mean.tolist(),
                    "sd": sd.tolist(),
                    "error": error.tolist(),
                    "run_error": float(np.sqrt((of_run**2).mean())),
                }
    u = np.array(method["u"])
    method["u_coverage"] = covers(u_true, u[:, 0], u[:, 1]).mean(axis=0).tolist()
    method["u"] = u[0].tolist()
    method["u_sd"] = np.sqrt((u[:, 1] ** 2).mean(axis=0)).tolist()


def check_the_sampling(key: jax.Array, system: System, network: Network, sizes: Sizes) -> dict[str, Any]:
    """Compare four chains with four that have half the step and four times the steps, on one data set."""
    key_truth, key_data, *keys = jax.random.split(key, 4)
    with jax.enable_x64(True):
        truth = true_values(key_truth, system, STATES["training"], sizes._replace(truth_systems=2, truth_blocks=1))
        data = training_data(key_data, system, truth, 1)[0]
    posterior, found = make_posterior(network, data, R_SHOWN), {}
    for name, key_run, halve in zip(("as used", "half the step, four times the steps"), keys, (1, 2), strict=True):
        fit = run(key_run, posterior, 4, sizes, halve=halve)
        found[name] = (
            {
                "sd_inside": float(np.median(fit.u.std(axis=(0, 1), ddof=1)[R_SHOWN >= 0.96])),
                "sd_short": float(fit.u.std(axis=(0, 1), ddof=1)[np.argmin(abs(R_SHOWN - 0.86))]),
            }
            | fit.notes
            | rhat_of(fit)
        )
    return found


def main() -> None:
    """Run the parts, store them one by one, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=None)
    parser.add_argument("--quick", action="store_true", help="two repeats, short runs")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    output = arguments.output or pathlib.Path("benchmarks/results", "quick" if arguments.quick else "")
    output.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        pairs = System(tabulate(lennard_jones))
        many_body = System(tabulate(lennard_jones), jnp.asarray(EMBEDDING))
    keys = jax.random.split(jax.random.key(0), 4)
    parts = {
        "pairs": lambda: study(keys[0], pairs, Network(), tuple(METHODS), sizes.repeats, sizes),
        "many_body": lambda: study(keys[1], many_body, Network(), ("four chains",), sizes.repeats_other, sizes),
        "wide_prior": lambda: study(keys[2], pairs, Network(6.0), ("four chains",), sizes.repeats_other, sizes),
        "sampling": lambda: check_the_sampling(keys[3], pairs, Network(), sizes),
    }
    results: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpy")},
        "settings": sizes._asdict()
        | {"num_data": NUM_DATA, "batch": BATCH, "step_size": STEP_SIZE, "friction": FRICTION, "level": LEVEL}
        | {"energy_noise": ENERGY_NOISE, "force_noise": FORCE_NOISE, "embedding": EMBEDDING},
        "states": {name: state._asdict() for name, state in STATES.items()},
        "r": R_SHOWN.tolist(),
        "bins": BINS.tolist(),
        "processor_seconds": {},
    }
    for name, compute in parts.items():
        start = time.process_time()
        results[name] = compute()
        results["processor_seconds"][name] = round(time.process_time() - start, 1)
        print(name, results["processor_seconds"][name], "s of processor time", flush=True)
        (output / "pair_potential.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    for name, draw in FIGURES.items():
        draw(results).savefig(output / f"pair_potential_{name}.png", dpi=110)
    print(table(results))


if __name__ == "__main__":
    main()
