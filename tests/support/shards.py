"""Sharded posteriors on which everything is known."""

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg

SIZES = (50, 200, 400)
MEANS = (-2.0, 0.5, 1.0)
VARIANCES = (0.5, 1.0, 2.0)
PRIOR_PRECISION = 0.1


def gaussian_mean_shards(sizes=SIZES, means=MEANS, variances=VARIANCES, prior_precision=PRIOR_PRECISION):
    """Data N(theta, 1) whose shards have exactly the given means and population variances; sizes must be even."""
    rows = [
        mean + np.sqrt(variance) * np.resize([-1.0, 1.0], size)
        for size, mean, variance in zip(sizes, means, variances, strict=True)
    ]
    posterior = erg.Posterior(
        lambda theta: -0.5 * prior_precision * theta**2,
        lambda theta, rows: -0.5 * (rows - theta) ** 2,
        jnp.asarray(np.concatenate(rows)),
        initial=jnp.asarray(0.0, jnp.result_type(float)),
    )
    return erg.Shards(posterior, np.repeat(np.arange(len(sizes)), sizes))


def exact_surrogates(shards, *, precision_factor=1.0, mean_shift=0.0):
    """Those of `gaussian_mean_shards`, or wrong ones."""
    means = jnp.stack([jnp.sum(batch.weight * batch.data) for batch in map(shards.whole, range(shards.num_clients))])
    sizes = shards.sizes.astype(means.dtype)
    return erg.estimators.GaussianSurrogates(means + mean_shift, precision_factor * sizes)


def regression_shards(sizes=(5, 9, 4), num_parameters=3, noise=0.7, seed=21, mixing=None):
    """Linear regression with correlated covariates, a prior that is not centred, and clients that disagree."""
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    client = np.repeat(np.arange(len(sizes)), sizes)
    normals = rng.normal(size=(count, num_parameters))
    x = (
        normals @ (rng.normal(size=(num_parameters, num_parameters)) if mixing is None else mixing)
        + client[:, None] / 2
    )
    y = x @ rng.normal(size=num_parameters) + client + noise * rng.normal(size=count)

    def log_likelihood(theta, rows):
        return -0.5 * ((rows["y"] - rows["x"] @ theta) / noise) ** 2

    posterior = erg.Posterior(
        lambda theta: -0.5 * jnp.sum((theta - 0.5) ** 2 * jnp.arange(1.0, num_parameters + 1)),
        log_likelihood,
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        initial=jnp.zeros(num_parameters),
    )
    return erg.Shards(posterior, client)


def client_log_likelihood(shards, theta, client):
    """Sum over a client's rows, cut out here and not by `Shards.whole`."""
    begin, size = int(shards.offsets[client]), int(shards.sizes[client])
    rows = jax.tree.map(lambda x: x[begin : begin + size], shards.rows)
    return jnp.sum(shards.posterior.log_likelihood(theta, rows))


def closed_form(precision, pull, noise, step_size, visit_probabilities, local_steps):
    """Mean and variance where visits end, and over all steps, of one coordinate: scalar formulas, step by step.

    Of theta' = theta + h (pull - precision theta + zeta) + sqrt(2h) xi with Var zeta = noise, at each client.
    """
    p, tau = np.asarray(visit_probabilities), np.broadcast_to(local_steps, np.shape(visit_probabilities))
    a, b, w = 1 - step_size * precision, step_size * pull, 2 * step_size + step_size**2 * noise

    def after(j, first, second):
        A = a**j
        B, W = b * (1 - A) / (1 - a), w * (1 - A**2) / (1 - a**2)
        return B + A * first, W + B**2 + 2 * A * B * first + A**2 * second

    A = a**tau
    B, W = b * (1 - A) / (1 - a), w * (1 - A**2) / (1 - a**2)
    first = np.sum(p * B) / (1 - np.sum(p * A))
    second = np.sum(p * (W + B**2 + 2 * A * B * first)) / (1 - np.sum(p * A**2))
    steps = np.array([(j <= tau) * p for j in range(1, tau.max() + 1)]) / np.sum(p * tau)
    means, seconds = np.array([after(j, first, second) for j in range(1, tau.max() + 1)]).transpose(1, 0, 2)
    mean = np.sum(steps * means)
    return (first, second - first**2), (mean, np.sum(steps * seconds) - mean**2)
