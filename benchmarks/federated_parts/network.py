"""A Bayesian neural network on digits whose labels are spread unevenly over ten clients.

64 pixels, 16 tanh units, ten classes, 1,210 weights with the prior N(0, 2^2 / fan-in) (biases N(0, 1)). Proportions of
each digit over the clients are from a Dirichlet law with concentration 0.2. A third of each client's pictures is held out and
scored there.

Surrogates are Gaussians of the clients' likelihoods times their share of the prior, so that they are proper: expanded at one
mode of the posterior (diagonal, and diagonal plus rank 30), at each client's own mode with negative curvature set to 0, and
fitted to 3,000 draws of local runs (diagonal), which is what the paper does. Pooled SGLD has the same batches and step.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

import ergodica as erg
from ergodica.estimators import laplace_surrogates, moment_surrogates
from ergodica.models.equinox import fan_in_scale
from ergodica.models.zoo import digits
from federated_parts.common import (
    LOCAL_STEPS,
    Cell,
    key_of,
    label_skew,
    lost,
    num_lost,
    scores_at_clients,
    total_variation,
    with_local_steps,
)

PART = 4
CLIENTS, CONCENTRATION, HIDDEN, BATCH = 10, 0.2, 16, 50
STEP_SIZE = 1e-4
CHAINS, WARMUP, SAMPLES, THIN = 4, 4000, 57, 107  # THIN is no multiple of a visit's length
LOCAL_DRAWS = 3000


class Problem(NamedTuple):
    """Shards, and what each client holds out."""

    shards: erg.Shards
    held_out: list[dict[str, jax.Array]]
    distance: float


def make(key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(64, 10, width_size=HIDDEN, depth=1, activation=jnp.tanh, key=key)


def categorical(net: eqx.nn.MLP, x: jax.Array) -> dist.Distribution:
    return dist.Categorical(logits=jax.vmap(net)(x))


def prior_scale(name: str, shape: tuple[int, ...]) -> float:
    return 2 * fan_in_scale(name, shape) if len(shape) > 1 else 1.0


@cache
def problem() -> Problem:
    data, rng = digits(), np.random.default_rng(4)
    client = label_skew(rng, data.y, CLIENTS, CONCENTRATION)
    train = np.ones(len(data.y), bool)
    for s in range(CLIENTS):
        rows = np.flatnonzero(client == s)
        train[rng.permutation(rows)[: len(rows) // 3]] = False
    posterior = erg.models.from_equinox(
        make(jax.random.key(0)),
        categorical,
        jnp.asarray(data.x[train]),
        jnp.asarray(data.y[train]),
        prior_scale=prior_scale,
        initial=make,
    )
    held_out = [
        {"x": jnp.asarray(data.x[here]), "y": jnp.asarray(data.y[here])}
        for here in (~train & (client == s) for s in range(CLIENTS))
    ]
    return Problem(erg.Shards(posterior, client[train]), held_out, total_variation(data.y[train], client[train]))


@cache
def mode() -> Any:
    return erg.find_mode(key_of(PART, 2000), problem().shards.posterior, num_steps=1000, progress=False).position


def sampler(surrogates: Any) -> Any:
    gradient = erg.estimators.Conducive(problem().shards, surrogates, BATCH)
    return erg.samplers.Federated(erg.samplers.SGLD(gradient, STEP_SIZE), 1)


def laplace(centre: Any, covariance: Any) -> Any:
    return sampler(laplace_surrogates(problem().shards, centre, covariance=covariance))


def local_fit() -> Any:
    shards = problem().shards
    step = STEP_SIZE * len(shards.rows["y"]) / np.asarray(shards.sizes)
    fit = partial(moment_surrogates, key_of(PART, 1000), shards, jnp.asarray(np.minimum(step, 1e-3), jnp.float32))
    return sampler(
        fit(
            num_samples=LOCAL_DRAWS,
            num_warmup=1000,
            batch_size=BATCH,
            covariance="diagonal",
            correct_step=False,
            initial=mode(),
        )
    )


METHODS = {
    "DSGLD": lambda: sampler(None),
    "FSGLD, Laplace, diagonal": lambda: laplace(mode(), "diagonal"),
    "FSGLD, local Laplace, diagonal": lambda: laplace("local", "diagonal"),
    "FSGLD, 3,000 draws, diagonal": local_fit,
    "FSGLD, Laplace, rank 30": lambda: laplace(mode(), 30),
}


@cache
def built(method: str) -> Any:
    """Surrogates are fitted once."""
    return METHODS[method]()


def sample(key: jax.Array, chosen: Any) -> Any:
    return erg.sample(
        key,
        chosen,
        num_samples=SAMPLES,
        num_warmup=WARMUP,
        num_chains=CHAINS,
        thin=THIN,
        progress=False,
        probes=False,
        throw=False,
    )


@jax.jit
def correct_rows(posterior: erg.Posterior, positions: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """How many rows the mean of the probabilities over the draws gives to their own class."""

    def of_draw(position: Any) -> jax.Array:
        def of_class(c: jax.Array) -> jax.Array:
            return posterior.log_likelihood(position, {**rows, "y": jnp.full_like(rows["y"], c)})

        return jnp.exp(jax.vmap(of_class, out_axes=1)(jnp.arange(10, dtype=rows["y"].dtype)))

    probability = jax.lax.map(of_draw, positions).mean(0)
    return jnp.sum(probability.argmax(1) == rows["y"])


def score(dt: Any) -> dict[str, Any]:
    """Scores that add up over clients."""
    p = problem()
    positions = {name: jnp.asarray(v.values).reshape(-1, *v.shape[2:]) for name, v in dt.posterior.data_vars.items()}
    found: dict[str, Any] = scores_at_clients(dt, p.shards, p.held_out)
    correct = sum(int(correct_rows(p.shards.posterior, positions, rows)) for rows in p.held_out)
    norm = np.sqrt(np.mean(sum(np.sum(np.square(v), axis=tuple(range(1, v.ndim))) for v in positions.values())))
    return found | {"accuracy": correct / found["rows"], "norm": float(norm)}


@jax.jit
def _between(gradient: erg.estimators.Conducive, position: Any) -> jax.Array:
    def of_client(client: jax.Array) -> jax.Array:
        return ravel_pytree(jax.grad(gradient.mean_log_density)(position, client))[0]

    means = jax.lax.map(of_client, jnp.arange(CLIENTS, dtype=jnp.int32))
    f = gradient.probabilities
    return jnp.sum(f * jnp.sum((means - (f @ means)[None]) ** 2, axis=1))


@cache
def pooled() -> Any:
    """SGLD with all rows in one place, uniform batches of the same size."""
    gradient = erg.estimators.Minibatch(problem().shards.posterior, BATCH, "uniform")
    return sample(key_of(PART, 3000), erg.samplers.SGLD(gradient, STEP_SIZE))


@cache
def places() -> dict[str, list[Any]]:
    """Where gradients are compared: at the mode, at draws of pooled SGLD, and at starts of chains."""
    posterior, dt = problem().shards.posterior, pooled()
    last = [{n: jnp.asarray(v.values[c, -1]) for n, v in dt.posterior.data_vars.items()} for c in range(CHAINS)]
    return {"mode": [mode()], "draws": last, "starts": [posterior.start(key_of(PART, 4000 + i)) for i in range(CHAINS)]}


def gradients(name: str) -> dict[str, Any]:
    """Between-client variance of the gradient over that of DSGLD, at three kinds of places."""
    chosen, plain = built(name).gradient, built("DSGLD").gradient
    return {
        place: float(np.mean([_between(chosen, p) for p in where]) / np.mean([_between(plain, p) for p in where]))
        for place, where in places().items()
    }


def cell(method: str, made: Any, steps: int) -> dict[str, Any]:
    number = 10 * list(METHODS).index(method) + LOCAL_STEPS.index(steps)
    dt = sample(key_of(PART, number), with_local_steps(made, steps))
    if dt.attrs["result"] != "successful":
        return lost(dt, None)
    return {"scores": score(dt), "lost": num_lost(dt), "chains": CHAINS}


def about() -> dict[str, Any]:
    """Settings, the pooled run, and the score of guessing by each client's and everybody's label frequencies."""
    p = problem()
    y = np.asarray(p.shards.rows["y"])
    frequency = np.bincount(y, minlength=10) / len(y)
    held = np.concatenate([np.asarray(rows["y"]) for rows in p.held_out])
    at_mode = {name: np.asarray(w)[None, None] for name, w in mode().items()}
    import arviz as az

    return {
        "sizes": np.asarray(p.shards.sizes).tolist(),
        "distance": p.distance,
        "guessing": {"nll": float(-np.mean(np.log(frequency[held])))},
        "mode": score_of_mode(az.from_dict({"posterior": at_mode})),
        "pooled": score(pooled()),
        "chains": CHAINS,
        "steps": WARMUP + SAMPLES * THIN,
    }


def score_of_mode(dt: Any) -> dict[str, Any]:
    """Scores of one position, without errors over draws."""
    p = problem()
    position = {name: jnp.asarray(v.values[0]) for name, v in dt.posterior.data_vars.items()}
    rows = sum(len(rows["y"]) for rows in p.held_out)
    one = jax.tree.map(lambda w: w[0], position)
    lpd = sum(float(jnp.sum(p.shards.posterior.log_likelihood(one, held))) for held in p.held_out)
    correct = sum(int(correct_rows(p.shards.posterior, position, held)) for held in p.held_out)
    norm = np.sqrt(sum(float(jnp.sum(w**2)) for w in one.values()))
    return {"nll": -lpd / rows, "accuracy": correct / rows, "norm": float(norm)}


def cells() -> Iterator[Cell]:
    """Everything that is run, one method at a time."""
    yield "about", about
    for method in METHODS:
        if method != "DSGLD":
            yield f"gradients, {method}", lambda m=method: gradients(m)
        for steps in LOCAL_STEPS:
            yield f"{method}, {steps}", lambda m=method, t=steps: cell(m, built(m), t)
