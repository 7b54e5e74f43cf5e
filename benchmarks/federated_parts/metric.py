"""Bayesian metric learning on digits: five clients, each with pairs of pictures of its own two classes.

A pair is similar if both pictures show one digit. After Yang, Jin and Sukthankar (2007), as in the paper (which takes isolet):

    p(similar | x, y) = sigmoid(mu - (x - y)^T A (x - y)),    A = sum_k gamma_k v_k v_k^T,    gamma_k = softplus(theta_k) > 0

with the leading principal directions v_k of the pictures. Pairs for training and held-out pairs have no picture in common.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.estimators import laplace_surrogates, moment_surrogates
from ergodica.models.zoo import digits
from federated_parts.common import (
    LOCAL_STEPS,
    Cell,
    beside,
    cells_of,
    draws,
    key_of,
    lost,
    moments,
    num_lost,
    predict,
    run,
    scores_at_clients,
    with_local_steps,
)

PART = 3
CLIENTS, DIRECTIONS, PAIRS, HELD_OUT = 5, 6, 800, 200
BATCH = 200
STEP_SIZE = 2e-4
CHAINS, STEPS, WARMUP = 64, 10_500, 2000
LOCAL_DRAWS = 3000


class Problem(NamedTuple):
    """Shards of pairs, what each client holds out, and moments of the posterior by NUTS."""

    shards: erg.Shards
    held_out: list[dict[str, jax.Array]]


def pairs_of(rng: np.random.Generator, z: np.ndarray, label: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Squares of differences along the directions (count, K), half of similar pairs, and whether the pair is similar."""
    similar = np.arange(count) < count // 2
    first = rng.integers(len(z), size=count)
    second = np.array(
        [
            rng.choice(np.flatnonzero((label == label[i]) & (np.arange(len(z)) != i) if same else label != label[i]))
            for i, same in zip(first, similar, strict=True)
        ]
    )
    return {"z": (z[first] - z[second]) ** 2, "similar": similar.astype(np.float32)}


def log_prior(theta: jax.Array) -> jax.Array:
    """N(0, 1) for each coordinate."""
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    logit = theta[-1] - rows["z"] @ jax.nn.softplus(theta[:-1])
    return rows["similar"] * logit - jax.nn.softplus(logit)


@cache
def problem() -> Problem:
    data, rng = digits(), np.random.default_rng(0)
    away = data.x.astype(float) - data.x.mean(0)
    z = away @ np.linalg.svd(away, full_matrices=False)[2][:DIRECTIONS].T
    z /= z.std()
    train, held_out = [], []
    for s in range(CLIENTS):
        here = rng.permutation(np.flatnonzero(data.y % CLIENTS == s))
        cut = 7 * len(here) // 10
        train.append(pairs_of(rng, z[here[:cut]], data.y[here[:cut]], PAIRS))
        held_out.append(pairs_of(rng, z[here[cut:]], data.y[here[cut:]], HELD_OUT))
    rows, held = (
        [{"z": jnp.asarray(p["z"], jnp.float32), "similar": jnp.asarray(p["similar"])} for p in part]
        for part in (train, held_out)
    )
    initial = jnp.zeros(DIRECTIONS + 1)
    shards = erg.Shards.from_datasets(
        lambda data: erg.Posterior(log_prior, log_likelihood, jax.tree.map(jnp.asarray, data), initial=initial), rows
    )
    return Problem(shards, held)


@cache
def mode() -> jax.Array:
    return erg.find_mode(key_of(PART, 2000), problem().shards.posterior, progress=False).position


@cache
def reference() -> np.ndarray:
    """Draws of NUTS with all pairs in one place (chain, draw, D)."""
    from numpyro.infer import MCMC, NUTS

    posterior = problem().shards.posterior
    mcmc = MCMC(
        NUTS(potential_fn=lambda theta: -posterior.log_density(theta)),
        num_warmup=500,
        num_samples=1500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key_of(PART, 2001), init_params=jnp.tile(mode(), (4, 1)))
    return np.asarray(mcmc.get_samples(group_by_chain=True), float)


def sampler(surrogates: Any, strength: float = 1.0) -> Any:
    gradient = erg.estimators.Conducive(problem().shards, surrogates, BATCH, strength=strength)
    return erg.samplers.Federated(erg.samplers.SGLD(gradient, STEP_SIZE), 1)


def starts() -> jax.Array:
    """Draws of the reference, one a chain: what must relax is the sampler's own error alone."""
    flat = reference().reshape(-1, DIRECTIONS + 1)
    return jnp.asarray(flat[:: len(flat) // CHAINS][:CHAINS], jnp.float32)


def local_fit(covariance: str) -> Any:
    return moment_surrogates(
        key_of(PART, 1000),
        problem().shards,
        STEP_SIZE * CLIENTS,
        num_samples=LOCAL_DRAWS,
        num_warmup=3000,
        batch_size=BATCH,
        covariance=covariance,
        correct_step=False,
    )


METHODS = {
    "DSGLD": lambda: sampler(None),
    "FSGLD, Laplace": lambda: sampler(laplace_surrogates(problem().shards, mode())),
    "FSGLD, local Laplace": lambda: sampler(laplace_surrogates(problem().shards, "local")),
    "FSGLD, 3,000 draws": lambda: sampler(local_fit("full")),
    "FSGLD, 3,000 draws, diagonal": lambda: sampler(local_fit("diagonal")),
    "FSGLD, Laplace, strength 0.8": lambda: sampler(laplace_surrogates(problem().shards, mode()), strength=0.8),
}


def cell(method: str, made: Any, steps: int) -> dict[str, Any]:
    """Predict before the run, then run, and score at the clients."""
    p, chosen = problem(), with_local_steps(made, steps)
    truth = moments(reference())
    prediction = predict(key_of(PART, 0), chosen, mode())
    number = 10 * list(METHODS).index(method) + LOCAL_STEPS.index(steps)
    dt = run(key_of(PART, number), chosen, CHAINS, STEPS, WARMUP, starts())
    if num_lost(dt):
        return lost(dt, prediction)
    found = beside(prediction, moments(draws(dt)), truth["mean"], truth["sd"])
    scores = scores_at_clients(dt.isel(draw=slice(None, None, 30)), p.shards, p.held_out)
    return found | {"scores": scores}


def about() -> dict[str, Any]:
    """Settings, how Gaussian the posterior is, and the score of the reference."""
    p, found = problem(), moments(reference())
    posterior = p.shards.posterior
    precision = -np.asarray(jax.hessian(posterior.log_density)(mode()), float)
    laplace = np.sqrt(np.diag(np.linalg.inv(precision)))
    import arviz as az

    dt = az.from_dict({"posterior": {"position": reference().astype(np.float32)}})
    h_lambda = STEP_SIZE * np.linalg.eigvalsh(precision)
    return {
        "sd": found["sd"].tolist(),
        "laplace_sd_over_true": (laplace / found["sd"]).tolist(),
        "laplace_shift": ((np.asarray(mode(), float) - found["mean"]) / found["sd"]).tolist(),
        "mean": found["mean"].tolist(),
        "scores": scores_at_clients(dt, p.shards, p.held_out),
        "h_lambda": [float(h_lambda[0]), float(h_lambda[-1])],
        "largest_rhat": float(az.rhat(dt)["position"].max()),
        "steps": STEPS,
        "chains": CHAINS,
    }


def rims() -> dict[str, list[float]]:
    """How deep the well around the mode is in the density that a chain sees at each client, with Laplace's surrogates.

    Along the eigenvectors of sum_r P_r - P_s / f_s with negative eigenvalues, both ways, on straight lines: the lowest log
    density before it is back at that of the mode, and where it is back. Ways that are not straight may be lower. NaN where it
    is never back.
    """
    gradient = METHODS["FSGLD, Laplace"]().gradient
    precision = np.asarray(gradient.surrogates.natural.precision, float)
    share = np.asarray(gradient.probabilities, float)
    distance = np.linspace(0, 10, 1001)
    along = jax.jit(lambda g, lines, s: jax.vmap(lambda theta: g.mean_log_density(theta, s))(lines))
    found: dict[str, list[float]] = {"curvature": [], "depth": [], "distance": []}
    for s in range(CLIENTS):
        values, vectors = np.linalg.eigh(precision.sum(0) - precision[s] / share[s])
        ways = [sign * v for v in vectors[:, values < 0].T for sign in (-1, 1)]
        rims = []
        for way in ways:
            lines = jnp.asarray(np.asarray(mode(), float) + distance[:, None] * way, jnp.float32)
            drop = np.asarray(along(gradient, lines, jnp.array(s)), float)
            back = np.flatnonzero((drop > drop[0]) & (np.minimum.accumulate(drop) < drop[0] - 1))
            if len(back):
                rims.append((drop[0] - drop[: back[0]].min(), distance[back[0]]))
        depth, where = min(rims, default=(float("nan"), float("nan")))
        for name, value in zip(found, (values[0], depth, where), strict=True):
            found[name].append(float(value))
    return found


def cells() -> Iterator[Cell]:
    """Everything that is run."""
    yield "about", about
    yield "rims", rims
    yield from cells_of(METHODS, cell)
