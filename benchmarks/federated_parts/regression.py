"""Bayesian linear regression on cars: eight clients, each with cars of a narrow range of weights.

392 cars of `models.zoo.auto_mpg`, nine standardised coefficients with prior N(0, 1), and a noise that is known: the posterior is
Gaussian, Laplace's surrogates are exact. A fifth of each client's cars is held out, and scored at the client.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.estimators import laplace_surrogates, moment_surrogates
from ergodica.models.zoo import auto_mpg
from federated_parts.common import (
    LOCAL_STEPS,
    Cell,
    beside,
    cells_of,
    draws,
    key_of,
    moments,
    predict,
    run,
    scores_at_clients,
    with_local_steps,
)

PART = 2
CLIENTS, BATCH = 8, 10
STEP_SIZE = 2e-5
CHAINS, STEPS, WARMUP = 128, 35_000, 5000
LOCAL_DRAWS, LOCAL_THIN = 3000, 10


class Problem(NamedTuple):
    """Shards, what each client holds out, the posterior, and the noise."""

    shards: erg.Shards
    held_out: list[dict[str, jax.Array]]
    mean: np.ndarray
    covariance: np.ndarray
    noise: float


@cache
def problem() -> Problem:
    data = auto_mpg()
    weight = data.x[:, data.columns.index("weight")]
    client = np.empty(len(weight), int)
    client[np.argsort(weight, kind="stable")] = np.arange(len(weight)) * CLIENTS // len(weight)
    train = np.ones(len(weight), bool)
    rng = np.random.default_rng(0)
    for s in range(CLIENTS):
        rows = np.flatnonzero(client == s)
        train[rng.permutation(rows)[: len(rows) // 5]] = False
    y = (data.y - data.y[train].mean()) / data.y[train].std()
    x = np.concatenate([np.ones((len(y), 1)), data.x], axis=1).astype(np.float32)
    X, t = x[train].astype(float), y[train].astype(float)
    residual = t - X @ np.linalg.lstsq(X, t, rcond=None)[0]
    noise = float(np.sqrt(residual @ residual / (len(t) - X.shape[1])))

    def log_likelihood(theta: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
        away = (rows["y"] - rows["x"] @ theta) / noise
        return -0.5 * away**2 - float(np.log(noise) + 0.5 * np.log(2 * np.pi))

    rows = {"x": jnp.asarray(x[train]), "y": jnp.asarray(y[train], jnp.float32)}
    posterior = erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, rows, initial=jnp.zeros(x.shape[1])
    )
    held_out = [
        {"x": jnp.asarray(x[here]), "y": jnp.asarray(y[here], jnp.float32)}
        for here in (~train & (client == s) for s in range(CLIENTS))
    ]
    precision = X.T @ X / noise**2 + np.eye(X.shape[1])
    covariance = np.linalg.inv(precision)
    return Problem(erg.Shards(posterior, client[train]), held_out, covariance @ X.T @ t / noise**2, covariance, noise)


def sampler(surrogates: Any) -> Any:
    gradient = erg.estimators.Conducive(problem().shards, surrogates, BATCH)
    return erg.samplers.Federated(erg.samplers.SGLD(gradient, STEP_SIZE), 1)


def local_fit(*, thin: int = 1) -> Any:
    shards = problem().shards
    step = STEP_SIZE * len(shards.rows["y"]) / np.asarray(shards.sizes)
    return moment_surrogates(
        key_of(PART, 1000),
        shards,
        jnp.asarray(step, jnp.float32),
        num_samples=LOCAL_DRAWS,
        num_warmup=5000,
        batch_size=BATCH,
        thin=thin,
    )


METHODS = {
    "DSGLD": lambda: sampler(None),
    "FSGLD, Laplace": lambda: sampler(laplace_surrogates(problem().shards, "local")),
    "FSGLD, 3,000 draws": lambda: sampler(local_fit()),
    "FSGLD, 3,000 draws thinned": lambda: sampler(local_fit(thin=LOCAL_THIN)),
}


def cell(method: str, made: Any, steps: int) -> dict[str, Any]:
    """Predict before the run, then run, and score at the clients."""
    p, chosen = problem(), with_local_steps(made, steps)
    mean, sd = p.mean, np.sqrt(np.diag(p.covariance))
    start = jnp.asarray(mean, jnp.float32)
    prediction = predict(key_of(PART, 0), chosen, start)
    if prediction is None:  # the model is Gaussian: chains would go to infinity
        return {"unstable": "no stationary law"}
    number = 10 * list(METHODS).index(method) + LOCAL_STEPS.index(steps)
    dt = run(key_of(PART, number), chosen, CHAINS, STEPS, WARMUP, start)
    found = beside(prediction, moments(draws(dt)), mean, sd)
    scores = scores_at_clients(dt.isel(draw=slice(None, None, 50)), p.shards, p.held_out)
    return found | {"scores": scores}


def about() -> dict[str, Any]:
    """Settings, and the exact held-out score of the posterior."""
    p = problem()
    x, y = (np.concatenate([np.asarray(rows[name], float) for rows in p.held_out]) for name in ("x", "y"))
    variance = p.noise**2 + np.einsum("nd,de,ne->n", x, p.covariance, x)
    nll = 0.5 * np.mean((y - x @ p.mean) ** 2 / variance + np.log(2 * np.pi * variance))
    h_lambda = STEP_SIZE * np.linalg.eigvalsh(np.linalg.inv(p.covariance))
    return {
        "sizes": np.asarray(p.shards.sizes).tolist(),
        "held_out": len(y),
        "noise": p.noise,
        "nll": float(nll),
        "h_lambda": [float(h_lambda[0]), float(h_lambda[-1])],
        "steps": STEPS,
        "chains": CHAINS,
    }


def cells() -> Iterator[Cell]:
    """Everything that is run."""
    yield "about", about
    yield from cells_of(METHODS, cell)
