"""How much Monte Carlo error control variates take away: mean squared error over independent runs, not residual variance.

Two posteriors, sampled by NUTS (BlackJAX's, step size and metric tuned once): a logistic regression with 10 coefficients and the
eight schools in non-centred form. A run is 4 chains of 1,000 draws. The truth is the control variate estimate from as many
*other* runs together. For each quantity and method: mean squared error of the plain mean over that of the estimate, with a
bootstrap interval over the runs, and what the estimate's own standard errors say.

    python benchmarks/stein_controls.py [--runs 50] [--output benchmarks/results]
"""

import argparse
import json
import pathlib

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from step_time import environment

import ergodica as erg
from ergodica.diagnostics import control_variate_expectation

CHAINS, DRAWS = 4, 1000
METHODS = ("linear", "quadratic")
SCHOOLS = (
    jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def logistic():
    """Ten coefficients, 200 data, standard normal prior."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 10))
    y = generator.random(200) < 1 / (1 + np.exp(-x @ generator.normal(size=10)))

    def log_likelihood(beta, rows):
        logit = rows["x"] @ beta
        return rows["y"] * logit - jax.nn.softplus(logit)

    data = {"x": jnp.asarray(x), "y": jnp.asarray(y, float)}
    posterior = erg.Posterior(lambda b: -0.5 * jnp.sum(b**2), log_likelihood, data, initial=jnp.zeros(10))
    return posterior, lambda x: {f"beta[{i}]": x[..., i] for i in range(10)}


def eight_schools():
    """Coordinates: mu, log tau, and eight standardised effects."""
    effects, errors = SCHOOLS

    def log_density(x):
        mu, log_tau, z = x[0], x[1], x[2:]
        theta = mu + jnp.exp(log_tau) * z
        prior = -0.5 * (mu / 5) ** 2 - jnp.log1p(jnp.exp(2 * log_tau) / 25) + log_tau - 0.5 * jnp.sum(z**2)
        return prior - 0.5 * jnp.sum(((effects - theta) / errors) ** 2)

    posterior = erg.Posterior(log_density, initial=jnp.concatenate([jnp.array([4.0, 1.0]), jnp.zeros(8)]))
    return posterior, lambda x: {
        "mu": x[..., 0],
        "log tau": x[..., 1],
        "tau": np.exp(x[..., 1]),
        "theta[0]": x[..., 0] + np.exp(x[..., 1]) * x[..., 2],
    }


def sample(key, posterior, num_chains):
    """Draws (chain, draw, D) of NUTS, and their scores."""
    key_tune, key_run = jax.random.split(key)
    log_density = jax.tree_util.Partial(type(posterior).log_density, posterior)
    tuning = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.9)
    (_, found), _ = tuning.run(key_tune, posterior.start(key_tune), num_steps=1000)
    sampler = erg.from_blackjax(blackjax.nuts(log_density, **found))
    dt = erg.sample(
        key_run, sampler, num_samples=DRAWS, num_warmup=200, num_chains=num_chains, posterior=posterior, progress=False
    )
    x = dt["posterior"]["position"].values
    return x, np.asarray(jax.jit(jax.vmap(jax.vmap(jax.grad(log_density))))(x))


def study(name, make, num_runs, key):
    posterior, quantities = make()
    x, scores = sample(key, posterior, 2 * num_runs * CHAINS)
    half = num_runs * CHAINS

    def estimate(chains, method):
        at = slice(*chains)
        dt = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": (("chain", "draw", "i"), x[at])})})
        values = {k: (("chain", "draw"), v) for k, v in quantities(x[at]).items()}
        return control_variate_expectation(dt, lambda _: xr.Dataset(values), scores=scores[at], method=method)

    truth = estimate((half, 2 * half), METHODS)
    rows, generator = [], np.random.default_rng(1)
    for method in METHODS:
        tables = [estimate((r * CHAINS, (r + 1) * CHAINS), method) for r in range(num_runs)]
        for quantity in truth.index:
            error = np.array([t.loc[quantity, "mean"] - truth.loc[quantity, "mean"] for t in tables]) ** 2
            plain = np.array([t.loc[quantity, "plain_mean"] - truth.loc[quantity, "mean"] for t in tables]) ** 2
            picks = generator.integers(num_runs, size=(2000, num_runs))
            ratios = plain[picks].mean(axis=1) / error[picks].mean(axis=1)
            rows.append(
                {
                    "problem": name,
                    "quantity": str(quantity),
                    "method": method,
                    "gain": float(plain.mean() / error.mean()),
                    "gain_lower": float(np.quantile(ratios, 0.05)),
                    "gain_upper": float(np.quantile(ratios, 0.95)),
                    "gain_said": float(np.median([t.loc[quantity, "variance_ratio"] for t in tables])),
                    "error_said_over_error": float(
                        np.sqrt(np.mean([t.loc[quantity, "mcse"] ** 2 for t in tables]) / error.mean())
                    ),
                    "truth": float(truth.loc[quantity, "mean"]),
                    "truth_error": float(truth.loc[quantity, "mcse"]),
                }
            )
            print(rows[-1])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = []
    for i, (name, make) in enumerate({"logistic, 10": logistic, "eight schools": eight_schools}.items()):
        rows += study(name, make, arguments.runs, jax.random.key(i))
    record = {
        "environment": environment(),
        "runs": arguments.runs,
        "chains": CHAINS,
        "draws": DRAWS,
        "rows": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "stein_controls.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
