"""Variance and time of ELBO gradients, beside NumPyro's TraceGraph_ELBO and a VAE written by hand.

The model (print it with --show): a bit, a normal whose law in the guide depends on it, five data. The parameters are frozen at
points of one path of exact gradient ascent (the start, half way in nats, where the ELBO is within 0.1 nat of its maximum, the
end), and where the normal is too narrow by a factor of exp(2). Every estimator sees the same points. Exact gradients are sums over
the bit times Gauss–Hermite quadrature.

Times are ratios to the peer within a repeat, all variants in turn in one process; medians and quartiles of the ratios.

    python benchmarks/elbo_gradients.py [--replicates 20000] [--repeats 30] [--output benchmarks/results]
"""

import argparse
import inspect
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from step_time import environment

from ergodica.core import tree
from ergodica.estimators import ELBO, Enumerate, LeaveOneOut, Reparam, Score

K = 10
DATA = (2.1, 1.4, 2.6, 0.9, 1.8)
STL = Reparam(stl=True)


# --- the model --------------------------------------------------------------------------------------------------------


def model(x):
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("x", dist.Normal(w + 1.5 * z, 1.0), obs=x)


def guide(x):  # noqa: ARG001  (NumPyro calls it as the model)
    z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(-2.0))))
    loc = numpyro.param("loc", jnp.array([0.0, 0.0]))
    log_scale = numpyro.param("log_scale", jnp.array([0.0, 0.0]))
    numpyro.sample("w", dist.Normal(loc[z], jnp.exp(log_scale[z])))


# ----------------------------------------------------------------------------------------------------------------------

START = {"logit": jnp.array(-2.0), "loc": jnp.zeros(2), "log_scale": jnp.zeros(2)}


def exact_elbo(params, x):
    """Sum over the bit, quadrature over the normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    value = 0.0
    for z, q in ((0, 1 - jax.nn.sigmoid(params["logit"])), (1, jax.nn.sigmoid(params["logit"]))):
        scale = jnp.exp(params["log_scale"][z])
        w = params["loc"][z] + scale * jnp.asarray(nodes, x.dtype)
        log_p = jnp.log(0.3 if z else 0.7) + dist.Normal(0, 1).log_prob(w)
        log_p += jnp.sum(dist.Normal(w[:, None] + 1.5 * z, 1.0).log_prob(x[None, :]), axis=1)
        log_q = jnp.log(q) + dist.Normal(params["loc"][z], scale).log_prob(w)
        value += q * jnp.sum(jnp.asarray(weights / weights.sum(), x.dtype) * (log_p - log_q))
    return value


def log_evidence(x):
    """Of the conjugate pair, summed over the bit."""
    n = x.shape[0]
    covariance = jnp.eye(n) + jnp.ones((n, n))
    parts = [
        jnp.log(0.3 if z else 0.7) + dist.MultivariateNormal(1.5 * z * jnp.ones(n), covariance).log_prob(x)
        for z in (0, 1)
    ]
    return float(jax.nn.logsumexp(jnp.stack(parts)))


def frozen_points(x):
    """Start, half way, within 0.1 nat of the maximum (the log evidence, which this guide reaches), the end; and one off it."""
    best, params, path = log_evidence(x), START, []
    step = jax.jit(jax.value_and_grad(lambda p: exact_elbo(p, x)))
    for _ in range(2000):
        value, gradient = step(params)
        path.append((best - float(value), params))
        params = jax.tree.map(lambda p, g: p + 0.02 * g, params, gradient)
    gap = path[0][0]
    half = next(p for p in path if p[0] < gap / 2)
    near = next(p for p in path if p[0] < 0.1)
    narrow = path[-1][1] | {"log_scale": path[-1][1]["log_scale"] - 2.0}
    return {
        "start": path[0],
        "half way": half,
        "within 0.1 nat": near,
        "end of the path": path[-1],
        "too narrow": (best - float(exact_elbo(narrow, x)), narrow),
    }


LOSSES = {
    "NumPyro TraceGraph_ELBO": TraceGraph_ELBO(K),
    "NumPyro Trace_ELBO": Trace_ELBO(K),
    "Score + Reparam": ELBO(K, {"z": Score(), "w": Reparam()}),
    "LeaveOneOut + Reparam": ELBO(K, {"z": LeaveOneOut(), "w": Reparam()}),
    "LeaveOneOut + Reparam(stl=True)": ELBO(K, {"z": LeaveOneOut(), "w": STL}),
    "LeaveOneOut at both": ELBO(K, {"z": LeaveOneOut(), "w": LeaveOneOut()}),
    "Enumerate + Reparam (auto)": ELBO(K, {"z": Enumerate(), "w": Reparam()}),
    "Enumerate + Reparam(stl=True)": ELBO(K, {"z": Enumerate(), "w": STL}),
}


def variances(x, replicates):
    """Bias in standard errors, variance of the score-function parameter and in all, with standard errors, at each point."""
    rows, keys = [], jax.random.split(jax.random.key(1), replicates)
    points = frozen_points(x)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in points.values()))
    exact = np.asarray(jax.vmap(lambda p: tree.ravel(jax.grad(lambda q: exact_elbo(q, x))(p)))(stacked))
    index = tree.coordinate_names(START).index("logit")
    for name, loss in LOSSES.items():

        def one(key, params, loss=loss):
            return tree.ravel(jax.grad(lambda p: -loss.loss(key, p, model, guide, x))(params))

        run = jax.jit(
            lambda keys, params, one=one: jax.lax.map(
                lambda k: jax.vmap(one, (None, 0))(k, params), keys, batch_size=250
            )
        )
        draws = np.asarray(run(keys, stacked), np.float64)
        for j, (point, (gap, _)) in enumerate(points.items()):
            squares = (draws[:, j] - draws[:, j].mean(axis=0)) ** 2
            error = np.sqrt(squares.mean(axis=0) / replicates)
            bias = draws[:, j].mean(axis=0) - exact[j]
            rounding = 1e-6 * np.max(np.abs(exact[j])) + 1e-6
            rows.append(
                {
                    "point": point,
                    "nats_below_maximum": gap,
                    "estimator": name,
                    "largest_z": float(np.max(np.abs(bias) / np.hypot(error, rounding))),
                    "variance_logit": float(squares[:, index].mean()),
                    "variance_logit_error": float(squares[:, index].std() / np.sqrt(replicates)),
                    "variance": float(squares.sum(axis=1).mean()),
                    "variance_error": float(squares.sum(axis=1).std() / np.sqrt(replicates)),
                }
            )
    rows.sort(key=lambda row: list(points).index(row["point"]))
    peers = {row["point"]: row for row in rows if row["estimator"] == "NumPyro TraceGraph_ELBO"}
    for row in rows:
        for kind in ("variance_logit", "variance"):
            row["gain_" + kind] = peers[row["point"]][kind] / max(row[kind], 1e-300)
    return rows


# --- time -------------------------------------------------------------------------------------------------------------


def interleaved(runs, repeats, calls):
    """Seconds of a call by name, for each repeat."""
    for run in runs.values():
        jax.block_until_ready(run())
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - begin) / calls)
    return times


def ratios(times, reference):
    rows = {}
    for name, values in times.items():
        each = [a / b for a, b in zip(values, times[reference], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        rows[name] = {"microseconds": 1e6 * statistics.median(values), "ratio": middle, "ratio_quartiles": [low, high]}
    return rows


def step_times(x, repeats):
    """One value and gradient, on the model above and on a hundred bits in a plate."""

    def plated_model(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(w + 1.5 * z, 1.0), obs=x)

    def plated_guide(x):
        numpyro.sample(
            "w", dist.Normal(numpyro.param("loc", jnp.array(0.0)), jnp.exp(numpyro.param("scale", jnp.array(0.0))))
        )
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(x.shape[0]))))

    many = jnp.linspace(-1.0, 3.0, 1000)
    programs = {
        "the model above": (model, guide, x, START),
        "1,000 bits in a plate": (
            plated_model,
            plated_guide,
            many,
            {"loc": jnp.array(0.3), "scale": jnp.array(-1.0), "logits": jnp.zeros(many.shape[0])},
        ),
    }
    results = {}
    for title, (program, its_guide, data, params) in programs.items():
        losses = {
            "NumPyro TraceGraph_ELBO": TraceGraph_ELBO(K),
            "Score": ELBO(K, {"z": Score()}),
            "LeaveOneOut": ELBO(K, {"z": LeaveOneOut()}),
            "LeaveOneOut, stl": ELBO(K, {"z": LeaveOneOut(), "w": STL}),
            "Enumerate": ELBO(K, {"z": Enumerate()}),
        }
        runs = {}
        for name, loss in losses.items():

            def gradient(key, p, data, loss=loss, program=program, its_guide=its_guide):
                return jax.value_and_grad(lambda p: loss.loss(key, p, program, its_guide, data))(p)

            compiled = jax.jit(gradient)
            runs[name] = lambda compiled=compiled, params=params, data=data: compiled(jax.random.key(0), params, data)
        results[title] = ratios(interleaved(runs, repeats, calls=30), "NumPyro TraceGraph_ELBO")
    return results


PIXELS, HIDDEN, CODE = 784, 200, 20


def vae_params(key):
    shapes = {"e1": (PIXELS, HIDDEN), "e2": (HIDDEN, 2 * CODE), "d1": (CODE, HIDDEN), "d2": (HIDDEN, PIXELS)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) / np.sqrt(s[0]) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def encode(params, x):
    loc, log_scale = jnp.split(jnp.tanh(x @ params["e1"]) @ params["e2"], 2, axis=-1)
    return loc, jnp.exp(log_scale)


def decode(params, z):
    return jnp.tanh(z @ params["d1"]) @ params["d2"]


def vae_by_hand(key, params, x):
    """Negative ELBO of a minibatch, one draw a datum."""
    loc, scale = encode(params, x)
    z = loc + scale * jax.random.normal(key, loc.shape)
    logits = decode(params, z)
    log_likelihood = jnp.sum(x * logits - jax.nn.softplus(logits))
    log_prior = jnp.sum(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi))
    log_q = jnp.sum(-0.5 * ((z - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi))
    return -(log_likelihood + log_prior - log_q)


def vae_model(x):
    params = {name: numpyro.param(name, None) for name in ("d1", "d2")}
    with numpyro.plate("batch", x.shape[0]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([CODE]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(params, z)).to_event(1), obs=x)


def vae_guide(x):
    params = {name: numpyro.param(name, None) for name in ("e1", "e2")}
    loc, scale = encode(params, x)
    with numpyro.plate("batch", x.shape[0]):
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def vae_times(repeats, sizes=(64, 128, 256, 512, 1024)):
    """Gradient of a minibatch, by hand, by ELBO(1) and by NumPyro's Trace_ELBO."""
    params, results = vae_params(jax.random.key(0)), {}
    for size in sizes:
        x = (jax.random.uniform(jax.random.key(1), (size, PIXELS)) < 0.3).astype(jnp.float32)
        runs = {"by hand": jax.jit(jax.value_and_grad(vae_by_hand, argnums=1))}
        for name, loss in (("ELBO", ELBO(1)), ("NumPyro Trace_ELBO", Trace_ELBO(1))):

            def gradient(key, p, x, loss=loss):
                return jax.value_and_grad(lambda p: loss.loss(key, p, vae_model, vae_guide, x))(p)

            runs[name] = jax.jit(gradient)
        calls = {name: (lambda run=run, x=x: run(jax.random.key(2), params, x)) for name, run in runs.items()}
        results[str(size)] = ratios(interleaved(calls, repeats, calls=max(1, 512 // size)), "by hand")
    return results


def report(record):
    lines = []
    if "variances" in record:
        lines += [
            "| point | nats below | estimator | largest z | var of logit | gain | total variance | gain |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['point']} | {r['nats_below_maximum']:.3f} | {r['estimator']} | {r['largest_z']:.1f} | "
            f"{r['variance_logit']:.3g} | {r['gain_variance_logit']:.3g} | {r['variance']:.3g} | {r['gain_variance']:.3g} |"
            for r in record["variances"]
        ]
    for part, reference in (("step_times", "TraceGraph_ELBO"), ("vae_times", "by hand")):
        for title, rows in record.get(part, {}).items():
            lines += ["", f"| {title} | us | ratio to {reference} (quartiles) |", "|---|---|---|"]
            for name, row in rows.items():
                low, high = row["ratio_quartiles"]
                lines.append(f"| {name} | {row['microseconds']:.0f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--show", action="store_true", help="print the model and stop")
    parser.add_argument("--parts", nargs="+", default=["variances", "step_times", "vae_times"])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    source = inspect.getsource(model) + "\n\n" + inspect.getsource(guide)
    if arguments.show:
        print(source)
        return
    x, path = jnp.array(DATA), arguments.output / "elbo_gradients.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"model": source, "data": DATA, "num_particles": K, "environment": environment()}
    parts = {
        "variances": lambda: variances(x, arguments.replicates),
        "step_times": lambda: step_times(x, arguments.repeats),
        "vae_times": lambda: vae_times(arguments.repeats),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        record[part] = parts[part]()
        record[f"{part}_settings"] = arguments.replicates if part == "variances" else arguments.repeats
        path.write_text(json.dumps(record, indent=2) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
