"""Layers of flows: inverses, log determinants by linear algebra, score rules against the generic ones, and what they cost."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core.flow import AbstractLayer
from ergodica.models import flows
from ergodica.models.flows import masks, splines
from ergodica.models.flows.coupling import moved_scores

TOLERANCE = 1e-10
DIM = 4
KEY = jax.random.key


def couplings(dim=DIM, parity=0, **settings):
    return flows.AffineCoupling(KEY(parity), dim, flows.half_mask(dim, parity), width=6, depth=1, **settings)


def autoregressive():
    return flows.Autoregressive(KEY(3), DIM, width=6)


LAYERS = {
    "affine": lambda: flows.AffineCoupling(KEY(0), DIM, flows.alternating_mask(DIM), width=6),
    "affine, odd dimension, no bound": lambda: couplings(5, bound=None),
    "affine, any indices": lambda: flows.AffineCoupling(KEY(0), 12, (11, 0, 3, 7, 5, 9), width=6, depth=0),
    "spline": lambda: flows.SplineCoupling(KEY(1), DIM, flows.half_mask(DIM, 1), num_bins=5, width=6, bound=3.0),
    "elementwise affine": lambda: flows.ElementwiseAffine(DIM),
    "sinh-arcsinh": lambda: flows.SinhArcsinh(DIM),
    "elementwise spline": lambda: flows.ElementwiseSpline(DIM, num_bins=6, bound=2.0),
    "permutation": lambda: flows.Permutation((2, 0, 3, 1)),
    "long permutation": lambda: flows.Permutation((5, 0, 3, 1, 7, 2, 6, 4)),
    "linear": lambda: flows.LinearLU(DIM),
    "householder": lambda: flows.Householder(KEY(2), DIM),
    "autoregressive": autoregressive,
    "inverted": lambda: flows.Inverted(autoregressive()),
    "stacked": lambda: flows.Stacked([flows.Chain([couplings(), couplings(parity=1)]) for _ in range(2)]),
}
IN_STACKS = [
    name
    for name in LAYERS
    if name not in ("affine, odd dimension, no bound", "affine, any indices", "long permutation")
]


def moved_away(layer, key, size=0.4):
    """The layer with noise on its parameters, so that nothing is checked at the identity."""
    leaves, structure = jax.tree.flatten(eqx.filter(layer, eqx.is_inexact_array))
    keys = jax.random.split(key, max(len(leaves), 1))
    leaves = [leaf + size * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=False)]
    return eqx.combine(jax.tree.unflatten(structure, leaves), layer)


def random_stack(seed):
    """Six layers of kinds drawn at random, with noise on their parameters."""
    names = np.random.default_rng(seed).choice(IN_STACKS, 6)
    return flows.Chain([moved_away(LAYERS[name](), KEY(i), 0.2) for i, name in enumerate(names)])


def dimension(name):
    return {"affine, odd dimension, no bound": 5, "affine, any indices": 12, "long permutation": 8}.get(name, DIM)


def gap(a, b):
    return jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b)))


@jax.jit
def by_jacobian(layer, points, scores):
    """Largest relative errors of maps and rules against the Jacobian of the plain forward map, and against the generic rules."""

    def one(x, score):
        y, log_det = layer.forward(x)
        back, log_det_back = layer.inverse(y)
        jacobian = jax.jacfwd(lambda x: layer.forward(x)[0])(x)
        slope = jax.grad(lambda x: layer.forward(x)[1])(x)
        pushed = layer.forward_with_score(x, score)
        pulled = layer.inverse_with_score(y, score)
        generic = AbstractLayer.forward_with_score(layer, x, score), AbstractLayer.inverse_with_score(layer, y, score)
        return {
            "inverse": gap(back, x),
            "log_det": gap(log_det, jnp.linalg.slogdet(jacobian)[1]),
            "log_det of the inverse": gap(log_det_back, -log_det),
            "forward score": gap(pushed[2], jnp.linalg.solve(jacobian.T, score - slope)),
            "inverse score": gap(pulled[2], jacobian.T @ score + slope),
            "points": jnp.maximum(gap(pushed[0], y), gap(pulled[0], back)),
            "log_dets": jnp.maximum(gap(pushed[1], log_det), gap(pulled[1], log_det_back)),
            "generic forward": gap(pushed[2], generic[0][2]),
            "generic inverse": gap(pulled[2], generic[1][2]),
        }

    return jax.tree.map(jnp.max, jax.vmap(one)(points, scores))


@jax.jit
def by_gradients(layer, points, scores):
    """Largest relative errors of the derivatives that the rules leave: those of the new point alone."""
    params, rest = eqx.partition(layer, eqx.is_inexact_array)

    def gradients(rule):
        def total(params, points):
            return jnp.sum(jax.vmap(lambda x, s: rule(eqx.combine(params, rest), x, s))(points, scores))

        return jax.tree.leaves(jax.grad(total, (0, 1))(params, points))

    def everything(outputs, score):
        new, log_det, new_score = outputs
        return score @ new + 3 * log_det + jnp.sum(new_score)

    pairs = (
        (lambda m, x, s: everything(m.forward_with_score(x, s), s), lambda m, x, s: s @ m.forward(x)[0]),
        (lambda m, x, s: everything(m.inverse_with_score(x, s), s), lambda m, x, s: s @ m.inverse(x)[0]),
    )
    return [gap(a, b) for rule, plain in pairs for a, b in zip(gradients(rule), gradients(plain), strict=True)]


def draws(dim, num=20):
    """Points (num, D), some outside the boxes of splines, and scores."""
    return 1.5 * jax.random.normal(KEY(8), (num, dim)), jax.random.normal(KEY(9), (num, dim))


@functools.cache
def errors(name):
    with jax.enable_x64(True):
        layer = random_stack(name) if isinstance(name, int) else moved_away(LAYERS[name](), KEY(7))
        return {key: float(value) for key, value in by_jacobian(layer, *draws(dimension(name))).items()}


@pytest.mark.parametrize(
    "name", [*LAYERS, 0, pytest.param(1, marks=pytest.mark.sweep), pytest.param(2, marks=pytest.mark.sweep)]
)
def test_maps_invert_and_scores_follow_the_jacobian(name):
    assert {key: value for key, value in errors(name).items() if not value < TOLERANCE} == {}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("x64")
def test_rules_are_differentiable_in_the_new_point_alone(name):
    layer = moved_away(LAYERS[name](), KEY(7))
    assert max(map(float, by_gradients(layer, *draws(dimension(name))))) < TOLERANCE


class NoLogDet(flows.AffineCoupling):
    """Mutant: the cotangent of the network lacks the log determinant's ones."""

    def forward_with_score(self, x, score):
        kept, moved = self.split.apart(x)
        (new, slope), pull = jax.vjp(lambda kept: self.curve(moved, self.conditioner(kept)), kept)
        score_kept, score_moved = self.split.apart(score)
        score_moved = moved_scores(score_moved, slope, jnp.zeros_like(slope))
        score_kept = score_kept - pull((score_moved, jnp.zeros_like(slope)))[0]
        return self.split.together(kept, new), jnp.sum(slope), self.split.together(score_kept, score_moved)


@pytest.mark.usefixtures("x64")
def test_a_rule_without_the_log_determinant_is_rejected():
    layer = moved_away(NoLogDet(KEY(0), DIM, flows.alternating_mask(DIM), width=6), KEY(7))
    wrong = by_jacobian(layer, *draws(DIM))
    assert float(wrong["forward score"]) > 1e6 * TOLERANCE
    assert float(wrong["log_det"]) < TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_single_precision_is_kept(name):
    layer, (x, score) = LAYERS[name](), draws(dimension(name), 1)
    with jax.enable_x64(True):
        rules = lambda layer, x, s: (layer.forward_with_score(x, s), layer.inverse_with_score(x, s))  # noqa: E731
        plain = lambda layer, x: (layer.forward(x), layer.inverse(x))  # noqa: E731
        out = jax.eval_shape(rules, layer, x[0], score[0]), jax.eval_shape(plain, layer, x[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}


def test_flows_start_near_the_identity():
    x = draws(DIM)[0]
    for layer in (couplings(start=0.0), flows.SplineCoupling(KEY(0), DIM, (0, 1), width=6, start=0.0)):
        np.testing.assert_allclose(jax.vmap(layer.forward)(x)[0], x, atol=1e-5)
    for name in ("linear", "elementwise affine", "sinh-arcsinh", "elementwise spline"):
        np.testing.assert_allclose(jax.vmap(LAYERS[name]().forward)(x)[0], x, atol=1e-5)
    for make in (flows.real_nvp, flows.spline_flow, flows.inverse_autoregressive_flow):
        flow = make(KEY(0), DIM, num_layers=2, width=6)
        moved = jax.vmap(flow.layer.forward)(x)[0]
        moved = moved[:, ::-1] if make is flows.inverse_autoregressive_flow else moved
        assert 0 < float(jnp.max(jnp.abs(moved - x))) < 0.2


@pytest.mark.usefixtures("x64")
def test_splines_pass_through_their_knots_with_their_slopes():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3 * 4 - 1, 1)))
    floor, bound = splines.SMALLEST, 2.5
    ends = []
    for raw in (np.asarray(table[:4, 0]), np.asarray(table[4:8, 0])):
        share = floor + (1 - 4 * floor) * np.exp(raw) / np.exp(raw).sum()
        ends.append(bound * (2 * np.cumsum(share)[:-1] - 1))
    slopes = floor + np.log1p(np.exp(np.asarray(table[8:, 0]) + np.log(np.expm1(1 - floor))))
    for side in (-1e-9, 1e-9):
        y, log_slope, _ = splines.spline(jnp.asarray(ends[0]) + side, jnp.tile(table, 3), bound)
        np.testing.assert_allclose(y, ends[1], atol=1e-7)
        np.testing.assert_allclose(jnp.exp(log_slope), slopes, rtol=1e-6)
    edges = jnp.array([-1.0, 1.0]) * bound * (1 - 1e-9)
    np.testing.assert_allclose(splines.spline(edges, jnp.tile(table, 2), bound)[1], 0, atol=1e-6)


def test_inverse_splines_are_finite_up_to_the_ends_of_narrow_bins():
    """Single precision, steep tables: values at the images of random points and of the knots, and next to them."""
    table = 6.0 * jax.random.normal(KEY(3), (3 * 8 - 1, 3000))
    widths = splines.SMALLEST + (1 - 8 * splines.SMALLEST) * jax.nn.softmax(table[8:16], axis=0)
    knots = 5.0 * (2 * jnp.cumsum(widths, axis=0)[:-1] - 1)
    inverse = jax.jit(lambda y: splines.spline_inverse(y, table, 5.0))
    for y in (*knots, *jnp.nextafter(knots, -jnp.inf), *jnp.nextafter(knots, jnp.inf)):
        x, log_slope = inverse(y)
        assert jnp.all(jnp.isfinite(x) & jnp.isfinite(log_slope))


@pytest.mark.usefixtures("x64")
def test_splines_know_the_derivative_of_their_log_slope():
    x, table = jnp.linspace(-3.0, 3.0, 41), jax.random.normal(KEY(0), (11, 1))
    one = lambda x: splines.spline(x[None], table, 2.5)[1][0]  # noqa: E731
    np.testing.assert_allclose(splines.spline(x, jnp.tile(table, 41), 2.5)[2], jax.vmap(jax.grad(one))(x), atol=1e-10)


def test_autoregressive_layers_look_back_alone():
    layer = moved_away(autoregressive(), KEY(0))
    jacobian = jax.jacfwd(lambda x: layer.forward(x)[0])(draws(DIM)[0][0])
    assert not np.any(np.triu(jacobian, 1))
    assert np.all(np.tril(jacobian)[np.tril_indices(DIM)])


@pytest.mark.parametrize(
    ("moved", "dim"),
    [((1, 3), 4), ((0, 3), 4), ((0, 1), 4), ((2,), 4), ((3, 1), 4), ((1, 2, 4, 7), 8), ((11, 0, 3, 7, 5, 9), 12)],
)
def test_points_are_taken_apart_and_put_together(moved, dim):
    split, x = masks.Split(dim, moved), jnp.arange(float(dim))
    kept, taken = split.apart(x)
    assert (kept.tolist(), taken.tolist()) == (list(split.kept), list(moved))
    assert split.together(kept, taken).tolist() == x.tolist()


def test_masks():
    assert flows.half_mask(5) == (2, 3, 4)
    assert flows.half_mask(5, 1) == (0, 1)
    assert flows.alternating_mask(5) == (1, 3)
    assert flows.alternating_mask(5, 1) == (0, 2, 4)
    assert flows.checkerboard_mask((2, 4)) == (1, 3, 4, 6)
    assert flows.checkerboard_mask((2, 4), 1) == (0, 2, 5, 7)


def test_derivatives_of_common_masks_need_no_scatter():
    for moved in (flows.half_mask(16), flows.alternating_mask(16), flows.checkerboard_mask((4, 4), 1)):
        split = masks.Split(16, moved)

        def total(x, split=split):
            kept, taken = split.apart(x)
            return jnp.sum(split.together(jnp.sin(kept), jnp.cos(taken)) ** 2)

        assert not re.search("scatter|gather", str(jax.make_jaxpr(jax.grad(total))(jnp.ones(16))))


@pytest.mark.parametrize("make", [flows.real_nvp, flows.spline_flow])
def test_a_loop_over_layers_is_the_same_flow(make):
    plain, stacked = (make(KEY(0), DIM, num_layers=4, width=6, depth=1, stacked=s, start=1.0) for s in (False, True))
    x, log_q = jax.jit(lambda flow: flow.sample_and_log_prob(KEY(1), 20))(plain)
    assert float(jnp.abs(x - plain.base.sample(KEY(1), 20)).max()) > 0.1
    again, log_q_again = jax.jit(lambda flow: flow.sample_and_log_prob(KEY(1), 20))(stacked)
    np.testing.assert_allclose(again, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_q_again, log_q, rtol=1e-5, atol=1e-5)


def test_the_two_autoregressive_flows_invert_each_other():
    forth = moved_away(flows.inverse_autoregressive_flow(KEY(0), DIM, num_layers=2, width=6), KEY(1), 0.2)
    first, swap, last = forth.layer.layers
    back = flows.masked_autoregressive_flow(KEY(0), DIM, num_layers=2, width=6)
    like = jax.tree.leaves(flows.Flow(DIM, flows.Inverted(last), swap, flows.Inverted(first)))
    back = jax.tree.unflatten(jax.tree.structure(back), like)
    x, log_det = jax.vmap(forth.layer.forward)(draws(DIM)[0])
    z, log_det_back = jax.vmap(back.layer.forward)(x)
    np.testing.assert_allclose(z, draws(DIM)[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-3, atol=1e-4)


@pytest.mark.optimised
def test_the_score_costs_one_derivative_of_the_network_and_no_second_pass():
    """In the compiled gradient: three products a weight for the standard gradient, one more for the score; none for the inverse."""
    num_layers, num_weights = 3, 2
    flow = flows.real_nvp(KEY(0), DIM, num_layers=num_layers, width=8, depth=num_weights - 1)
    z = jnp.ones((64, DIM))

    def standard(flow, z):
        x, log_det = jax.vmap(flow.layer.forward)(z)
        return jnp.sum(jnp.sin(x)) + jnp.sum(log_det)

    def path(flow, z):
        x, _, score = jax.vmap(flow.layer.forward_with_score)(z, -z)
        return jnp.sum(jax.lax.stop_gradient(jnp.cos(x) - score) * x)

    def products(objective):
        text = jax.jit(jax.grad(objective)).lower(flow, z).compile().as_text()
        return len(re.findall(r" dot\(", text))

    # the first network's input needs no derivative by the parameters
    assert products(standard) == 3 * num_weights * num_layers - 1
    assert products(path) == 4 * num_weights * num_layers - 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.Split(1, (0,)), ValueError, "dim"),
        (lambda: masks.Split(4, ()), ValueError, "at least one"),
        (lambda: masks.Split(4, (0, 1, 2, 3)), ValueError, "at least one"),
        (lambda: masks.Split(4, (1, 1)), ValueError, "once"),
        (lambda: masks.Split(4, (1, 4)), ValueError, "from 0 to 3"),
        (lambda: masks.Split(4, (-1,)), ValueError, "from 0 to 3"),
        (lambda: masks.Split(4, (True, False, True, False)), TypeError, "booleans"),
        (lambda: masks.Split(4, (0.5,)), TypeError, "indices"),
        (lambda: masks.Split(4, 2), TypeError, "indices"),
        (lambda: flows.half_mask(1), ValueError, "dim"),
        (lambda: flows.checkerboard_mask((1, 1)), ValueError, "two sites"),
        (lambda: flows.AffineCoupling(KEY(0), 4, (0,), bound=-1.0), ValueError, "bound"),
        (lambda: flows.AffineCoupling(KEY(0), 4, (0,), width=0), ValueError, "width"),
        (lambda: flows.AffineCoupling(KEY(0), 4, (0,), activation="tanh"), TypeError, "activation"),
        (lambda: flows.SplineCoupling(KEY(0), 4, (0,), num_bins=1), ValueError, "num_bins"),
        (lambda: flows.ElementwiseSpline(2, bound=0.0), ValueError, "bound"),
        (lambda: flows.Permutation((0, 2)), ValueError, "order"),
        (lambda: flows.Householder(KEY(0), 3, 0), ValueError, "num_reflections"),
        (lambda: flows.Autoregressive(KEY(0), 8, width=4), ValueError, "width"),
        (lambda: flows.Autoregressive(KEY(0), 1), ValueError, "dim"),
        (lambda: flows.Inverted(jnp.tanh), TypeError, "layer"),
        (lambda: flows.Stacked([]), ValueError, "at least one"),
        (lambda: flows.Stacked([couplings(), couplings(parity=1)]), ValueError, "Chain"),
        (lambda: flows.real_nvp(KEY(0), 1), ValueError, "dim"),
        (lambda: flows.real_nvp(KEY(0), 4, masks="thirds"), ValueError, "halves"),
        (lambda: flows.real_nvp(KEY(0), 4, masks=()), ValueError, "masks"),
        (lambda: flows.real_nvp(KEY(0), 4, 3, stacked=True), ValueError, "multiple"),
        (lambda: flows.Flow(3, couplings()), ValueError, "4 coordinates"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
