"""Rows of the estimators whose E-step is a Markov chain."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import ergodica as erg
from tests.contract.table import BATCH_SIZE, NUM_DATA, EstimatorRow, as_vector


def _prior(params, rows):
    """A normal latent of each datum, around a function of the parameters."""
    return dist.Normal(rows["x"][:, 0] * jnp.sum(as_vector(params)), jnp.array(4.0, jnp.result_type(float)))


def _likelihood(posterior, params, z, rows):
    return posterior.log_likelihood(params, rows) - 0.1 * (rows["y"] - z) ** 2


def _monte_carlo_em(posterior, batch_size=BATCH_SIZE):
    initial = jnp.zeros(NUM_DATA, jnp.result_type(float))
    likelihood = jax.tree_util.Partial(_likelihood, posterior)
    return erg.estimators.MonteCarloEM(_prior, likelihood, posterior.data, batch_size, initial=initial)


def _joint(posterior, params, z):
    """The density of the parameters, with a normal latent around their sum that changes no marginal."""
    return posterior.log_density(params) - 0.5 * (z - jnp.sum(as_vector(params))) ** 2


def _independent(log_density):
    """Draws exactly from a normal of variance 1: Langevin with step 1 at temperature 1/2."""
    target = erg.Posterior(log_density)
    return erg.samplers.SGLD(erg.estimators.Minibatch(target, scheme="full"), 1.0, temperature=0.5)


def _persistent_chains(posterior, num_chains=3):
    joint = jax.tree_util.Partial(_joint, posterior)
    initial = jnp.zeros((), jnp.result_type(float))
    return erg.estimators.PersistentChains(joint, _independent, initial, num_chains=num_chains)


EM = [
    EstimatorRow(
        "MonteCarloEM",
        _monte_carlo_em,
        "MonteCarloEM",
        unbiased=False,  # for the posterior's density: it has no latents and another prior
        streams=False,
        adapts_posterior=True,
        takes_posterior=False,
        bad_input=(lambda p: _monte_carlo_em(p, 1), ValueError, "batch_size must be at least 2"),
    ),
    EstimatorRow(
        "PersistentChains",
        _persistent_chains,
        "PersistentChains",
        streams=False,
        adapts_posterior=True,
        takes_posterior=False,
        bad_input=(lambda p: _persistent_chains(p, 0), ValueError, "num_chains must be at least 1; got 0"),
    ),
]
