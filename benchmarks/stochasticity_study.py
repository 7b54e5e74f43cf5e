"""What minibatches do to the order of Langevin integrators: error of the sampled law against the step size.

The question is that of Franzese, Milios, Filippone and Michiardi (2022), "Revisiting the effects of stochasticity for
Hamiltonian samplers", asked of the kernels of `ergodica.samplers`, with full gradients, independent batches, reshuffled
blocks and symmetric sweeps.

- Gaussian target: no random number is drawn. Fed with one batch, a shipped kernel is an affine map with Gaussian noise,
  so the first two moments move linearly; averaged over the batch orders, their fixed point is the stationary law.
- Logistic regression in two dimensions: simulation of many chains, against quadrature on a grid.
- Bayesian neural network with 25 weights: predictive negative log likelihood. No exact reference exists.

    python benchmarks/stochasticity_study.py [--output benchmarks/results] [--quick]

`--quick` computes the Gaussian part alone, in seconds.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from stochasticity_exact import (
    INTEGRATORS,
    ORDERS,
    STEPS,
    gaussian_errors,
    halving_table,
    integrators_of,
    moment_operators,
    path_of,
    slope_table,
    stationary_covariance,
)
from stochasticity_figures import draw_bnn, draw_gaussian, draw_logistic

import ergodica as erg
from ergodica.estimators import Minibatch
from ergodica.samplers import BAOAB

# --- simulation -------------------------------------------------------------------------------------------------------


@eqx.filter_jit
def run_chains(kernels: Any, statistic: Callable, key: jax.Array, starts: Any, num_warmup: Any, num_steps: Any):
    """Time averages of a statistic for each chain of each kernel (given as a tuple), all driven by the same noise."""
    num_chains = jax.tree.leaves(starts)[0].shape[0]
    key_init, key_run = jax.random.split(key)
    keys = jax.random.split(key_init, num_chains)
    states = tuple(jax.vmap(kernel.init)(keys, starts) for kernel in kernels)

    def step(i, carry):
        states, total = carry
        keys = jax.random.split(jax.random.fold_in(key_run, i), num_chains)
        states = tuple(jax.vmap(kernel.step)(keys, state)[0] for kernel, state in zip(kernels, states, strict=True))
        values = jnp.stack([jax.vmap(statistic)(state.position) for state in states])
        return states, total + jnp.where(i < num_warmup, 0.0, values)

    total = jnp.zeros((len(kernels), *jax.eval_shape(jax.vmap(statistic), starts).shape))
    return jax.lax.fori_loop(0, num_warmup + num_steps, step, (states, total))[1] / num_steps


# --- logistic regression ----------------------------------------------------------------------------------------------

LOGISTIC_ROWS, LOGISTIC_BATCH, LOGISTIC_FRICTION = 64, 8, 6.0
LOGISTIC_STEPS = (0.32, 0.16, 0.08, 0.04)
SGLD_STEPS = (0.08, 0.04, 0.02, 0.01)
LOGISTIC_CHAINS, LOGISTIC_TIME, LOGISTIC_WARMUP_TIME = 1024, 100.0, 8.0


def logistic_posterior() -> erg.Posterior:
    """Make a regression with two coefficients and 64 rows, prior N(0, 4)."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(LOGISTIC_ROWS, 2))
    y = generator.uniform(size=LOGISTIC_ROWS) < 1 / (1 + np.exp(-x @ [1.0, -0.5]))

    def log_likelihood(theta, rows):
        x, y = rows
        logits = x @ theta
        return y * logits - jax.nn.softplus(logits)

    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return erg.Posterior(lambda theta: -jnp.sum(theta**2) / 8, log_likelihood, data, initial=jnp.zeros(2))


class Quadrature(NamedTuple):
    """Moments on a grid, and the grid with its probabilities."""

    mean: np.ndarray
    covariance: np.ndarray
    points: np.ndarray
    probabilities: np.ndarray


def quadrature(posterior: erg.Posterior, half_width: float = 6.0, size: int = 601) -> Quadrature:
    """Sum over a square grid: for a smooth density that has died out at the edges, exact to rounding."""
    axis = np.linspace(-half_width, half_width, size)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    with jax.enable_x64(True):
        log_density = np.asarray(jax.lax.map(posterior.log_density, jnp.asarray(points), batch_size=10_000))
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = weights @ points
    return Quadrature(mean, (points - mean).T @ ((points - mean) * weights[:, None]), points, weights)


def logistic_errors(key: jax.Array) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Relative error of the variance, signed, and its standard error, for each batch order, integrator and step.

    The variance is the mean over whitened coordinates of the second moment about the true mean. Every chain has a twin that
    is driven by the same noise towards the Gaussian of the same mean and covariance, with exact gradients. What the twin
    samples is known exactly, so only the difference between the two is estimated. Steps at which the twin is unstable are
    left out.
    """
    posterior = logistic_posterior()
    truth = quadrature(posterior)
    precision = np.linalg.inv(truth.covariance)

    def quadratic(theta, mean, precision):
        return (theta - mean) @ precision @ (theta - mean)

    def twin_of(dtype):
        mean, P = jnp.asarray(truth.mean, dtype), jnp.asarray(precision, dtype)
        twin = erg.Posterior(lambda theta: -0.5 * quadratic(theta, mean, P), initial=jnp.zeros(2, dtype))
        return Minibatch(twin, scheme="full"), lambda theta: quadratic(theta, mean, P) / 2 - 1

    twin, statistic = twin_of(jnp.float32)
    chosen = np.random.default_rng(1).choice(len(truth.points), LOGISTIC_CHAINS, p=truth.probabilities)
    starts = jnp.asarray(truth.points[chosen], jnp.float32)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for order in ORDERS:
        gradient = Minibatch(posterior, None if order == "full" else LOGISTIC_BATCH, order)
        found[order] = {}
        for name, make in integrators_of(order).items():
            steps = SGLD_STEPS if name == "SGLD" else LOGISTIC_STEPS
            exact = twin_errors(make, twin_of, precision, steps)
            found[order][name] = []
            for h, of_twin in zip(steps, exact, strict=True):
                key, key_run = jax.random.split(key)
                if np.isnan(of_twin):  # unstable
                    continue
                kernels = tuple(make(g, h, LOGISTIC_FRICTION) for g in (gradient, twin))
                counts = (jnp.asarray(round(time / h)) for time in time_of(name))
                mine, twins = np.asarray(run_chains(kernels, statistic, key_run, starts, *counts), np.float64)
                difference = mine - twins
                error = float(difference.mean() + of_twin)
                se = float(difference.std(ddof=1) / np.sqrt(LOGISTIC_CHAINS))
                found[order][name].append({"step": h, "error": error, "se": se})
    return found


def time_of(name: str) -> tuple[float, float]:
    """Warm-up and length of a run: as many steps for SGLD, whose steps are shorter."""
    scale = SGLD_STEPS[0] / LOGISTIC_STEPS[0] if name == "SGLD" else 1.0
    return scale * LOGISTIC_WARMUP_TIME, scale * LOGISTIC_TIME


def twin_errors(make: Callable, twin_of: Callable, precision: np.ndarray, steps: tuple[float, ...]) -> np.ndarray:
    """What the statistic of the twin is on average, exactly."""
    with jax.enable_x64(True):
        gradient, _ = twin_of(jnp.float64)
        operators = moment_operators(lambda h: make(gradient, h, LOGISTIC_FRICTION), None, steps)
        return np.trace(precision @ stationary_covariance(path_of("full", operators)), axis1=1, axis2=2) / 2 - 1


def measured_slope(points: list[dict[str, float]]) -> tuple[float, float] | None:
    """Fit the order, and its standard error, to those of the three smallest steps whose errors exceed three standard errors.

    ``None`` if fewer than two do.
    """
    kept = [p for p in points[-3:] if abs(p["error"]) > 3 * p["se"]]
    if len(kept) < 2:
        return None
    x, y = (np.log([abs(p[name]) for p in kept]) for name in ("step", "error"))
    weight = np.array([abs(p["error"]) / p["se"] for p in kept])
    fit, covariance = np.polyfit(x, y, 1, w=weight, cov="unscaled")
    return float(fit[0]), float(np.sqrt(covariance[0, 0]))


# --- Bayesian neural network ------------------------------------------------------------------------------------------

BNN_WIDTH, BNN_ROWS, BNN_BATCH, BNN_FRICTION = 8, 64, 8, 5.0
BNN_STEPS = (0.02, 0.01, 0.005, 0.0025)
BNN_CHAINS, BNN_TIME, BNN_WARMUP_TIME, BNN_START_TIME, BNN_GROUPS = 128, 20.0, 10.0, 30.0, 16
BNN_INTEGRATORS = (
    "OBABO",
    "UBU",
    "BAOAB",
)  # the curvature reaches 2e4: steps at which SGLD is stable are too short to mix
BNN_NOISE = 0.3


def network(theta: jax.Array, x: jax.Array) -> jax.Array:
    """One hidden layer of tanh units on one input."""
    slope, offset, out = theta[: 3 * BNN_WIDTH].reshape(3, BNN_WIDTH)
    return jnp.tanh(x[..., None] * 2 * slope + 2 * offset) @ out + theta[-1]


def bnn_problem() -> tuple[erg.Posterior, Callable]:
    """Make a regression with known noise under a N(0, 1) prior on the weights, and the densities of 64 held-out outputs."""
    generator = np.random.default_rng(2)
    x = generator.uniform(-2, 2, size=2 * BNN_ROWS)
    y = np.sin(2 * x) + BNN_NOISE * generator.normal(size=x.size)
    train, test = (
        tuple(jnp.asarray(v[part], jnp.float32) for v in (x, y)) for part in (slice(BNN_ROWS), slice(BNN_ROWS, None))
    )

    def log_likelihood(theta, rows):
        x, y = rows
        return -0.5 * ((y - network(theta, x)) / BNN_NOISE) ** 2 - np.log(BNN_NOISE * np.sqrt(2 * np.pi))

    size = 3 * BNN_WIDTH + 1
    posterior = erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, train, initial=jnp.zeros(size))
    return posterior, lambda theta: jnp.exp(log_likelihood(theta, test))


def bnn_nll(key: jax.Array) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Predictive negative log likelihood a held-out datum (nats), its standard error over groups of chains, for each step."""
    posterior, densities = bnn_problem()
    key, key_start, key_warm, key_noise = jax.random.split(key, 4)
    careful = BAOAB(Minibatch(posterior, scheme="full"), BNN_STEPS[-1], BNN_FRICTION)
    starts = 0.5 * jax.random.normal(key_noise, (BNN_CHAINS, 3 * BNN_WIDTH + 1))
    starts = last_positions(careful, key_warm, starts, jnp.asarray(round(BNN_START_TIME / BNN_STEPS[-1])))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for order in ("full", "uniform", "blocks"):
        gradient = Minibatch(posterior, None if order == "full" else BNN_BATCH, order)
        found[order] = {}
        for name in BNN_INTEGRATORS:
            found[order][name] = []
            for h in BNN_STEPS:
                # one key for all: the same noise, so that differences are less noisy than the values
                kernel = INTEGRATORS[name](gradient, h, BNN_FRICTION)
                counts = (jnp.asarray(round(time / h)) for time in (BNN_WARMUP_TIME, BNN_TIME))
                means = np.asarray(run_chains((kernel,), densities, key_start, starts, *counts)[0], np.float64)
                groups = means.reshape(BNN_GROUPS, -1, means.shape[-1])
                left_out = [-np.log(np.delete(groups, i, axis=0).mean(axis=(0, 1))).mean() for i in range(BNN_GROUPS)]
                se = float(np.sqrt((BNN_GROUPS - 1) * np.var(left_out)))
                found[order][name].append({"step": h, "nll": float(-np.log(means.mean(axis=0)).mean()), "se": se})
    return found


@eqx.filter_jit
def last_positions(kernel: Any, key: jax.Array, starts: jax.Array, num_steps: Any) -> jax.Array:
    """Where the chains are after a number of steps."""
    key_init, key_run = jax.random.split(key)
    states = jax.vmap(kernel.init)(jax.random.split(key_init, len(starts)), starts)

    def step(i, states):
        return jax.vmap(kernel.step)(jax.random.split(jax.random.fold_in(key_run, i), len(starts)), states)[0]

    return jax.lax.fori_loop(0, num_steps, step, states).position


# --- results -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts, print the slopes, write results and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the Gaussian part alone")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("ergodica", "jax", "numpy")},
        "seconds": {},
    }
    parts = {"gaussian": (gaussian_errors, draw_gaussian)}
    if not arguments.quick:
        parts["logistic"] = (lambda: logistic_errors(jax.random.key(1)), draw_logistic)
        parts["bnn"] = (lambda: bnn_nll(jax.random.key(2)), draw_bnn)
    for name, (compute, draw) in parts.items():
        start = time.perf_counter()
        results[name] = compute()
        results["seconds"][name] = round(time.perf_counter() - start, 1)
        draw(results[name]).savefig(arguments.output / f"stochasticity_{name}.png", dpi=110)
        print(name, results["seconds"][name], "s", flush=True)
        if not arguments.quick:
            (arguments.output / "stochasticity_study.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    results["gaussian_steps"], results["gaussian_slopes"] = STEPS, slope_table(results["gaussian"])
    results["gaussian_halving_slopes"] = halving_table(results["gaussian"])
    if not arguments.quick:
        results["logistic_slopes"] = {
            order: {name: measured_slope(points) for name, points in by_name.items()}
            for order, by_name in results["logistic"].items()
        }
        (arguments.output / "stochasticity_study.json").write_text(
            json.dumps(results, indent=1, allow_nan=False) + "\n"
        )
    print(json.dumps({name: results[name] for name in results if name.endswith("slopes")}, indent=1))


if __name__ == "__main__":
    main()
