"""The order of the blocks: a permutation each epoch, and either of two blocks first with probability one half."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import ergodica as erg
from ergodica.core import permutation
from ergodica.estimators.minibatch import reshuffle

SIZES = (1, 2, 3, 7, 1000)
FALSE_ALARM = 1e-7


def orders(words, size):
    """Orders of many epochs, (epochs, size)."""
    traced_anew = reshuffle.permutation_at.__wrapped__  # a test below replaces what it calls
    over_positions = jax.vmap(traced_anew, in_axes=(None, 0, None))
    positions = jnp.arange(size, dtype=jnp.int32)
    return jax.jit(jax.vmap(lambda w: over_positions(w, positions, size)))(words)


def random_words(seed, count):
    return jax.random.bits(jax.random.key(seed), (count, 2), jnp.uint32)


def visits(size, num_chains, num_epochs):
    """Blocks that `advance` visits, (chains, epochs, size)."""

    def chain(key):
        key_start, key_steps = jax.random.split(key)

        def body(cursor, key):
            block, cursor = reshuffle.advance(key, cursor, size)
            return cursor, block

        keys = jax.random.split(key_steps, size * num_epochs)
        return jax.lax.scan(body, reshuffle.start(key_start), keys)[1].reshape(num_epochs, size)

    return np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(5), num_chains)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.swept_after(2)
def test_each_epoch_visits_each_block_once(size):
    blocks = visits(size, num_chains=8, num_epochs=4)
    np.testing.assert_array_equal(np.sort(blocks, axis=-1), np.broadcast_to(np.arange(size), blocks.shape))


@pytest.mark.parametrize("size", [7, 1000])
def test_chains_and_epochs_go_their_own_ways(size):
    blocks = visits(size, num_chains=8, num_epochs=4).reshape(-1, size)
    assert len({tuple(order) for order in blocks}) > 24  # of 32; among 7! orders a few may coincide


def test_epochs_of_one_chain_are_independent():
    """First block of one epoch against that of the next, by chi-square over the 4 x 4 table."""
    blocks = visits(4, num_chains=20_000, num_epochs=2)
    counts = np.zeros((4, 4))
    np.add.at(counts, (blocks[:, 0, 0], blocks[:, 1, 0]), 1)
    expected = counts.sum() / 16
    assert np.sum((counts - expected) ** 2 / expected) < chi2.isf(FALSE_ALARM, 15)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.swept_after(2)
def test_the_last_bit_reverses_the_order(size, monkeypatch):
    """Half of all words hold the reverse of the other half's order, whatever the rounds do: exact, not statistical."""
    words = random_words(1, 20)
    forward = np.asarray(orders(words, size))
    mix = permutation._mix

    def with_other_direction(x, word):
        mixed = mix(x, word)
        is_schedule = mixed.shape == (permutation.NUM_ROUNDS + 1,)
        return mixed.at[-1].set(mixed[-1] ^ jnp.uint32(1 << 31)) if is_schedule else mixed

    monkeypatch.setattr(permutation, "_mix", with_other_direction)
    np.testing.assert_array_equal(forward, np.asarray(orders(words, size))[:, ::-1])


@pytest.mark.sweep
def test_the_direction_is_a_fair_coin():
    """The bit that reverses is balanced: block 0 comes before block 1 half the time, for two blocks and for a thousand."""
    for size in (2, 7, 1000):
        drawn = np.asarray(orders(random_words(2, 40_000 if size < 1000 else 4_000), size))
        place = np.argsort(drawn, axis=1)
        first = np.mean(place[:, :-1] < place[:, 1:], axis=0)
        z = (first - 0.5) * 2 * np.sqrt(len(drawn))
        assert np.max(np.abs(z)) < 6


@pytest.mark.parametrize("size", [3, 4])
def test_all_orders_are_equally_likely(size):
    """Chi-square over all the permutations; would see probabilities off by a few per cent."""
    count = 200_000
    drawn = np.asarray(orders(random_words(3, count), size))
    index = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    counts = np.bincount([index[tuple(order)] for order in drawn.tolist()], minlength=math.factorial(size))
    expected = count / math.factorial(size)
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert statistic < chi2.isf(FALSE_ALARM, math.factorial(size) - 1)


@pytest.mark.optimised
def test_position_of_a_block_is_uniform_for_many_blocks():
    drawn = np.asarray(orders(random_words(4, 20_000), 1000))
    counts = np.bincount(drawn[:, 0], minlength=1000)
    assert np.sum((counts - 20.0) ** 2 / 20.0) < chi2.isf(FALSE_ALARM, 999)


def test_minibatch_follows_the_cursor():
    """The rows of an epoch of the estimator are all the rows, once each."""
    posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: x * t, jnp.arange(20.0), initial=jnp.array(0.0))
    gradient = erg.estimators.Minibatch(posterior, 3)
    assert gradient.num_blocks == 7

    def epoch(key):
        key_init, key_steps = jax.random.split(key)

        def body(state, key):
            batch, state = gradient.draw(key, state)
            return state, batch

        keys = jax.random.split(key_steps, gradient.num_blocks)
        return jax.lax.scan(body, gradient.init(key_init, jnp.array(0.0)), keys)[1]

    batches = jax.jit(jax.vmap(epoch))(jax.random.split(jax.random.key(0), 5))
    for rows, weights in zip(batches.data, batches.weight, strict=True):
        counted = np.sort(np.asarray(rows)[np.asarray(weights) > 0])
        np.testing.assert_array_equal(counted, np.arange(20.0))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_symmetric_epochs_go_there_and_back(size):
    """Through a permutation and its reverse, then through another one; with one order drawn an epoch."""

    def body(cursor, key):
        block, cursor = reshuffle.advance(key, cursor, size, symmetric=True)
        return cursor, block

    keys = jax.random.split(jax.random.key(3), 2 * size * 40)
    blocks = np.asarray(jax.jit(lambda: jax.lax.scan(body, reshuffle.start(jax.random.key(4)), keys))()[1])
    epochs = blocks.reshape(40, 2 * size)
    np.testing.assert_array_equal(epochs, epochs[:, ::-1])
    np.testing.assert_array_equal(np.sort(epochs[:, :size], axis=-1), np.tile(np.arange(size), (40, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 0.4 * min(40, math.factorial(size))
