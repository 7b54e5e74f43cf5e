"""Rows drawn with given probabilities: exactly unbiased at any rounding, with the variance that theory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.estimators import SVRG, ControlVariate, Minibatch, importance_probabilities
from ergodica.estimators.minibatch import importance
from tests.support.problems import linear_regression

NUM_DATA = 12
THETA = (0.3, -1.2, 0.8)
WRAPPERS = {
    "plain": lambda minibatch: minibatch,
    "control variate": lambda minibatch: ControlVariate(minibatch, jnp.array([0.5, 0.5, -0.5])),
}


def probabilities(num_data=NUM_DATA):
    p = np.linspace(1.0, 5.0, num_data)
    return p / p.sum()


def chances(proposal):
    """Probability with which each row is drawn: its share of the 2^32 words."""
    edges = np.concatenate([[0], np.asarray(proposal.edges).astype(np.int64), [2**32]])
    return np.diff(edges) / 2**32


def data_gradients(posterior, theta):
    gradient = jax.grad(lambda t, row: posterior.log_likelihood(t, jax.tree.map(lambda x: x[None], row))[0])
    return np.asarray(jax.vmap(gradient, in_axes=(None, 0))(theta, posterior.data))


def assert_unbiased(estimator, minibatch):
    """A batch of one row has its weight; the mean under the probabilities of the draw is the full gradient."""
    posterior, theta = minibatch.posterior, jnp.array(THETA)
    value, gradient = jax.value_and_grad(posterior.log_density)(theta)
    chance = chances(minibatch.proposal)
    rows = jnp.arange(NUM_DATA)
    words = jnp.concatenate([jnp.zeros(1, jnp.uint32), minibatch.proposal.edges])  # the first word of each row
    drawn, weight = jax.vmap(lambda word: draw_with(minibatch.proposal, word))(words)
    np.testing.assert_array_equal(drawn[:, 0], rows)
    batches = Batch(jax.tree.map(lambda x: x[:, None], posterior.data), weight)
    estimates = jax.vmap(lambda batch: estimator.at(theta, batch))(batches)
    np.testing.assert_allclose(chance @ estimates.gradient, gradient, rtol=1e-12)
    np.testing.assert_allclose(chance @ estimates.value, value, rtol=1e-12)


def draw_with(proposal, *words):
    """What `draw_rows` makes of given random words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.stack(words))
        return importance.draw_rows(jax.random.key(0), proposal, len(words))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_unbiased(wrap):
    minibatch = Minibatch(linear_regression(NUM_DATA), 1, "importance", probabilities=probabilities())
    assert_unbiased(WRAPPERS[wrap](minibatch), minibatch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mutant", ["no weight", "weight of the probabilities as given"])
def test_mutants_of_the_weight_are_rejected(mutant, monkeypatch):
    p = probabilities() * (1 + 1e-4 * (-1) ** np.arange(NUM_DATA))
    minibatch = Minibatch(linear_regression(NUM_DATA), 1, "importance", probabilities=p)
    assert_unbiased(minibatch, minibatch)
    wrong = np.ones(NUM_DATA) if mutant == "no weight" else 1 / (NUM_DATA * probabilities())
    object.__setattr__(minibatch.proposal, "weight", jnp.asarray(wrong))
    with pytest.raises(AssertionError):
        assert_unbiased(minibatch, minibatch)


@pytest.mark.usefixtures("x64")
def test_weights_of_a_batch_are_shared_by_its_rows():
    minibatch = Minibatch(linear_regression(NUM_DATA), 5, "importance", probabilities=probabilities())
    batch = minibatch.independent_batch(jax.random.key(0))
    chance = dict(zip(np.asarray(minibatch.posterior.data["y"]).tolist(), chances(minibatch.proposal), strict=True))
    expected = [1 / (5 * NUM_DATA * chance[y]) for y in np.asarray(batch.data["y"]).tolist()]
    np.testing.assert_allclose(batch.weight, expected, rtol=1e-12)


def test_each_word_belongs_to_one_row():
    """The first and last word of every row, and the ends of the range."""
    proposal = importance.make_proposal(probabilities(), NUM_DATA)
    edges = np.asarray(proposal.edges)
    words = [jnp.uint32(0), *map(jnp.uint32, edges - np.uint32(1)), *map(jnp.uint32, edges), jnp.uint32(2**32 - 1)]
    rows, _ = draw_with(proposal, *words)
    np.testing.assert_array_equal(rows, [0, *range(NUM_DATA - 1), *range(1, NUM_DATA), NUM_DATA - 1])


def test_rows_come_up_as_often_as_they_should():
    p = probabilities()
    minibatch = Minibatch(linear_regression(NUM_DATA), 5, "importance", probabilities=p)
    y = np.asarray(minibatch.posterior.data["y"])
    batches = jax.jit(jax.vmap(minibatch.independent_batch))(jax.random.split(jax.random.key(1), 20_000))
    counts = np.array([np.sum(np.asarray(batches.data["y"]) == value) for value in y])
    expected = 100_000 * p
    assert np.sum((counts - expected) ** 2 / expected) < chi2.isf(1e-7, NUM_DATA - 1)


def test_a_million_rows_keep_their_probabilities_in_single_precision():
    """Where a cumulative sum in single precision misstates some by more than a tenth."""
    num_data = 1_000_000
    p = 0.5 / num_data + 0.5 * np.linspace(0.5, 1.5, num_data) / num_data
    p /= p.sum()
    proposal = importance.make_proposal(jnp.asarray(p, jnp.float32), num_data)
    chance = chances(proposal)
    np.testing.assert_allclose(chance, p, rtol=5e-4)  # one in 2^32 of a probability of 1e-6
    np.testing.assert_allclose(np.asarray(proposal.weight, np.float64) * num_data * chance, 1.0, rtol=1e-6)
    single = np.diff(np.cumsum(p.astype(np.float32)), prepend=np.float32(0))
    assert np.max(np.abs(single / p - 1)) > 0.01


@pytest.mark.usefixtures("x64")
def test_variance_is_the_closed_form_and_least_at_the_norms():
    """Total variance of one row: sum |g|^2 / p - |sum g|^2; (sum |g|)^2 - |sum g|^2 for p in proportion to |g|."""
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    gradients = data_gradients(posterior, theta)
    norms, mean = np.linalg.norm(gradients, axis=1), gradients.sum(axis=0)

    def variance(p):
        minibatch = Minibatch(posterior, 1, "importance", probabilities=p)
        chance, weight = chances(minibatch.proposal), np.asarray(minibatch.proposal.weight)
        estimates = NUM_DATA * weight[:, None] * gradients
        return np.sum(chance @ (estimates - chance @ estimates) ** 2)

    p = probabilities()
    np.testing.assert_allclose(variance(p), np.sum(norms**2 / p) - mean @ mean, rtol=1e-7)
    best = variance(importance_probabilities(posterior, theta, floor=1e-6))
    np.testing.assert_allclose(best, norms.sum() ** 2 - mean @ mean, rtol=1e-5)
    assert best < variance(np.full(NUM_DATA, 1 / NUM_DATA))
    rng = np.random.default_rng(0)
    assert all(best < variance(rng.dirichlet(np.full(NUM_DATA, 50.0))) for _ in range(20))


@pytest.mark.usefixtures("x64")
def test_probabilities_are_the_norms_mixed_with_uniform_ones():
    posterior, theta, centre = linear_regression(NUM_DATA), jnp.array(THETA), jnp.zeros(3)
    here, there = data_gradients(posterior, theta), data_gradients(posterior, centre)
    for given, gradients in ((None, here), (centre, here - there)):
        norms = np.linalg.norm(gradients, axis=1)
        expected = 0.8 * norms / norms.sum() + 0.2 / NUM_DATA
        got = importance_probabilities(posterior, theta, centre=given, floor=0.2)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_walk_of_svrg_does_not_use_the_probabilities():
    posterior, theta = linear_regression(NUM_DATA), jnp.array(THETA)
    estimator = SVRG(Minibatch(posterior, 5, "importance", probabilities=probabilities()), centre=jnp.zeros(3))
    state = estimator.init(jax.random.key(0), theta)
    for i in range(3):  # a pass
        _, state = estimator.estimate(jax.random.key(i), theta, state)
    expected = jax.grad(lambda t: jnp.sum(posterior.log_likelihood(t, posterior.data)))(theta)
    np.testing.assert_allclose(state.active.full.gradient, expected, rtol=1e-12)


def test_one_row():
    posterior = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, jnp.array([2.0]), initial=jnp.array(0.0))
    minibatch = Minibatch(posterior, 1, "importance", probabilities=[1.0])
    estimate = minibatch.probe(jax.random.key(0), jnp.array(0.0), None)
    assert float(estimate.gradient) == 2.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full(11, 1 / 11), r"one entry a datum, of shape \(12,\); got \(11,\)"),
        (np.full(12, 0.1), "sum 1; got entries from 0.1 to 0.1 with the sum 1.2"),
        (np.r_[-0.1, np.full(11, 0.1)], "not negative"),
        (np.full(12, np.nan), "finite"),
        (np.r_[0.0, np.full(11, 1 / 11)], "at least 2.3e-10, or the estimate is biased; got 0 for row 0"),
    ],
)
def test_bad_probabilities(given, message):
    with pytest.raises(ValueError, match=message):
        Minibatch(linear_regression(NUM_DATA), 3, "importance", probabilities=given)


def test_errors():
    posterior = linear_regression(NUM_DATA)
    with pytest.raises(ValueError, match=r"scheme='importance', which needs them.*got scheme='uniform' with"):
        Minibatch(posterior, 3, "uniform", probabilities=probabilities())
    with pytest.raises(ValueError, match="got scheme='importance' without"):
        Minibatch(posterior, 3, "importance")
    for floor in (0.0, 1.5):
        with pytest.raises(ValueError, match="floor must be above 0 and at most 1"):
            importance_probabilities(posterior, jnp.zeros(3), floor=floor)
    with pytest.raises(ValueError, match="centre must differ from position"):
        importance_probabilities(posterior, jnp.zeros(3), centre=jnp.zeros(3))
    flat = erg.Posterior(lambda t: -(t**2), lambda t, x: 0.0 * x, jnp.arange(4.0), initial=jnp.array(0.0))
    with pytest.raises(ValueError, match="not all zero"):
        importance_probabilities(flat, jnp.array(0.0))
    with pytest.raises(ValueError, match="centre must have the shape"):
        importance_probabilities(posterior, jnp.zeros(3), centre=jnp.zeros(2))
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=100, initial=jnp.array(0.0))
    with pytest.raises(ValueError, match="needs all the data"):
        importance_probabilities(streamed, jnp.array(0.0))
