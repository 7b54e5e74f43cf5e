"""Expectations with control variates: exact where they must be, unbiased where they are not, honest about what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy.special import digamma

import ergodica as erg
from ergodica.diagnostics import control_variate_expectation
from ergodica.diagnostics.control_functions import fit_polynomial, kernel_regression, ridge_regression
from ergodica.diagnostics.control_variates import METHODS
from tests.support.statistics import REJECTION

SHAPE = 3.0


def as_tree(x, **attrs):
    dt = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": (("chain", "draw", "i"), x)})})
    dt.attrs.update(attrs)
    return dt


def log_gamma(generator, num_chains, num_draws, dim=2):
    """Logarithms of gamma draws, their score, and their mean."""
    x = np.log(generator.gamma(SHAPE, size=(num_chains, num_draws, dim)))
    return x, SHAPE - np.exp(x), digamma(SHAPE)


@pytest.fixture(scope="module")
def gaussian():
    generator = np.random.default_rng(0)
    root = generator.normal(size=(4, 4))
    covariance, mean = root @ root.T + np.eye(4), np.array([1.0, -200.0, 0.01, 3.0])
    x = generator.multivariate_normal(mean, covariance, size=(4, 60))
    return x, -(x - mean) @ np.linalg.inv(covariance), mean, covariance


def test_exact_for_polynomials_of_a_gaussian(gaussian):
    x, scores, mean, covariance = gaussian
    table = control_variate_expectation(as_tree(x), scores=scores, method="linear")
    np.testing.assert_allclose(table["mean"], mean, rtol=1e-9)
    assert (table.mcse < 1e-9 * np.abs(mean)).all()
    squares = control_variate_expectation(as_tree(x), lambda d: d**2, scores=scores)
    np.testing.assert_allclose(squares["mean"], mean**2 + np.diag(covariance), rtol=1e-9)
    assert set(squares.method) == {"quadratic"}
    wrong = control_variate_expectation(as_tree(x), lambda d: d**2, scores=-scores, method="quadratic")
    assert (abs(wrong["mean"] / (mean**2 + np.diag(covariance)) - 1) > 1e-9).any(), (
        "scores of the wrong sign are not exact"
    )


@pytest.mark.parametrize("method", ["linear", "quadratic", "kernel+linear"])
def test_unbiased_with_the_error_that_it_says(method):
    """Smallest error seen: .01 standard deviations for the linear method. Errors are those of the runs, within 20%."""
    generator, repeats = np.random.default_rng(1), 60
    tables = []
    for _ in range(repeats):
        x, scores, mean = log_gamma(generator, 4, 15 if "kernel" in method else 50, dim=1)
        tables.append(control_variate_expectation(as_tree(x), scores=scores, method=method).iloc[0])
    found, said = np.array([t["mean"] for t in tables]), np.array([t.mcse for t in tables])
    assert abs(found.mean() - mean) < REJECTION * found.std(ddof=1) / np.sqrt(repeats)
    assert 0.7 < np.sqrt(np.mean(said**2)) / found.std(ddof=1) < 1.3
    plain = np.array([t.plain_mean for t in tables])
    assert plain.var() / found.var() > {"linear": 3.0, "quadratic": 25.0, "kernel+linear": 8.0}[method]


def test_fitting_and_evaluating_on_the_same_draws_is_another_matter():
    """The mutant: with nearly as many controls as draws, errors within the sample say nothing."""
    generator = np.random.default_rng(2)
    x, scores = generator.normal(size=(2, 40, 8)), None
    f = np.abs(x).sum(axis=-1, keepdims=True)
    scores = -x
    flat, slopes, values = x.reshape(80, 8), scores.reshape(80, 8), f.reshape(80, 1)
    inside = values - fit_polynomial(flat, slopes, values, 2)(flat, slopes)
    table = control_variate_expectation(
        as_tree(x), lambda d: abs(d).sum("i"), scores=scores, method="quadratic", num_folds=2
    )
    truth = 8 * np.sqrt(2 / np.pi)
    assert abs(table["mean"].iloc[0] - truth) < REJECTION * table.mcse.iloc[0]
    assert inside.std() / np.sqrt(80) < 0.7 * table.mcse.iloc[0]


def test_the_best_of_several_is_chosen_and_never_worse_than_the_plain_mean():
    x, scores, _ = log_gamma(np.random.default_rng(3), 4, 100)
    table = control_variate_expectation(
        as_tree(x), lambda d: xr.merge([d, np.sign(np.sin(40 * d.x)).rename("steps")]), scores=scores
    )
    assert set(table.method[:2]) == {"quadratic"}
    assert set(table.method[2:]) == {"plain"}
    assert (table.variance_ratio[2:] == 1).all()


def test_more_controls_than_draws_are_shrunk():
    generator = np.random.default_rng(4)
    controls, f = generator.normal(size=(30, 100)), generator.normal(size=(30, 1))
    assert np.linalg.norm(controls @ ridge_regression(controls, f)) < 0.5 * np.linalg.norm(f)
    signal = controls[:, :1] * 5
    assert np.corrcoef((controls @ ridge_regression(controls, signal)).T, signal.T)[0, 1] > 0.9


def test_kernel_regression_interpolates_as_its_normal_equations_say():
    generator = np.random.default_rng(5)
    root = generator.normal(size=(12, 12))
    kernel, free, f = root @ root.T, np.ones((12, 1)), generator.normal(size=(12, 1))
    weights, linear = kernel_regression(kernel, free, f)
    np.testing.assert_allclose(free.T @ weights, 0.0, atol=1e-10)
    ridge = (f - kernel @ weights - free @ linear) / weights
    assert np.ptp(ridge) < 1e-8 * ridge.max()
    assert ridge.min() > 0


@pytest.fixture(scope="module")
def run():
    generator = np.random.default_rng(6)
    x = jnp.asarray(generator.normal(size=(60, 2)), jnp.float32)
    y = jnp.asarray(generator.random(60) < 1 / (1 + np.exp(-x @ np.array([1.0, -0.5]))), jnp.float32)

    def log_likelihood(position, row):
        logit = row["x"] @ position
        return row["y"] * logit - jax.nn.softplus(logit)

    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), log_likelihood, {"x": x, "y": y}, initial=jnp.zeros(2))
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 1e-3)
    dt = erg.sample(jax.random.key(0), sampler, num_samples=200, num_warmup=200, num_chains=2, thin=5)
    return posterior, dt


class TestOnARun:
    def test_posterior_gives_the_scores(self, run):
        posterior, dt = run
        table = control_variate_expectation(dt, posterior=posterior)
        assert (table.variance_ratio > 20).all()
        assert table.attrs["num_scores"] == 400
        assert "approximate sampler" in table.attrs["notes"][0]
        assert table.attrs["stein_z"] < 6

    def test_noisy_scores_of_a_minibatch(self, run):
        posterior, dt = run
        gradient = erg.estimators.ControlVariate(erg.estimators.Minibatch(posterior, 20), jnp.array([0.8, -0.4]))
        table = control_variate_expectation(dt, gradient=gradient, key=jax.random.key(1), method="linear")
        exact = control_variate_expectation(dt, posterior=posterior, method="linear")
        assert (abs(table["mean"] - exact["mean"]) < REJECTION * np.hypot(table.mcse, exact.mcse)).all()
        assert any("noisy" in note for note in table.attrs["notes"])

    def test_scores_of_another_density_are_noticed(self, run):
        _, dt = run
        other = erg.Posterior(lambda t: -0.5 * jnp.sum((t - 1) ** 2) / 0.01, initial=jnp.zeros(2))
        table = control_variate_expectation(dt, posterior=other)
        assert table.attrs["stein_z"] > 10
        assert any("identity fails" in note for note in table.attrs["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give one of posterior=, scores= and gradient="),
        ({"scores": np.zeros((2, 5, 3))}, "shape of the draws, \\(2, 40, 2\\)"),
        ({"scores": np.full((2, 40, 2), np.nan)}, "NaN or infinite"),
        ({"scores": np.zeros((2, 40, 2)), "method": "cubic"}, f"one of .*{METHODS[0]}"),
        ({"scores": np.zeros((2, 40, 2)), "num_folds": 3}, "at most 2"),
        ({"scores": np.zeros((2, 40, 2)), "function": lambda d: d.mean()}, "a value a draw"),
        ({"scores": np.zeros((2, 40, 2)), "function": lambda d: d / 0}, "no mean"),
    ],
)
def test_bad_input(arguments, message):
    dt = as_tree(np.random.default_rng(7).normal(size=(2, 40, 2)))
    with np.errstate(all="ignore"), pytest.raises((ValueError, TypeError), match=message):
        control_variate_expectation(dt, **arguments)
