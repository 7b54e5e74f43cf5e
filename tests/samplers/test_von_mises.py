"""A target that is not Gaussian: von Mises on the circle, U = -kappa cos q, whose force is bounded.

SGLD is held against its exact stationary law (the transition density on a grid of the circle); the splittings against
biases that were measured by an independent NumPy program, whose standard error is 2e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import i0, i1

import ergodica as erg
from ergodica.samplers import BAOA, OBABO, SGHMC, SGLD, LieTrotter
from tests.support.chains import time_averages
from tests.support.statistics import THRESHOLD, standard_error

pytestmark = pytest.mark.slow

KAPPA = 2.0
EXACT = i1(KAPPA) / i0(KAPPA)
PUBLISHED_ERROR = 2e-4
NUM_CHAINS = 32_768

BIASES = {
    (BAOA, 1.0): -0.0044,
    (BAOA, 0.5): 0.0,
    (OBABO, 0.8): -0.1015,
    (OBABO, 0.4): -0.0217,
    (LieTrotter, 0.8): -0.1014,
    (LieTrotter, 0.4): -0.0212,
    (SGHMC, 0.8): -0.197,
    (SGHMC, 0.4): -0.0270,
}


def mean_cosine(make, h):
    """Mean of cos q and its standard error, from chains that run for 40 and then 80 units of time."""
    posterior = erg.Posterior(lambda q: KAPPA * jnp.cos(q), initial=jnp.array(0.0))
    kernel = make(erg.estimators.Minibatch(posterior, scheme="full"), h)
    positions = 0.7 * jax.random.normal(jax.random.key(1), (NUM_CHAINS,))
    averages = time_averages(
        jax.random.key(2), kernel, positions, jnp.cos, num_discarded=round(40 / h), num_steps=round(80 / h)
    )
    return float(np.mean(np.asarray(averages, np.float64))), float(standard_error(averages))


def exact_sgld_cosine(h, size=2_000):
    """E cos q under the stationary law of q' = q - h kappa sin q + sqrt(2h) xi on the circle."""
    grid = 2 * np.pi * np.arange(size) / size
    moved = grid - h * KAPPA * np.sin(grid)
    away = grid[None, :, None] - moved[:, None, None] + 2 * np.pi * np.arange(-3, 4)
    transition = np.exp(-(away**2) / (4 * h)).sum(axis=-1)
    transition /= transition.sum(axis=1, keepdims=True)
    law = np.full(size, 1 / size)
    for _ in range(round(40 / h)):
        law = law @ transition
    return law @ np.cos(grid)


@pytest.mark.parametrize("h", [0.2, 0.1])
def test_sgld(h):
    exact = exact_sgld_cosine(h)
    assert abs(exact - EXACT - {0.2: -0.0585, 0.1: -0.0273}[h]) < 5e-4
    mean, error = mean_cosine(SGLD, h)
    assert THRESHOLD * error < 0.003
    assert abs(mean - exact) < THRESHOLD * error


@pytest.mark.parametrize(("make", "h"), BIASES)
def test_splittings(make, h):
    mean, error = mean_cosine(make, h)
    assert THRESHOLD * error < 0.003
    tolerance = THRESHOLD * np.hypot(error, PUBLISHED_ERROR)
    assert abs(mean - EXACT - BIASES[make, h]) < tolerance
