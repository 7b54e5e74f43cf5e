"""Routing to one of four experts: SparseMixer's gradient beside the exact one and the library's. Under twenty seconds on two cores.

A router picks one expert for each digit and multiplies its output by the probability of the pick. The gradient of the router
needs the derivative of a random pick. SparseMixer (version 2: Liu et al. 2024, "GRIN: GRadient-INformed MoE", arXiv:2409.12136)
estimates it from the one expert that ran. Here the other experts are cheap, so that its bias can be computed. It is large: the
rule that would be right within a tenth is not applied to the best expert.
"""

import argparse
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import ergodica as erg
from ergodica.estimators import LeaveOneOut, ReinMax, StraightThrough, UnorderedSet, expectation_gradient
from ergodica.models.zoo import digits

NUM_EXPERTS, WIDTH, BALANCE = 4, 8, 1.0
NUM_STEPS, NUM_REPEATS = 400, 400


# --- SparseMixer -------------------------------------------------------------------------------------------------------


def near_the_best(logits, jitter):
    """Mask out experts whose logit is more than ``2 jitter`` below the best, relative to the larger of the two."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where((best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter, -jnp.inf, logits)


@jax.custom_vjp
def multiplier(logits, expert, part):
    """Probability of the pick, times ``part``; the derivative is the probability's, without ``part``."""
    return jax.nn.softmax(logits)[expert] * part


def multiplier_forward(logits, expert, part):
    return multiplier(logits, expert, part), (jax.nn.softmax(logits), expert)


def multiplier_backward(kept, g):
    p, expert = kept
    return g * p[expert] * (jax.nn.one_hot(expert, len(p)) - p), None, None


multiplier.defvjp(multiplier_forward, multiplier_backward)


def probability_of_whole(logits, expert, *, spare_the_best=True):
    """Heun's third-order rule, ``f(m) - f(0) = m (f'(m) + 3 f'(m / 3)) / 4``: the output is whole one time in four, else a third.

    If the pick is the best expert, it is always whole: Euler's rule, ``m f'(m)``.
    """
    return jnp.where((expert == jnp.argmax(logits)) & spare_the_best, 1.0, 0.25)


def sparse_mixer(key, logits, jitter=None):
    """Pick an expert, and what to multiply its output by."""
    key_pick, key_part = jax.random.split(key)
    masked = logits if jitter is None else near_the_best(logits, jitter)
    expert = jax.random.categorical(key_pick, masked)
    whole = jax.random.uniform(key_part) < probability_of_whole(logits, expert)
    return expert, multiplier(masked, expert, jnp.where(whole, 1.0, 1 / 3))


# --- a small mixture of experts ----------------------------------------------------------------------------------------


def outputs(params, x):
    """Outputs of all experts (E, 10)."""
    hidden = jnp.tanh(jnp.einsum("d,edh->eh", x, params["inner"]))
    return jnp.einsum("eh,eho->eo", hidden, params["outer"])


def cross_entropy(output, y):
    return -jax.nn.log_softmax(output)[y]


def training_loss(params, key, x, y):
    """Cross-entropy, and a little of what keeps the experts equally busy (Fedus et al. 2022, equation 4)."""

    def one(key, x, y):
        expert, scale = sparse_mixer(key, x @ params["router"])
        return cross_entropy(scale * outputs(params, x)[expert], y), expert

    loss, experts = jax.vmap(one)(jax.random.split(key, len(x)), x, y)
    busy = jnp.mean(jax.nn.one_hot(experts, NUM_EXPERTS), axis=0)
    probability = jnp.mean(jax.nn.softmax(x @ params["router"]), axis=0)
    return jnp.mean(loss) + BALANCE * NUM_EXPERTS * jnp.sum(busy * probability)


data = digits()
x, y = jnp.asarray(data.x, float), jnp.asarray(data.y)
order = np.random.default_rng(0).permutation(len(y))
train, test = order[:1400], order[1400:]
key_inner, key_outer, key_train, key_compare = jax.random.split(jax.random.key(0), 4)
params = {
    "router": jnp.zeros((x.shape[1], NUM_EXPERTS)),
    "inner": jax.random.normal(key_inner, (NUM_EXPERTS, x.shape[1], WIDTH)) / jnp.sqrt(x.shape[1]),
    "outer": jax.random.normal(key_outer, (NUM_EXPERTS, WIDTH, 10)) / jnp.sqrt(WIDTH),
}
optimiser = optax.adam(5e-3)


@jax.jit
def fit(params):
    def step(carry, key):
        params, state = carry
        key_rows, key_step = jax.random.split(key)
        rows = jax.random.choice(key_rows, jnp.asarray(train), (100,))
        loss, gradient = jax.value_and_grad(training_loss)(params, key_step, x[rows], y[rows])
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key_train, NUM_STEPS))


(params, _), losses = fit(params)
logits = x[test] @ params["router"]
best = jnp.argmax(logits, axis=-1)
output = jax.vmap(partial(outputs, params))(x[test])[jnp.arange(len(test)), best]
accuracy = float(jnp.mean(jnp.argmax(output, axis=-1) == y[test]))
shares = np.bincount(np.asarray(best), minlength=NUM_EXPERTS) / len(test)
print(
    f"loss {losses[:50].mean():.2f} -> {losses[-50:].mean():.2f}; {accuracy:.1%} of the test digits right, by the best expert"
)
print("shares of the experts:", " ".join(f"{share:.0%}" for share in shares), "\n")


# --- its gradient, beside others ---------------------------------------------------------------------------------------


def parts(params, x, y):
    """Per expert: the loss of its output times ``scale``, as a function of the scale."""
    every = outputs(params, x)
    return lambda scale: jax.vmap(lambda output, s: cross_entropy(s * output, y))(every, scale)


def exact(logits, x, y):
    """Derivative by the logits of the mean loss over the picks: through the pick alone, and through the multiplier as well."""
    loss = parts(params, x, y)
    held = jax.nn.softmax(logits)
    through_pick = jax.grad(lambda t: jax.nn.softmax(t) @ loss(held))(logits)
    return through_pick, jax.grad(lambda t: jax.nn.softmax(t) @ loss(jax.nn.softmax(t)))(logits)


def sparse_mixer_moments(logits, x, y, *, jitter=None, spare_the_best=True):
    """Mean and variance of SparseMixer's derivative, over all picks and parts."""
    every, experts = outputs(params, x), jnp.arange(NUM_EXPERTS)

    def derivative(expert, part):
        def loss(logits):
            masked = logits if jitter is None else near_the_best(logits, jitter)
            return cross_entropy(multiplier(masked, expert, part) * every[expert], y)

        return jax.grad(loss)(logits)

    found = jax.vmap(jax.vmap(derivative, (None, 0)), (0, None))(experts, jnp.array([1.0, 1 / 3]))
    whole = probability_of_whole(logits, experts, spare_the_best=spare_the_best)
    picks = jax.nn.softmax(logits if jitter is None else near_the_best(logits, jitter))
    weights = picks[:, None] * jnp.stack([whole, 1 - whole], axis=1)
    mean = jnp.einsum("ep,epl->l", weights, found)
    return mean, jnp.einsum("ep,epl->l", weights, (found - mean) ** 2)


def by_library(estimator, num_samples, key, logits, x, y):
    """The pick as a one-hot vector that selects among scaled outputs; the multipliers are held."""
    scaled = jax.nn.softmax(logits)[:, None] * outputs(params, x)
    return expectation_gradient(
        key,
        logits,
        lambda t: dist.Multinomial(1, logits=t),
        lambda z: cross_entropy(z @ scaled, y),
        estimator,
        num_samples,
    ).gradient


variants = {
    "SparseMixer": {},
    "SparseMixer, masked": {"jitter": 0.1},
    "Heun's rule at all experts": {"spare_the_best": False},
}
ways = {
    "straight-through": (StraightThrough(), 1, NUM_EXPERTS),
    "ReinMax": (ReinMax(), 1, NUM_EXPERTS),
    "leave one out of 2": (LeaveOneOut(), 2, 2),
    "unordered set of 2": (UnorderedSet(2), 1, 2),
}
rows = jnp.asarray(test[:100])
arguments = (x[rows] @ params["router"], x[rows], y[rows])


@jax.jit
def moments(key):
    """Mean and variance for each digit and logit: over all picks, or over repeats."""
    found = {name: jax.vmap(partial(sparse_mixer_moments, **how))(*arguments) for name, how in variants.items()}
    for name, (estimator, num_samples, _) in ways.items():

        def once(key, estimator=estimator, num_samples=num_samples):
            way = partial(by_library, estimator, num_samples)
            return jax.vmap(way)(jax.random.split(key, len(rows)), *arguments)

        draws = jax.lax.map(once, jax.random.split(key, NUM_REPEATS), batch_size=50)
        found[name] = draws.mean(axis=0), draws.var(axis=0)
    return found, jax.vmap(exact)(*arguments)


def size(v):
    return float(jnp.sqrt(jnp.sum(v**2)))


table, (found, (pick, total)) = {}, moments(key_compare)
for name in [*variants, *ways]:
    mean, variance = found[name]
    noise = (
        0.0 if name in variants else float(jnp.sum(variance)) / NUM_REPEATS
    )  # of the squared distance from the truth
    table[name] = {
        "experts run": 1 if name in variants else ways[name][2],
        "bias": np.sqrt(max(size(mean - pick) ** 2 - noise, 0.0)) / size(pick),
        "seen from": float(np.sqrt(2 * noise) / size(pick)),
        "standard deviation": float(np.sqrt(float(jnp.sum(variance)))) / size(pick),
        "bias, whole gradient": np.sqrt(max(size(mean - total) ** 2 - noise, 0.0)) / size(total),
    }
columns = list(next(iter(table.values())))
print(
    "of 100 digits, relative to the length of the exact gradient through the pick (last column: the whole exact gradient)"
)
print(" " * 28 + "  ".join(columns))
for name, row in table.items():
    print(
        f"{name:28s}"
        + "  ".join(f"{row[c]:{len(c)}.2f}" if c != "experts run" else f"{row[c]:{len(c)}d}" for c in columns)
    )

parser = argparse.ArgumentParser()
parser.add_argument("--store", action="store_true", help="write the table to benchmarks/results, for the documentation")
if parser.parse_args().store:
    path = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "sparse_mixer.json"
    record = {"accuracy": accuracy, "shares": shares.tolist(), "table": table, "version": erg.__version__}
    path.write_text(json.dumps(record, indent=1) + "\n")
