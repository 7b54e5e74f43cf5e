"""The variance of the gradient at a client against the skew of the clients' labels, exactly.

Softmax regression on the digits (16 principal components and an intercept, 170 coefficients with prior N(0, 1)), spread over ten
clients with proportions of each digit from a Dirichlet law. At the mode and at draws of the Laplace approximation, of the
estimator's variance, summed over coordinates: what lies between the clients, sum_s f_s |E g_s - g|^2, and what batches of ten rows
add within one, sum_s f_s tr Cov(g_s). Nothing is simulated.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.estimators import laplace_surrogates
from ergodica.models.zoo import digits
from federated_parts.common import Cell, key_of, label_skew, total_variation

PART = 5
CLIENTS, COMPONENTS, CLASSES, BATCH, DRAWS = 10, 16, 10, 10, 4
CONCENTRATIONS = (0.05, 0.2, 1.0, 5.0, 1000.0)


def log_prior(theta: jax.Array) -> jax.Array:
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    logits = rows["x"] @ theta.reshape(COMPONENTS + 1, CLASSES)
    chosen = jnp.take_along_axis(logits, rows["y"][:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


@cache
def posterior() -> erg.Posterior:
    data = digits()
    away = data.x.astype(float) - data.x.mean(0)
    z = away @ np.linalg.svd(away, full_matrices=False)[2][:COMPONENTS].T
    x = np.concatenate([np.ones((len(z), 1)), z / z.std()], axis=1)
    rows = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(data.y)}
    return erg.Posterior(log_prior, log_likelihood, rows, initial=jnp.zeros((COMPONENTS + 1) * CLASSES))


@cache
def points() -> jax.Array:
    """The mode, and draws around it (1 + DRAWS, D)."""
    mode = erg.find_mode(key_of(PART, 0), posterior(), progress=False).position
    precision = -np.asarray(jax.hessian(posterior().log_density)(mode), float)
    noise = np.random.default_rng(1).normal(size=(DRAWS, len(precision)))
    draws = np.linalg.solve(np.linalg.cholesky(precision).T, noise.T).T
    return jnp.concatenate([mode[None], mode[None] + jnp.asarray(draws, jnp.float32)])


@jax.jit
def variances(gradient: erg.estimators.Conducive, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Between clients and within, at each point (P,)."""

    def of_point(theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_client(client: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean = jax.grad(gradient.mean_log_density)(theta, client)
            return mean, jnp.sum(gradient.covariance(theta, client, diagonal=True))

        means, within = jax.lax.map(of_client, jnp.arange(CLIENTS, dtype=jnp.int32))
        f = gradient.probabilities
        away = means - (f @ means)[None]
        return jnp.sum(f * jnp.sum(away**2, axis=1)), jnp.sum(f * within)

    return jax.lax.map(of_point, at)


def cell(concentration: float) -> dict[str, Any]:
    """Variances for one skew."""
    labels = np.asarray(posterior().data["y"])
    client = label_skew(np.random.default_rng(2), labels, CLIENTS, concentration)
    shards = erg.Shards(posterior(), client)
    mode = points()[0]
    surrogates = {
        "none": None,
        "Laplace at the mode": laplace_surrogates(shards, mode),
        "Laplace at the mode, diagonal": laplace_surrogates(shards, mode, covariance="diagonal"),
        "Laplace at local modes": laplace_surrogates(shards, "local"),
    }
    found: dict[str, Any] = {"distance": total_variation(labels, client), "sizes": np.asarray(shards.sizes).tolist()}
    for name, q in surrogates.items():
        between, within = variances(erg.estimators.Conducive(shards, q, BATCH), points())
        found[name] = {
            "between_at_mode": float(between[0]),
            "between": float(between[1:].mean()),
            "within": float(within[1:].mean()),
        }
    return found


def cells() -> Iterator[Cell]:
    """Everything that is computed."""
    for concentration in CONCENTRATIONS:
        yield f"{concentration:g}", lambda c=concentration: cell(c)
