"""What server and sites have in common: the model, the kernel and the visits. No data."""

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg
from ergodica.integrations.flower import Study

NAMES = ("north", "south", "west")


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def log_likelihood(theta, rows):
    logits = rows["X"] @ theta
    return rows["y"] * logits - jax.nn.softplus(logits)


def make(rows):
    return erg.Posterior(log_prior, log_likelihood, rows, initial=jnp.zeros(3))


def study(context):
    return Study(
        make,
        example={"X": np.zeros((2, 3), np.float32), "y": np.zeros(2, np.float32)},
        kernel=lambda gradient: erg.samplers.SGLD(gradient, 2e-5),
        names=NAMES,
        num_visits=context.run_config["visits"],
        num_warmup=2,
        num_chains=4,
        local_steps=20_000,
        stride=200,
        batch_size=50,
        slack=2.0,  # the likelihoods are not quite Gaussian
    )
