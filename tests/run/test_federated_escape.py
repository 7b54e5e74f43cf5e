"""Whether a chain is kept during a visit: barriers along a line, against the density written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit

import ergodica as erg
from ergodica.run.federated_escape import NUM_PLACES, REACH, barrier

pytestmark = pytest.mark.usefixtures("x64")
SIZES = np.array([40, 40])
STRENGTH_OF_DATA = np.array([3.0, 0.3])


def logistic_shards():
    """One coefficient; the first client's covariate is ten times the second's, so its curvature is above its share."""
    x = np.repeat(STRENGTH_OF_DATA, SIZES)
    y = np.tile([0.0, 1.0], SIZES.sum() // 2)
    posterior = erg.Posterior(
        lambda t: -0.5 * t**2 / 25,
        lambda t, rows: rows["y"] * rows["x"] * t - jax.nn.softplus(rows["x"] * t),
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        initial=jnp.array(0.0, jnp.float64),
    )
    return erg.Shards(posterior, np.repeat([0, 1], SIZES))


def sampler_of(shards, surrogates, strength=1.0):
    gradient = erg.estimators.Conducive(shards, surrogates, 10, probabilities="uniform", strength=strength)
    return erg.samplers.Federated(erg.samplers.SGLD(gradient, 1e-3), 20)


def by_hand(client):
    """The mode is 0, where the surrogate's precision is N x² / 4 plus half of the prior's, which cancels in the sum."""
    precisions = SIZES * STRENGTH_OF_DATA**2 / 4
    sd = 1 / np.sqrt(precisions.sum() + 1 / 25)
    theta = np.linspace(0, REACH, NUM_PLACES // 2 + 1) * sd
    xt = STRENGTH_OF_DATA[client] * theta
    own = SIZES[client] * 0.5 * (log_expit(xt) + log_expit(-xt))
    push = -0.5 * (precisions.sum() - 2 * precisions[client]) * theta**2
    return -0.5 * theta**2 / 25 + 2 * own + push


def test_light_tails_leave_a_barrier_and_it_is_named():
    shards = logistic_shards()
    surrogates = erg.estimators.laplace_surrogates(shards, jnp.array(0.0, jnp.float64))
    found = erg.predict_federated(jax.random.key(0), sampler_of(shards, surrogates), jnp.array(0.0, jnp.float64))
    heights = by_hand(0)
    expected = heights[: np.argmin(heights) + 1].max() - heights.min()
    assert np.argmin(heights) < len(heights) - 1
    np.testing.assert_allclose(found.barriers, [expected, np.inf], rtol=1e-6)
    assert (found.barriers[0] < 10) == ("At client 0 a chain is kept by a barrier of" in str(found))


def test_without_surrogates_nothing_pushes_outwards():
    shards = logistic_shards()
    for surrogates, strength in ((None, 1.0), (erg.estimators.laplace_surrogates(shards, "mode"), 0.0)):
        sampler = sampler_of(shards, surrogates, strength)
        found = erg.predict_federated(jax.random.key(0), sampler, jnp.array(0.0, jnp.float64))
        assert np.all(found.barriers == np.inf)
        assert "barrier" not in str(found)


def test_quadratic_likelihoods_keep_their_chains():
    x = np.r_[np.linspace(-1, 1, 30), np.linspace(2, 3, 5)]
    posterior = erg.Posterior(
        lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.asarray(x), initial=jnp.array(0.0, jnp.float64)
    )
    shards = erg.Shards(posterior, np.repeat([0, 1], [30, 5]))
    sampler = sampler_of(shards, erg.estimators.laplace_surrogates(shards, "mode"))
    assert np.all(erg.predict_federated(jax.random.key(0), sampler).barriers == np.inf)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([-3.0, -1.0, 0.0, -1.0, -2.0], np.inf),  # a mode
        ([-3.0, 0.0, 0.5, -2.0, -1.0], 2.5),  # rises to the right beyond a trough
        ([2.0, -1.0, 3.0, -5.0, 0.0], 4.0),  # to both: the lower barrier counts
        ([1.0, 2.0, 1.5, 4.0, 9.0], 0.5),  # the top is off the middle, and the trough above the start
        ([0.0, 1.0, 2.0], 0.0),  # rises all the way
        ([2.0, 1.0, 0.0], 0.0),
        ([2.0, 1.0, 1.5], 0.0),  # a trough without a top
    ],
)
def test_barrier(heights, expected):
    assert barrier(np.array(heights)) == expected
