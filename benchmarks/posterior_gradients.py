"""Bias and variance of gradients of posterior expectations along one path of training, with chains that run beside it.

Eight questions with sixteen answers each. The prior of the answers (a table of logits) is trained to maximum likelihood; one or six
of a question's answers are right, and a wrong one is taken for right with probability 0.02. A guide, a second table, is fitted to
the posterior (inclusive divergence) five times more slowly. Both follow the exact gradients, so that every estimator sees the
same parameters at every step and the exact gradient is known. Each estimator makes one estimate a step, and keeps its own
chains from step to step; what is measured is the mean and the spread over independent repeats, so the bias is that of chains that
lag and of weights that are normalised.

    python benchmarks/posterior_gradients.py [--repeats 400] [--steps 240] [--output benchmarks/results]
"""

import argparse
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from step_time import environment

from ergodica.estimators import (
    ForwardKL,
    JointStochasticApproximation,
    MarkovianScoreClimbing,
    MonteCarloEM,
    VariationalGradient,
)
from ergodica.estimators.em.independence import Selection
from ergodica.estimators.variational.objectives.climbing import AbstractScoreClimbing

ROWS, ANSWERS, SLIP = 8, 16, 0.02
RIGHT = (1, 6)
LEARNING_RATES = {"prior": 0.25, "guide": 0.05}
EDGES = (0, 1, 2, 4, 8, 15, 30, 60, 100, 160, 240)
"""Steps are pooled between these."""


# --- the problem ----------------------------------------------------------------------------------------------------------


def data(num_right):
    """Numbers of the questions, and logarithms of the probability (ROWS, ANSWERS) that an answer is taken for right."""
    rank = np.argsort(np.random.default_rng(0).random((ROWS, ANSWERS)), axis=1)
    return {"row": jnp.arange(ROWS), "table": jnp.log(jnp.where(rank < num_right, 1.0, SLIP))}


START = {"prior": 0.5 * jax.random.normal(jax.random.key(1), (ROWS, ANSWERS)), "guide": jnp.zeros((ROWS, ANSWERS))}


def model(data):
    logits = numpyro.param("prior", START["prior"])
    with numpyro.plate("questions", ROWS):
        z = numpyro.sample("z", dist.Categorical(logits=logits))
        numpyro.factor("answer", jnp.take_along_axis(data["table"], z[:, None], axis=1)[:, 0])


def guide(data):  # noqa: ARG001  (NumPyro calls it as the model)
    logits = numpyro.param("guide", START["guide"])
    with numpyro.plate("questions", ROWS):
        numpyro.sample("z", dist.Categorical(logits=logits))


def prior_law(params, rows):
    return dist.Categorical(logits=params["prior"][rows["row"]])


def guide_law(params, rows):
    return dist.Categorical(logits=params["guide"][rows["row"]])


def log_likelihood(params, z, rows):  # noqa: ARG001
    return jnp.take_along_axis(rows["table"], z[:, None], axis=1)[:, 0]


def objective(params, table, posterior):
    """Log evidence, and minus the inclusive divergence up to a constant."""
    log_joint = jax.nn.log_softmax(params["prior"]) + table
    return jnp.sum(jax.nn.logsumexp(log_joint, axis=1)) + jnp.sum(posterior * jax.nn.log_softmax(params["guide"]))


def exact_gradient(params, table):
    posterior = jax.nn.softmax(jax.nn.log_softmax(params["prior"]) + table)
    return jax.grad(objective)(params, table, posterior)


def path(table, steps):
    """Parameters and exact gradients at each step of gradient ascent."""

    def step(params, _):
        gradient = exact_gradient(params, table)
        moved = {name: x + LEARNING_RATES[name] * gradient[name] for name, x in params.items()}
        return moved, (params, gradient)

    return jax.jit(lambda: jax.lax.scan(step, START, None, length=steps)[1])()


# --- estimators -----------------------------------------------------------------------------------------------------------


class StaleWeight(AbstractScoreClimbing):
    """The published error: proposals are compared with the weight that the step began with, whatever was accepted since."""

    def __init__(self, num_particles):
        self.num_particles, self.vectorize_particles = num_particles, True

    def select(self, key, log_weights):
        accept = jnp.log(jax.random.uniform(key, log_weights[1:].shape)) < log_weights[1:] - log_weights[:1]
        numbers = jnp.arange(1, log_weights.shape[0])[:, None]
        at = jax.lax.cummax(jnp.where(accept, numbers, 0), axis=0)
        visits = jnp.mean(jax.nn.one_hot(at, log_weights.shape[0], axis=0), axis=1)
        visits = visits.at[0].set(jnp.where(log_weights[0] > -jnp.inf, visits[0], 0))
        return Selection(visits / jnp.sum(visits, axis=0, keepdims=True), at[-1], jnp.mean(1.0 * accept, axis=0))


def estimators(rows):
    """All of them, on one set of questions."""

    def variational(loss):
        return VariationalGradient(loss, model, guide, rows)

    def em(**options):
        return MonteCarloEM(prior_law, log_likelihood, rows, scheme="full", **options)

    return {
        "ForwardKL(4)": variational(ForwardKL(4)),
        "MarkovianScoreClimbing(4)": variational(MarkovianScoreClimbing(4)),
        "the same, rao_blackwell=False": variational(MarkovianScoreClimbing(4, rao_blackwell=False)),
        "JointStochasticApproximation(4)": variational(JointStochasticApproximation(4)),
        "the same, weight not updated": variational(StaleWeight(4)),
        "MarkovianScoreClimbing(1)": variational(MarkovianScoreClimbing(1)),
        "JointStochasticApproximation(1)": variational(JointStochasticApproximation(1)),
        "MonteCarloEM": em(),
        "the same, no control variate": em(control_variate=False),
        "MonteCarloEM(guide=…)": em(guide=guide_law),
        "with the guide, no control variate": em(guide=guide_law, control_variate=False),
    }


def runs_beside(estimator, params, repeats):
    """Gradients of a table by each repeat at each step: mean, sum of variances, and the share of chains that moved."""

    def one(key):
        key_init, key_steps = jax.random.split(key)
        state = estimator.init(key_init, jax.tree.map(lambda x: x[0], params))

        def step(state, given):
            i, at = given
            estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), at, state)
            return state, estimate.gradient

        numbers = jnp.arange(len(params["prior"]))
        state, gradients = jax.lax.scan(step, state, (numbers, params))
        chains = state.get("chains") if isinstance(state, dict) else state
        rate = jnp.nan if chains is None else jnp.sum(chains.moves) / jnp.sum(chains.visits)
        return gradients, rate

    def all_repeats(key):
        gradients, rates = jax.lax.map(one, jax.random.split(key, repeats), batch_size=50)
        return (
            jax.tree.map(lambda x: jnp.mean(x, axis=0), gradients),
            jax.tree.map(lambda x: jnp.sum(jnp.var(x, axis=0, ddof=1), axis=(1, 2)), gradients),
            jnp.mean(rates),
        )

    return jax.jit(all_repeats)(jax.random.key(2))


def pooled(mean, variance, exact, repeats):
    """Root of the mean squared bias, free of the noise of the means, and of the mean variance, between the edges.

    Both are relative to the root mean square of the exact gradient at the start, so that they can be added to one another. The
    error of the squared bias is the spread that the means' noise would give it if there were no bias.
    """
    mean, variance, exact = (np.asarray(x, np.float64) for x in (mean, variance, exact))
    unit = np.sum(exact[0] ** 2)
    squared = np.sum((mean - exact) ** 2, axis=(1, 2)) - variance / repeats
    entries = exact[0].size
    rows = []
    for low, high in itertools.pairwise(EDGES):
        part = slice(low, min(high, len(squared)))
        if low >= len(squared):
            break
        noise = np.mean(variance[part]) / repeats * np.sqrt(2 / entries)
        rows.append(
            {
                "first_step": low,
                "last_step": min(high, len(squared)) - 1,
                "gradient": float(np.sqrt(np.mean(np.sum(exact[part] ** 2, axis=(1, 2))) / unit)),
                "bias": float(np.sqrt(max(np.mean(squared[part]), 0) / unit)),
                "bias_noise": float(np.sqrt(noise / unit)),
                "standard_deviation": float(np.sqrt(np.mean(variance[part]) / unit)),
            }
        )
    return rows


def measure(num_right, steps, repeats):
    rows = data(num_right)
    params, exact = path(rows["table"], steps)
    likelihood = jnp.sum(jax.nn.softmax(params["prior"]) * jnp.exp(rows["table"]), axis=-1).mean(axis=1)
    record = {"likelihood": np.round(np.asarray(likelihood, np.float64), 4).tolist(), "estimators": {}}
    for name, estimator in estimators(rows).items():
        mean, variance, rate = runs_beside(estimator, params, repeats)
        tables = {table: pooled(mean[table], variance[table], exact[table], repeats) for table in START}
        record["estimators"][name] = tables | {"acceptance_rate": None if np.isnan(rate) else float(rate)}
        print(f"{num_right} right, {name}: acceptance rate {float(rate):.2f}", flush=True)
    return record


def report(record):
    lines = []
    for num_right, table in itertools.product(map(str, RIGHT), START):
        found = record["right"][num_right]["estimators"]
        title = f"{num_right} right, gradient of the {table}: bias / standard deviation, in units of the first gradient"
        first = next(iter(found.values()))[table]
        chosen = [0, 4, 6, len(first) - 1]
        steps = [f"steps {first[i]['first_step']} to {first[i]['last_step']}" for i in chosen]
        lines += ["", title, "", "| estimator | " + " | ".join(steps) + " |", "|---|" + "---|" * len(chosen)]
        for name, rows in found.items():
            if rows[table][-1]["standard_deviation"] == 0:  # it has no gradient of the guide
                continue
            cells = [f"{rows[table][i]['bias']:.3f} / {rows[table][i]['standard_deviation']:.3f}" for i in chosen]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--steps", type=int, default=EDGES[-1])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    begin = time.process_time()
    right = {str(n): measure(n, arguments.steps, arguments.repeats) for n in RIGHT}
    record = {"repeats": arguments.repeats, "right": right, "environment": environment()}
    record["processor_seconds"] = time.process_time() - begin
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "posterior_gradients.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))


if __name__ == "__main__":
    main()
