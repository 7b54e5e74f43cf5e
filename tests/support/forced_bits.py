"""Estimators at bits without luck: every outcome of all particles, weighted by its probability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ergodica.estimators import expectation_gradient
from ergodica.estimators.variational.facts import Draw
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.relaxation import log_probabilities
from tests.support.exact_programs import Case


class Forced(AbstractSiteEstimator):
    """An estimator that draws from the law itself, with given draws in their place."""

    inner: Any
    bits: jax.Array
    params: Any = None

    def noise(self, key, site, num_particles):
        return self.bits

    def draw(self, key, fn, branch, site, noise):
        value = noise.astype(jnp.result_type(float))
        return Draw(value, (log_probabilities(self, fn, site), jnp.stack([1 - value, value], axis=-1)))

    def log_prob(self, fn, value, intermediates=None):
        return self.inner.log_prob(fn, value, intermediates)

    def surrogate(self, site, downstream):
        return self.inner.surrogate(site, downstream._replace(params=self.params))


def outcomes(logits, num_particles):
    """Every outcome (N, K, D) of K draws of D independent bits, and its probability (N,)."""
    logits = np.atleast_1d(logits)
    count = num_particles * len(logits)
    bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    bits = bits.reshape(-1, num_particles, len(logits))
    p = 1 / (1 + np.exp(-logits))
    return bits, np.prod(np.where(bits, p, 1 - p), axis=(1, 2))


def every_estimate(estimator, logits, f, num_particles, params=None):
    """Estimates (N, D) of the gradient of E f by the logits (D,), at every outcome, and their probabilities (N,)."""
    logits = jnp.asarray(logits)
    bits, weights = outcomes(logits, num_particles)

    def one(bits):
        law = lambda t: dist.Bernoulli(logits=t)  # noqa: E731
        return expectation_gradient(
            jax.random.key(0), logits, law, f, Forced(estimator, bits, params), num_particles
        ).gradient

    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(bits))), weights


def enumerated(estimator, logits, f, num_particles, params=None):
    """Mean (D,) and variance (D,) of the estimate of the gradient of E f by the logits (D,), by enumeration."""
    found, weights = every_estimate(estimator, logits, f, num_particles, params)
    mean = weights @ found
    return mean, weights @ (found - mean) ** 2


def exact_gradient_of(logits, f):
    """Gradient (D,) of E f by the logits, by enumeration."""
    bits, _ = outcomes(np.asarray(logits), 1)
    bits = jnp.asarray(bits[:, 0], jnp.result_type(float))

    def mean(logits):
        return jax.nn.softmax(bits @ logits) @ jax.vmap(f)(bits)

    return np.asarray(jax.grad(mean)(jnp.asarray(logits)))


def bits_program(f, logits):
    """A program whose evidence lower bound is E f of bits with the parameter ``logits``."""

    def guide():
        logit = numpyro.param("logits", jnp.asarray(logits))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("x", dist.Bernoulli(logits=logit))

    def model():
        with numpyro.handlers.mask(mask=False):
            x = numpyro.sample("x", dist.Bernoulli(logits=jnp.asarray(logits)))
        numpyro.factor("f", f(x))

    return Case("bits", model, guide, (), {"logits": jnp.asarray(logits)})


LOGITS = np.array([-0.8, 0.5, 0.2])


def joint_cost(x):
    """A cost of three bits that is neither linear nor quadratic, and no sum over them."""
    return jnp.exp(0.7 * x[0] - 0.4 * x[1]) + 0.5 * x[0] * x[1] * x[2] + jnp.cos(x[2] + x[0]) + 1.0
