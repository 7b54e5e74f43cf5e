"""Problems whose moments are known: exactly, or from a long run of HMC.

Positions are in units of the posterior's scale, so that curvatures are about 1: momenta of unit mass and thermostats of unit
inertia, which is what BlackJAX's kernels have, then suit the problem. SGLD does not care.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from step_time import BATCH_SIZE, NUM_DATA, SIZE, log_likelihood, make_data

import ergodica as erg
from accuracy import data

RESULTS = pathlib.Path(__file__).parents[1] / "results"
REFERENCE = RESULTS / "logistic_reference.json"


class Problem(NamedTuple):
    """A posterior with its reference.

    Attributes
    ----------
    posterior : Posterior
    log_likelihood_of_one : callable
        For peers that take the likelihood of one datum.
    batch_size : int
    curvatures : array (D,)
        Eigenvalues of minus the Hessian at the mode, or quantiles of them: for predictions alone.
    mode, mean, sd : array (D,)
        The last two: of the posterior.
    square_variance : array (D,)
        Variance of ``((theta - mean) / sd)**2`` under the posterior; 2 for a Gaussian.
    start : callable
        Draws of the posterior for starting points: key and number to array (R, D).
    """

    posterior: erg.Posterior
    log_likelihood_of_one: Callable
    batch_size: int
    curvatures: np.ndarray
    mode: jax.Array
    mean: np.ndarray
    sd: np.ndarray
    square_variance: np.ndarray
    start: Callable

    @property
    def num_data(self) -> int:
        return self.posterior.num_data


# --- Gaussian ----------------------------------------------------------------------------------------------------------


def gaussian() -> Problem:
    """Mean of 10,000 Gaussian vectors under a flat prior; posterior precisions from 0.5 to 2."""
    rows, precision = data.gaussian_rows()
    num_data, size = rows.shape
    of_one = jnp.asarray(precision / num_data, jnp.float32)
    mean, sd = rows.astype(float).mean(axis=0), precision**-0.5

    def likelihood(theta, rows):
        return -0.5 * jnp.sum(of_one * (rows - theta) ** 2, axis=-1)

    return Problem(
        erg.Posterior(lambda theta: 0.0 * jnp.sum(theta), likelihood, jnp.asarray(rows), initial=jnp.zeros(size)),
        likelihood,
        data.BATCH_SIZE,
        precision,
        jnp.asarray(mean, jnp.float32),
        mean,
        sd,
        np.full(size, 2.0),
        lambda key, num: jnp.asarray(mean + sd * np.asarray(jax.random.normal(key, (num, size))), jnp.float32),
    )


# --- logistic regression -----------------------------------------------------------------------------------------------

SCALE = 1 / np.sqrt(0.21 * NUM_DATA)  # about the posterior sd of a coefficient


def logistic_posterior() -> erg.Posterior:
    """The regression of `step_time.py`, with coefficients in units of `SCALE`."""
    x, y = make_data()
    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum((SCALE * theta) ** 2),
        log_likelihood,
        (SCALE * x, y),
        initial=jnp.zeros(SIZE),
    )


def logistic() -> Problem:
    """Logistic regression with 100,000 rows and 50 coefficients; the reference is read from a file."""
    if not REFERENCE.exists():
        raise FileNotFoundError(
            f"{REFERENCE} is missing; make it by: python benchmarks/gradients_to_accuracy.py --reference"
        )
    stored = json.loads(REFERENCE.read_text())
    starts = jnp.asarray(stored["draws"], jnp.float32)
    return Problem(
        logistic_posterior(),
        log_likelihood,
        BATCH_SIZE,
        np.quantile(stored["curvatures"], (np.arange(8) + 0.5) / 8),
        jnp.asarray(stored["mode"], jnp.float32),
        np.array(stored["mean"]),
        np.array(stored["sd"]),
        np.array(stored["square_variance"]),
        lambda key, num: starts[jax.random.choice(key, len(starts), (num,), replace=False)],
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"gaussian": gaussian, "logistic": logistic}


def hmc_draws(
    key: jax.Array, posterior: erg.Posterior, num_chains: int, num_draws: int, num_warmup: int
) -> dict[str, Any]:
    """Sample with exact gradients and acceptance: HMC on coordinates in which the Laplace approximation is N(0, I).

    The log density is summed as differences to that at the mode, datum by datum: single precision then loses about 1e-5 of it.
    """
    import blackjax

    mode = erg.find_mode(jax.random.key(0), posterior, progress=False).position
    hessian = np.asarray(jax.jit(jax.hessian(posterior.log_density))(mode), float)
    spread = jnp.asarray(np.linalg.cholesky(np.linalg.inv(-hessian)), jnp.float32)
    at_mode = posterior.log_likelihood(mode, posterior.data)

    @jax.jit
    def run(key, at_mode, data):
        def log_density(white):
            theta = mode + spread @ white
            gain = jnp.sum(posterior.log_likelihood(theta, data) - at_mode)
            return gain + posterior.log_prior(theta) - posterior.log_prior(mode)

        kernel = blackjax.hmc.build_kernel()
        start = jax.random.normal(jax.random.fold_in(key, 0), (num_chains, mode.size))
        states = jax.vmap(blackjax.hmc.init, (0, None))(start, log_density)

        def step(states, key):
            key_step, key_size = jax.random.split(key)
            size = jax.random.uniform(key_size, minval=0.2, maxval=0.45)

            def move(key, state):
                return kernel(key, state, log_density, size, jnp.ones(mode.size), 5)

            states, info = jax.vmap(move)(jax.random.split(key_step, num_chains), states)
            return states, (states.position @ spread.T + mode, info.acceptance_rate)

        return jax.lax.scan(step, states, jax.random.split(jax.random.fold_in(key, 1), num_warmup + num_draws))[1]

    draws, acceptance = run(key, at_mode, posterior.data)
    return {
        "mode": np.asarray(mode, float),
        "curvatures": np.linalg.eigvalsh(-hessian),
        "draws": np.asarray(draws, float)[num_warmup:].swapaxes(0, 1),  # (chain, draw, D)
        "acceptance": float(np.mean(acceptance[num_warmup:])),
    }


def make_reference(
    num_chains: int = 16, num_draws: int = 700, num_warmup: int = 50, num_kept: int = 512
) -> dict[str, Any]:
    """Moments of the logistic regression from HMC, with their Monte Carlo standard errors, and some draws to start from."""
    import arviz as az

    found = hmc_draws(jax.random.key(11), logistic_posterior(), num_chains, num_draws, num_warmup)
    draws = found["draws"]
    mean, sd = draws.mean(axis=(0, 1)), draws.std(axis=(0, 1))
    squares = ((draws - mean) / sd) ** 2
    tree = az.from_dict({"posterior": {"z": (draws - mean) / sd, "square": squares}})
    error, rhat, size = (f(tree) for f in (az.mcse, az.rhat, az.ess))
    flat = draws.reshape(-1, draws.shape[-1])
    record = {
        "sampler": "blackjax.hmc, 5 leapfrog steps, full gradients, whitened by the Laplace approximation",
        "chains": num_chains,
        "draws_a_chain": num_draws,
        "acceptance": found["acceptance"],
        "rhat_max": float(max(rhat[name].max() for name in ("z", "square"))),
        "ess_min": float(min(size[name].min() for name in ("z", "square"))),
        "mcse_of_mean_in_sd": np.asarray(error["z"]).tolist(),
        "mcse_of_square_in_sd": (np.asarray(error["square"]) / squares.std(axis=(0, 1))).tolist(),
        "mean_shift_from_mode_in_sd": ((mean - found["mode"]) / sd).tolist(),
        "mode": found["mode"].tolist(),
        "mean": mean.tolist(),
        "sd": sd.tolist(),
        "square_variance": squares.var(axis=(0, 1)).tolist(),
        "curvatures": found["curvatures"].tolist(),
        "draws": np.round(flat[:: len(flat) // num_kept][:num_kept], 3).tolist(),
    }
    REFERENCE.write_text(json.dumps(record) + "\n")
    return record
