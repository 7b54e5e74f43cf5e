"""Replica exchange: detailed balance of the noisy swap in closed form, and invariance of the law under the shipped step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.samplers import ReplicaExchange
from ergodica.samplers.replica_exchange import swap_penalty, swap_probability
from tests.support.statistics import REJECTION, assert_mean, z_scores

TEMPERATURES = np.array([0.5, 2.0])
GAP = 1 / 0.5 - 1 / 2.0


def expected_rate(difference, spread, penalty):
    """Mean probability of a swap over normal noise in the difference, by quantiles."""
    noise = spread * ndtri((np.arange(20_000) + 0.5) / 20_000)
    rates = jax.vmap(lambda d: swap_probability(d[None], penalty, jnp.asarray(TEMPERATURES))[0])(
        jnp.asarray(difference + noise)
    )
    return float(jnp.mean(rates))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("difference", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_detailed_balance_between_two_states(difference, spread):
    """Forth and back have the ratio exp(gap * difference), although each decision is made on noise."""
    penalty = swap_penalty(jnp.array([spread**2]), jnp.asarray(TEMPERATURES))
    forth, back = (expected_rate(sign * difference, spread, penalty) for sign in (1, -1))
    np.testing.assert_allclose(forth / back, np.exp(GAP * difference), rtol=2e-3)


@pytest.mark.usefixtures("x64")
def test_without_penalty_there_is_no_detailed_balance():
    forth, back = (expected_rate(sign * 1.5, 1.5, jnp.zeros(1)) for sign in (1, -1))
    assert forth / back < 0.5 * np.exp(GAP * 1.5)


def test_nothing_is_swapped_at_temperature_zero_or_on_nan():
    cold = jnp.array([0.0, 0.0])
    np.testing.assert_array_equal(swap_probability(jnp.array([3.0]), swap_penalty(jnp.array([1.0]), cold), cold), 0)
    np.testing.assert_array_equal(swap_probability(jnp.array([jnp.nan]), jnp.zeros(1), jnp.asarray(TEMPERATURES)), 0)


SPREAD, LADDER = 0.9, (4.0, 16.0)


class NoisyEnergy(AbstractGradientEstimator):
    """A standard normal target, with normal noise on its log density that is independent between positions."""

    spread: jax.Array

    def init(self, key, params, batch=None):
        return None

    def estimate(self, key, params, state, batch=None):
        own = jax.random.fold_in(key, jax.lax.bitcast_convert_type(params, jnp.uint32))
        return Estimate(-params, -0.5 * params**2 + self.spread * jax.random.normal(own)), state

    def probe(self, key, params, state):
        return self.estimate(key, params, state)[0]


@functools.partial(jax.jit, static_argnames="num_steps")
def squares_after(kernel, key, num_steps):
    """theta^2 / T of all replicas, which start in their laws, after steps so small that only swaps move them."""
    key_start, key_init, key_run = jax.random.split(key, 3)
    temperatures = jnp.concatenate([jnp.ones(1), kernel.ladder])
    start = jnp.sqrt(temperatures) * jax.random.normal(key_start, (3,))
    state = kernel.init(key_init, start[0])
    # the true variance of a difference, as if measured for ever
    state = state._replace(hot=start[1:], noise=jnp.full(2, 2 * kernel.gradient.spread**2 * (1 - kernel.decay)))

    def body(i, carry):
        state, rate = carry
        state, info = kernel.step(jax.random.fold_in(key_run, i), state)
        return state, rate + info.swap_rate / num_steps

    state, rate = jax.lax.fori_loop(1, 1 + num_steps, body, (state._replace(count=jnp.int32(1)), jnp.zeros(())))
    return jnp.concatenate([state.position[None], state.hot]) ** 2 / temperatures, rate


def swapped_squares(num_chains, **options):
    kernel = ReplicaExchange(NoisyEnergy(jnp.float32(SPREAD)), 1e-12, LADDER, num_adapt=1, **options)
    keys = jax.random.split(jax.random.key(5), num_chains)
    return jax.vmap(lambda key: squares_after(kernel, key, 20))(keys)


@pytest.mark.sweep
def test_swaps_on_noisy_energies_leave_the_laws_alone():
    """All three temperatures, after twenty rounds of swaps of even and odd pairs."""
    squares, rates = swapped_squares(160_000)
    assert 0.2 < float(rates.mean()) < 0.6  # swaps do happen
    for i in range(3):
        assert_mean(squares[:, i], 1.0, smallest_error=0.02)


def test_uncorrected_swaps_are_rejected():
    squares, _ = swapped_squares(20_000, variance_correction=False)
    assert z_scores(squares, np.ones(3))[0] > REJECTION


def test_the_noise_is_measured():
    """Its running mean estimates the variance of a difference, twice that of an energy."""
    kernel = ReplicaExchange(NoisyEnergy(jnp.float32(SPREAD)), 0.05, LADDER, num_adapt=None, decay=0.9)

    @jax.jit
    @jax.vmap
    def measured(key):
        key_init, key_run = jax.random.split(key)
        state = kernel.init(key_init, jnp.array(0.3))
        body = lambda i, state: kernel.step(jax.random.fold_in(key_run, i), state)[0]  # noqa: E731
        return jax.lax.fori_loop(0, 30, body, state).noise / (1 - kernel.decay**30)

    assert_mean(measured(jax.random.split(jax.random.key(1), 16_384)), 2 * SPREAD**2, smallest_error=0.02)


def test_replicas_move_at_their_own_temperatures():
    """Far from each other in energy nothing is swapped, and each replica is SGLD at its temperature."""
    posterior = erg.Posterior(lambda t: -0.5 * t**2, initial=jnp.array(0.0))
    kernel = ReplicaExchange(erg.estimators.Minibatch(posterior, scheme="full"), 0.5, LADDER, temperature=0.5)

    @jax.jit
    @jax.vmap
    def moved(key):
        key_init, key_step = jax.random.split(key)
        state = kernel.init(key_init, jnp.array(0.0))  # equal positions: a swap changes nothing
        state, info = kernel.step(key_step, state)
        return jnp.concatenate([state.position[None], state.hot]) ** 2, info.swap_rate

    squares, rates = moved(jax.random.split(jax.random.key(1), 65_536))
    np.testing.assert_array_equal(rates, 1.0)
    temperatures = 0.5 * np.array([1.0, *LADDER])
    assert_mean(np.asarray(squares) / temperatures, 2 * 0.5, smallest_error=0.03)


@pytest.mark.sweep
def test_two_modes_get_their_weights():
    """Barrier of ten: SGLD stays where it starts; exchanged replicas find three quarters to one, from either side."""

    def log_density(t):
        return jnp.logaddexp(jnp.log(0.75) - 5 * (t - 1.5) ** 2, jnp.log(0.25) - 5 * (t + 1.5) ** 2)

    posterior = erg.Posterior(log_density, initial=jnp.array(1.5))
    gradient = erg.estimators.Minibatch(posterior, scheme="full")

    def share(sampler):
        starts = jnp.where(jnp.arange(512) % 2 == 0, 1.5, -1.5)
        options = {"num_chains": 512, "probes": False, "progress": False, "initial": starts}
        dt = erg.sample(jax.random.key(0), sampler, num_samples=200, num_warmup=1000, thin=10, **options)
        return (dt.posterior["position"] > 0).mean("draw").values

    stuck = share(erg.samplers.SGLD(gradient, 0.01))
    assert abs(stuck.mean() - 0.5) < 0.02
    # the error of the step moves both modes alike; the weights keep to a percent
    assert_mean(share(ReplicaExchange(gradient, 0.01, (3.0, 9.0, 27.0))), 0.75, smallest_error=0.05)


def test_bad_input_raises():
    gradient = NoisyEnergy(jnp.ones(()))
    with pytest.raises(ValueError, match="ladder must rise from above 1"):
        ReplicaExchange(gradient, 0.1, (1.0, 2.0))
    with pytest.raises(ValueError, match="ladder must rise from above 1"):
        ReplicaExchange(gradient, 0.1, (3.0, 2.0))
    with pytest.raises(ValueError, match="ladder must be a sequence"):
        ReplicaExchange(gradient, 0.1, 2.0)
