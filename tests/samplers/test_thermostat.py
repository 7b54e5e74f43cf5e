"""Thermostats: an identity that holds for every path, and the law of a slow thermostat, which is exact.

With a large thermal mass the friction hardly moves once it has found its value: the kernel is then an affine map at a
constant friction, and that friction is the one at which the letter D sees the temperature asked for. Both follow from
linear equations, which are written here in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.samplers import BADODAB, SGNHT, Thermostat, thermostat
from tests.support.affine import noise_from
from tests.support.marks import quick
from tests.support.statistics import REJECTION, assert_mean, z_scores

SIZE = 20
SETTING = {"h": 0.1, "lam": 1.0, "gamma": 1.0, "T": 0.8, "s2": 20.0}
PRESETS = {"SGNHT": SGNHT, "BADODAB": BADODAB}
# one period each; BADODAB joins its closing kick with the opening one of the next step, since they share a gradient
PERIODS = {
    "SGNHT": [("E", 1.0), ("B", 1.0), ("A", 1.0), ("D", 1.0)],
    "BADODAB": [("B", 1.0), ("A", 0.5), ("D", 0.5), ("O", 1.0), ("D", 0.5), ("A", 0.5)],
}


class IndependentNoise(AbstractGradientEstimator):
    """Gradient of -lam |theta|^2 / 2 with fresh Gaussian noise."""

    lam: jax.Array
    spread: jax.Array

    def init(self, key, params, batch=None):
        return None

    def estimate(self, key, params, state, batch=None):
        return Estimate(-self.lam * params + self.spread * jax.random.normal(key, params.shape), jnp.zeros(())), state


def law_at_constant_friction(name, xi, h, lam, gamma, T, s2):
    """Variance of the position at the end of a step, and the mean of p^2 that D sees."""

    def letter(name, t):
        move, noise = np.eye(2), np.zeros((2, 2))
        if name == "A":
            move[0, 1] = t
        elif name == "B":
            move[1, 0], noise[1, 1] = -t * lam, t**2 * s2
        elif name == "E":
            move[1, 1], noise[1, 1] = 1 - xi * t, 2 * gamma * T * t
        elif name == "O":
            move[1, 1], noise[1, 1] = np.exp(-xi * t), gamma * T * (1 - np.exp(-2 * xi * t)) / xi
        return move, noise

    steps = [(name, *letter(name, share * h)) for name, share in PERIODS[name]]
    transition, covariance = np.eye(2), np.zeros((2, 2))
    for _, move, noise in steps:
        transition, covariance = move @ transition, move @ covariance @ move.T + noise
    law = solve_discrete_lyapunov(transition, covariance)
    variance, seen = law[0, 0], []
    for name, move, noise in steps:
        law = move @ law @ move.T + noise
        if name == "D":
            seen.append(law[1, 1])
    return variance, np.mean(seen)


@functools.cache
def predicted(name, **setting):
    """The friction at which D sees the temperature, and the variance there."""
    setting = setting or SETTING
    xi = brentq(
        lambda xi: law_at_constant_friction(name, xi, **setting)[1] - setting["T"], 0.2, 10 / setting["h"] ** 0.5
    )
    return xi, law_at_constant_friction(name, xi, **setting)[0]


@functools.partial(jax.jit, static_argnames=("num_discarded", "num_steps"))
def simulate(kernel, key, thermostats, variance, *, num_discarded, num_steps):
    """Mean of the thermostat, of theta^2 and of the p^2 at the end, over the steps of chains in parallel."""
    num_chains = thermostats.shape[0]
    key_theta, key_init, key_run = jax.random.split(key, 3)
    positions = jnp.sqrt(variance) * jax.random.normal(key_theta, (num_chains, SIZE))
    states = jax.vmap(kernel.init)(jax.random.split(key_init, num_chains), positions)
    states = states._replace(thermostat=thermostats)

    def body(i, carry):
        states, total = carry
        states, info = jax.vmap(kernel.step)(jax.random.split(jax.random.fold_in(key_run, i), num_chains), states)
        now = jnp.stack([info.thermostat, jnp.mean(states.position**2, axis=-1), info.kinetic_temperature], axis=-1)
        return states, total + jnp.where(i >= num_discarded, now, 0)

    _, total = jax.lax.fori_loop(0, num_discarded + num_steps, body, (states, jnp.zeros((num_chains, 3))))
    return total / num_steps


def averages(name, num_chains, **setting):
    setting = SETTING | setting
    xi, variance = predicted(name, **setting)
    gradient = IndependentNoise(jnp.asarray(setting["lam"]), jnp.sqrt(setting["s2"]))
    kernel = PRESETS[name](gradient, setting["h"], setting["gamma"], temperature=setting["T"], thermal_mass=100.0)
    return simulate(
        kernel, jax.random.key(3), jnp.full(num_chains, xi, jnp.float32), variance, num_discarded=100, num_steps=400
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.swept_after(1)
def test_law_with_a_slow_thermostat(name):
    """Its mean friction, and the variance of the position: hotter neither by the noise nor by its size."""
    found = averages(name, 512)
    xi, variance = predicted(name, **SETTING)
    assert_mean(found[:, 0], xi, smallest_error=0.02)
    assert_mean(found[:, 1], variance, smallest_error=0.02)
    if name == "SGNHT":  # D stands at the end of the step
        assert_mean(found[:, 2], SETTING["T"], smallest_error=0.02)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PRESETS)
def test_friction_takes_up_the_noise(name):
    """Deterministic: E xi -> gamma + h s2 / (2 T), by BADODAB at order 2; so its Var, where fixed friction has order 1."""
    settings = [SETTING | {"h": h} for h in (0.02, 0.01, 0.005)]
    frictions, variances = np.array([predicted(name, **s) for s in settings]).T
    h = np.array([s["h"] for s in settings])
    rest = np.abs(frictions - SETTING["gamma"] - h * SETTING["s2"] / (2 * SETTING["T"]))
    if name == "BADODAB":
        assert np.all(np.log2(rest[:-1] / rest[1:]) > 1.9)
        errors = np.abs(variances - SETTING["T"] / SETTING["lam"])
        assert np.all(np.log2(errors[:-1] / errors[1:]) > 1.9)
    else:
        assert np.all(np.log2(rest[:-1] / rest[1:]) > 0.9)


def norm_for_its_square(momentum, mass):
    """The published bug: |p| - D for |p|^2 - D."""
    norm = jnp.sqrt(sum(jnp.sum(p**2) for p in jax.tree.leaves(momentum)))
    return norm / sum(p.size for p in jax.tree.leaves(momentum))


@pytest.mark.parametrize("name", PRESETS)
def test_norm_in_place_of_its_square_is_rejected(name, monkeypatch):
    monkeypatch.setattr(thermostat, "kinetic_temperature", norm_for_its_square)
    simulate.clear_cache()
    xi, variance = predicted(name, **SETTING)
    gradient = IndependentNoise(jnp.asarray(1.0), jnp.sqrt(SETTING["s2"]))
    kernel = PRESETS[name](gradient, SETTING["h"], SETTING["gamma"], temperature=SETTING["T"], thermal_mass=1.0)
    found = simulate(
        kernel, jax.random.key(3), jnp.full(64, xi, jnp.float32), variance, num_discarded=100, num_steps=400
    )
    assert z_scores(found[:, 1], variance) > REJECTION
    simulate.clear_cache()


@pytest.mark.parametrize("name", quick(PRESETS, ("BADODAB",)))
def test_mutants_of_the_noise_are_rejected(name, monkeypatch):
    """A thermostat that forgets the temperature in D."""
    monkeypatch.setattr(thermostat, "adapt", lambda xi, seen, t, T, mu: xi + t * (seen - 1.0) / mu)
    simulate.clear_cache()
    xi, variance = predicted(name, **SETTING)
    gradient = IndependentNoise(jnp.asarray(1.0), jnp.sqrt(SETTING["s2"]))
    kernel = PRESETS[name](gradient, SETTING["h"], SETTING["gamma"], temperature=SETTING["T"], thermal_mass=1.0)
    found = simulate(
        kernel, jax.random.key(3), jnp.full(64, xi, jnp.float32), variance, num_discarded=100, num_steps=400
    )
    assert z_scores(found[:, 1], variance) > REJECTION
    simulate.clear_cache()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PRESETS)
def test_one_step_by_hand(name):
    """Every letter of a step against NumPy, with given noise, a mass that differs between coordinates, and xi < 0."""
    h, gamma, T, mu, lam = 0.3, 0.7, 0.6, 2.0, 1.7
    mass, noise = np.array([0.5, 2.0]), np.array([0.3, -1.1])

    class Quadratic(AbstractGradientEstimator):
        def init(self, key, params, batch=None):
            return None

        def estimate(self, key, params, state, batch=None):
            return Estimate(-lam * params, jnp.zeros(())), state

    kernel = PRESETS[name](Quadratic(), h, gamma, mass=jnp.asarray(mass), temperature=T, thermal_mass=mu)
    theta, p, xi = np.array([0.4, -0.2]), np.array([1.0, 0.5]), -0.8
    state = kernel.init(jax.random.key(0), jnp.asarray(theta))._replace(
        momentum=jnp.asarray(p), thermostat=jnp.asarray(xi)
    )
    with noise_from(jnp.asarray(noise)):
        after, info = kernel.step(jax.random.key(0), state)
    for letter in kernel.scheme:
        t = h / kernel.scheme.count(letter)
        if letter == "A":
            theta = theta + t * p / mass
        elif letter == "B":
            p = p - t * lam * theta
        elif letter == "D":
            xi = xi + t * (np.mean(p**2 / mass) - T) / mu
        elif letter == "E":
            p = (1 - xi * t) * p + np.sqrt(2 * gamma * T * t * mass) * noise
        else:
            p = np.exp(-xi * t) * p + np.sqrt(gamma * T * (1 - np.exp(-2 * xi * t)) / xi * mass) * noise
    np.testing.assert_allclose(after.position, theta, rtol=1e-13)
    np.testing.assert_allclose(after.momentum, p, rtol=1e-13)
    np.testing.assert_allclose(info.thermostat, xi, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_friction_of_zero_is_a_continuation():
    args = (jnp.ones(1), jnp.ones(1), jnp.full(1, 2.0), jnp.asarray(0.3))
    at = functools.partial(thermostat.thermostatted_friction, *args)
    zero, near = at(jnp.asarray(0.0), 1.5, 0.7), at(jnp.asarray(1e-9), 1.5, 0.7)
    np.testing.assert_allclose(zero, near, rtol=1e-8)
    np.testing.assert_allclose(zero, 1 + 2 * np.sqrt(2 * 1.5 * 0.7 * 0.3), rtol=1e-13)


def test_a_scheme_without_thermostat_is_refused():
    with pytest.raises(ValueError, match="needs D"):
        Thermostat("BAOAB", IndependentNoise(jnp.ones(()), jnp.ones(())), 0.1)
    with pytest.raises(ValueError, match="thermal_mass must be finite and above 0"):
        BADODAB(IndependentNoise(jnp.ones(()), jnp.ones(())), 0.1, thermal_mass=0.0)
