"""Score distillation: controls of mean zero, exact means and no noise on linear scores, and what printed formulas get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core import tree
from ergodica.estimators import distillation
from ergodica.estimators.distillation import ScoreDistillation, noise_control
from tests.support.quadrature import exact_moments, normal_rule
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64")
MIDDLE = (0.5, 0.5 + 1e-12)
CENTRE, SPREAD = np.array([0.7, -0.4]), np.array([0.5, 0.8])
PARAMS = {"height": np.array(0.6), "slope": np.array(-0.3)}


def render(params, view):
    """Two pixels."""
    return jnp.stack([params["height"] * view, jnp.sin(params["slope"]) * view])


def linear_score(x, time, view):
    """Of independent normal pixels."""
    alpha, sigma = distillation.cosine_schedule(time)
    return -(x - alpha * CENTRE * view) / (alpha**2 * SPREAD**2 + sigma**2)


def bent_score(x, time, view):
    """Not of a normal law."""
    return linear_score(x, time, view) - 0.3 * jnp.tanh(x[::-1])


def one_view(key):
    return jnp.ones(())


def any_view(key):
    return jax.random.uniform(key, (), minval=0.5, maxval=1.5)


def constant(x, time, view):
    return 1.0


def bump(x, time, view):
    return jnp.sin(x[0]) * x[1]


def exact_gradient(score, points=40):
    """At the middle time and one view: the mean by quadrature of the plain formula."""
    alpha, sigma = distillation.cosine_schedule(jnp.array(0.5))
    noise, weights = normal_rule(2, points)
    render_here = lambda p: render(p, jnp.ones(()))  # noqa: E731
    g, pull = jax.vjp(render_here, PARAMS)
    x = (alpha * g)[None] + sigma * jnp.asarray(noise)
    mean = jnp.asarray(weights) @ jax.vmap(lambda x: score(x, jnp.array(0.5), jnp.ones(())))(x)
    return np.asarray(tree.ravel(pull(sigma**2 * alpha * mean)[0]))


def made(score=bent_score, **options):
    settings = {"num_samples": 1, "times": MIDDLE} | options
    return ScoreDistillation(render, score, settings.pop("views", one_view), **settings)


@pytest.mark.parametrize("options", [{"baseline": "none"}, {"baseline": "noise"}, {"controls": (constant, bump)}])
def test_mean_by_quadrature(options):
    mean, _ = exact_moments(made(**options), PARAMS, 2, 40)
    np.testing.assert_allclose(mean, exact_gradient(bent_score), atol=1e-9)


def test_mean_with_weights_from_earlier_calls():
    """Whatever is remembered."""
    estimator = made(controls=(constant, bump), num_samples=8)
    _, state = estimator.estimate(jax.random.key(0), PARAMS, estimator.init(jax.random.key(1), PARAMS))
    assert float(jnp.abs(jax.vmap(distillation.coefficients)(state)).max()) > 0.05
    keys = jax.random.split(jax.random.key(2), 4000)
    one = jax.jit(jax.vmap(lambda key: tree.ravel(estimator.estimate(key, PARAMS, state)[0].gradient)))
    assert_mean(np.asarray(one(keys)), exact_gradient(bent_score), smallest_error=0.12)


def in_sample(self, key, params, state, batch=None):
    """A mutant: weights from the very draws that they are used on."""
    _, state = ScoreDistillation.true_estimate(self, key, params, jax.tree.map(jnp.zeros_like, state), batch)
    return ScoreDistillation.true_estimate(self, key, params, state, batch)


def test_weights_from_the_same_draws_would_be_biased(monkeypatch):
    estimator = made(controls=(constant, bump), num_samples=3)
    state = estimator.init(jax.random.key(1), PARAMS)
    monkeypatch.setattr(ScoreDistillation, "true_estimate", ScoreDistillation.estimate, raising=False)
    monkeypatch.setattr(ScoreDistillation, "estimate", in_sample)
    keys = jax.random.split(jax.random.key(2), 20_000)
    one = jax.jit(jax.vmap(lambda key: tree.ravel(estimator.estimate(key, PARAMS, state)[0].gradient)))
    assert np.max(np.abs(z_scores(np.asarray(one(keys)), exact_gradient(bent_score)))) > REJECTION


def test_control_has_mean_zero_and_the_printed_one_has_not():
    """Equation 8 of the paper adds the slope, and without the factor sigma."""
    noise, weights = normal_rule(2, 30)
    noise, weights, sigma = jnp.asarray(noise), jnp.asarray(weights), 0.6
    centre = jnp.array([0.4, -0.2])
    value, slope = jax.vmap(jax.value_and_grad(lambda x: bump(x, None, None)))(centre[None] + sigma * noise)
    ours = jax.vmap(noise_control, (0, 0, 0, None))(noise, value, slope, sigma)
    np.testing.assert_allclose(weights @ ours, 0.0, atol=1e-12)
    printed = noise * value[:, None] + slope
    assert np.max(np.abs(weights @ printed)) > 0.2


def test_linear_scores_and_a_constant_feature_leave_no_noise():
    """Up to the share of noise in the weights, which are fitted to a constant beside the noise."""
    estimator = made(linear_score, controls=(constant,), num_samples=4)
    keys = jax.random.split(jax.random.key(2), 50)
    at = jax.jit(
        jax.vmap(lambda key, state: tree.ravel(estimator.estimate(key, PARAMS, state)[0].gradient), in_axes=(0, None))
    )
    long = made(linear_score, controls=(constant,), num_samples=20_000)
    _, settled = long.estimate(jax.random.key(3), PARAMS, long.init(jax.random.key(0), PARAMS))
    better = np.asarray(at(keys, settled))
    plain = made(linear_score, num_samples=4)
    at_plain = jax.jit(
        jax.vmap(lambda key: tree.ravel(plain.estimate(key, PARAMS, plain.init(key, PARAMS))[0].gradient))
    )
    noisy = np.asarray(at_plain(keys))
    assert np.all(better.std(axis=0) < 0.02 * noisy.std(axis=0))


def test_baseline_of_the_draws_own_law_is_the_noise():
    """Variational distillation with one render a view."""

    def own(x, time, view):
        alpha, sigma = distillation.cosine_schedule(time)
        return -(x - alpha * render(PARAMS, view)) / sigma**2

    settings = {"num_samples": 5, "times": (0.1, 0.9), "views": any_view}
    variational, noise = made(baseline=own, **settings), made(baseline="noise", **settings)
    a, b = (e.estimate(jax.random.key(0), PARAMS, e.init(jax.random.key(1), PARAMS))[0] for e in (variational, noise))
    np.testing.assert_allclose(tree.ravel(a.gradient), tree.ravel(b.gradient), rtol=1e-10)


BAD = {
    "render": (lambda: ScoreDistillation(None, bent_score, one_view), TypeError, "render must be"),
    "baseline": (lambda: made(baseline="score"), ValueError, "baseline must be one of"),
    "times": (lambda: made(times=(0.5, 1.0)), ValueError, "0 < first < last < 1"),
    "decay": (lambda: made(decay=1.0), ValueError, "decay must be between 0 and 1"),
    "feature": (
        lambda: jax.eval_shape(
            lambda k: made(controls=(lambda x, t, v: x,)).estimate(
                k, PARAMS, made(controls=(constant,)).init(k, PARAMS)
            ),
            jax.random.key(0),
        ),
        ValueError,
        r"scalar; got shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
