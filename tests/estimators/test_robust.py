"""Clipping and robust aggregation: the rules themselves, and that their bias is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.diagnostics.gradients import compare_gradients
from ergodica.estimators import Clipped, Minibatch, RobustAggregate
from ergodica.estimators.minibatch import robust
from tests.support.problems import linear_regression

THETA = (0.3, -1.2, 0.8)
RULES = {"median": {}, "trimmed_mean": {"trim": 1}, "geometric_median": {}}


def data_gradients(posterior, theta):
    x, y = posterior.data["x"], posterior.data["y"]
    return np.asarray(x) * np.asarray(y - x @ theta)[:, None] / 0.7**2


def estimate_of(estimator, theta):
    return estimator.estimate(jax.random.key(0), theta, estimator.init(jax.random.key(1), theta))[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheme", ["blocks", "uniform", "full"])
@pytest.mark.swept_after(1)
def test_clipping(scheme):
    """Each datum's gradient by its own norm, on the batch that was drawn; value and count are the minibatch's."""
    posterior, theta = linear_regression(13), jnp.array(THETA)
    minibatch = Minibatch(posterior, None if scheme == "full" else 5, scheme)
    batch = minibatch.independent_batch(jax.random.key(3))
    max_norm = 1.5
    x, y, weight = np.asarray(batch.data["x"]), np.asarray(batch.data["y"]), np.asarray(batch.weight)
    gradients = x * (y - x @ np.asarray(theta))[:, None] / 0.7**2
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    assert (norms > max_norm).any()
    assert (norms < max_norm).any()
    expected = -np.asarray(theta) + 13 * weight @ (np.minimum(1, max_norm / norms) * gradients)
    got = Clipped(minibatch, max_norm).at(theta, batch)
    np.testing.assert_allclose(got.gradient, expected, rtol=1e-12)
    plain = minibatch.at(theta, batch)
    np.testing.assert_allclose(got.value, plain.value, rtol=1e-12)
    assert got.n_grad == plain.n_grad
    loose = Clipped(minibatch, 1e6).at(theta, batch)
    np.testing.assert_allclose(loose.gradient, plain.gradient, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_clipping_takes_the_norm_over_all_leaves():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[[4.0]], [[0.0]]])}}
    np.testing.assert_allclose(robust.clipping_factors(gradients, jnp.asarray(2.0)), [2 / 5, 1.0], rtol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rule", "num_groups", "options"),
    [
        ("median", 2, {}),
        ("median", 5, {}),
        ("trimmed_mean", 5, {"trim": 1}),
        ("trimmed_mean", 3, {"trim": 1}),
        ("geometric_median", 4, {}),
    ],
)
@pytest.mark.swept_after(2)
def test_aggregation(rule, num_groups, options):
    """Against groups cut in NumPy, with sizes that do not divide and with unequal weights."""
    posterior, theta = linear_regression(13), jnp.array(THETA)
    weight = jnp.linspace(0.05, 0.11, 13)
    estimator = RobustAggregate(Minibatch(posterior, 12), num_groups, rule, **options)
    got = estimator.at(theta, Batch(posterior.data, weight))
    gradients, w = data_gradients(posterior, theta), np.asarray(weight)
    groups = np.array_split(np.arange(13), num_groups)
    means = np.stack([w[rows] @ gradients[rows] / w[rows].sum() for rows in groups])
    expected = {
        "median": lambda: np.median(means, axis=0),
        "trimmed_mean": lambda: np.sort(means, axis=0)[1:-1].mean(axis=0),
        "geometric_median": lambda: np.asarray(robust.geometric_median(jnp.asarray(means), 32)),
    }[rule]()
    np.testing.assert_allclose(got.gradient, -np.asarray(theta) + 13 * w.sum() * expected, rtol=1e-10)
    np.testing.assert_allclose(got.value, Minibatch(posterior, 12).at(theta, Batch(posterior.data, weight)).value)
    assert got.n_grad == 13


@pytest.mark.usefixtures("x64")
@pytest.mark.sweep
def test_the_mean_of_equal_groups_would_be_the_minibatch(monkeypatch):
    """What distinguishes the estimator from an unbiased one is the rule alone."""
    posterior, theta = linear_regression(12), jnp.array(THETA)
    minibatch = Minibatch(posterior, 6)
    mean = lambda self, gradients: jax.tree.map(lambda x: jnp.mean(x, axis=0), gradients)  # noqa: E731
    monkeypatch.setattr(RobustAggregate, "_aggregate", mean)
    got, plain = estimate_of(RobustAggregate(minibatch, 3), theta), estimate_of(minibatch, theta)
    np.testing.assert_allclose(got.gradient, plain.gradient, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_trimmed_mean():
    x = jnp.array([[5.0, 1.0], [1.0, -900.0], [2.0, 3.0], [800.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(robust.trimmed_mean(x, 1), [10 / 3, 2.0])
    np.testing.assert_allclose(robust.trimmed_mean(x, 2), np.median(x, axis=0))


@pytest.mark.usefixtures("x64")
def test_geometric_median_minimises_the_distances():
    """The unit vectors to the points add up to nothing; three corners give the Fermat point; leaves count together."""
    points = jax.random.normal(jax.random.key(0), (7, 3))
    z = robust.geometric_median(points, 200)
    units = (points - z[None]) / jnp.linalg.norm(points - z[None], axis=1, keepdims=True)
    assert np.linalg.norm(units.sum(axis=0)) < 1e-6
    corners = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    np.testing.assert_allclose(robust.geometric_median(corners, 32), [0.5, np.sqrt(3) / 6], rtol=1e-12)
    leaves = {"a": points[:, 0], "b": points[:, 1:, None]}
    together = robust.geometric_median(leaves, 200)
    np.testing.assert_allclose(together["a"], z[0], rtol=1e-9)
    np.testing.assert_allclose(together["b"][:, 0], z[1:], rtol=1e-9)


@pytest.mark.parametrize("num_iterations", [1, 32])
def test_geometric_median_of_equal_points_is_that_point(num_iterations):
    np.testing.assert_array_equal(robust.geometric_median(jnp.full((5, 2), 3.0), num_iterations), 3.0)
    np.testing.assert_array_equal(robust.geometric_median(jnp.zeros((5, 2)), num_iterations), 0.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", [*RULES, "mean"])
def test_one_group_cannot_carry_the_estimate_away(rule):
    """One group in five is replaced by anything: the rules move by no more than the others spread, the mean moves with it."""
    clean = jax.random.normal(jax.random.key(1), (5, 3))
    aggregate = {
        "median": lambda x: robust.trimmed_mean(x, 2),
        "trimmed_mean": lambda x: robust.trimmed_mean(x, 1),
        "geometric_median": lambda x: robust.geometric_median(x, 500),
        "mean": lambda x: jnp.mean(x, axis=0),
    }[rule]
    spread = np.max(np.abs(clean[1:] - jnp.mean(clean[1:], axis=0)[None]))
    moves = [np.max(np.abs(aggregate(clean.at[0].set(size)) - jnp.mean(clean[1:], axis=0))) for size in (1e3, 1e6)]
    assert (max(moves) < 2 * spread) == (rule != "mean")


def skewed():
    """A location model with exponential data: the gradients of single data are skewed."""
    x = jax.random.exponential(jax.random.key(5), (600,))
    return erg.Posterior(lambda t: -0.5 * t**2, lambda t, rows: -0.5 * (rows - t) ** 2, x, initial=jnp.array(0.0))


@pytest.mark.sweep
def test_compare_gradients_calls_them_biased():
    """And the minibatch under them unbiased; the bias of clipping is what its formula says."""
    posterior, theta = skewed(), jnp.array(0.5)
    minibatch = Minibatch(posterior, 30, "uniform")
    estimators = {
        "minibatch": minibatch,
        "clipped": Clipped(minibatch, 1.0),
        **{rule: RobustAggregate(minibatch, 5, rule, **options) for rule, options in RULES.items()},
    }
    table = compare_gradients(jax.random.key(6), estimators, theta, num_repeats=4000, num_timings=0)
    verdicts = dict(zip(estimators, table.verdict.sel(point=0).values.tolist(), strict=True))
    assert verdicts == {"minibatch": "unbiased"} | dict.fromkeys(list(estimators)[1:], "biased")
    gradients = np.asarray(posterior.data) - 0.5
    bias = np.sum(np.clip(gradients, -1.0, 1.0)) - np.sum(gradients)
    clipped = table.sel(estimator="clipped", point=0)
    assert abs(clipped.bias.item() - bias) < 5 * clipped.standard_error.item()
    assert abs(bias) > 50 * clipped.standard_error.item()


def test_errors():
    posterior = linear_regression(12)
    minibatch = Minibatch(posterior, 6)
    for make in (lambda g: Clipped(g, 1.0), lambda g: RobustAggregate(g, 2)):
        with pytest.raises(TypeError, match="gradient must be an Minibatch"):
            make(posterior)
    for max_norm in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="max_norm must be finite and above 0"):
            Clipped(minibatch, max_norm)
    with pytest.raises(ValueError, match="num_groups must be at least 2; got 1"):
        RobustAggregate(minibatch, 1)
    with pytest.raises(ValueError, match=r"num_groups must be at most half.*got 4 groups for batches of 6 rows"):
        estimate_of(RobustAggregate(minibatch, 4), jnp.zeros(3))
    with pytest.raises(ValueError, match="rule must be one of 'median', 'trimmed_mean', 'geometric_median'"):
        RobustAggregate(minibatch, 2, "mean")
    with pytest.raises(ValueError, match=r"trim belongs to rule='trimmed_mean'.*got rule='median' and trim=1"):
        RobustAggregate(minibatch, 3, trim=1)
    with pytest.raises(ValueError, match="which needs it; got rule='trimmed_mean' and trim=None"):
        RobustAggregate(minibatch, 3, "trimmed_mean")
    with pytest.raises(ValueError, match=r"trim must be between 1 and 1; got 2\. There are 3 groups"):
        RobustAggregate(minibatch, 3, "trimmed_mean", trim=2)


@pytest.mark.parametrize("make", [lambda g: Clipped(g, 1.0), lambda g: RobustAggregate(g, 2)])
def test_streamed_rows(make):
    """Without data there is no probe; batches that are handed over are taken."""
    streamed = erg.Posterior(lambda t: -(t**2), lambda t, x: x * t, num_data=100, initial=jnp.array(0.0))
    estimator, theta = make(Minibatch(streamed, 10)), jnp.array(0.5)
    state = estimator.init(jax.random.key(0), theta)
    assert estimator.probe(jax.random.key(1), theta, state) is None
    estimate, _ = estimator.estimate(jax.random.key(1), theta, state, jnp.full(4, 0.5))
    assert float(estimate.gradient) == pytest.approx(-1.0 + 100 * 0.5)
    with pytest.raises(ValueError, match="holds no data"):
        estimator.estimate(jax.random.key(1), theta, state)
