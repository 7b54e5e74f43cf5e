"""Bias, variance and cost of gradient estimators against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Estimate
from ergodica.diagnostics.gradient_points import training_points
from ergodica.diagnostics.gradient_table import GradientComparison
from ergodica.diagnostics.gradients import compare_gradients
from ergodica.estimators import ControlVariate, Minibatch

N, D, BATCH = 600, 3, 25


def log_prior(theta):
    return -0.5 * jnp.sum(theta**2)


def linear_log_likelihood(theta, rows):
    x, y = rows
    return -0.5 * (y - x @ theta) ** 2


def location_log_likelihood(theta, rows):
    return -0.5 * jnp.sum((rows - theta[None]) ** 2, axis=1)


@pytest.fixture(scope="module")
def regression():
    key_x, key_y = jax.random.split(jax.random.key(1))
    x = jax.random.normal(key_x, (N, D))
    y = x @ jnp.array([1.0, -1.0, 0.5]) + jax.random.normal(key_y, (N,))
    return Posterior(log_prior, linear_log_likelihood, (x, y), initial=jnp.zeros(D))


class Distorted(AbstractGradientEstimator):
    """A wrong estimator: a factor before the gradient, and what the likelihood is scaled by."""

    inner: AbstractGradientEstimator
    factor: float = 1.0
    likelihood_factor: float = 1.0

    def init(self, key, params, batch=None):
        return self.inner.init(key, params, batch)

    def estimate(self, key, params, state, batch=None):
        estimate, state = self.inner.estimate(key, params, state, batch)
        prior = jax.grad(log_prior)(params)
        gradient = jax.tree.map(
            lambda g, p: self.factor * (p + self.likelihood_factor * (g - p)), estimate.gradient, prior
        )
        return Estimate(gradient, estimate.value, n_grad=estimate.n_grad), state

    @property
    def posterior(self):
        return self.inner.posterior

    @property
    def exact(self):
        return self.inner.exact


class Noisy(AbstractGradientEstimator):
    """Gradient of -|θ|²/2 with unit noise: no posterior, no count of data."""

    shift: float = 0.0

    def init(self, key, params, batch=None):
        return None

    def estimate(self, key, params, state, batch=None):
        noise = jax.random.normal(key, params.shape)
        return Estimate(self.shift - params + noise, jnp.zeros(())), None


def data_gradients(posterior, theta):
    """Gradient of each datum's log likelihood, (N, D)."""
    x, y = posterior.data
    return np.asarray(x) * np.asarray(y - x @ theta)[:, None]


def test_uniform_variance_is_that_of_the_population(regression):
    theta = jnp.array([0.3, 0.0, -0.2])
    table = compare_gradients(
        jax.random.key(2), {"uniform": Minibatch(regression, BATCH, "uniform")}, theta, num_repeats=4000, num_timings=0
    )
    expected = N**2 / BATCH * data_gradients(regression, theta).var(axis=0).sum()
    (cell,) = (table.isel(estimator=0, point=0),)
    # the interval has half-width 5.6%: a missing n or N, or the sd for the variance, is far outside
    assert cell.variance_lower < expected < cell.variance_upper
    assert cell.variance_upper / cell.variance_lower < 1.2
    assert cell.datum_gradients == BATCH
    np.testing.assert_allclose(cell.work_variance, cell.variance * BATCH)


def test_block_variance_is_that_of_the_block_sums(regression):
    theta = jnp.array([0.3, 0.0, -0.2])
    gradient = Minibatch(regression, BATCH, "blocks")
    sums = np.stack([tree.ravel(gradient.at(theta, gradient.block(k)).gradient) for k in range(gradient.num_blocks)])
    table = compare_gradients(jax.random.key(3), {"blocks": gradient}, theta, num_repeats=4000, num_timings=0)
    assert table.variance_lower < sums.var(axis=0).sum() < table.variance_upper
    assert table.verdict.item() != "biased"


def test_control_variate_of_equal_curvatures_has_no_noise():
    rows = jax.random.normal(jax.random.key(4), (N, D))
    posterior = Posterior(log_prior, location_log_likelihood, rows, initial=jnp.zeros(D))
    minibatch = Minibatch(posterior, BATCH, "uniform")
    estimators = {"plain": minibatch, "centred": ControlVariate(minibatch, jnp.ones(D))}
    table = compare_gradients(jax.random.key(5), estimators, jnp.full(D, 2.0), num_timings=0)
    centred = table.sel(estimator="centred", point=0)
    assert centred.variance < centred.rounding_variance
    assert centred.verdict == "unbiased"
    assert centred.datum_gradients == 2 * BATCH
    assert table.sel(estimator="plain", point=0).variance > 1e6 * centred.rounding_variance


def test_exact_estimators_are_compared_up_to_rounding(regression):
    full = Minibatch(regression, scheme="full")
    estimators = {"full": full, "wrong": Distorted(full, factor=1.001)}
    table = compare_gradients(jax.random.key(6), estimators, jnp.ones(D), num_timings=0)
    assert table.verdict.values.tolist() == [["unbiased"], ["biased"]]
    assert table.variance.values.tolist() == [[0.0], [0.0]]
    assert table.bias_bound.sel(estimator="full").item() < 1e-4


@pytest.mark.parametrize("mutant", [{"likelihood_factor": BATCH / N}, {"factor": 0.5}], ids=["missing N/n", "halved"])
@pytest.mark.parametrize("scheme", ["uniform", "blocks"])
@pytest.mark.swept_after(2)
def test_a_biased_estimator_is_flagged(regression, mutant, scheme):
    gradient = Minibatch(regression, BATCH, scheme)
    start = jnp.zeros(D)
    estimators = {"right": gradient, "wrong": Distorted(gradient, **mutant)}
    table = compare_gradients(jax.random.key(7), estimators, start, num_timings=0)
    assert table.verdict.sel(point=0).values.tolist() == ["unbiased", "biased"]
    assert table.z.sel(estimator="wrong").max() > 10


def test_undecided_where_noise_hides_the_gradient(regression):
    x, y = regression.data
    mode = jnp.linalg.solve(x.T @ x + jnp.eye(D), x.T @ y)
    table = compare_gradients(
        jax.random.key(8), {"uniform": Minibatch(regression, BATCH, "uniform")}, [mode, jnp.zeros(D)], num_timings=0
    )
    assert table.verdict.values.tolist() == [["undecided", "unbiased"]]
    assert table.bias_bound.sel(point=0).item() > 0.1 > table.bias_bound.sel(point=1).item()


def test_intervals_cover_and_false_alarms_are_rare():
    """Coverage at 90% and alarms at 10%, over 300 comparisons, within the binomial law at one in 10⁵."""
    level, runs = 0.9, 300
    covered, alarms = 0, 0
    rows = jax.random.normal(jax.random.key(9), (200, D)) ** 3
    posterior = Posterior(log_prior, location_log_likelihood, rows, initial=jnp.zeros(D))
    gradient = Minibatch(posterior, 20, "uniform")
    expected = 200**2 / 20 * np.asarray(rows).var(axis=0).sum()
    for seed in range(runs):
        table = compare_gradients(
            jax.random.key(seed), {"uniform": gradient}, jnp.ones(D), num_repeats=500, confidence=level, num_timings=0
        )
        covered += bool(table.variance_lower < expected < table.variance_upper)
        alarms += table.verdict.item() == "biased"
    assert binom.cdf(covered, runs, level) > 1e-5, f"covered {covered} of {runs}"
    assert binom.sf(covered, runs, 0.97) > 1e-5, f"covered {covered} of {runs}: the intervals are too wide"
    assert binom.sf(alarms - 1, runs, 1 - level) > 1e-5, f"{alarms} alarms of {runs}"


def test_pooled_reference_sees_disagreement():
    estimators = {"a": Noisy(), "b": Noisy(), "shifted": Noisy(shift=0.5)}
    table = compare_gradients(jax.random.key(10), estimators, jnp.ones(D), num_timings=0)
    assert table.attrs["reference"] == "pooled"
    assert "biased" in table.verdict.values
    agreeing = {name: estimators[name] for name in "ab"}
    table = compare_gradients(jax.random.key(10), agreeing, jnp.ones(D), num_repeats=1000, num_timings=0)
    np.testing.assert_allclose(table.z.sel(estimator="a"), -table.z.sel(estimator="b"), rtol=1e-6)
    assert "biased" not in table.verdict.values
    assert np.isnan(table.datum_gradients).all()
    # the mean of two has half the variance: var(a - pooled) = var(a) - var(pooled)
    np.testing.assert_allclose(table.standard_error, np.sqrt(1 / 2000), rtol=0.1)


def test_reference_by_name():
    estimators = {"trusted": Noisy(), "shifted": Noisy(shift=0.5)}
    table = compare_gradients(
        jax.random.key(11), estimators, jnp.ones(D), reference="trusted", num_repeats=1000, num_timings=0
    )
    assert table.verdict.sel(estimator="shifted").item() == "biased"
    assert table.bias.sel(estimator="trusted").values.tolist() == [[0.0] * D]
    np.testing.assert_allclose(table.standard_error.sel(estimator="shifted"), np.sqrt(2 / 1000), rtol=0.1)


def test_result_is_a_dataset_with_table_and_figure(regression, tmp_path):
    estimators = {
        "full": Minibatch(regression, scheme="full"),
        "blocks": Minibatch(regression, BATCH),
    }
    table = compare_gradients(jax.random.key(12), estimators, [jnp.zeros(D), jnp.ones(D)], num_timings=3)
    assert isinstance(table, xr.Dataset)
    assert dict(table.sizes) == {"estimator": 2, "point": 2, "coordinate": D}
    assert list(table.coordinate.values) == ["position[0]", "position[1]", "position[2]"]
    assert table.time_ratio.sel(estimator="full").item() == 1.0
    assert (table.seconds > 0).all()
    assert (table.time_ratio_lower <= table.time_ratio).all()
    summary = table.summary
    assert summary.loc[(0, "blocks"), "verdict"] == "unbiased"
    assert summary.loc[(1, "blocks"), "datum_gradients"] == BATCH
    figure = table.plot()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["full", "blocks"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["no noise"] * 2
    table.to_netcdf(tmp_path / "table.nc")
    assert xr.open_dataset(tmp_path / "table.nc").verdict.values.tolist() == table.verdict.values.tolist()


def test_pytree_positions_are_named():
    posterior = Posterior(
        lambda theta: -0.5 * theta["b"] ** 2,
        lambda theta, x: -0.5 * jnp.sum((x - theta["a"][None] - theta["b"]) ** 2, axis=1),
        jnp.ones((40, 2)),
        initial={"a": jnp.zeros(2), "b": jnp.array(0.0)},
    )
    table = compare_gradients(
        jax.random.key(13), {"blocks": Minibatch(posterior, 10)}, posterior.initial, num_timings=0
    )
    assert list(table.coordinate.values) == ["a[0]", "a[1]", "b"]


class TestErrors:
    def test_nan(self, regression):
        posterior = Posterior(
            log_prior, lambda t, rows: jnp.log(rows[1] * 0 + t[1]), regression.data, initial=jnp.zeros(D)
        )
        with pytest.raises(
            ValueError, match=r"estimators\['m'\] gave gradients that are NaN .* point 1, .*position\[1\]"
        ):
            compare_gradients(jax.random.key(0), {"m": Minibatch(posterior, 5, "uniform")}, [jnp.ones(D), jnp.zeros(D)])

    def test_arguments(self, regression):
        gradient = {"m": Minibatch(regression, 5)}
        key, theta = jax.random.key(0), jnp.zeros(D)
        with pytest.raises(TypeError, match="typed key"):
            compare_gradients(jnp.zeros(2, jnp.uint32), gradient, theta)
        with pytest.raises(TypeError, match="must map names"):
            compare_gradients(key, gradient["m"], theta)
        with pytest.raises(TypeError, match=r"estimators\['x'\] must be"):
            compare_gradients(key, {"x": log_prior}, theta)
        with pytest.raises(ValueError, match="must be one of 'auto', 'exact', 'pooled', 'm'; got 'true'"):
            compare_gradients(key, gradient, theta, reference="true")
        with pytest.raises(ValueError, match=r"params\[1\] must have the shape \(3,\)"):
            compare_gradients(key, gradient, [theta, jnp.zeros(2)])
        with pytest.raises(ValueError, match="at least one point"):
            compare_gradients(key, gradient, [])
        with pytest.raises(ValueError, match="num_repeats must be at least 30"):
            compare_gradients(key, gradient, theta, num_repeats=3)
        with pytest.raises(ValueError, match="confidence"):
            compare_gradients(key, gradient, theta, confidence=95)

    def test_nothing_to_compare_with(self):
        with pytest.raises(ValueError, match="nothing to be compared with"):
            compare_gradients(jax.random.key(0), {"a": Noisy()}, jnp.ones(D))
        with pytest.raises(ValueError, match="posterior holds its data"):
            compare_gradients(jax.random.key(0), {"a": Noisy(), "b": Noisy()}, jnp.ones(D), reference="exact")


class TestRepeats:
    def test_as_many_as_are_needed(self, regression):
        """A bias of 6% is found at default settings; where the cap is met, the notes say how many repeats it would take."""
        gradient = Minibatch(regression, BATCH, "uniform")
        x, y = regression.data
        mode = jnp.linalg.solve(x.T @ x + jnp.eye(D), x.T @ y)
        estimators = {"right": gradient, "wrong": Distorted(gradient, factor=0.94)}
        table = compare_gradients(jax.random.key(14), estimators, [jnp.zeros(D), mode], num_timings=0, max_repeats=3000)
        assert table.verdict.sel(point=0).values.tolist() == ["unbiased", "biased"]
        assert table.repeats.values.tolist() == [[int(table.repeats[0, 0]), 3000]] * 2
        assert (table.repeats_needed.sel(point=0) <= 3000).all()
        assert (table.repeats_needed.sel(point=1) > 3000).all()
        assert table.control.values.tolist() == [["found", "missed"]] * 2
        notes = "\n".join(table.notes)
        assert "right at point 1: 3,000 repeats were taken, and" in notes
        assert "right at point 1: the same gradient shrunk by 5% was not found biased" in notes
        assert "right at point 0" not in notes

    def test_memory_is_bounded(self, monkeypatch, regression):
        from ergodica.diagnostics import gradients

        monkeypatch.setattr(gradients, "MOST_NUMBERS", 2000 * D)
        table = compare_gradients(
            jax.random.key(14), {"m": Minibatch(regression, 2, "uniform")}, jnp.zeros(D), num_timings=0
        )
        assert table.repeats.item() == 2000


class TestResult:
    def test_round_trip_through_a_file(self, regression, tmp_path):
        estimators = {"full": Minibatch(regression, scheme="full"), "blocks": Minibatch(regression, BATCH)}
        table = compare_gradients(
            jax.random.key(15),
            estimators,
            [jnp.zeros(D), jnp.ones(D)],
            num_repeats=500,
            num_timings=0,
            split_variance=True,
        ).assign_coords(point=["start", "there"])
        table.to_netcdf(tmp_path / "table.nc")
        again = GradientComparison.open(tmp_path / "table.nc")
        xr.testing.assert_identical(
            xr.Dataset(again.data_vars, again.coords), xr.Dataset(table.data_vars, table.coords)
        )
        assert again.notes == table.notes
        assert again.to_markdown() == table.to_markdown()
        assert "| blocks | unbiased |" in table.to_markdown()
        assert "**start**" in table.to_markdown()
        assert again.plot().axes[0].get_xlabel() == "variance × datum gradients"
        assert (table.variance_sampling.sel(estimator="blocks") == 0).all()
        blocks = table.sel(estimator="blocks")
        assert (blocks.variance_data_lower < blocks.variance).all()
        assert (blocks.variance_data_upper > blocks.variance).all()

    def test_names_that_mean_references(self, regression):
        for name in ("auto", "exact", "pooled"):
            with pytest.raises(ValueError, match=f"has the name '{name}', which is what reference='{name}' stands for"):
                compare_gradients(jax.random.key(0), {name: Minibatch(regression, 5)}, jnp.zeros(D))
        with pytest.raises(ValueError, match=r"budget=10 cannot be given to estimators\['m'\], a Minibatch"):
            compare_gradients(jax.random.key(0), {"m": Minibatch(regression, 5)}, jnp.zeros(D), budget=10)


class TestTrainingPoints:
    def test_half_way_in_the_objective(self, regression):
        """The optimum is the mode up to noise; the middle has made half of the way."""
        gradient = Minibatch(regression, BATCH)
        points = training_points(jax.random.key(16), gradient, jnp.full(D, -1.0), num_steps=600, learning_rate=0.01)
        values = [float(regression.log_density(p)) for p in points]
        x, y = regression.data
        mode = jnp.linalg.solve(x.T @ x + jnp.eye(D), x.T @ y)
        np.testing.assert_allclose(points[2], mode, atol=0.05)
        assert 0.3 < (values[1] - values[0]) / (values[2] - values[0]) < 0.7
        table = compare_gradients(jax.random.key(17), {"m": gradient}, points, num_repeats=50, num_timings=0)
        assert table.point.values.tolist() == ["start", "middle", "optimum"]
        assert table.notes[0] == "The reference is exact."

    def test_no_ascent(self, regression):
        with pytest.raises(ValueError, match="which is no ascent"):
            training_points(
                jax.random.key(18), Distorted(Minibatch(regression, BATCH), factor=-1.0), jnp.zeros(D), num_steps=100
            )
