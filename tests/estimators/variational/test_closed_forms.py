"""Variances of single estimators against closed forms, by `expectation_gradient`.

Mohamed et al. (2020) plot these for normal laws; the formulas are worked out for f quadratic, cosine and exponential, and for
one bit. Each is checked at three or more points.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from ergodica.estimators import Enumerate, LeaveOneOut, Reparam, Score, expectation_gradient
from ergodica.estimators.variational.objectives.wake_sleep import normalised_weights
from ergodica.estimators.variational.sites.score import finite_baseline, vimco_baseline

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

REPEATS = 60_000
POINTS = [(1.0, 1.0, 0.0), (1.0, 1.5, 0.8), (-0.5, 0.7, 1.2)]


def check_variance(draws, exact, *, smallest_error):
    """|z| < 5 for the mean squared deviation, with the standard error of the squares; and no blindness."""
    squares = (np.asarray(draws) - np.mean(draws, axis=0)) ** 2
    error = squares.std(axis=0) / np.sqrt(len(squares))
    assert np.all(5 * error < smallest_error * np.maximum(exact, 1e-12)), error / exact
    assert np.all(np.abs(squares.mean(axis=0) - exact) < 5 * error), (squares.mean(axis=0), exact, error)


def normal_gradients(f, estimator, points, num_samples=1):
    """Gradients (points, R, 2) by location and scale; the baseline may depend on the point."""

    def one(key, mu, sigma, k, baseline):
        estimate = expectation_gradient(
            key,
            {"mu": mu, "sigma": sigma},
            lambda p: dist.Normal(p["mu"], p["sigma"]),
            lambda x: f(x, k),
            estimator(baseline),
            num_samples,
        )
        return jnp.stack([estimate.gradient["mu"], estimate.gradient["sigma"]])

    keys = jax.random.split(jax.random.key(3), REPEATS)
    run = jax.jit(jax.vmap(jax.vmap(one, (0, None, None, None, None)), (None, 0, 0, 0, 0)))
    return np.asarray(run(keys, *map(jnp.asarray, zip(*points, strict=True))))


def quadratic(x, k):
    return (x - k) ** 2


def cosine(x, k):
    return jnp.cos(k * x)


def exponential(x, k):
    return jnp.exp(-k * x**2)


def quadratic_variances(kind, mu, sigma, k):
    d2, s2 = (mu - k) ** 2, sigma**2
    return {
        "score": (d2**2 / s2 + 14 * d2 + 15 * s2, 2 * d2**2 / s2 + 60 * d2 + 74 * s2),
        "mean": (8 * d2 + 10 * s2, 40 * d2 + 56 * s2),
        "path": (4 * s2, 4 * d2 + 8 * s2),
    }[kind]


def cosine_variances(kind, mu, sigma, k):
    a, c, s, c2 = (k * sigma) ** 2, np.cos(k * mu), np.sin(k * mu), np.cos(2 * k * mu)
    e, e2 = np.exp(-a / 2), np.exp(-2 * a)
    by_mu = (1 + c2 * (1 - 4 * a) * e2) / (2 * sigma**2) - k**2 * s**2 * e**2
    by_sigma = (2 + c2 * (2 - 16 * a + 16 * a**2) * e2) / (2 * sigma**2) - k**4 * sigma**2 * c**2 * e**2
    return {
        "score": (by_mu, by_sigma),
        "path": (
            k**2 * ((1 - c2 * e2) / 2 - s**2 * e**2),
            k**2 / 2 * (1 - c2 * (1 - 4 * a) * e2) - k**4 * sigma**2 * c**2 * e**2,
        ),
    }[kind]


def exponential_variances(kind, mu, sigma, k):
    def amplitude(c):
        return np.exp(-c * mu**2 / (1 + 2 * c * sigma**2)) / np.sqrt(1 + 2 * c * sigma**2)

    spread = 1 + 2 * k * sigma**2
    d_mu = -2 * k * mu * amplitude(k) / spread
    d_sigma = amplitude(k) * (-2 * k * sigma / spread + 4 * k**2 * mu**2 * sigma / spread**2)
    m, v = mu / (1 + 4 * k * sigma**2), sigma**2 / (1 + 4 * k * sigma**2)
    a, w = (m - mu) / sigma, v / sigma**2
    y2, y3, y4 = a**2 + w, a**3 + 3 * a * w, a**4 + 6 * a**2 * w + 3 * w**2
    squared = amplitude(2 * k)
    return {
        "score": (squared * y2 / sigma**2 - d_mu**2, squared * (y4 - 2 * y2 + 1) / sigma**2 - d_sigma**2),
        "path": (
            4 * k**2 * squared * (v + m**2) - d_mu**2,
            4 * k**2 * squared * (mu**2 * y2 + 2 * mu * sigma * y3 + sigma**2 * y4) - d_sigma**2,
        ),
    }[kind]


FORMS = {
    "quadratic": (quadratic, quadratic_variances),
    "cosine": (cosine, cosine_variances),
    "exponential": (exponential, exponential_variances),
}
ESTIMATORS = {"score": lambda b: Score(), "path": lambda b: Reparam(), "mean": lambda b: Score(b)}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("quadratic", "score"),
        ("quadratic", "path"),
        ("quadratic", "mean"),
        ("cosine", "score"),
        ("cosine", "path"),
        ("exponential", "score"),
        ("exponential", "path"),
    ],
)
def test_normal(form, kind):
    """By location and scale at three points. Sees 35% of a variance (the score's fourth moments are large), 8% along paths."""
    f, variances = FORMS[form]
    points = [(mu, sigma, k or 0.4 * (form != "quadratic"), (mu - k) ** 2 + sigma**2) for mu, sigma, k in POINTS]
    draws = normal_gradients(f, ESTIMATORS[kind], points)
    for (mu, sigma, k, _), at_point in zip(points, draws, strict=True):
        check_variance(
            at_point, np.array(variances(kind, mu, sigma, k)), smallest_error=0.12 if kind == "path" else 0.4
        )


def test_formulas_at_the_values_that_are_known():
    """μ = 1, σ = 1.5, k = 0.8, by quadrature elsewhere."""
    np.testing.assert_allclose(cosine_variances("score", 1, 1.5, 0.8), (0.145925335, 0.3340349537), rtol=1e-8)
    np.testing.assert_allclose(cosine_variances("path", 1, 1.5, 0.8), (0.2424938151, 0.2115148952), rtol=1e-8)
    np.testing.assert_allclose(exponential_variances("score", 1, 1.5, 0.8), (0.04075306157, 0.04396988213), rtol=1e-8)
    np.testing.assert_allclose(exponential_variances("path", 1, 1.5, 0.8), (0.1941832518, 0.09187798153), rtol=1e-8)


P0 = 0.49
LOGITS = [-0.85, 0.3, 1.7]


def bit_variance(kind, p, n=1):
    q, delta, f0, f1 = 1 - p, 1 - 2 * P0, P0**2, (1 - P0) ** 2
    return {
        "score": p * q * (q * f1 + p * f0) ** 2,
        "leave-one-out": delta**2 * (p * q * (1 - 3 * p * q) - p**2 * q**2 * (n - 3) / max(n - 1, 1)) / n,
        "best": 0.0,
    }[kind]


def bit_gradients(estimator, num_samples):
    def one(key, phi, baseline):
        f = lambda b: (b - P0) ** 2  # noqa: E731
        return expectation_gradient(
            key, phi, lambda l: dist.Bernoulli(logits=l), f, estimator(baseline), num_samples
        ).gradient

    keys = jax.random.split(jax.random.key(4), REPEATS)
    p = jax.nn.sigmoid(jnp.array(LOGITS))
    best = (1 - p) * (1 - P0) ** 2 + p * P0**2
    return np.asarray(jax.jit(jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0)))(keys, jnp.array(LOGITS), best))


@pytest.mark.parametrize(
    ("kind", "estimator", "n"),
    [
        ("score", lambda b: Score(), 1),
        ("leave-one-out", lambda b: LeaveOneOut(), 2),
        ("leave-one-out", lambda b: LeaveOneOut(), 4),
        ("leave-one-out", lambda b: LeaveOneOut(), 8),
    ],
)
def test_bit(kind, estimator, n):
    """Sees 10% of a variance."""
    draws = bit_gradients(estimator, n)
    for phi, at_point in zip(LOGITS, draws, strict=True):
        p = 1 / (1 + np.exp(-phi))
        check_variance(at_point, bit_variance(kind, p, n), smallest_error=0.1)


def test_bit_without_variance():
    """The optimal constant baseline and enumeration leave none, and the gradient is exact."""
    p = 1 / (1 + np.exp(-np.array(LOGITS)))
    exact = p * (1 - p) * (1 - 2 * P0)
    for estimator in (lambda b: Score(b), lambda b: Enumerate()):
        draws = bit_gradients(estimator, 1)
        np.testing.assert_allclose(draws, np.broadcast_to(exact[:, None], draws.shape), rtol=1e-10)


def test_leave_one_out_of_two_by_hand():
    """One draw, recomputed: half the difference of the costs times the difference of the scores."""
    key, phi = jax.random.key(8), jnp.array(0.3)
    two = jax.random.split(key, 2)

    @jax.jit
    def estimate(key, phi):
        return expectation_gradient(
            key, phi, lambda l: dist.Bernoulli(logits=l), lambda b: (b - P0) ** 2, LeaveOneOut(), 2
        ).gradient

    draws = jnp.array([dist.Bernoulli(logits=phi).sample(jax.random.split(k)[1]) for k in two])
    scores, costs = draws - jax.nn.sigmoid(phi), (draws - P0) ** 2
    by_hand = 0.5 * (costs[0] - costs[1]) * (scores[0] - scores[1])
    np.testing.assert_allclose(estimate(key, phi), by_hand, rtol=1e-12)


def test_baselines_of_particles_that_are_impossible():
    """Weights of zero have no logarithm; a baseline made of them is a number all the same."""
    log_weights = jnp.array([-jnp.inf, 0.5, 1.5])
    e = jnp.exp(log_weights)
    fill = jnp.array([jnp.exp((0.5 + 1.5) / 2), 0.0, 0.0])
    expected = jnp.log((e.sum() - e + fill) / 3)
    np.testing.assert_allclose(vimco_baseline(log_weights), expected, rtol=1e-12)
    alone = vimco_baseline(jnp.array([1.0, -jnp.inf, -jnp.inf]))
    np.testing.assert_array_equal(jnp.isfinite(alone), [False, True, True])
    assert jnp.isfinite(finite_baseline(alone)).all()
    shares = normalised_weights(jnp.array([[0.0, -jnp.inf], [jnp.log(3.0), -jnp.inf]]))
    np.testing.assert_allclose(shares, [[0.25, 0.0], [0.75, 0.0]], rtol=1e-12)
