"""What `bayesian_networks.py` runs: two problems, chains at a temperature, and what they are compared with."""

import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import xarray as xr

import ergodica as erg
from ergodica.core import tree
from ergodica.diagnostics import calibration, chain_disagreement, function_draws
from ergodica.models.equinox import fan_in_scale
from ergodica.models.zoo import auto_mpg, digits

CHAINS = 4


class Problem(NamedTuple):
    """A data set, a network for it, and the settings that all methods share."""

    name: str
    load: Callable[[], Any]
    num_train: int
    num_test: int
    batch_size: int
    make: Callable[[jax.Array], Any]
    likelihood: Callable
    step_size: float
    friction: float
    num_steps: int  # of each chain; half of them are warm-up
    num_draws: int  # stored, of each chain
    laplace: str  # arrays of which the Laplace approximation is made: those whose name begins so
    prior_factor: float | None  # prior standard deviation of weights times the root of their fan-in; None: it is 1


class Regressor(eqx.Module):
    """A network with one output, and the log of its noise."""

    net: eqx.nn.MLP
    log_sd: jax.Array


def regressor(key: jax.Array) -> Regressor:
    return Regressor(eqx.nn.MLP(8, "scalar", width_size=32, depth=1, activation=jnp.tanh, key=key), jnp.array(-1.0))


def mean_and_log_sd(model: Regressor, x: jax.Array) -> jax.Array:
    mean = jax.vmap(model.net)(x)
    return jnp.stack([mean, jnp.broadcast_to(model.log_sd, mean.shape)], axis=-1)


def normal(model: Regressor, x: jax.Array) -> dist.Distribution:
    return dist.Normal(jax.vmap(model.net)(x), jnp.exp(model.log_sd))


def classifier(key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(64, 10, width_size=32, depth=1, key=key)


def mnist_classifier(key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(784, 10, width_size=50, depth=1, key=key)


def logits(model: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    return jax.vmap(model)(x)


def log_probabilities(model: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits(model, x))


def categorical(model: eqx.nn.MLP, x: jax.Array) -> dist.Distribution:
    return dist.Categorical(logits=logits(model, x))


def mnist() -> Any:
    """Load MNIST from the folder that ERGODICA_DATA names."""
    table = np.load(pathlib.Path(os.environ["ERGODICA_DATA"]) / "mnist.npz")
    x = np.concatenate([table["x_train"], table["x_test"]]).reshape(-1, 784).astype(np.float32) / np.float32(255)
    return digits()._replace(x=x, y=np.concatenate([table["y_train"], table["y_test"]]).astype(np.int32))


PROBLEMS = {
    "auto_mpg": Problem("auto_mpg", auto_mpg, 313, 79, 64, regressor, normal, 0.005, 20.0, 6000, 100, "net", 1.0),
    "digits": Problem(
        "digits", digits, 1197, 600, 100, classifier, categorical, 0.01, 20.0, 6000, 100, "layers.1", 4.0
    ),
    "digits_unit": Problem(
        "digits_unit", digits, 1197, 600, 100, classifier, categorical, 0.01, 20.0, 6000, 100, "layers.1", None
    ),
    "mnist": Problem(
        "mnist", mnist, 10_000, 2000, 100, mnist_classifier, categorical, 0.002, 20.0, 4000, 25, "layers.1", 4.0
    ),
}


class Split(NamedTuple):
    """A posterior and what was held out."""

    posterior: erg.Posterior
    gradient: erg.estimators.Minibatch
    test: dict[str, jax.Array]


def split(problem: Problem, seed: int) -> Split:
    """Hold out rows by a random permutation; numbers are standardised by the training rows."""
    data = problem.load()
    order = np.random.default_rng(seed).permutation(len(data.y))
    train, held_out = np.split(order[: problem.num_train + problem.num_test], [problem.num_train])
    y = data.y
    if is_regression(problem):
        y = ((y - y[train].mean()) / y[train].std()).astype(np.float32)
    posterior = erg.models.from_equinox(
        problem.make(jax.random.key(0)),
        problem.likelihood,
        jnp.asarray(data.x[train]),
        jnp.asarray(y[train]),
        prior_scale=partial(prior_scale, problem.prior_factor),
        initial=problem.make,
    )
    gradient = erg.estimators.Minibatch(posterior, problem.batch_size)
    return Split(posterior, gradient, {"x": jnp.asarray(data.x[held_out]), "y": jnp.asarray(y[held_out])})


def prior_scale(factor: float | None, name: str, shape: tuple[int, ...]) -> float:
    return factor * fan_in_scale(name, shape) if factor is not None and len(shape) > 1 else 1.0


def is_regression(problem: Problem) -> bool:
    return problem.likelihood is normal


def output(problem: Problem) -> Callable:
    return mean_and_log_sd if is_regression(problem) else log_probabilities


# --- runs -------------------------------------------------------------------------------------------------------------


def run_chains(key: jax.Array, problem: Problem, s: Split, temperature: float) -> xr.DataTree:
    """Sample from the posterior to the power of one over the temperature."""
    sampler = erg.samplers.BAOAB(s.gradient, problem.step_size, problem.friction, temperature=temperature)
    return sample(key, problem, sampler)


def run_ensemble(key: jax.Array, problem: Problem, s: Split) -> xr.DataTree:
    """Climb from the same starts, by the same dynamics without noise and with a step that goes to zero."""
    schedule = erg.samplers.schedules.cyclical(problem.step_size, problem.num_steps + 1, exploration=0.0)
    sampler = erg.samplers.BAOAB(s.gradient, schedule.step_size, problem.friction, temperature=0.0)
    return sample(key, problem, sampler)


def run_swag(key: jax.Array, problem: Problem, s: Split) -> xr.DataTree:
    """Climb with a constant step, and keep the mean and the variances of the second half."""
    climber = erg.samplers.BAOAB(s.gradient, problem.step_size, problem.friction, temperature=0.0)
    return sample(key, problem, erg.samplers.Averaged(climber, start=problem.num_steps // 2))


def sample(key: jax.Array, problem: Problem, sampler: Any) -> xr.DataTree:
    half = problem.num_steps // 2
    return erg.sample(
        key,
        sampler,
        num_samples=problem.num_draws,
        num_warmup=half,
        num_chains=CHAINS,
        thin=half // problem.num_draws,
        progress=False,
    )


def swag_draws(key: jax.Array, dt: xr.DataTree, rank: int = 20) -> xr.DataTree:
    r"""Draw from the SWAG Gaussian of each chain, as many as are stored (Maddox et al. 2019, equation 1).

    .. math:: \theta = \bar\theta + \frac{\Sigma_\text{diag}^{1/2} z_1}{\sqrt2} + \frac{\hat D z_2}{\sqrt{2 (K - 1)}}

    with the deviations of the last K stored iterates from the mean in the columns of :math:`\hat D`.
    """
    mean, variance = dt["summary/mean"], dt["summary/variance"]
    chains, num_draws = dt.posterior.sizes["chain"], dt.posterior.sizes["draw"]
    key_low, key = jax.random.split(key)
    z2 = np.asarray(jax.random.normal(key_low, (chains, num_draws, rank)))  # shared by all arrays
    draws = dt.posterior.to_dataset().copy()
    for i, name in enumerate(dt.posterior.data_vars):
        centre, sd = mean[name].values[:, None], np.sqrt(variance[name].values[:, None])
        deviations = dt.posterior[name].values[:, -rank:] - centre
        z1 = np.asarray(jax.random.normal(jax.random.fold_in(key, i), (chains, num_draws, *centre.shape[2:])))
        low = np.einsum("cdk,ck...->cd...", z2, deviations) / np.sqrt(2 * (rank - 1))
        draws[name] = (draws[name].dims, (centre + sd * z1 / np.sqrt(2) + low).astype(np.float32))
    return xr.DataTree.from_dict({"posterior": draws})


# --- Laplace ------------------------------------------------------------------------------------------------------------


def laplace_predictions(key: jax.Array, problem: Problem, s: Split, dt: xr.DataTree) -> dict[str, Any]:
    """Predict by the linearised Laplace approximation at the last position of each chain, and mix the chains.

    The precision is that of generalised Gauss–Newton, of all arrays whose name begins with ``problem.laplace``, plus that of the
    prior as it is: nothing is tuned (Immer, Korzepa and Bauer 2021; mixed over modes, Eschenhagen et al. 2021).
    """
    found = []
    for chain, key_chain in enumerate(jax.random.split(key, CHAINS)):
        position = {name: jnp.asarray(v.values[chain, -1]) for name, v in dt.posterior.data_vars.items()}
        scales = {name: prior_scale(problem.prior_factor, name, w.shape) for name, w in position.items()}
        found.append(_laplace(problem.laplace, output(problem), s.posterior, s.test["x"], position, scales, key_chain))
    if is_regression(problem):
        means, sds = (np.stack([f[i] for f in found]) for i in (0, 1))
        return {"gaussians": (means, sds)}
    return {"probabilities": np.mean([np.asarray(f, float) for f in found], axis=0)}


@eqx.filter_jit
def _laplace(
    prefix: str, function: Callable, posterior: Any, x: jax.Array, position: dict, scales: dict, key: jax.Array
) -> Any:
    free = {name: w for name, w in position.items() if name.startswith(prefix)}
    flat, unravel = jax.flatten_util.ravel_pytree(free)
    network = posterior.source.network

    def outputs(v: jax.Array, rows: jax.Array) -> jax.Array:
        model = network({**position, **unravel(v)})
        return mean_and_log_sd(model, rows)[:, :1] if function is mean_and_log_sd else logits(model, rows)

    def jacobian(rows: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: jax.jacrev(outputs)(flat, row[None])[0], rows, batch_size=100)

    train = posterior.data["x"]
    prior = tree.ravel({name: jnp.full_like(w, scales[name] ** -2) for name, w in free.items()})
    f, J, J_test = outputs(flat, x), jacobian(train), jacobian(x)
    if function is mean_and_log_sd:
        variance = jnp.exp(2 * position["log_sd"])
        weighted = J / jnp.sqrt(variance)
    else:
        p = jax.nn.softmax(outputs(flat, train))
        root = jnp.sqrt(p)[:, :, None] * jnp.eye(p.shape[1])[None] - p[:, :, None] * jnp.sqrt(p)[:, None, :]
        weighted = jnp.einsum("nck,ncd->nkd", root, J)  # root root' = diag(p) - pp'
    rows = weighted.reshape(-1, flat.size)
    factor = jax.scipy.linalg.cho_factor(rows.T @ rows + jnp.diag(prior), lower=True)
    solved = jax.scipy.linalg.solve_triangular(factor[0], J_test.reshape(-1, flat.size).T, lower=True)
    solved = solved.T.reshape(*J_test.shape)
    if function is mean_and_log_sd:
        return f[:, 0], jnp.sqrt(variance + jnp.sum(solved[:, 0] ** 2, axis=-1))
    noise = jax.random.normal(key, (200, flat.size))
    samples = f[None] + jnp.einsum("sd,ncd->snc", noise, solved)
    return jax.nn.softmax(samples).mean(0)


# --- scores -------------------------------------------------------------------------------------------------------------


def predictions(problem: Problem, s: Split, dt: xr.DataTree) -> tuple[dict[str, Any], xr.DataArray]:
    """The predictive law in the form that `calibration` takes, and the function at each draw."""
    values = function_draws(dt, s.posterior, output(problem), s.test["x"])
    flat = values.values.reshape(-1, *values.shape[2:]).astype(float)
    if is_regression(problem):
        return {"gaussians": (flat[..., 0], np.exp(flat[..., 1]))}, values.isel(value_dim_0=0)
    return {"probabilities": np.exp(flat).mean(0)}, values


def scores(s: Split, law: dict[str, Any]) -> dict[str, list[float | None]]:
    """Score, its interval over test data, and its range under calibration."""
    table = calibration(observed=np.asarray(s.test["y"]), **law)
    columns = ("value", "low", "high", "calibrated_low", "calibrated_high")
    return {
        str(name): [None if np.isnan(x := table[c].sel(score=name).item()) else round(x, 5) for c in columns]
        for name in table["score"].values
    }


def disagreement(problem: Problem, values: xr.DataArray, dt: xr.DataTree) -> dict[str, float]:
    """How far chains differ in what they predict, and (meaninglessly) in their weights."""
    values = values.isel(row=slice(50))  # R-hat costs about a millisecond each
    found = chain_disagreement(values if is_regression(problem) else np.exp(values))
    shown = found if is_regression(problem) else chain_disagreement(values)
    flat = np.concatenate([v.values.reshape(*v.shape[:2], -1) for v in dt.posterior.data_vars.values()], axis=-1)
    some = flat[..., np.random.default_rng(0).permutation(flat.shape[-1])[:200]]
    weights = chain_disagreement(xr.DataArray(some, dims=("chain", "draw", "weight"))).rhat
    within, between = float(found.within.mean()), float(found.between.mean())
    return {
        "within": within,
        "between": between,
        "share": between / (between + within),
        "rhat_median": float(np.nanmedian(shown.rhat)),
        "rhat_max": float(np.nanmax(shown.rhat)),
        "weight_rhat_median": float(np.nanmedian(weights)),
    }
