"""Gradients by persistent chains on Gaussian latents, where everything has a closed form."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import rng
from ergodica.estimators import PersistentChains
from ergodica.estimators.em.persistent import distances
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64")

DATA = np.array([1.3, 0.4, 2.2])
PRECISION = 1.0 + len(DATA)
STEP, NUM_STEPS = 0.07, 3


def log_joint(theta, z, x):
    """A mean under a prior around theta, and data around the mean."""
    return -0.5 * (z["mean"] - theta) ** 2 - 0.5 * jnp.sum((x - z["mean"]) ** 2)


def posterior_mean(theta):
    return (theta + jnp.sum(DATA)) / PRECISION


def langevin(log_density):
    return erg.samplers.SGLD(erg.estimators.Minibatch(erg.Posterior(log_density), scheme="full"), STEP)


def adjusted(log_density):
    return erg.from_blackjax(blackjax.mala(log_density, 0.3))


def test_path_without_noise_is_the_closed_form():
    """Chains go on where they stood, under the parameters of each call; the gradient is taken where they end."""
    gradient = PersistentChains(
        log_joint, langevin, {"mean": jnp.array(0.0)}, num_steps=NUM_STEPS, num_chains=2, data=DATA
    )
    contraction = (1 - STEP * PRECISION) ** NUM_STEPS
    expected = 0.0
    with rng.normals_from(lambda tree: jax.tree.map(jnp.zeros_like, tree)):
        state = gradient.init(jax.random.key(0), jnp.array(0.5))
        for i, theta in enumerate([0.5, -1.0, 2.0]):
            estimate, state = gradient.estimate(jax.random.key(i), jnp.array(theta), state)
            expected = posterior_mean(theta) + contraction * (expected - posterior_mean(theta))
            np.testing.assert_allclose(state.position["mean"], expected, rtol=1e-12)
            np.testing.assert_allclose(estimate.gradient, expected - theta, rtol=1e-12)
            np.testing.assert_allclose(estimate.value, log_joint(theta, {"mean": expected}, DATA), rtol=1e-12)


def test_warmup_runs_the_chains():
    gradient = PersistentChains(
        log_joint, langevin, {"mean": jnp.array(0.0)}, num_warmup=NUM_STEPS, num_chains=2, data=DATA
    )
    with rng.normals_from(lambda tree: jax.tree.map(jnp.zeros_like, tree)):
        state = gradient.init(jax.random.key(0), jnp.array(0.5))
    expected = posterior_mean(0.5) * (1 - (1 - STEP * PRECISION) ** NUM_STEPS)
    np.testing.assert_allclose(state.position["mean"], expected, rtol=1e-12)


def at_rest(move, theta, num_repeats=20_000):
    """Positions (R,) after a move from the posterior of theta, and their squares."""
    keys = jax.random.split(jax.random.key(5), num_repeats)
    start = posterior_mean(theta) + jax.random.normal(jax.random.key(6), (num_repeats,)) / np.sqrt(PRECISION)
    end = jax.jit(jax.vmap(move))(keys, start)
    found = np.stack([end, end**2], axis=1)
    mean = float(posterior_mean(theta))
    return found, np.array([mean, mean**2 + 1 / PRECISION])


def test_exact_kernels_keep_the_posterior():
    """MALA made anew at every gradient, after a gradient at other parameters; an error of 3% would be seen."""
    theta = jnp.array(2.0)
    gradient = PersistentChains(log_joint, adjusted, {"mean": jnp.array(0.0)}, data=DATA)

    def move(key, start):
        state = gradient.init(jax.random.key(0), theta)._replace(position={"mean": start[None]})
        estimate, state = gradient.estimate(key, theta, state)
        return estimate.gradient + theta  # the position: the gradient is z - theta

    found, exact = at_rest(move, theta)
    assert_mean(found, exact, smallest_error=0.03)


def test_a_state_that_keeps_its_old_density_is_rejected():
    """Carrying BlackJAX's state over from the parameters before: its log density and gradient are of another target."""
    theta, before = jnp.array(2.0), jnp.array(-1.0)

    def move(key, start):
        stale = adjusted(lambda z: log_joint(before, z, DATA)).init(jax.random.key(0), {"mean": start})
        return adjusted(lambda z: log_joint(theta, z, DATA)).step(key, stale)[0].position["mean"]

    found, exact = at_rest(move, theta)
    assert np.max(np.abs(z_scores(found, exact))) > REJECTION


def test_reports_how_far_chains_move():
    """Langevin renews by 1 - (1 - h P)^m in expectation; chains that stand still report 0, a single chain NaN."""
    theta, many = jnp.array(0.3), 5_000

    def start(key):
        variance = 2 * STEP / (1 - (1 - STEP * PRECISION) ** 2)  # of the discretised chain
        return {"mean": posterior_mean(theta) + jnp.sqrt(variance) * jax.random.normal(key)}

    def run(kernel, num_chains):
        gradient = PersistentChains(log_joint, kernel, start, num_steps=NUM_STEPS, num_chains=num_chains, data=DATA)
        state = gradient.init(jax.random.key(0), theta)
        return jax.jit(lambda state: gradient.estimate(jax.random.key(1), theta, state))(state)[0].aux

    moving = run(langevin, many)
    expected = 1 - (1 - STEP * PRECISION) ** NUM_STEPS
    np.testing.assert_allclose(moving.renewal, expected, atol=6 / np.sqrt(many))
    assert float(moving.moved) == 1.0
    assert np.isnan(moving.acceptance_rate)
    still = run(lambda f: erg.from_blackjax(blackjax.mala(f, 1e6)), 50)
    assert float(still.renewal) == float(still.moved) == 0.0
    assert float(still.acceptance_rate) == 0.0
    alone = {"mean": jnp.zeros(1)}, {"mean": jnp.ones(1)}
    assert np.isnan(distances(*alone)[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PersistentChains(log_joint, langevin, {"mean": jnp.array(0)}), TypeError, "initial.*floating point"),
        (
            lambda: PersistentChains(log_joint, langevin, {"mean": 0.0}, num_steps=0),
            ValueError,
            "num_steps must be at least",
        ),
        (
            lambda: PersistentChains(log_joint, lambda f: f, {"mean": 0.0}, num_warmup=1, data=DATA).init(
                jax.random.key(0), jnp.array(0.0)
            ),
            TypeError,
            r"kernel\(log_density\) must be an AbstractKernel",
        ),
    ],
)
def test_bad_input_raises(make, error, message):
    with pytest.raises(error, match=message):
        make()
