"""Gaussian blobs: the mean of a Gaussian from ten clients whose data are far apart, where everything is known.

The setting of the paper's notebook: ten shards of 200 points in the plane, blob centres uniform on [-6, 6]^2, variance 0.125 within
a blob, likelihood N(theta, I), prior N(0, 5 I), batches of 10, the paper's step 1e-4 (5e-5 here). The blobs are our own.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.estimators import GaussianSurrogates, laplace_surrogates, moment_surrogates
from federated_parts.common import LOCAL_STEPS, Cell, beside, cells_of, draws, key_of, moments, run, with_local_steps

PART = 1
CLIENTS, ROWS, BATCH = 10, 200, 10
STEP_SIZE, PRIOR_PRECISION, BLOB_VARIANCE = 5e-5, 0.2, 0.125
CHAINS, STEPS, WARMUP = 128, 4200, 400
LOCAL_DRAWS, LOCAL_THIN = 3000, 20  # thinned so, the draws are nearly independent


def log_prior(theta: jax.Array) -> jax.Array:
    return -0.5 * PRIOR_PRECISION * jnp.sum(theta**2)


def log_likelihood(theta: jax.Array, x: jax.Array) -> jax.Array:
    return -0.5 * jnp.sum((x - theta[None]) ** 2, -1)


@cache
def shards() -> erg.Shards:
    rng = np.random.default_rng(666)
    centres = rng.uniform(-6, 6, (CLIENTS, 1, 2))
    x = centres + np.sqrt(BLOB_VARIANCE) * rng.normal(size=(CLIENTS, ROWS, 2))
    data = jnp.asarray(x.reshape(-1, 2), jnp.float32)
    posterior = erg.Posterior(log_prior, log_likelihood, data, initial=jnp.zeros(2))
    return erg.Shards(posterior, np.repeat(np.arange(CLIENTS), ROWS))


def truth() -> tuple[np.ndarray, float]:
    """Posterior mean and sd."""
    x = np.asarray(shards().rows, float)
    precision = PRIOR_PRECISION + len(x)
    return x.sum(0) / precision, precision**-0.5


def exact_surrogates() -> GaussianSurrogates:
    x = np.asarray(shards().rows, float).reshape(CLIENTS, ROWS, 2)
    precision = np.tile(ROWS * np.eye(2), (CLIENTS, 1, 1))
    return GaussianSurrogates(jnp.asarray(x.mean(1), jnp.float32), jnp.asarray(precision, jnp.float32))


def local_fit(*, correct_step: bool = True, thin: int = 1) -> GaussianSurrogates:
    """Of 3,000 iterates of SGLD on each client's data, with the sampler's own step times 1 / f."""
    return moment_surrogates(
        key_of(PART, 1000),
        shards(),
        STEP_SIZE * CLIENTS,
        num_samples=LOCAL_DRAWS,
        thin=thin,
        batch_size=BATCH,
        correct_step=correct_step,
    )


def sampler(surrogates: GaussianSurrogates, strength: float = 1.0) -> Any:
    gradient = erg.estimators.Conducive(shards(), surrogates, BATCH, strength=strength)
    return erg.samplers.Federated(erg.samplers.SGLD(gradient, STEP_SIZE), 1)


METHODS = {
    "DSGLD": lambda: sampler(exact_surrogates(), strength=0.0),
    "FSGLD, exact": lambda: sampler(exact_surrogates()),
    "FSGLD, Laplace": lambda: sampler(laplace_surrogates(shards())),
    "FSGLD, 3,000 draws thinned": lambda: sampler(local_fit(thin=LOCAL_THIN)),
    "FSGLD, 3,000 draws": lambda: sampler(local_fit()),
    "FSGLD, 3,000 draws uncorrected": lambda: sampler(local_fit(correct_step=False)),
}


def cell(method: str, made: Any, steps: int) -> dict[str, Any]:
    """Predict before the run, then run."""
    chosen = with_local_steps(made, steps)
    mean, sd = truth()
    prediction = erg.predict_federated(key_of(PART, 0), chosen, jnp.asarray(mean, jnp.float32))
    number = 10 * list(METHODS).index(method) + LOCAL_STEPS.index(steps)
    dt = run(key_of(PART, number), chosen, CHAINS, STEPS, WARMUP, jnp.asarray(mean, jnp.float32))
    x = draws(dt)
    found = beside(prediction, moments(x), mean, sd)
    scatter = x[:, -1].tolist() if method in ("DSGLD", "FSGLD, exact") else None
    error = {
        "surrogate_error": float(prediction.surrogate_error.mean()),
        "gradient_size": float(prediction.gradient_size.mean()),
    }
    return found | error | {"visits": STEPS / steps, "last_draws": scatter}


def about() -> dict[str, Any]:
    """Settings and truth."""
    mean, sd = truth()
    x = np.asarray(shards().rows, float).reshape(CLIENTS, ROWS, 2)
    return {
        "mean": mean.tolist(),
        "sd": sd,
        "blobs": x.mean(1).tolist(),
        "steps": STEPS,
        "chains": CHAINS,
        "scalar_law": scalar_law(PRIOR_PRECISION, BLOB_VARIANCE),
        "scalar_law_of_paper_text": scalar_law(1.0, 1.0),
    }


def scalar_law(prior_precision: float, blob_variance: float) -> dict[str, list[float]]:
    r"""Ratio of sd to the posterior's where visits end, first coordinate: the closed form for equal shards and exact surrogates.

    With :math:`F = 1 - h\lambda`, :math:`V = (1 + \frac h2 \bar S) / (\lambda (1 - h \lambda / 2))` and the variance
    :math:`V_s` of the clients' fixed points: :math:`V + V_s (1 - F^\tau)/(1 + F^\tau)` for DSGLD, :math:`V` for FSGLD.
    """
    x = np.asarray(shards().rows, float).reshape(CLIENTS, ROWS, 2)[..., 0]
    precision, h = prior_precision + CLIENTS * ROWS, STEP_SIZE
    noise = np.mean((CLIENTS * ROWS) ** 2 * x.var(1) / BATCH) * blob_variance / BLOB_VARIANCE
    F = 1 - h * precision
    V = (1 + h / 2 * noise) / (precision * (1 - h * precision / 2))
    Vs = np.var(CLIENTS * ROWS * x.mean(1) / precision)
    taus = np.array(LOCAL_STEPS)
    dsgld = V + Vs * (1 - F**taus) / (1 + F**taus)
    return {"DSGLD": np.sqrt(dsgld * precision).tolist(), "FSGLD": [float(np.sqrt(V * precision))] * len(taus)}


def cells() -> Iterator[Cell]:
    """Everything that is run."""
    yield "about", about
    yield from cells_of(METHODS, cell)
