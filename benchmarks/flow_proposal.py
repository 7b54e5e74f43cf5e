"""Time of a proposal of independence Metropolis with a flow, beside `blackjax.irmh` with the same flow.

Eight affine couplings, four chains side by side in one scan; the target is a correlated normal. BlackJAX's algorithm takes the
proposal's density as a function and evaluates it at both ends of a move: two passes through the flow's inverse, beside the pass
that draws. `FlowIMH` gets it with the draw and keeps it. Without that function BlackJAX takes the proposal for symmetric: its
acceptance rate is then another, and so is its law, which the last line of each dimension shows.

All variants run in turn within each repeat; what is reported is the median of the ratios to BlackJAX of the same repeat.

    python benchmarks/flow_proposal.py [--repeats 9] [--proposals 6400] [--output benchmarks/results]
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg

CHAINS = 4
DIMENSIONS = (10, 64)
BLOCKS = (1, 8, 64)


def target(x):
    """Normal with neighbours correlated."""
    return -0.5 * jnp.sum(x**2) - 0.25 * jnp.sum((x[1:] - x[:-1]) ** 2)


def chains(step, init, num_steps):
    """Mean acceptance rate and mean squares of four chains, in a scan."""

    @jax.jit
    def run(kernel, key):
        key_init, key_steps = jax.random.split(key)

        def body(carry, i):
            state, rate, squares = carry
            keys = jax.random.split(jax.random.fold_in(key_steps, i), CHAINS)
            state, info = jax.vmap(step, in_axes=(None, 0, 0))(kernel, keys, state)
            return (state, rate + info.acceptance_rate.mean(), squares + (state.position**2).mean()), None

        state = jax.vmap(init, in_axes=(None, 0))(kernel, jax.random.split(key_init, CHAINS))
        (_, rate, squares), _ = jax.lax.scan(body, (state, jnp.zeros(()), jnp.zeros(())), jnp.arange(num_steps))
        return rate / num_steps, squares / num_steps

    return run


def flow_imh(flow, num_proposals, total):
    sampler = erg.samplers.FlowIMH(flow, target, num_proposals)
    run = chains(
        lambda kernel, key, state: kernel.step(key, state),
        lambda kernel, key: kernel.init(key, kernel.start(key)),
        total // num_proposals,
    )
    return lambda key: run(sampler, key)


def irmh(flow, total, *, density):
    def algorithm(flow):
        def log_proposal(_, end):
            return flow.log_prob(end.position)

        return blackjax.irmh(target, lambda key: flow.sample(key, 1)[0], log_proposal if density else None)

    run = chains(
        lambda flow, key, state: algorithm(flow).step(key, state),
        lambda flow, key: algorithm(flow).init(flow.sample(key, 1)[0]),
        total,
    )
    return lambda key: run(flow, key)


def measure(dim, total, repeats):
    flow = erg.models.flows.real_nvp(jax.random.key(0), dim=dim, num_layers=8, width=64)
    runs = {"blackjax.irmh": irmh(flow, total, density=True)}
    runs |= {f"FlowIMH, {n} proposals a step": flow_imh(flow, n, total) for n in BLOCKS}
    found = {name: [np.asarray(x) for x in run(jax.random.key(0))] for name, run in runs.items()}  # compiles
    times = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(repeat)))
            times[name].append(1e6 * (time.perf_counter() - begin) / (total * CHAINS))
    rows = []
    for name in runs:
        ratios = [t / f for t, f in zip(times[name], times["blackjax.irmh"], strict=True)]
        rows.append(
            {
                "dim": dim,
                "variant": name,
                "microseconds": statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "acceptance_rate": float(found[name][0]),
                "mean_square": float(found[name][1]),
            }
        )
    symmetric = irmh(flow, total, density=False)(jax.random.key(0))
    rows.append(
        {
            "dim": dim,
            "variant": "blackjax.irmh without the proposal's density",
            "acceptance_rate": float(symmetric[0]),
            "mean_square": float(symmetric[1]),
        }
    )
    return rows


def exact_mean_square(dim):
    differences = np.diff(np.eye(dim), axis=0)
    precision = np.eye(dim) + 0.5 * differences.T @ differences
    return float(np.mean(np.diag(np.linalg.inv(precision))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--proposals", type=int, default=6400, help="a chain")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    options = parser.parse_args()
    rows = [row for dim in DIMENSIONS for row in measure(dim, options.proposals, options.repeats)]
    for row in rows:
        timing = (
            f"{row['microseconds']:8.2f} us  {row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})"
            if "ratio" in row
            else ""
        )
        print(
            f"D = {row['dim']:<3} {row['variant']:<46}acceptance {row['acceptance_rate']:.3f}  "
            f"mean square {row['mean_square']:.3f} (exact {exact_mean_square(row['dim']):.3f})  {timing}"
        )
    result = {
        "rows": rows,
        "exact_mean_square": {str(dim): exact_mean_square(dim) for dim in DIMENSIONS},
        "chains": CHAINS,
        "proposals": options.proposals,
        "repeats": options.repeats,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "blackjax", "ergodica")},
        "machine": platform.machine(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "flow_proposal.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
