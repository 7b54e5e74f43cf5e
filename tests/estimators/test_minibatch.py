"""Minibatch gradients: exact averages over partitions, streamed rows, probes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.estimators import ControlVariate, Minibatch
from tests.support.problems import linear_regression, logistic_regression

NUM_DATA = 12
THETA = (0.3, -1.2, 0.8)
ESTIMATORS = {
    "plain": lambda minibatch: minibatch,
    "control variate": lambda minibatch: ControlVariate(minibatch, jnp.array([0.5, 0.5, -0.5])),
}


def full(posterior, theta):
    return jax.value_and_grad(posterior.log_density)(theta)


def minibatch_of(estimator):
    return estimator.minibatch if isinstance(estimator, ControlVariate) else estimator


@jax.jit
def at_block(estimator, theta, k):
    return estimator.at(theta, minibatch_of(estimator).block(k))


@jax.jit
def estimate_on(estimator, key, theta, state, rows):
    return estimator.estimate(key, theta, state, rows)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", ESTIMATORS)
@pytest.mark.parametrize(
    ("num_data", "batch_size"), [(12, 1), (12, 3), (12, 5), (13, 1), (13, 3), (13, 5), (13, 7), (13, 12), (13, 13)]
)
@pytest.mark.swept_after(6)
def test_blocks_average_to_the_full_gradient(num_data, batch_size, wrap):
    """Whether or not the batch size divides the data: no datum is dropped or counted twice."""
    posterior, theta = linear_regression(num_data), jnp.array(THETA)
    estimator = ESTIMATORS[wrap](Minibatch(posterior, batch_size))
    estimates = [at_block(estimator, theta, k) for k in range(minibatch_of(estimator).num_blocks)]
    value, gradient = full(posterior, theta)
    np.testing.assert_allclose(np.mean([e.gradient for e in estimates], axis=0), gradient, rtol=1e-12)
    np.testing.assert_allclose(np.mean([e.value for e in estimates]), value, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", ESTIMATORS)
def test_uniform_rows_are_unbiased(wrap):
    """Rows of equal weight 1/n: the mean over all batches of one row is the full gradient, and so over n."""
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    estimator = ESTIMATORS[wrap](Minibatch(posterior, 1, "uniform"))
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], posterior.data) for i in range(NUM_DATA)]
    estimates = [estimator.at(theta, Batch(row, jnp.ones(1))) for row in rows]
    value, gradient = full(posterior, theta)
    np.testing.assert_allclose(np.mean([e.gradient for e in estimates], axis=0), gradient, rtol=1e-12)
    np.testing.assert_allclose(np.mean([e.value for e in estimates]), value, rtol=1e-12)


def test_uniform_draws_each_row_alike():
    """Chi-square on the rows drawn, in a setting that sees a row left out (a randint off by one)."""
    posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: x * t, jnp.arange(12.0), initial=jnp.array(0.0))
    gradient = Minibatch(posterior, 5, "uniform")
    keys = jax.random.split(jax.random.key(0), 20_000)
    batches = jax.jit(jax.vmap(gradient.independent_batch))(keys)
    counts = np.bincount(np.asarray(batches.data).ravel().astype(int), minlength=12)
    expected = 100_000 / 12
    assert np.sum((counts - expected) ** 2 / expected) < 60  # chi-square with 11 degrees of freedom: 1e-8
    np.testing.assert_array_equal(batches.weight, np.float32(1 / 5))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", ESTIMATORS)
def test_full_is_exact(wrap):
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    estimator = ESTIMATORS[wrap](Minibatch(posterior, scheme="full"))
    assert estimator.exact
    estimate, _ = estimator.estimate(jax.random.key(0), theta, estimator.init(jax.random.key(1), theta))
    value, gradient = full(posterior, theta)
    np.testing.assert_allclose(estimate.gradient, gradient, rtol=1e-12)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 5, 7, 12])
def test_surplus_row_has_weight_zero(batch_size):
    minibatch = Minibatch(linear_regression(13), batch_size)
    blocks = [minibatch.block(k) for k in range(minibatch.num_blocks)]
    sizes = {int(np.sum(np.asarray(b.weight) > 0)) for b in blocks}
    assert max(sizes) - min(sizes) == 1
    np.testing.assert_allclose(sum(float(jnp.sum(b.weight)) for b in blocks) / len(blocks), 1.0, rtol=1e-6)
    assert {float(w) for b in blocks for w in b.weight} == {0.0, float(np.float32(len(blocks) / 13))}


def test_nonfinite_surplus_row_is_the_only_thing_zero_weight_cannot_hide():
    """Surplus rows are rows of the data: never padding, so no 0 * inf can arise from a made-up row."""
    data = jnp.arange(1.0, 8.0)
    posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: t * jnp.log(x), data, initial=jnp.array(1.0))
    minibatch = Minibatch(posterior, 3)
    for k in range(minibatch.num_blocks):
        assert set(np.asarray(minibatch.block(k).data).tolist()) <= set(np.asarray(data).tolist())
        assert np.isfinite(minibatch.at(jnp.array(1.0), minibatch.block(k)).gradient)


def test_last_block_of_long_data_does_not_overflow():
    """Near the end of two billion rows, where block index times batch size exceeds int32. No data of that size needed."""
    num_data, batch_size = 2_147_000_011, 999_999
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=num_data)
    minibatch = Minibatch(streamed, batch_size)
    short, num_long = divmod(num_data, minibatch.num_blocks)
    assert minibatch.num_blocks * batch_size > np.iinfo(np.int32).max
    for index in (0, num_long - 1, num_long, minibatch.num_blocks - 1):
        inside = np.asarray(minibatch.block(index).weight) > 0
        assert inside.sum() == short + (index < num_long)
    assert inside[-1]  # the last block ends with the last row


@pytest.mark.parametrize("scheme", ["blocks", "uniform", "full"])
def test_probe_is_independent_of_the_epoch(scheme):
    """The state is untouched, and over many keys every block comes up, whatever the cursor."""
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    minibatch = Minibatch(posterior, None if scheme == "full" else 4, scheme)
    state = minibatch.init(jax.random.key(0), theta)
    before = jax.tree.map(np.asarray, state)
    keys = jax.random.split(jax.random.key(1), 200)
    probes = jax.jit(jax.vmap(lambda key: minibatch.probe(key, theta, state).gradient))(keys)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    distinct = {tuple(np.round(np.asarray(g), 3).tolist()) for g in probes}
    least, most = {"blocks": (3, 3), "uniform": (100, 200), "full": (1, 1)}[scheme]
    assert least <= len(distinct) <= most


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", ESTIMATORS)
def test_streamed_rows_stay_unbiased_where_the_last_batch_is_short(wrap):
    """12 rows as batches of 5, 5 and 2: weighted by their length they average to the full gradient."""
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    estimator = ESTIMATORS[wrap](Minibatch(posterior, 5))
    state = estimator.init(jax.random.key(0), theta)
    total, value = 0.0, 0.0
    for begin, end in ((0, 5), (5, 10), (10, 12)):
        rows = jax.tree.map(lambda x, a=begin, b=end: x[a:b], posterior.data)
        estimate, after = estimate_on(estimator, jax.random.key(1), theta, state, rows)
        total += (end - begin) / NUM_DATA * np.asarray(estimate.gradient)
        value += (end - begin) / NUM_DATA * float(estimate.value)
        jax.tree.map(np.testing.assert_array_equal, after, state)
    exact_value, gradient = full(posterior, theta)
    np.testing.assert_allclose(total, gradient, rtol=1e-12)
    np.testing.assert_allclose(value, exact_value, rtol=1e-12)


def test_streamed_posterior_needs_batches():
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=100, initial=jnp.array(0.0))
    minibatch = Minibatch(streamed, 10)
    theta = jnp.array(0.5)
    state = minibatch.init(jax.random.key(0), theta)
    estimate, _ = minibatch.estimate(jax.random.key(1), theta, state, jnp.ones(4))
    assert float(estimate.gradient) == pytest.approx(-1.0 + 100.0)
    assert int(estimate.n_grad) == 4
    assert minibatch.probe(jax.random.key(2), theta, state) is None
    with pytest.raises(ValueError, match=r"holds no data.*batch="):
        minibatch.estimate(jax.random.key(1), theta, state)


def test_prior_alone():
    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.ones(2))
    minibatch = Minibatch(posterior, scheme="full")
    estimate, _ = minibatch.estimate(jax.random.key(0), jnp.ones(2), minibatch.init(jax.random.key(1), jnp.ones(2)))
    np.testing.assert_array_equal(estimate.gradient, -1.0)
    assert int(estimate.n_grad) == 0


def test_shuffle_is_one_permutation_of_the_rows_that_leaves_the_posterior_alone():
    posterior = linear_regression(NUM_DATA)
    before = np.asarray(posterior.data["y"])
    minibatch = Minibatch(posterior, 4, key=jax.random.key(5))
    assert not np.array_equal(minibatch.rows["y"], before)
    np.testing.assert_array_equal(np.sort(minibatch.rows["y"]), np.sort(before))
    pairs = {(float(y), float(x)) for y, x in zip(minibatch.rows["y"], minibatch.rows["x"][:, 0], strict=True)}
    assert pairs == {(float(y), float(x)) for y, x in zip(before, posterior.data["x"][:, 0], strict=True)}
    np.testing.assert_array_equal(posterior.observed_data()["y"], before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be between 1 and 12; got 0"),
        ({"batch_size": 13}, ValueError, "batch_size must be between 1 and 12; got 13. There are 12 data"),
        ({"batch_size": None}, TypeError, "batch_size must be an integer; got None"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer; got 2.0"),
        ({"batch_size": 3, "scheme": "cyclic"}, ValueError, "scheme must be one of 'blocks', 'uniform', 'full'"),
        ({"batch_size": 3, "scheme": "full"}, ValueError, "leave batch_size out"),
    ],
)
def test_minibatch_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        Minibatch(linear_regression(NUM_DATA), **arguments)


def test_minibatch_needs_a_posterior_with_data():
    with pytest.raises(TypeError, match="posterior must be an ergodica Posterior; got function"):
        Minibatch(lambda theta: theta, 3)
    with pytest.raises(ValueError, match=r"no data.*scheme='full'"):
        Minibatch(erg.Posterior(lambda t: -(t**2), initial=0.0), 3)
    minibatch, theta = Minibatch(linear_regression(NUM_DATA), 3), jnp.array(THETA)
    state = minibatch.init(jax.random.key(0), theta)
    with pytest.raises(ValueError, match="All arrays of batch must have one row a datum"):
        minibatch.estimate(jax.random.key(0), theta, state, {"x": jnp.ones((3, 3)), "y": jnp.ones(2)})


@pytest.mark.usefixtures("x64")
def test_control_variate_noise_falls_with_the_square_of_the_distance():
    """Exact variances over all blocks, at distances 1 and 1/10 ... : a factor of 100 each, asymptotically."""
    posterior = logistic_regression()
    centre = jnp.array([0.4, -0.2, 0.1])
    direction = jnp.array([0.6, 0.0, -0.8])
    estimator = ControlVariate(Minibatch(posterior, 5), centre)

    def variance(distance):
        theta, blocks = centre + distance * direction, range(estimator.minibatch.num_blocks)
        return np.var([at_block(estimator, theta, k).gradient for k in blocks], axis=0).sum()

    far, near, nearer = variance(0.1), variance(0.01), variance(0.001)
    assert near / nearer == pytest.approx(100, rel=0.01)
    assert far / near == pytest.approx(100, rel=0.1)
    assert variance(0.0) < 1e-24


def test_control_variate_costs_two_gradients_a_row():
    posterior = logistic_regression()
    estimator = ControlVariate(Minibatch(posterior, 5), jnp.zeros(3))
    assert estimator.at(jnp.ones(3), estimator.minibatch.block(0)).n_grad == 10


@pytest.mark.usefixtures("x64")
def test_full_likelihood_gradient_in_chunks(monkeypatch):
    """The chunked sum at construction is the sum, with and without a remainder."""
    import ergodica.estimators.minibatch.control_variate as module

    posterior, theta = logistic_regression(num_data=30), jnp.array(THETA)
    expected = jax.grad(lambda t: jnp.sum(posterior.log_likelihood(t, posterior.data)))(theta)
    for chunk in (7, 10, 30, 100):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        traced_anew = jax.jit(lambda *args: module.full_likelihood_gradient.__wrapped__(*args))
        np.testing.assert_allclose(traced_anew(posterior, theta)[1], expected, rtol=1e-12)


def test_control_variate_errors():
    posterior = logistic_regression()
    minibatch = Minibatch(posterior, 5)
    with pytest.raises(TypeError, match="gradient must be a Minibatch; got Posterior"):
        ControlVariate(posterior, jnp.zeros(3))
    with pytest.raises(ValueError, match="centre must have the shape"):
        ControlVariate(minibatch, jnp.zeros(2))
    with pytest.raises(ValueError, match="centre must have the structure"):
        ControlVariate(minibatch, {"theta": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"centre.* must be finite"):
        ControlVariate(minibatch, jnp.array([0.0, jnp.nan, 0.0]))
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=100, initial=jnp.array(0.0))
    with pytest.raises(ValueError, match="needs all the data once"):
        ControlVariate(Minibatch(streamed, 10), jnp.array(0.0))
