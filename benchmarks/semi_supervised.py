"""Digits of which a few have a label: the class summed out, or drawn and relaxed.

The model is M2 of Kingma et al. (2014): a class y and a normal code z give the pixels; the guide is a classifier q(y | x) and an
encoder q(z | x, y). One NumPyro program with one-hot classes serves every method; only the estimator at the site of the
unlabelled classes differs. The comparison is that of Jang, Gu and Poole (2017), table 2 and figure 5, scaled down to 1,797
digits of 8 x 8 pixels (10 labels a class) and, where ERGODICA_DATA names a folder with mnist.npz, to one run of MNIST.
Leave-one-out has two particles, all others one.

    objective = mean bound of the labelled + mean bound of the unlabelled + mean log q(y | x) of the labelled

All methods have the same start, batches, steps and optimiser (Adam). Temperatures fall from 1 to 0.5 as in the paper, over two
thirds of the steps. The test bound sums over the classes, whatever the method. "Exact divergence": log p(y) - log q(y) is not taken
at the draw but replaced by its mean, the divergence of q(y | x) from the prior, as implementations of the relaxation often do.

    python benchmarks/semi_supervised.py [--only training|bias|timing] [--seeds 5] [--fresh] [--output benchmarks/results]

Training goes on from what is stored. ``--only timing`` measures a step with 10 and with 100 classes, all methods in turn in one
process; ratios within a repeat, medians and quartiles. Run it on an idle machine: the load is stored beside the times.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from elbo_gradients import interleaved, ratios
from step_time import environment

from ergodica.core import tree
from ergodica.estimators import ELBO, Enumerate, GumbelSoftmax, LeaveOneOut, RaoBlackwellGumbel, ReinMax
from ergodica.models.zoo import digits

LABELS_PER_CLASS, BATCH = 10, 100
TEMPERATURES = 20
"""So many values from 1 to 0.5, on a geometric grid, over the first two thirds of the steps."""


class Sizes(NamedTuple):
    """Of the networks."""

    pixels: int
    classes: int
    hidden: int
    code: int


class Task(NamedTuple):
    """Pictures of zeros and ones with their classes, and how long to train."""

    sizes: Sizes
    x: np.ndarray
    y: np.ndarray
    num_test: int
    steps: int
    step_size: float


METHODS = {
    "Enumerate": lambda _: ELBO(1, {"y": Enumerate()}),
    "GumbelSoftmax": lambda t: ELBO(1, {"y": GumbelSoftmax(t)}),
    "GumbelSoftmax, straight through": lambda t: ELBO(1, {"y": GumbelSoftmax(t, straight_through=True)}),
    "RaoBlackwellGumbel": lambda t: ELBO(1, {"y": RaoBlackwellGumbel(t)}),
    "ReinMax": lambda _: ELBO(1, {"y": ReinMax()}),
    "LeaveOneOut, 2 particles": lambda _: ELBO(2, {"y": LeaveOneOut()}),
}
METHODS |= {name + ", exact divergence": METHODS[name] for name in ("GumbelSoftmax", "GumbelSoftmax, straight through")}
SUPERVISED = "labels alone"
"""The classifier without the pictures that have no label."""


# --- the program ------------------------------------------------------------------------------------------------------


def initial(key, sizes):
    """Weights 1 / sqrt(inputs), biases 0."""
    p, c, h, d = sizes
    layers = {
        "c1": (p, h),
        "c2": (h, c),
        "ex": (p, h),
        "ey": (c, h),
        "e2": (h, 2 * d),
        "dz": (d, h),
        "dy": (c, h),
        "d2": (h, p),
    }
    keys = jax.random.split(key, len(layers))
    weights = {
        name: jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, layers.items(), strict=True)
    }
    return weights | {"b" + name: jnp.zeros(layers[name][1]) for name in ("c1", "c2", "ex", "e2", "dz", "d2")}


def layer(name, x):
    return x @ numpyro.param(name, None) + numpyro.param("b" + name, None)


def classify(x):
    return layer("c2", jax.nn.relu(layer("c1", x)))


def encode(x, y):
    hidden = jax.nn.relu(layer("ex", x) + y @ numpyro.param("ey", None))
    loc, log_scale = jnp.split(layer("e2", hidden), 2, axis=-1)
    return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)


def decode(z, y):
    hidden = jax.nn.relu(layer("dz", z) + y @ numpyro.param("dy", None))
    return dist.Bernoulli(logits=layer("d2", hidden)).to_event(1)


def unlabelled(x, sizes, weight, *, exact=False):
    law = dist.Multinomial(1, probs=jnp.full(sizes.classes, 1 / sizes.classes))
    with numpyro.plate("unlabelled", len(x)), numpyro.handlers.scale(scale=weight):
        y = numpyro.sample("y", law.mask(not exact)).astype(float)
        if exact:
            log_q = jax.nn.log_softmax(classify(x))
            numpyro.factor("divergence", -jnp.sum(jnp.exp(log_q) * (log_q + jnp.log(sizes.classes)), axis=-1))
        z = numpyro.sample("z", dist.Normal(jnp.zeros(sizes.code), 1.0).to_event(1))
        numpyro.sample("x", decode(z, y), obs=x)


def unlabelled_guide(x, sizes, weight, *, exact=False):  # noqa: ARG001  (NumPyro calls it as the model)
    with numpyro.plate("unlabelled", len(x)), numpyro.handlers.scale(scale=weight):
        y = numpyro.sample("y", dist.Multinomial(1, logits=classify(x)).mask(not exact)).astype(float)
        numpyro.sample("z", encode(x, y))


def model(x, labelled_x, labelled_y, sizes, *, exact=False):
    unlabelled(x, sizes, 1 / len(x), exact=exact)
    with numpyro.plate("labelled", len(labelled_x)), numpyro.handlers.scale(scale=1 / len(labelled_x)):
        y = jax.nn.one_hot(labelled_y, sizes.classes)
        numpyro.sample("class", dist.Categorical(probs=jnp.full(sizes.classes, 1 / sizes.classes)), obs=labelled_y)
        z = numpyro.sample("code", dist.Normal(jnp.zeros(sizes.code), 1.0).to_event(1))
        numpyro.sample("picture", decode(z, y), obs=labelled_x)
        numpyro.sample("label", dist.Categorical(logits=classify(labelled_x)), obs=labelled_y)


def guide(x, labelled_x, labelled_y, sizes, *, exact=False):
    unlabelled_guide(x, sizes, 1 / len(x), exact=exact)
    with numpyro.plate("labelled", len(labelled_x)), numpyro.handlers.scale(scale=1 / len(labelled_x)):
        numpyro.sample("code", encode(labelled_x, jax.nn.one_hot(labelled_y, sizes.classes)))


# --- training ---------------------------------------------------------------------------------------------------------


def digits_task():
    data = digits()
    return Task(
        Sizes(64, 10, 64, 8), (data.x > 0.5).astype(np.float32), data.y, num_test=397, steps=3000, step_size=2e-3
    )


def mnist_task():
    table = np.load(pathlib.Path(os.environ["ERGODICA_DATA"]) / "mnist.npz")
    x = np.concatenate([table["x_train"][:20_000], table["x_test"]]).reshape(-1, 784) > 127
    y = np.concatenate([table["y_train"][:20_000], table["y_test"]]).astype(np.int32)
    return Task(Sizes(784, 10, 128, 16), x.astype(np.float32), y, num_test=10_000, steps=1000, step_size=1e-3)


def split(task, seed):
    """Rows of the test set (the last ones of MNIST, random ones of the digits), of the labelled, and of the rest."""
    generator, num = np.random.default_rng(seed), len(task.x) - task.num_test
    order = (
        generator.permutation(len(task.x))
        if len(task.x) < 10_000
        else np.append(generator.permutation(num), np.arange(num, len(task.x)))
    )
    train, test = order[:num], order[num:]
    labelled = np.concatenate([train[task.y[train] == c][:LABELS_PER_CLASS] for c in range(task.sizes.classes)])
    return test, labelled, np.setdiff1d(train, labelled)


def temperature(step, steps):
    """From 1 to 0.5 over two thirds of the steps, in a few jumps."""
    part = jnp.minimum(jnp.floor(TEMPERATURES * step / (2 * steps / 3)) / TEMPERATURES, 1.0)
    return 0.5**part


@functools.partial(jax.jit, static_argnames=("method", "sizes", "steps", "step_size"))
def train(key, params, x, labelled_x, labelled_y, method, sizes, steps, step_size):
    """Adam on batches of the unlabelled, with all of the labelled each time."""
    optimiser = optax.adam(step_size)

    def loss(params, key, rows, temperature):
        if method == SUPERVISED:
            logits = predict(params, labelled_x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labelled_y).mean()
        objective = METHODS[method](temperature)
        exact = method.endswith("exact divergence")
        return objective.loss(key, params, model, guide, x[rows], labelled_x, labelled_y, sizes, exact=exact)

    def step(carry, i):
        params, state = carry
        key_rows, key_loss = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.choice(key_rows, len(x), (BATCH,))
        gradient = jax.grad(loss)(params, key_loss, rows, temperature(i, steps))
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))[0][0]


@jax.jit
def predict(params, x):
    """Logits of the classifier."""
    return numpyro.handlers.substitute(classify, data=params)(x)


@functools.partial(jax.jit, static_argnames="sizes")
def bound_of(params, x, sizes):
    """Mean bound with the class summed out (16 codes)."""
    loss = ELBO(1, {"y": Enumerate()})
    bounds = jax.lax.map(
        lambda k: -loss.loss(k, params, unlabelled, unlabelled_guide, x, sizes, 1 / len(x)),
        jax.random.split(jax.random.key(0), 16),
    )
    return jnp.mean(bounds)


def run(task, method, seed):
    test, labelled, rest = split(task, seed)
    rows = test[:2000]  # for the bound
    key = jax.random.key(seed)
    begin, cpu = time.perf_counter(), time.process_time()
    params = train(
        key, initial(jax.random.fold_in(key, 1), task.sizes), jnp.asarray(task.x[rest]), jnp.asarray(task.x[labelled]),
        jnp.asarray(task.y[labelled]), method, task.sizes, task.steps, task.step_size,
    )  # fmt: skip
    jax.block_until_ready(params)
    seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    accuracy = np.mean(np.argmax(predict(params, jnp.asarray(task.x[test])), axis=1) == task.y[test])
    bound = None if method == SUPERVISED else float(bound_of(params, jnp.asarray(task.x[rows]), task.sizes))
    return {"accuracy": float(accuracy), "bound": bound} | seconds


def save(path, part, value):
    """Put one part into what is stored."""
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | {part: value}, indent=2) + "\n")


def training(record, path, seeds):
    tasks = {"digits": (digits_task(), seeds)}
    if os.environ.get("ERGODICA_DATA"):
        tasks["mnist"] = (mnist_task(), 1)
    else:
        print("mnist: skipped, since ERGODICA_DATA does not say where mnist.npz is")
    for name, (task, num_seeds) in tasks.items():
        results = record.setdefault("training", {}).setdefault(name, {"runs": {}})
        results["settings"] = task.sizes._asdict() | {
            "steps": task.steps, "step_size": task.step_size, "batch": BATCH, "labels": LABELS_PER_CLASS * task.sizes.classes,
            "unlabelled": len(task.x) - task.num_test - LABELS_PER_CLASS * task.sizes.classes, "test": task.num_test,
        }  # fmt: skip
        for seed in range(num_seeds):
            for method in [SUPERVISED, *METHODS]:
                done = results["runs"].setdefault(method, {})
                if str(seed) not in done:
                    done[str(seed)] = run(task, method, seed)
                    print(name, method, seed, done[str(seed)], flush=True)
                    save(path, "training", record["training"])


# --- bias -------------------------------------------------------------------------------------------------------------


def bias(num=1000, steps=500):
    """Of the classifier's gradient from a batch without labels, against enumeration, after some steps of training."""
    task = digits_task()
    _, labelled, rest = split(task, 0)
    start = initial(jax.random.key(1), task.sizes)
    data = (jnp.asarray(task.x[rest]), jnp.asarray(task.x[labelled]), jnp.asarray(task.y[labelled]))
    params = train(jax.random.key(0), start, *data, "Enumerate", task.sizes, steps, task.step_size)
    classifier = {name: params[name] for name in ("c1", "bc1", "c2", "bc2")}
    x, keys = data[0][:BATCH], jax.random.split(jax.random.key(2), num)

    def gradients(loss, *, exact=False):
        given = (unlabelled, unlabelled_guide, x, task.sizes, 1 / BATCH)

        def one(key):
            return tree.ravel(jax.grad(lambda c: -loss.loss(key, params | c, *given, exact=exact))(classifier))

        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(keys), np.float64)

    reference, rows = gradients(METHODS["Enumerate"](1.0)), []
    exact, size = reference.mean(axis=0), np.linalg.norm(reference.mean(axis=0))
    for name, method in METHODS.items():
        for t in (1.0, 0.5) if "Gumbel" in name else (None,):
            found = gradients(method(t), exact=name.endswith("exact divergence"))
            mean, variance = found.mean(axis=0), found.var(axis=0, ddof=1).sum()
            noise = (variance + reference.var(axis=0, ddof=1).sum()) / num  # of the squared distance of the means
            rows.append(
                {
                    "method": name,
                    "temperature": t,
                    "relative_bias": float(max(np.sum((mean - exact) ** 2) - noise, 0.0) ** 0.5 / size),
                    "relative_error": float(noise**0.5 / size),
                    "cosine": float(mean @ exact / np.linalg.norm(mean) / size),
                    "relative_sd": float(variance**0.5 / size),
                }
            )
    return {"steps": steps, "repeats": num, "rows": rows}


# --- time -------------------------------------------------------------------------------------------------------------


def timing(repeats):
    """Seconds of a step (gradient and Adam) by number of classes, networks of 784 - 128 units; and its work as XLA counts it."""
    results, optimiser = {}, optax.adam(1e-3)
    for classes in (10, 100):
        sizes, generator = Sizes(784, classes, 128, 16), np.random.default_rng(0)
        x, labelled_x = (jnp.asarray(generator.random((BATCH, 784)) < 0.2, jnp.float32) for _ in range(2))
        labelled_y = jnp.asarray(generator.integers(0, classes, BATCH), jnp.int32)
        params = initial(jax.random.key(0), sizes)
        runs, work = {}, {}
        for name in [name for name in METHODS if not name.endswith("exact divergence")]:
            method = METHODS[name]

            def step(params, state, key, x, labelled_x, labelled_y, method=method, sizes=sizes):
                loss = lambda p: method(0.7).loss(key, p, model, guide, x, labelled_x, labelled_y, sizes)  # noqa: E731
                updates, state = optimiser.update(jax.grad(loss)(params), state)
                return optax.apply_updates(params, updates), state

            given = (params, optimiser.init(params), jax.random.key(1), x, labelled_x, labelled_y)
            compiled = jax.jit(step).lower(*given).compile()
            work[name] = float(compiled.cost_analysis()["flops"])
            runs[name] = functools.partial(compiled, *given)
        rows = ratios(interleaved(runs, repeats, calls=3 if classes == 10 else 1), "GumbelSoftmax")
        for name, row in rows.items():
            row["work_ratio"] = work[name] / work["GumbelSoftmax"]
        results[str(classes)] = rows
    return results


def spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def report(record):
    lines = []
    for name, results in record.get("training", {}).items():
        lines += [f"| {name} | test bound, nats | sd over seeds | accuracy | sd | seeds |", "|---|---|---|---|---|---|"]
        for method, runs in results["runs"].items():
            accuracy = spread([100 * r["accuracy"] for r in runs.values()])
            bound = spread([r["bound"] for r in runs.values()]) if method != SUPERVISED else (float("nan"),) * 2
            lines.append(
                f"| {method} | {bound[0]:.2f} | {bound[1]:.2f} | {accuracy[0]:.1f} % | {accuracy[1]:.1f} | {len(runs)} |"
            )
    if "bias" in record:
        lines += [
            "",
            "| method | temperature | bias / gradient | its error | cosine | sd / gradient |",
            "|---|---|---|---|---|---|",
        ]
        for r in record["bias"]["rows"]:
            t = "" if r["temperature"] is None else r["temperature"]
            lines.append(
                f"| {r['method']} | {t} | {r['relative_bias']:.3f} | {r['relative_error']:.3f} | {r['cosine']:.3f} | "
                f"{r['relative_sd']:.2f} |"
            )
    for classes, rows in record.get("timing", {}).get("classes", {}).items():
        lines += [
            "",
            f"| {classes} classes | ms a step | ratio to GumbelSoftmax (quartiles) | of floating-point work |",
            "|---|---|---|---|",
        ]
        for name, row in rows.items():
            low, high = row["ratio_quartiles"]
            time_ = row["microseconds"] / 1000
            lines.append(
                f"| {name} | {time_:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {row['work_ratio']:.2f} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["training", "bias", "timing"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--idle", action="store_true", help="say in the results that nothing else ran")
    parser.add_argument("--fresh", action="store_true", help="do not go on from stored runs")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "semi_supervised.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if arguments.only in (None, "training"):
        if arguments.fresh:
            record.pop("training", None)
        training(record, path, arguments.seeds)
    if arguments.only in (None, "bias"):
        save(path, "bias", bias())
    if arguments.only in (None, "timing"):
        shared = {"machine_was_shared": not arguments.idle, "environment": environment()}
        save(path, "timing", shared | {"repeats": arguments.repeats, "classes": timing(arguments.repeats)})
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
