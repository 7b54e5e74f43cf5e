"""Stein controls of gradients: no bias over every sample of a discrete law, no noise along directions, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import regression, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Draws
from ergodica.estimators import EvolutionStrategy, ForwardGradient, SteinControl
from ergodica.estimators.stein import shared
from ergodica.estimators.stein.matched import matched_controls
from tests.support.flows import bent_flow, target
from tests.support.statistics import assert_mean

PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(())}


# --- every sample of a discrete law ----------------------------------------------------------------------------------


class Atoms(AbstractGradientEstimator):
    """Draws from a table; which ones is handed over as a batch, so that all of them can be gone through."""

    gradient: dict
    value: jax.Array
    points: jax.Array
    num: int

    def init(self, key, params, batch=None):
        return ()

    def estimate(self, key, params, state, batch=None):
        raise NotImplementedError

    def per_draw(self, key, params, state, batch=None, *, linearise=False, independent=False):
        index = jnp.zeros(self.num, int) if batch is None else batch
        rows = jax.tree.map(lambda x: x[index], (self.gradient, self.value, self.points))
        linear = {"a": 2 * rows[2], "b": rows[2][:, 0]} if linearise else None
        return Draws(*rows, -rows[2], self.num, linear), state


def atoms(num):
    """A law of four atoms in the plane with mean zero."""
    points, law = np.array([[-1.3, 0.2], [0.1, -0.9], [1.0, 0.4], [2.0, 1.0]]), np.array([0.3, 0.3, 0.3, 0.1])
    points = points - law @ points
    gradient = {"a": np.array([[1.0, -2.0], [0.3, 0.5], [-0.7, 3.0], [2.0, 1.0]]), "b": np.array([0.2, -1.0, 0.4, 2.0])}
    value = np.array([0.3, 1.0, -2.0, 0.7])
    arrays = jax.tree.map(jnp.asarray, (gradient, value, points))
    exact = np.concatenate([law @ gradient["a"], [law @ gradient["b"], law @ value]])
    return Atoms(*arrays, num), law, exact


def means(control, law, num_calls=1):
    """Exact means of the gradient and value of the last call, over every sample of every call."""
    num = control.gradient.num
    samples = np.array(list(itertools.product(range(len(law)), repeat=num * num_calls)))

    def last(sample):
        state = control.init(jax.random.key(0), params64())
        for index in sample.reshape(num_calls, num):
            estimate, state = control.estimate(jax.random.key(0), params64(), state, index)
        return jnp.append(tree.ravel(estimate.gradient), estimate.value)

    values = jax.jit(lambda s: jax.lax.map(last, s, batch_size=1024))(jnp.asarray(samples))
    return np.prod(law[samples], axis=1) @ np.asarray(values)


def params64():
    return jax.tree.map(lambda x: x.astype(float), PARAMS)


SETTINGS = [
    ("linear", "leave-one-out", None, {}),
    ("linear", "split", None, {}),
    ("linear", "split", None, {"select": 1}),
    ("linearised", "leave-one-out", "coordinate", {}),
    ("linearised", "leave-one-out", "block", {}),
    ("linearised", "leave-one-out", "all", {}),
    ("linear", "leave-one-out", "coordinate", {}),
    ("linearised", "split", "block", {}),
    ("linearised", "fixed", None, {}),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("controls", "coefficients", "per", "options"), SETTINGS)
def test_no_bias_over_every_sample(controls, coefficients, per, options):
    """Four draws; to rounding, whatever is fitted."""
    table, law, exact = atoms(4)
    control = SteinControl(table, controls, coefficients, per, ridge=0.0 if coefficients == "fixed" else 0.2, **options)
    np.testing.assert_allclose(means(control, law), exact, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("controls", "per", "options"), [("linear", None, {}), ("linear", None, {"select": 1}), ("linearised", "block", {})]
)
def test_memories_bring_no_bias_into_the_next_call(controls, per, options):
    """Two calls of three draws each; the second uses the coefficients of the first."""
    table, law, exact = atoms(3)
    control = SteinControl(table, controls, "moving-average", per, ridge=0.2, decay=0.5, **options)
    np.testing.assert_allclose(means(control, law, num_calls=2), exact, rtol=1e-11, atol=1e-13)


def in_sample(parts, ridge):
    """The mutant's weights: one fit, used at the draws that it was made from."""
    return 1 / parts.left.shape[0] - regression.transfer_weights(parts, ridge, parts.mean)


@pytest.mark.usefixtures("x64")
def test_a_fit_that_is_used_at_its_own_draws_is_seen(monkeypatch):
    """The mutant: coefficients from all draws of the call."""
    table, law, exact = atoms(4)
    monkeypatch.setattr(shared, "leave_one_out_weights", in_sample)
    bias = means(SteinControl(table, "linear", ridge=0.2), law) - exact
    assert np.all(np.abs(bias) > 0.01)


def of_key(control, key, params):
    return tree.ravel(control.estimate(key, params, control.init(key, params))[0].gradient)


PRECISION = np.array([[2.0, 0.6, -0.3], [0.6, 1.5, 0.4], [-0.3, 0.4, 1.0]])


# --- directions, evolution, flows ------------------------------------------------------------------------------------


def quadratic(x):
    return 2.0 + x @ jnp.array([0.5, -1.0, 2.0]) + x @ jnp.asarray(PRECISION) @ x / 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make",
    [
        lambda n: ForwardGradient(quadratic, n),
        lambda n: EvolutionStrategy(quadratic, 0.7, n),
        lambda n: EvolutionStrategy(
            lambda x: quadratic(x) - x @ jnp.asarray(PRECISION) @ x / 2, 0.7, n // 2, antithetic=False
        ),
    ],
    ids=["forward", "pairs", "points, linear"],
)
def test_directions_give_a_quadratic_its_gradient_without_noise(make):
    plain = make(14)
    x = jnp.array([0.4, -0.7, 1.1])
    exact = jax.grad(plain.objective.function)(x)
    control = SteinControl(plain, "quadratic")
    found = of_key(control, jax.random.key(0), x)
    np.testing.assert_allclose(found, exact, rtol=1e-11)
    assert np.linalg.norm(of_key(plain, jax.random.key(0), x) - exact) > 0.1
    split = SteinControl(make(40), "quadratic", "split")
    np.testing.assert_allclose(of_key(split, jax.random.key(0), x), exact, rtol=1e-10)
    remembering = SteinControl(plain, "quadratic", "moving-average", ridge=1e-12)
    state = remembering.init(jax.random.key(0), x)
    for i in range(12):
        estimate, state = remembering.estimate(jax.random.key(i), x, state)
    np.testing.assert_allclose(estimate.gradient, exact, rtol=1e-6)
    vectors = SteinControl(plain, lambda x: jnp.append(x, 1.0), per="coordinate")
    np.testing.assert_allclose(of_key(vectors, jax.random.key(1), x), exact, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_draws_of_directions_average_to_the_estimate():
    """Pairs and directions draw alike; without pairs the estimate has a baseline, which the draws have not."""
    x = jnp.array([0.4, -0.7, 1.1])
    for plain in (ForwardGradient(quadratic, 5), EvolutionStrategy(quadratic, 0.7, 5)):
        draws, _ = plain.per_draw(jax.random.key(1), x, None)
        estimate, _ = plain.estimate(jax.random.key(1), x, None)
        np.testing.assert_allclose(draws.gradient.mean(axis=0), estimate.gradient, rtol=1e-12)
        assert draws.n_grad == estimate.n_grad


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [erg.estimators.PathGradient, erg.estimators.ReverseKL])
def test_draws_of_a_flow_average_to_the_estimate_and_keep_its_mean(make):
    """Paired with the same draws' plain mean: sees a bias of 5% of the largest entry."""
    plain = make(bent_flow(), target, num_samples=64)
    draws, _ = plain.per_draw(jax.random.key(1), plain.params, None)
    estimate, _ = plain.estimate(jax.random.key(1), plain.params, None)
    mean = jax.tree.map(lambda x: x.mean(axis=0), draws.gradient)
    np.testing.assert_allclose(tree.ravel(mean), tree.ravel(estimate.gradient), rtol=1e-11)
    keys = jax.random.split(jax.random.key(2), 2_000)
    control = SteinControl(plain, "quadratic")
    both = jax.jit(jax.vmap(lambda k: (of_key(plain, k, plain.params), of_key(control, k, plain.params))))
    without, found = (np.asarray(x) for x in both(keys))
    assert np.sum(found.var(axis=0)) < 0.7 * np.sum(without.var(axis=0))
    exact = without.mean(axis=0)
    assert_mean(found - without + exact, exact, smallest_error=0.05)


@pytest.mark.parametrize("per", ["matrix", "coordinate", "all"])
def test_memories_wait_for_enough_draws(per):
    """A fit to next to nothing has no variance; until there are enough draws the estimate is the plain one."""
    plain, x = ForwardGradient(lambda x: jnp.sum(x**4), 4), jnp.array([1.0, -0.5])
    control = SteinControl(plain, "linear", "moving-average", per, decay=0.9)
    state = control.init(jax.random.key(0), x)
    waits = []
    for i in range(6):
        estimate, state = control.estimate(jax.random.key(i), x, state)
        draws, _ = plain.per_draw(jax.random.key(i), x, None)
        waits.append(bool(jnp.allclose(estimate.gradient, draws.gradient.mean(axis=0), rtol=1e-5)))
    needed = shared.fewest_remembered(2 if per == "matrix" else 1)
    seen = np.cumsum([0, *(3 * 0.9 ** np.arange(5))])
    assert waits == [bool(s < needed) for s in seen]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_has_no_draws_is_refused():
    with pytest.raises(TypeError, match="Minibatch does not"):
        SteinControl(erg.estimators.Minibatch(erg.Posterior(lambda x: -(x**2), initial=jnp.zeros(())), scheme="full"))
    x = jnp.ones(2)
    for plain in (
        ForwardGradient(jnp.sum, 20, directions="signs"),
        EvolutionStrategy(jnp.sum, 1.0, 20, shaping="rank"),
        erg.estimators.SPSA(jnp.sum, 1.0, 20),
    ):
        with pytest.raises(ValueError, match=f"this {type(plain).__name__} cannot"):
            of_key(SteinControl(plain), jax.random.key(0), x)
    with pytest.raises(ValueError, match="Black boxes cannot be expanded"):
        of_key(SteinControl(ForwardGradient(jnp.sum, 20), "linearised"), jax.random.key(0), x)


@pytest.mark.parametrize(
    ("plain", "options", "message"),
    [
        (5, {"controls": "quadratic"}, "9 controls with coefficients='leave-one-out' need at least 13 draws"),
        (12, {"controls": "quadratic", "coefficients": "split"}, "need at least 24 draws"),
        (2, {"coefficients": "moving-average", "decay": 0.5}, "3 controls need 8 remembered draws"),
    ],
)
def test_too_few_draws_are_refused_and_a_ridge_serves_them(plain, options, message):
    gradient, x = ForwardGradient(lambda x: jnp.sum(x**2), plain), jnp.ones(3)
    control = SteinControl(gradient, **options)
    with pytest.raises(ValueError, match=message):
        of_key(control, jax.random.key(0), x)
    assert np.all(np.isfinite(of_key(SteinControl(gradient, ridge=1.0, **options), jax.random.key(0), x)))


def test_settings_that_do_not_go_together_are_refused():
    plain = ForwardGradient(jnp.sum, 20)
    for options, message in (
        ({"controls": "cubic"}, "controls must be one of"),
        ({"controls": "linearised", "per": "matrix"}, "has the shape of the gradient"),
        ({"coefficients": "fixed"}, "right for controls='linearised' alone"),
        ({"select": 2}, "select is for"),
        ({"decay": 1.0}, "decay must be below 1"),
        ({"ridge": -1.0}, "ridge must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SteinControl(plain, **options)
    noise, params = jnp.ones((20, 3)), {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="must have 3 entries"):
        matched_controls(Draws(None, jnp.ones(20), noise, -noise), "linear", params, jnp.float32)
