"""Time and variance of gradients for flows: standard, path gradients in two passes, and in one.

Time: all estimators in turn in one process, each a compiled call at the same parameters; ratios within a turn, medians and
quartiles of them. A base setting (D = 32, 8 layers, batches of 1,024) and changes of one thing at a time, for each kind of layer.
XLA's own count of floating point operations is stored beside the times. flowjax's losses (with and without ``stick_the_landing``)
are timed on flowjax's own flow, beside the same flow through the adapter.

Variance: sums over parameters of the variance of one draw's gradient, with intervals from repeats, along one path of training by
the standard gradient, whose points all estimators share: from the start, far from the target, to the end. Among the targets are a
flow of the same kind, so that a perfect fit exists, and a mixture that the flow cannot match.

    python benchmarks/path_gradients.py [--rounds 30] [--only time|flowjax|variance] [--output benchmarks/results]
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_time import environment

from ergodica.core import tree
from ergodica.core.flow import Flow
from ergodica.estimators import PathGradient, ReverseKL
from ergodica.models import flows, zoo

BASE = {"dim": 32, "layers": 8, "batch": 1024}
CHANGES = [{}, {"dim": 8}, {"dim": 128}, {"layers": 4}, {"layers": 16}, {"batch": 512}, {"batch": 4096}]
WIDTH = 64


# --- flows ------------------------------------------------------------------------------------------------------------


def affine(key, dim, layers):
    """RealNVP."""
    return flows.real_nvp(key, dim, num_layers=layers, width=WIDTH)


def spline(key, dim, layers):
    """Neural spline flow with eight bins."""
    return flows.spline_flow(key, dim, num_layers=layers, width=WIDTH)


def implicit(key, dim, layers):
    """Couplings by mixtures of logistic distribution functions, without an inverse in closed form."""
    keys = jax.random.split(key, layers)
    made = [
        flows.LogisticMixtureCoupling(k, dim, flows.half_mask(dim, i % 2), num_components=4, width=WIDTH)
        for i, k in enumerate(keys)
    ]
    return Flow(dim, *made)


def inverse_autoregressive(key, dim, layers):
    """Masked networks, sampled in one pass; scores by triangular solves."""
    return flows.inverse_autoregressive_flow(key, dim, num_layers=layers, width=WIDTH)


KINDS = {
    "affine": (affine, CHANGES),
    "spline": (spline, CHANGES),
    "implicit": (implicit, [{"dim": 8, "layers": 4, "batch": 512}, {"layers": 4, "batch": 512}]),
    "inverse autoregressive": (inverse_autoregressive, [{"dim": 8, "layers": 4, "batch": 512}]),
}


def target(x):
    """A quartic density."""
    return -0.5 * jnp.sum((x - 0.3) ** 2) - 0.05 * jnp.sum(x**4)


# --- time -------------------------------------------------------------------------------------------------------------


def compiled(gradient):
    """A compiled call, and XLA's count of its operations."""
    call = jax.jit(lambda g, key: g.estimate(key, g.params, None)[0].gradient)
    key = jax.random.key(0)
    program = call.lower(gradient, key).compile()
    return (lambda: program(gradient, key)), float(program.cost_analysis()["flops"])


def time_together(calls, rounds):
    """Seconds of each call in each round."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds, name, to):
    """Median and quartiles of the ratio within a round."""
    values = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return [statistics.median(values), *np.quantile(values, [0.25, 0.75]).tolist()]


def time_flow(kind, make, setting, rounds):
    """One row."""
    dim, layers, batch = (setting[k] for k in ("dim", "layers", "batch"))
    flow = make(jax.random.key(0), dim, layers)
    estimators = {
        "standard": ReverseKL(flow, target, batch),
        "two passes": PathGradient(flow, target, num_samples=batch, passes=2),
        "one pass": PathGradient(flow, target, num_samples=batch),
    }
    calls = {name: compiled(gradient) for name, gradient in estimators.items()}
    seconds = time_together({name: call for name, (call, _) in calls.items()}, rounds)
    flops = {name: count for name, (_, count) in calls.items()}
    return {
        "kind": kind,
        **setting,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "to standard": ratios(seconds, "one pass", "standard"),
        "to two passes": ratios(seconds, "one pass", "two passes"),
        "operations": {k: flops["one pass"] / flops[k] for k in ("standard", "two passes")},
    }


def time_flowjax(rounds):
    """flowjax's own losses on its own coupling flow, and path gradients of the same flow through the adapter."""
    import equinox as eqx
    import paramax
    from flowjax.bijections import Affine
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow
    from flowjax.train.losses import ElboLoss

    from ergodica.integrations.flowjax import from_flowjax

    dim, layers, batch = BASE["dim"], BASE["layers"], BASE["batch"]
    theirs = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(dim)),
        transformer=Affine(),
        flow_layers=layers,
        nn_width=WIDTH,
        nn_depth=2,
        invert=False,
    )
    params, static = eqx.partition(
        theirs, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    key = jax.random.key(1)

    def call_of(loss):
        program = jax.jit(lambda p, key: jax.grad(lambda p: loss(p, static, key))(p)).lower(params, key).compile()
        return lambda: program(params, key)

    ours = from_flowjax(theirs)
    calls = {
        "flowjax, standard": call_of(ElboLoss(target, num_samples=batch)),
        "flowjax, stick_the_landing": call_of(ElboLoss(target, num_samples=batch, stick_the_landing=True)),
        "adapter, standard": compiled(ReverseKL(ours, target, batch))[0],
        "adapter, one pass": compiled(PathGradient(ours, target, num_samples=batch))[0],
    }
    seconds = time_together(calls, rounds)
    first = "flowjax, standard"
    return {
        name: {"milliseconds": 1e3 * statistics.median(values), "ratio": ratios(seconds, name, first)}
        for name, values in seconds.items()
    }


# --- variance ---------------------------------------------------------------------------------------------------------

STAGES = (0, 30, 100, 300, 1000, 3000)
REPEATS = 2000


def points_of_training(flow, log_density):
    """Parameters at the stages of one fit by the standard gradient."""
    gradient, optimiser = ReverseKL(flow, log_density, 512), optax.adam(2e-3)

    @jax.jit
    def run(gradient, params, state, first, last):
        def step(i, carry):
            params, state = carry
            estimate, _ = gradient.estimate(jax.random.fold_in(jax.random.key(7), i), params, None)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimiser.update(tree.scale(estimate.gradient, -1.0), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(first, last, step, (params, state))

    params, state, found = flow.params, optimiser.init(flow.params), []
    for first, last in zip((0, *STAGES[:-1]), STAGES, strict=True):
        params, state = run(gradient, params, state, jnp.asarray(first), jnp.asarray(last))
        found.append(params)
    return found


@jax.jit
def moments(gradient, params, keys):
    """Mean over keys, and mean squared deviation from it summed over parameters, for each key."""
    g = jax.lax.map(lambda key: tree.ravel(gradient.estimate(key, params, None)[0].gradient), keys, batch_size=250)
    return jnp.mean(g, 0), jnp.sum((g - jnp.mean(g, 0)[None]) ** 2, axis=1)


def variance_along(flow, log_density):
    """Variance of one draw's gradient at each stage: standard, path, and their ratio with its interval."""
    rows, keys = [], jax.random.split(jax.random.key(3), REPEATS)
    for stage, params in zip(STAGES, points_of_training(flow, log_density), strict=True):
        found = {}
        for name, kind in (("standard", ReverseKL), ("path", PathGradient)):
            mean, squares = moments(kind(flow, log_density, num_samples=1), params, keys)
            found[name] = (np.asarray(mean, np.float64), np.asarray(squares, np.float64))
        many = ReverseKL(flow, log_density, 4096).estimate(keys[0], params, None)[0]
        log_w = np.asarray(many.aux["log_weight"], np.float64)
        w = np.exp(log_w - log_w.max())
        rng = np.random.default_rng(0)
        index = rng.integers(0, REPEATS, (500, REPEATS))
        ratio = [found["path"][1][i].mean() / found["standard"][1][i].mean() for i in index]
        rows.append(
            {
                "step": stage,
                "value": float(many.value),
                "ess": float(w.sum() ** 2 / (w**2).sum() / len(w)),
                "gradient": float(np.sum(found["standard"][0] ** 2)),
                "standard": float(found["standard"][1].mean()),
                "path": float(found["path"][1].mean()),
                "ratio": float(found["path"][1].mean() / found["standard"][1].mean()),
                "interval": np.quantile(ratio, [0.025, 0.975]).tolist(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def narrow(scale):
    """A normal far narrower, or wider, than the flow's start."""
    return lambda x: -0.5 * jnp.sum(((x - 1.0) / scale) ** 2)


def variances():
    """Targets of three kinds."""
    start = flows.real_nvp(jax.random.key(0), 6, num_layers=6, width=WIDTH)
    bent = jax.tree.map(
        lambda x: x + 0.06 * jax.random.normal(jax.random.key(11), x.shape),
        flows.real_nvp(jax.random.key(5), 6, num_layers=6, width=WIDTH),
    )
    return {
        "another flow of the kind": variance_along(start, bent.log_prob),
        "mixture of 64 normals": variance_along(start, zoo.gaussian_mixture_cube(6)),
        "normal, ten times narrower": variance_along(start, narrow(0.1)),
        "normal, three times wider": variance_along(start, narrow(3.0)),
    }


# ----------------------------------------------------------------------------------------------------------------------


def show(rows):
    """The times as a table."""
    lines = [
        "| layers | D | depth | batch | one pass / standard | one pass / two passes | operations |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        a, b, c = r["to standard"], r["to two passes"], r["operations"]
        lines.append(
            f"| {r['kind']} | {r['dim']} | {r['layers']} | {r['batch']} | {a[0]:.2f} ({a[1]:.2f}–{a[2]:.2f}) | "
            f"{b[0]:.3f} ({b[1]:.3f}–{b[2]:.3f}) | {c['standard']:.2f}, {c['two passes']:.2f} |"
        )
    return "\n".join(lines)


def store(file, results):
    """Keep what there is."""
    results["environment"] = environment()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1))


def main():
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=["time", "variance", "flowjax"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    options = parser.parse_args()
    file = options.output / "path_gradients.json"
    results = json.loads(file.read_text()) if file.exists() else {"time": {}}
    if options.only in (None, "time"):
        for kind in options.kinds:
            make, changes = KINDS[kind]
            results["time"][kind] = []
            for change in changes:
                results["time"][kind].append(time_flow(kind, make, BASE | change, options.rounds))
                print(show(results["time"][kind][-1:]).splitlines()[-1], flush=True)
                store(file, results)
    if options.only in (None, "flowjax"):
        results["flowjax"] = time_flowjax(options.rounds)
        print(json.dumps(results["flowjax"], indent=1))
    if options.only in (None, "variance"):
        results["variance"] = variances()
        store(file, results)
    store(file, results)
    print(show([row for rows in results["time"].values() for row in rows]))


if __name__ == "__main__":
    main()
