"""Laws read off the kernels against closed forms, and the law of an epoch against all of its orders."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

import ergodica as erg
from ergodica.core import rng
from ergodica.run.linear_law import affine_step, affine_steps, solve_lyapunov, stationary_covariance
from tests.support.laws import VARIANCES, sgld_variance

pytestmark = pytest.mark.usefixtures("x64")

CURVATURE = np.array([[2.0, 0.7], [0.7, 1.0]])
NOISES = np.array([[3.0, 0.5], [-1.0, 2.0], [-2.5, 0.5], [0.5, -3.0]])  # one a block; they sum to zero
FRICTION = 1.5


@pytest.fixture
def exact():
    return erg.estimators.Minibatch(erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2)), scheme="full")


KERNELS = {
    "BAOA": (erg.samplers.BAOA, {}),
    "BAOAB1": (erg.samplers.BAOAB, {}),
    "BAOAB2": (erg.samplers.BAOAB, {"reuse_gradient": False}),
    "OBABO2": (erg.samplers.OBABO, {"reuse_gradient": False}),
    "LieTrotter2": (erg.samplers.LieTrotter, {"reuse_gradient": False}),
    "ABOBA1": (erg.samplers.ABOBA, {}),
    "ABOBA2": (erg.samplers.ABOBA, {"reuse_gradient": False}),
    "SGHMC": (erg.samplers.SGHMC, {}),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.swept_after(3)
def test_independent_batches_have_the_closed_form(exact, name):
    make, options = KERNELS[name]
    kernel = make(exact, 0.3, FRICTION, temperature=0.7, **options)
    lam, s2 = np.array([2.0, 0.4]), np.array([3.0, 0.0])
    law = VARIANCES[name](0.3, lam, FRICTION, 0.7, s2)
    found = stationary_covariance(affine_steps(kernel, lam), s2[:, None, None])[:, 0, 0]
    np.testing.assert_allclose(found, law, rtol=1e-9)
    joint = stationary_covariance(affine_step(kernel, jnp.zeros(2), np.diag(lam)), np.diag(s2))
    np.testing.assert_allclose(joint, np.diag(law), rtol=1e-9, atol=1e-12)


def baoa_by_hand(h):
    """Letters composed left to right, as block matrices over (position, momentum)."""
    one, zero, c = np.eye(2), np.zeros((2, 2)), np.exp(-FRICTION * h)
    drift = np.block([[one, h / 2 * one], [zero, one]])
    relax = np.block([[one, zero], [zero, c * one]])
    after_kick = drift @ relax @ drift
    transition = after_kick @ np.block([[one, zero], [-h * CURVATURE, one]])
    added = drift @ np.block([[zero, zero], [zero, (1 - c**2) * one]]) @ drift.T
    return transition, after_kick @ np.vstack([zero, h * one]), added


def sgld_by_hand(h):
    return np.eye(2) - h * CURVATURE, h * np.eye(2), 2 * h * np.eye(2)


def over_all_orders(transition, loading, added):
    """Average over the steps of an epoch, by going through all orders of its blocks."""
    size, num_blocks = len(transition), len(NOISES)
    of_noise = np.zeros((num_blocks + 1, size, size))
    orders = list(itertools.permutations(range(num_blocks)))
    for order in orders:
        z = np.zeros(size)
        for j, block in enumerate(order):
            z = transition @ z + loading @ NOISES[block]
            of_noise[j + 1] += np.outer(z, z) / len(orders)

    def epoch(start):
        base, path = start, [start + of_noise[0]]
        for j in range(num_blocks):
            base = transition @ base @ transition.T + added
            path.append(base + of_noise[j + 1])
        return path

    whole = np.linalg.matrix_power(transition, num_blocks)
    start = solve_discrete_lyapunov(whole, epoch(np.zeros((size, size)))[-1])
    return np.mean(epoch(start)[1:], axis=0)[:2, :2]


CASES = {
    "SGLD": (lambda g, h: erg.samplers.SGLD(g, h), sgld_by_hand),
    "BAOA": (lambda g, h: erg.samplers.BAOA(g, h, FRICTION), baoa_by_hand),
    "BAOAB": (lambda g, h: erg.samplers.BAOAB(g, h, FRICTION), baoa_by_hand),  # the same positions
}


@pytest.mark.parametrize("h", [0.03, 0.4])
@pytest.mark.parametrize("name", CASES)
def test_blocks_have_the_law_of_their_epoch(exact, name, h):
    make, by_hand = CASES[name]
    step = affine_step(make(exact, h), jnp.zeros(2), CURVATURE)
    noise = NOISES.T @ NOISES / len(NOISES)
    truth = over_all_orders(*by_hand(h))
    np.testing.assert_allclose(stationary_covariance(step, noise, len(NOISES)), truth, rtol=1e-9)
    # the mutant: the law of independent batches
    mutant = stationary_covariance(step, noise)
    assert np.max(np.abs(mutant / truth - 1)) > 0.02


def test_odd_numbers_of_steps(exact):
    """An epoch of seven steps, by the recursion written out."""
    h, lam, s2, K = 0.2, 1.3, 4.0, 7
    found = stationary_covariance(affine_steps(erg.samplers.SGLD(exact, h), [lam]), np.full((1, 1, 1), s2), K)[0, 0, 0]
    a = 1 - h * lam
    order = s2 * (np.eye(K) - (1 - np.eye(K)) / (K - 1))

    def after(j, start):
        weights = h * a ** np.arange(j - 1, -1, -1)
        return a ** (2 * j) * start + weights @ order[:j, :j] @ weights + 2 * h * np.sum(a ** (2 * np.arange(j)))

    start = after(K, 0.0) / (1 - a ** (2 * K))
    np.testing.assert_allclose(found, np.mean([after(j, start) for j in range(1, K + 1)]), rtol=1e-12)


@pytest.mark.parametrize(("khl", "ratio"), [(0.1, 0.03), (0.3, 0.09), (1.0, 0.27), (3.0, 0.55), (10.0, 0.82)])
def test_noise_bias_of_blocks_relative_to_independent_batches(exact, khl, ratio):
    """The known ratios for SGLD, to the two digits that are printed (K = 1,000)."""
    h, K = khl / 1000, 1000
    step = affine_steps(erg.samplers.SGLD(exact, h), [1.0])
    noise = np.full((1, 1, 1), 1e3)
    blocks, independent, none = (
        stationary_covariance(step, *args)[0, 0, 0] for args in ((noise, K), (noise, None), (0 * noise, None))
    )
    np.testing.assert_allclose(independent, sgld_variance(h, 1.0, 1.0, 1e3), rtol=1e-10)
    assert abs((blocks - none) / (independent - none) - ratio) < 0.006


def test_two_gradients_a_step_share_an_epoch(exact):
    """With six blocks there are three steps an epoch; one that it does not divide is refused."""
    step = affine_step(erg.samplers.ABOBA(exact, 0.3, FRICTION, reuse_gradient=False), jnp.zeros(2), CURVATURE)
    order = np.eye(6) - (1 - np.eye(6)) / 5
    powers = [np.linalg.matrix_power(step.transition, i) for i in range(4)]

    def after(j, start):
        loads = np.concatenate(
            [powers[j - 1 - t] @ step.noise_loading[:, e] for t in range(j) for e in range(2)], axis=1
        )
        noise = loads @ np.kron(order[: 2 * j, : 2 * j], np.eye(2)) @ loads.T
        own = sum(p @ step.loading @ step.loading.T @ p.T for p in powers[:j])
        return powers[j] @ start @ powers[j].T + noise + own

    start = solve_discrete_lyapunov(powers[3], after(3, np.zeros_like(step.transition)))
    truth = step.select @ np.mean([after(j, start) for j in (1, 2, 3)], axis=0) @ step.select.T
    np.testing.assert_allclose(stationary_covariance(step, np.eye(2), 6), truth, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="ends in the middle of a step"):
        stationary_covariance(step, np.eye(2), 5)


def test_smith_doubling_solves_lyapunov_equations():
    transition = np.array([[0.9, 0.3], [-0.2, 0.94]])
    np.testing.assert_allclose(
        solve_lyapunov(transition, np.eye(2)), solve_discrete_lyapunov(transition, np.eye(2)), rtol=1e-10
    )


def test_what_has_no_such_law_is_refused(exact):
    with pytest.raises(ValueError, match="unstable"):
        stationary_covariance(affine_steps(erg.samplers.SGLD(exact, 1.1), [2.0]), np.ones((1, 1, 1)))
    with pytest.raises(ValueError, match=r"affine.*Thermostat"):
        affine_step(erg.samplers.SGNHT(exact, 0.1), jnp.zeros(2), np.eye(2))
    with pytest.raises(TypeError, match="gradient estimator"):
        affine_step(erg.samplers.Averaged(erg.samplers.SGLD(exact, 0.1)), jnp.zeros(2), np.eye(2))


def test_noise_is_handed_in_only_inside_the_block():
    key, like = jax.random.key(0), jnp.zeros(3)
    before = rng.normal_like(key, like)
    with rng.normals_from(lambda tree: jnp.ones_like(tree)):
        np.testing.assert_array_equal(rng.normal_like(key, like), 1.0)
    np.testing.assert_array_equal(rng.normal_like(key, like), before)
