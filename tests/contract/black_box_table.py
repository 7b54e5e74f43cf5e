"""Rows of the estimators that see evaluations, derivatives along directions, or rewards."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import ergodica as erg
from ergodica.core.types import PyTree
from tests.contract.table import EstimatorRow, as_vector, minibatch_of


def _one_step(posterior: erg.Posterior, params: PyTree, inner: PyTree, index: Any) -> tuple:
    """A computation whose every step adds half the log density; the inner state is in nobody's way."""
    return 0.5 * inner, posterior.log_density(params) / 2


def _unrolled(name, **options):
    def make(p):
        settings = {"num_steps": 4, "window": 2, "sigma": 1.5, "num_pairs": 16} | options
        step = jax.tree_util.Partial(_one_step, p)
        return getattr(erg.estimators, name)(step, jnp.ones(2, jnp.result_type(float)), **settings)

    return make


BLACK_BOX = [
    EstimatorRow(
        "ForwardGradient",
        lambda p: erg.estimators.ForwardGradient(minibatch_of("uniform")(p), 8),
        "ForwardGradient",
        random_directions=True,
        bad_input=(
            lambda p: erg.estimators.ForwardGradient(p, directions="normal"),
            ValueError,
            "directions must be one of 'gaussian', 'signs'; got 'normal'",
        ),
    ),
    EstimatorRow(
        "SPSA",
        lambda p: erg.estimators.SPSA(p, 1.5, 8),
        "SPSA",
        unbiased=False,
        random_directions=True,
        bad_input=(lambda p: erg.estimators.SPSA(p, 0.0), ValueError, "radius must be finite and above 0; got 0.0"),
    ),
    EstimatorRow(
        "EvolutionStrategy",
        lambda p: erg.estimators.EvolutionStrategy(p, 1.5, 16),
        "EvolutionStrategy",
        unbiased=False,
        random_directions=True,
        bad_input=(
            lambda p: erg.estimators.EvolutionStrategy(p, 0.6, 0),
            ValueError,
            "num_pairs must be at least 1; got 0",
        ),
    ),
    EstimatorRow(
        "LowRankEvolution",
        lambda p: erg.estimators.LowRankEvolution(minibatch_of("blocks")(p), 1.5, 16),
        "LowRankEvolution",
        unbiased=False,
        random_directions=True,
        bad_input=(
            lambda p: erg.estimators.LowRankEvolution(p, 0.6, rank=0),
            ValueError,
            "rank must be at least 1; got 0",
        ),
    ),
    *(
        EstimatorRow(
            name,
            _unrolled(name),
            name,
            unbiased=False,
            streams=False,
            adapts_posterior=True,
            random_directions=True,
            probes=False,
            takes_posterior=False,
            bad_input=(_unrolled(name, window=3), ValueError, "num_steps must be a multiple of window, 3; got 4"),
        )
        for name in ("PersistentEvolution", "EvolutionSingle")
    ),
]


def _controlled(controls="linear", *options, **settings):
    plain = {"num_directions": 32, **settings}
    return lambda p: erg.estimators.SteinControl(
        erg.estimators.ForwardGradient(minibatch_of("uniform")(p), **plain), controls, *options
    )


def _log_density(posterior, params):
    return posterior.log_density(params)


def _itself(x):
    return x


def _controlled_evolution(posterior):
    plain = erg.estimators.EvolutionStrategy(jax.tree_util.Partial(_log_density, posterior), 1.5, 16)
    return erg.estimators.SteinControl(plain, _itself, "moving-average", "all", ridge=0.1)


BLACK_BOX += [
    EstimatorRow(
        "SteinControl",
        _controlled("quadratic"),
        "SteinControl-leave-one-out",
        random_directions=True,
        bad_input=(_controlled("cubic"), ValueError, "controls must be one of 'linear', 'quadratic', 'linearised'"),
    ),
    EstimatorRow(
        "SteinControl",
        _controlled("quadratic", "split", "block"),
        "SteinControl-split",
        random_directions=True,
        bad_input=(
            lambda p: erg.estimators.SteinControl(minibatch_of("uniform")(p)),
            TypeError,
            "gradient must hand over its draws and their noise; Minibatch does not",
        ),
    ),
    EstimatorRow(
        "SteinControl",
        _controlled_evolution,
        "SteinControl-moving-average",
        unbiased=False,
        streams=False,
        adapts_posterior=True,
        takes_posterior=False,
        random_directions=True,
        bad_input=(
            lambda p: erg.estimators.SteinControl(p),
            TypeError,
            "gradient must be an AbstractGradientEstimator",
        ),
    ),
]


class NormalPolicy(eqx.Module):
    """A normal around the parameters, as one vector, with standard deviation 2: far from the density at its mean."""

    mean: jax.Array

    def sample(self, key, sample_shape):
        return self.mean[None] + 2 * jax.random.normal(key, (*sample_shape, *self.mean.shape), self.mean.dtype)

    def log_prob(self, value):
        return -jnp.sum((value - self.mean[None]) ** 2, axis=-1) / 8


def _around(params):
    return NormalPolicy(as_vector(params))


def _log_densities(posterior, samples):
    return jax.vmap(posterior.log_density)(samples)


def _policy_gradient(posterior, num_samples=64):
    reward = jax.tree_util.Partial(_log_densities, posterior)
    return erg.estimators.PolicyGradient(_around, reward, num_samples)


BLACK_BOX += [
    EstimatorRow(
        "PolicyGradient",
        _policy_gradient,
        "PolicyGradient",
        unbiased=False,
        streams=False,
        adapts_posterior=True,
        random_directions=True,
        takes_posterior=False,
        bad_input=(lambda p: _policy_gradient(p, 1), ValueError, "num_samples must be at least 2; got 1"),
    ),
]
