"""Small posteriors on which the exact answers are known."""

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg


def linear_regression(num_data=12, num_parameters=3, noise=0.7):
    """Bayesian linear regression with unit Gaussian prior."""
    key_x, key_theta, key_y = jax.random.split(jax.random.key(11), 3)
    x = jax.random.normal(key_x, (num_data, num_parameters))
    y = x @ jax.random.normal(key_theta, (num_parameters,)) + noise * jax.random.normal(key_y, (num_data,))

    def log_likelihood(theta, rows):
        return -0.5 * ((rows["y"] - rows["x"] @ theta) / noise) ** 2

    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, {"x": x, "y": y}, initial=jnp.zeros(num_parameters)
    )


def gaussian_mean(num_data=200, data_variance=2.0, prior_variance=25.0):
    """Data N(theta, v0), prior N(0, tau2): the minibatch noise does not depend on theta."""
    x = 0.5 + np.sqrt(data_variance) * jax.random.normal(jax.random.key(12), (num_data,))
    return erg.Posterior(
        lambda theta: -0.5 * theta**2 / prior_variance,
        lambda theta, rows: -0.5 * (rows - theta) ** 2 / data_variance,
        x,
        initial=jnp.array(0.0),
    )


def logistic_regression(num_data=30, num_parameters=3):
    """Logistic regression with unit Gaussian prior; the curvature depends on the position."""
    key_x, key_theta, key_y = jax.random.split(jax.random.key(13), 3)
    x = jax.random.normal(key_x, (num_data, num_parameters))
    probability = jax.nn.sigmoid(x @ jax.random.normal(key_theta, (num_parameters,)))
    y = (jax.random.uniform(key_y, (num_data,)) < probability).astype(x.dtype)

    def log_likelihood(theta, rows):
        x, y = rows
        logits = x @ theta
        return y * logits - jax.nn.softplus(logits)

    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2), log_likelihood, (x, y), initial=jnp.zeros(num_parameters)
    )
