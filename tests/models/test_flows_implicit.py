"""Couplings whose inverse is a root: against closed forms of one component, linear algebra, and the generic rule for scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core.flow import AbstractLayer, Chain
from ergodica.models.flows import monotone
from ergodica.models.flows.implicit import CircularCoupling, LogisticMixtureCoupling
from ergodica.models.flows.monotone import CircularMixture, LogisticMixture
from ergodica.models.lattice import wrap

pytestmark = pytest.mark.usefixtures("x64")

DIM, POINTS = 5, 16
KINDS = {"circular": CircularCoupling, "logistic": LogisticMixtureCoupling}
MAPS = {"circular": CircularMixture, "logistic": LogisticMixture}
WITHOUT_BEND = {
    kind: type(f"WithoutBend{cls.__name__}", (cls,), {"bend": lambda self, x, raw: jnp.zeros_like(x)})
    for kind, cls in KINDS.items()
}
"""Mutants: the derivative of the log slope by what is moved is left out of the score."""


def chain_of(cls):
    masks = [(1, 3), (0, 2, 4)]
    keys = jax.random.split(jax.random.key(1), len(masks))
    return Chain([cls(k, DIM, m, num_components=3, width=8, start=3.0) for k, m in zip(keys, masks, strict=True)])


def difference(kind, a, b):
    return wrap(a - b) if kind == "circular" else a - b


@functools.cache
def measured(kind):
    """Everything about one chain, compiled together."""
    chain, mutant = chain_of(KINDS[kind]), chain_of(WITHOUT_BEND[kind]).layers[0]

    def one(x, score):
        y, log_det = chain.forward(x)
        back, log_det_back = chain.inverse(y)
        fast = chain.forward_with_score(x, score)
        return {
            "y": y,
            "log_det": log_det,
            "back": back,
            "log_det_back": log_det_back,
            "slogdet": jnp.linalg.slogdet(jax.jacfwd(lambda x: chain.forward(x)[0])(x))[1],
            "fast": fast,
            "generic": AbstractLayer.forward_with_score(chain, x, score),
            "returned": chain.inverse_with_score(y, fast[2]),
            "first": chain.layers[0].forward_with_score(x, score)[2],
            "mutant": mutant.forward_with_score(x, score)[2],
        }

    x = jax.random.uniform(jax.random.key(2), (POINTS, DIM), minval=-3.0, maxval=3.0)
    score = jax.random.normal(jax.random.key(3), (POINTS, DIM))
    return x, score, jax.jit(jax.vmap(one))(x, score)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_is_the_inverse(kind):
    x, _, out = measured(kind)
    assert np.abs(difference(kind, out["back"], x)).max() < 1e-12
    np.testing.assert_allclose(out["log_det"], -out["log_det_back"], atol=1e-12)
    np.testing.assert_allclose(out["log_det"], out["slogdet"], atol=1e-12)
    assert np.std(out["log_det"]) > 0.1  # far from the identity


@pytest.mark.parametrize("kind", KINDS)
def test_scores_need_no_roots_and_are_those_of_the_generic_rule(kind):
    _, score, out = measured(kind)
    np.testing.assert_allclose(out["fast"][2], out["generic"][2], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(out["fast"][0], out["y"], rtol=1e-14)
    np.testing.assert_allclose(out["fast"][1], out["log_det"], rtol=1e-13)
    np.testing.assert_allclose(out["returned"][2], score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_without_the_slope_of_slopes_is_noticed(kind):
    _, _, out = measured(kind)
    assert np.abs(out["mutant"] - out["first"]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_forward_passes_hold_no_loop(kind):
    chain = chain_of(KINDS[kind])
    x = jnp.ones(DIM)
    assert "while" not in str(jax.make_jaxpr(chain.forward_with_score)(x, x))
    assert "while" in str(jax.make_jaxpr(chain.inverse)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_points_carry_gradients_and_the_rest_of_the_rule_does_not(kind):
    layer = chain_of(KINDS[kind]).layers[0]
    x = jnp.linspace(-1.0, 1.0, DIM)

    def scalars(layer, x):
        y, log_det, score = layer.forward_with_score(x, 0.3 * x)
        return jnp.stack([jnp.sum(jnp.cos(y)), log_det + jnp.sum(score), jnp.sum(jnp.cos(layer.forward(x)[0]))])

    rows = jax.jit(jax.jacrev(scalars, argnums=(0, 1)))(layer, x)
    for leaf in jax.tree.leaves(rows):
        np.testing.assert_array_equal(leaf[1], 0.0)
        np.testing.assert_allclose(leaf[0], leaf[2], rtol=1e-12, atol=1e-13)
    assert all(np.abs(leaf[0]).max() > 0 for leaf in jax.tree.leaves(rows))


def closed_inverse(kind, y, params):
    """Of one component."""
    if kind == "circular":
        _, log_alpha, beta, shift = params
        return 2 * jnp.arctan((jnp.tan((y - shift) / 2) - beta) * jnp.exp(-log_alpha))
    _, log_scale, mean, log_gain, offset = params
    return mean + jnp.exp(log_scale) * (y - offset) * jnp.exp(-log_gain)


@pytest.mark.parametrize("kind", MAPS)
def test_roots_and_their_derivatives_are_closed_forms_for_one_component(kind):
    family = MAPS[kind](1)
    y = jnp.linspace(-2.0, 2.0, 9)
    params = jax.random.normal(jax.random.key(4), (family.num_params, 9)) * 0.7

    def derivatives(inverse):
        def total(y, params):
            return jnp.sum(jnp.sin(inverse(y, params)))

        first = jax.grad(total, argnums=(0, 1))
        return first(y, params), jax.jvp(first, (y, params), (jnp.ones_like(y), jnp.ones_like(params)))[1]

    def root(y, params):
        return family.inverse(y, params)[0]

    closed = functools.partial(closed_inverse, kind)
    np.testing.assert_allclose(np.sin(root(y, params)), np.sin(closed(y, params)), atol=1e-13)
    found, expected = jax.jit(lambda: (derivatives(root), derivatives(closed)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), found, expected)


def test_the_derivative_of_a_root_that_is_held_fixed_is_noticed():
    """A mutant: Newton's loop without the implicit function theorem, at whose end the parameters are differentiated alone."""
    family, y = LogisticMixture(1), jnp.linspace(-2.0, 2.0, 9)
    params = jax.random.normal(jax.random.key(4), (family.num_params, 9)) * 0.7

    def log_slope(inverse, params):
        x = inverse(y, params)
        return jnp.sum(family.forward(x, params)[0])

    true = jax.grad(lambda p: log_slope(lambda y, p: family.inverse(y, p)[0], p))(params)
    held = jax.grad(lambda p: log_slope(lambda y, p: jax.lax.stop_gradient(family.inverse(y, p)[0]), p))(params)
    np.testing.assert_allclose(true, 0.0, atol=1e-12)  # forward after inverse is y whatever the parameters
    assert np.abs(held).max() > 0.1


@pytest.mark.parametrize("kind", MAPS)
def test_roots_of_wild_mixtures_are_found(kind):
    """Slopes down to e^-6; the error of a root is that of the value, over the slope."""
    family, count = MAPS[kind](5), 4000
    params = 1.5 * jax.random.normal(jax.random.key(5), (family.num_params, count))
    x = jax.random.uniform(jax.random.key(6), (count,), minval=-3.1, maxval=3.1)
    y, log_slope = jax.jit(family.forward)(x, params)
    back, log_slope_back = jax.jit(family.inverse)(y, params)
    error = np.abs(difference(kind, back, x))
    assert np.min(log_slope) < -3
    assert (error * np.minimum(np.exp(log_slope), 1.0)).max() < 3e-13 * (1 + np.abs(y).max())
    np.testing.assert_allclose(log_slope_back, log_slope, atol=1e-9)


def test_a_map_of_the_circle_goes_around_once_and_smoothly():
    params = jax.random.normal(jax.random.key(7), (13, 1))
    turn = 2 * np.pi
    x = jnp.linspace(-np.pi, np.pi, 20001)
    y, log_slope = CircularMixture(4).forward(x, jnp.broadcast_to(params, (13, x.size)))
    slope = np.exp(log_slope)
    np.testing.assert_allclose((slope[1:] + slope[:-1]).sum() * turn / 40000, turn, rtol=1e-7)
    np.testing.assert_allclose(slope[0], slope[-1], rtol=1e-12)
    np.testing.assert_allclose(wrap(y[-1] - y[0]), 0.0, atol=1e-14)
    np.testing.assert_allclose(wrap(y[1:] - y[:-1]), 0.5 * (slope[1:] + slope[:-1]) * turn / 20000, rtol=1e-5)


def test_what_cannot_be_found_is_nan(monkeypatch):
    family = LogisticMixture(3)
    params = jax.random.normal(jax.random.key(8), (11, 4))
    y = jnp.array([0.3, jnp.nan, 2.0, -1.0])
    np.testing.assert_array_equal(np.isnan(family.inverse(y, params)[0]), [False, True, False, False])
    lost = family.inverse(y, params.at[0, 0].set(jnp.nan))[0]
    np.testing.assert_array_equal(np.isnan(lost), [True, True, False, False])
    monkeypatch.setattr(monotone, "MAX_STEPS", 2)
    few = family.inverse(y[None], params[:, None])[0]  # of another shape, so compiled anew
    assert np.isnan(few).all()


def test_single_precision_is_kept():
    with jax.enable_x64(False):
        for kind, cls in KINDS.items():
            layer = cls(jax.random.key(0), 4, (1, 2), width=8, start=1.0)
            x = jnp.array([0.5, -1.0, 2.0, 1.5])
            y, log_det = layer.forward(x)
            back, _ = layer.inverse(y)
            assert {y.dtype, log_det.dtype, back.dtype} == {jnp.dtype("float32")}
            np.testing.assert_allclose(difference(kind, back, x), 0.0, atol=1e-5)


def test_a_mixture_needs_a_component():
    with pytest.raises(ValueError, match="num_components must be at least 1; got 0"):
        CircularCoupling(jax.random.key(0), 4, (1,), num_components=0)
    with pytest.raises(ValueError, match="moved must name at least one of the 4"):
        LogisticMixtureCoupling(jax.random.key(0), 4, ())
