"""Reference moments and evidence of the posterior `visit_regression`, which the package ships as ``ergodica/models/zoo/data/``.

Importance sampling from a multivariate t law with 12 degrees of freedom around the mode, in antithetic pairs, in double
precision. With r pairs of weights and values the estimate is a ratio of sums over pairs; its standard error is the delta
method's, over pairs. The effective sample size says how close the t law is.

    python benchmarks/visit_regression_reference.py [--pairs 20000]
"""

import argparse
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from ergodica.models.zoo.visits import VisitRegression, visit_regression

jax.config.update("jax_enable_x64", True)

OUTPUT = pathlib.Path(__file__).parent.parent / "ergodica" / "models" / "zoo" / "data" / "visit_regression.json"
DEGREES = 12.0
CHUNK = 250
FACTOR = {1: 1, 100: 25}  # more pairs where a pass over the rows is cheap


def mode_of(target: VisitRegression) -> tuple[np.ndarray, np.ndarray]:
    """Mode, by Newton's method, and the covariance there."""
    x = jnp.zeros(target.dim)
    gradient, hessian = jax.jit(jax.grad(target.log_density)), jax.jit(jax.hessian(target.log_density))
    for _ in range(50):
        x = x - jnp.linalg.solve(hessian(x), gradient(x))
    assert float(jnp.max(jnp.abs(gradient(x)))) < 1e-8
    return np.asarray(x), np.linalg.inv(-np.asarray(hessian(x)))


def study(every: int, num_pairs: int) -> dict:
    target = visit_regression(every)
    mode, covariance = mode_of(target)
    factor = np.linalg.cholesky(covariance)
    generator = np.random.default_rng(every)
    normals = generator.normal(size=(num_pairs, target.dim))
    shrink = np.sqrt(DEGREES / generator.chisquare(DEGREES, size=num_pairs))
    steps = (normals * shrink[:, None]) @ factor.T
    square = np.sum(normals**2, axis=1) * shrink**2
    log_q = (
        gammaln((DEGREES + target.dim) / 2)
        - gammaln(DEGREES / 2)
        - 0.5 * target.dim * math.log(DEGREES * math.pi)
        - np.log(np.diagonal(factor)).sum()
        - 0.5 * (DEGREES + target.dim) * np.log1p(square / DEGREES)
    )
    density = jax.jit(lambda points: jax.lax.map(jax.vmap(target.log_density), points))
    points = np.stack([mode + steps, mode - steps])
    log_p = np.asarray(density(jnp.asarray(points.reshape(-1, CHUNK, target.dim)))).reshape(2, num_pairs)
    log_weights = log_p - log_q
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    total = weights.sum(axis=0)
    names = list(target.observables(jnp.zeros(target.dim)))
    values = np.concatenate([points, points**2], axis=-1)
    found = {}
    for i, name in enumerate(names):
        sums = np.sum(weights * values[..., i], axis=0)
        mean = sums.sum() / total.sum()
        found[name] = [float(mean), float(np.std((sums - mean * total) / total.mean()) / math.sqrt(num_pairs))]
    error = np.std(total) / total.mean() / math.sqrt(num_pairs)
    found["log_normaliser"] = [float(top + math.log(weights.mean())), float(error)]
    return {
        "every": every,
        "values": found,
        "pairs": num_pairs,
        "ess_share": float(weights.sum() ** 2 / np.sum(weights**2) / weights.size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20000)
    arguments = parser.parse_args()
    entries = []
    for every in (100, 1):
        begin = time.perf_counter()
        entries.append(
            study(every, arguments.pairs * FACTOR[every]) | {"seconds": round(time.perf_counter() - begin, 1)}
        )
        print(json.dumps(entries[-1]), flush=True)
    OUTPUT.write_text(
        json.dumps({"script": "benchmarks/visit_regression_reference.py", "entries": entries}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
