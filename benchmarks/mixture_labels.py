"""Gradients of a mixture with a label for each datum: the labels enumerated, drawn, relaxed and summed out.

392 cars in three clusters by displacement and horsepower; the program (print it with --show) is that of the tutorial "A mixture
and its labels". A second program has two clusters, and bits for labels, for estimators that need bits. All are compared at
three points of one fit by ``ergodica.compare_gradients``: the start, half way (in nats) and the end. NumPyro's TraceGraph_ELBO and,
where the package funsor can be imported, TraceEnum_ELBO are beside them.

The verdicts on bias mean nothing where labels are drawn: a car whose label is nearly certain draws another in no repeat, so that
its part of the gradient shows no noise and yet differs from its mean. The total variance is that of the clusters, mostly. What is
stored is the part that the tutorial draws, the labels summed out.

    python benchmarks/mixture_labels.py [--repeats 200] [--only "two clusters"] [--show] [--output benchmarks/results]
"""

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from step_time import environment

import ergodica as erg
from ergodica.estimators import (
    ELBO,
    DisARM,
    Enumerate,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    ReinMax,
    Score,
    StraightThrough,
    VariationalGradient,
)
from ergodica.models.zoo import auto_mpg

K, STEPS, REFERENCE = 2, 1500, "Enumerate"
START = jnp.array([[-1.0, -1.0], [0.0, 0.0], [1.5, 1.5]])


def cars():
    """Displacement and horsepower, standardised; the number of cylinders."""
    data = auto_mpg()
    columns = {name: data.x[:, i] for i, name in enumerate(data.columns)}
    return jnp.stack([jnp.asarray(columns["displacement"]), jnp.asarray(columns["horsepower"])], axis=1)


# --- three clusters ---------------------------------------------------------------------------------------------------


def clusters():
    share = numpyro.sample("share", dist.Dirichlet(jnp.full(3, 2.0)))
    with numpyro.plate("clusters", 3):
        centre = numpyro.sample("centre", dist.Normal(jnp.zeros(2), 1.5).to_event(1))
        spread = numpyro.sample("spread", dist.LogNormal(jnp.full(2, -1.0), 0.7).to_event(1))
    return share, centre, spread


def model(x):
    share, centre, spread = clusters()
    with numpyro.plate("cars", len(x)):
        label = numpyro.sample("label", dist.Multinomial(1, probs=share))
        numpyro.sample("x", dist.Normal(label @ centre, label @ spread).to_event(1), obs=x)


def clusters_guide():
    positive = dist.constraints.positive
    share = numpyro.sample(
        "share", dist.Dirichlet(numpyro.param("share_counts", jnp.full(3, 50.0), constraint=positive))
    )
    with numpyro.plate("clusters", 3):
        loc = numpyro.param("centre_loc", START)
        scale = numpyro.param("centre_scale", jnp.full((3, 2), 0.1), constraint=positive)
        centre = numpyro.sample("centre", dist.Normal(loc, scale).to_event(1))
        loc = numpyro.param("spread_loc", jnp.full((3, 2), -1.0))
        scale = numpyro.param("spread_scale", jnp.full((3, 2), 0.1), constraint=positive)
        spread = numpyro.sample("spread", dist.LogNormal(loc, scale).to_event(1))
    return share, centre, spread


def start_of_labels(x):
    return dist.Normal(START, 0.5).to_event(1).log_prob(x[:, None])  # near ones first


def guide(x):
    clusters_guide()
    logits = numpyro.param("label_logits", start_of_labels(x))
    with numpyro.plate("cars", len(x)):
        numpyro.sample("label", dist.Multinomial(1, logits=logits))


# --- the same by index, summed out, and with bits ------------------------------------------------------------------------


def model_by_index(x):
    share, centre, spread = clusters()
    with numpyro.plate("cars", len(x)):
        label = numpyro.sample("label", dist.Categorical(probs=share), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(centre[label], spread[label]).to_event(1), obs=x)


def guide_by_index(x):
    clusters_guide()
    logits = numpyro.param("label_logits", start_of_labels(x))
    with numpyro.plate("cars", len(x)):
        numpyro.sample("label", dist.Categorical(logits=logits))


def marginal_model(x):
    share, centre, spread = clusters()
    components = dist.Normal(centre, spread).to_event(1)
    with numpyro.plate("cars", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=share), components), obs=x)


def marginal_guide(x):  # noqa: ARG001  (NumPyro calls it as the model)
    clusters_guide()


def knowing_guide(x):
    """The label's law, given the clusters, is known: nothing to be learnt for each car."""
    share, centre, spread = clusters_guide()
    logits = jnp.log(share) + dist.Normal(centre, spread).to_event(1).log_prob(x[:, None])
    with numpyro.plate("cars", len(x)):
        numpyro.sample("label", dist.Multinomial(1, logits=logits))


def model_of_two(x):
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    with numpyro.plate("clusters", 2):
        centre = numpyro.sample("centre", dist.Normal(jnp.zeros(2), 1.5).to_event(1))
        spread = numpyro.sample("spread", dist.LogNormal(jnp.full(2, -1.0), 0.7).to_event(1))
    with numpyro.plate("cars", len(x)):
        label = numpyro.sample("label", dist.Bernoulli(share))[:, None]
        law = dist.Normal(centre[0] + label * (centre[1] - centre[0]), spread[0] + label * (spread[1] - spread[0]))
        numpyro.sample("x", law.to_event(1), obs=x)


def guide_of_two(x):
    positive = dist.constraints.positive
    counts = numpyro.param("share_counts", jnp.full(2, 50.0), constraint=positive)
    numpyro.sample("share", dist.Beta(counts[0], counts[1]))
    with numpyro.plate("clusters", 2):
        loc = numpyro.param("centre_loc", jnp.array([[-0.7, -0.7], [1.2, 1.2]]))
        scale = numpyro.param("centre_scale", jnp.full((2, 2), 0.1), constraint=positive)
        numpyro.sample("centre", dist.Normal(loc, scale).to_event(1))
        loc = numpyro.param("spread_loc", jnp.full((2, 2), -0.5))
        scale = numpyro.param("spread_scale", jnp.full((2, 2), 0.1), constraint=positive)
        numpyro.sample("spread", dist.LogNormal(loc, scale).to_event(1))
    logits = numpyro.param("label_logits", jnp.zeros(len(x)))
    with numpyro.plate("cars", len(x)):
        numpyro.sample("label", dist.Bernoulli(logits=logits))


# --- comparison -------------------------------------------------------------------------------------------------------

ONE_HOT = {
    REFERENCE: ELBO(K, {"label": Enumerate()}),
    "LeaveOneOut": ELBO(K, {"label": LeaveOneOut()}),
    "Score": ELBO(K, {"label": Score()}),
    "ReinMax": ELBO(K, {"label": ReinMax()}),
    "GumbelSoftmax(0.5)": ELBO(K, {"label": GumbelSoftmax(0.5)}),
    "GumbelSoftmax(0.5, straight_through)": ELBO(K, {"label": GumbelSoftmax(0.5, straight_through=True)}),
    "StraightThrough": ELBO(K, {"label": StraightThrough()}),
    "NumPyro TraceGraph_ELBO": TraceGraph_ELBO(K),
}
BY_INDEX = {"MeasureValued": ELBO(K, {"label": MeasureValued()})}
BITS = {
    REFERENCE: ELBO(K, {"label": Enumerate()}),
    "DisARM": ELBO(K, {"label": DisARM()}),
    "MeasureValued": ELBO(K, {"label": MeasureValued()}),
    "LeaveOneOut": ELBO(K, {"label": LeaveOneOut()}),
    "ReinMax": ELBO(K, {"label": ReinMax()}),
    "NumPyro TraceGraph_ELBO": TraceGraph_ELBO(K),
}
SUMMED = "summed out by hand"
MARGINAL = {SUMMED: ELBO(K), "NumPyro Trace_ELBO": Trace_ELBO(K)}
KNOWING = {
    "label from the clusters, Enumerate": ELBO(K, {"label": Enumerate()}),
    "label from the clusters, LeaveOneOut": ELBO(K, {"label": LeaveOneOut()}),
}


def path(gradient, start):
    """Start, half way and end of one fit with Adam, with their bounds."""
    optimiser = optax.adam(0.03)

    def step(carry, key):
        params, state = carry
        estimate, _ = gradient.estimate(key, params, {})
        updates, state = optimiser.update(jax.tree.map(jnp.negative, estimate.gradient), state)
        new = optax.apply_updates(params, updates)
        return (new, state), (params, estimate.value)

    keys = jax.random.split(jax.random.key(1), STEPS)
    (end, _), (points, bounds) = jax.jit(lambda c: jax.lax.scan(step, c, keys))((start, optimiser.init(start)))
    first, last = float(bounds[0]), float(bounds[-500:].mean())
    half = int(jnp.argmax(bounds > (first + last) / 2))
    return {
        "start": (start, first),
        "half way": (jax.tree.map(lambda x: x[half], points), float(bounds[half])),
        "end": (end, last),
    }


def compare(gradients, points, repeats):
    """Rows of bias and variance, one for each point and gradient; the first gradient is the reference."""
    params = [p for p, _ in points.values()]
    table = erg.compare_gradients(
        jax.random.key(2), gradients, params, reference=next(iter(gradients)), num_repeats=repeats, num_timings=0
    )
    rows = []
    for j, (point, (_, bound)) in enumerate(points.items()):
        for name in gradients:
            row = table.sel(estimator=name).isel(point=j)
            rows.append(
                {
                    "point": point,
                    "bound": bound,
                    "estimator": name,
                    "runs": float(row["datum_gradients"]),
                    "verdict": str(row["verdict"].item()),
                    "largest_z": float(abs(row["z"]).max()),
                    "variance": float(row["variance"]),
                    "variance_interval": [float(row["variance_lower"]), float(row["variance_upper"])],
                }
            )
    return rows


def three_clusters(gradients):
    ours = gradients(ONE_HOT, model, guide) | gradients(BY_INDEX, model_by_index, guide_by_index)
    return ours, path(ours[REFERENCE], ours[REFERENCE].start(jax.random.key(0)))


def two_clusters(gradients):
    two = gradients(BITS, model_of_two, guide_of_two)
    return two, path(two[REFERENCE], two[REFERENCE].start(jax.random.key(0)))


def summed_out(gradients):
    summed = gradients(MARGINAL, marginal_model, marginal_guide) | gradients(KNOWING, model, knowing_guide)
    if importlib.util.find_spec("funsor"):
        from numpyro.infer import TraceEnum_ELBO

        # summed out by name, not by a law of mixtures: the label is in the model alone
        summed["NumPyro TraceEnum_ELBO"] = VariationalGradient(
            TraceEnum_ELBO(K), model_by_index, marginal_guide, cars()
        )
    return summed, path(summed[SUMMED], summed[SUMMED].start(jax.random.key(0)))


PROGRAMS = {"three clusters": three_clusters, "two clusters": two_clusters, "labels summed out": summed_out}


def measure(program, repeats):
    x = cars()
    gradients, points = PROGRAMS[program](
        lambda losses, model, guide: {name: VariationalGradient(loss, model, guide, x) for name, loss in losses.items()}
    )
    return compare(gradients, points, repeats)


def report(record):
    lines = [
        "| program | point | bound | estimator | runs | verdict | largest z | variance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {program} | {r['point']} | {r['bound']:.1f} | {r['estimator']} | {r['runs']:.0f} | {r['verdict']} | "
        f"{r['largest_z']:.1f} | {r['variance']:.3g} |"
        for program, rows in record["comparison"].items()
        for r in rows
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), help="make these anew, and keep the others")
    parser.add_argument("--show", action="store_true", help="print the program and stop")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    source = "\n\n".join(inspect.getsource(f) for f in (clusters, model, clusters_guide, start_of_labels, guide))
    if arguments.show:
        print(source)
        return
    packages = ["funsor"] if importlib.util.find_spec("funsor") else []
    versions = environment()
    versions["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "mixture_labels.json"
    record = json.loads(file.read_text()) if file.exists() else {"comparison": {}}
    record |= {"program": source, "num_particles": K, "repeats": arguments.repeats, "environment": versions}
    for program in arguments.only or PROGRAMS:
        record["comparison"][program] = measure(program, arguments.repeats)
        file.write_text(json.dumps(record, indent=2) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
