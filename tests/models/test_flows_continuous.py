"""Continuous flows: Padé's approximations on linear fields, and which solvers carry the derivative of the log density."""

import functools
import itertools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from ergodica.core.flow import AbstractLayer
from ergodica.models.flows.continuous import Continuous, Hutchinson, VelocityField, continuous_flow
from ergodica.models.flows.gauss import collocation

pytestmark = pytest.mark.usefixtures("x64")

DIM, POINTS = 2, 5
MATRIX = np.array([[0.3, -0.8], [0.5, -0.4]])


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, t, x):
        return self.matrix @ x


class WithoutTrace(Continuous):
    """A mutant: the slope of the trace is left out of the equation of the score."""

    def _rate(self, t, point, args):
        rate = super()._rate(t, point, args)
        if point.score is None:
            return rate
        _, pull = jax.vjp(functools.partial(self.field, t), point.x)
        return rate._replace(score=-pull(point.score)[0])


def field():
    return VelocityField(jax.random.key(0), DIM, width=6, depth=1, start=4.0)


def points():
    return jax.random.normal(jax.random.key(1), (2, POINTS, DIM))


def scores(layer):
    """A point, the fast score there, and the derivative of the log density through the inverse."""

    def one(x, score):
        y, log_det, fast = layer.forward_with_score(x, score)
        return y, fast, AbstractLayer.forward_with_score(layer, x, score)[2], log_det

    return jax.jit(jax.vmap(one))(*points())


def gap(**settings):
    _, fast, generic, _ = scores(Continuous(field(), **settings))
    return np.abs(fast - generic).max()


@functools.cache
def gauss():
    layer = Continuous(field(), solver="gauss2", num_steps=3)
    mutant = WithoutTrace(field(), solver="gauss2", num_steps=3)

    def one(x, score):
        y, log_det = layer.forward(x)
        fast = layer.forward_with_score(x, score)
        return {
            "y": y,
            "log_det": log_det,
            "fast": fast,
            "generic": AbstractLayer.forward_with_score(layer, x, score)[2],
            "returned": layer.inverse_with_score(y, fast[2]),
            "mutant": mutant.forward_with_score(x, score)[2],
        }

    return jax.jit(jax.vmap(one))(*points())


def test_gauss_steps_are_undone_by_steps_back():
    x, _ = points()
    out = gauss()
    np.testing.assert_allclose(out["returned"][0], x, atol=1e-13)
    np.testing.assert_allclose(out["returned"][1], -out["log_det"], atol=1e-13)
    assert np.abs(out["y"] - x).max() > 0.5
    assert np.std(out["log_det"]) > 0.1


def test_the_score_along_gauss_steps_is_the_derivative_of_the_log_density():
    """In three steps of second order, far from the solution: the rule is that of the discretised flow."""
    _, score = points()
    out = gauss()
    np.testing.assert_allclose(out["fast"][2], out["generic"], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(out["fast"][0], out["y"], rtol=1e-13)
    np.testing.assert_allclose(out["fast"][1], out["log_det"], rtol=1e-13)
    np.testing.assert_allclose(out["returned"][2], score, rtol=1e-11, atol=1e-11)


def test_a_score_without_the_slope_of_the_trace_is_noticed():
    out = gauss()
    assert np.abs(out["mutant"] - out["generic"]).max() > 1e-2


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_tables_are_those_of_gauss(stages):
    """Quadrature of polynomials up to twice the stages, and the condition under which quadratic invariants are conserved."""
    a, b, c = collocation(stages)
    for power in range(2 * stages):
        np.testing.assert_allclose(b @ c**power, 1 / (power + 1), rtol=1e-14)
    np.testing.assert_allclose(b[:, None] * a + (b[:, None] * a).T, np.outer(b, b), atol=1e-15)


@pytest.mark.parametrize(("solver", "stages"), [("gauss2", 1), ("gauss4", 2)])
def test_linear_fields_are_mapped_by_pade_approximations(solver, stages):
    """A step of the method is the diagonal Padé approximation of the matrix exponential."""
    step = 0.5 * MATRIX
    even, odd = [(np.eye(2), step / 2), (np.eye(2) + step @ step / 12, step / 2)][stages - 1]
    one_step = linalg.solve(even - odd, even + odd)
    exact = one_step @ one_step
    layer = Continuous(Linear(jnp.asarray(MATRIX)), solver=solver, num_steps=2)
    x, score = points()
    y, log_det, new = jax.jit(jax.vmap(layer.forward_with_score))(x, score)
    np.testing.assert_allclose(y, x @ exact.T, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(log_det, np.trace(MATRIX), rtol=1e-13)
    np.testing.assert_allclose(new, np.linalg.solve(exact.T, score.T).T, rtol=1e-12, atol=1e-12)


def test_signs_give_the_trace_in_the_mean():
    """Over all signs: log determinants and scores are linear in the trace, and their means exact."""
    all_signs = jnp.array(list(itertools.product([-1, 1], repeat=DIM)), jnp.int8)
    exact = Continuous(field(), solver="heun", num_steps=2)
    estimated = Continuous(field(), solver="heun", num_steps=2, trace=Hutchinson(jax.random.key(2), DIM))
    assert set(np.unique(estimated.trace.signs)) <= {-1, 1}
    x, score = points()[:, 0]

    def with_signs(signs):
        layer = eqx.tree_at(lambda one: one.trace.signs, estimated, signs[None])
        return layer.forward_with_score(x, score)[1:]

    found = jax.jit(jax.vmap(with_signs))(all_signs)
    expected = exact.forward_with_score(x, score)[1:]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.mean(axis=0), other, rtol=1e-12)
        assert np.abs(one - other[None]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("bosh3", 3), ("tsit5", 5)])
def test_explicit_steps_carry_it_up_to_their_order(solver, order):
    """Which is why an equality of 1e-10 is not to be had from them at large steps."""
    coarse, fine = gap(solver=solver, num_steps=8), gap(solver=solver, num_steps=16)
    assert 2 ** (order - 0.7) < coarse / fine < 2 ** (order + 1.7)
    assert fine > 1e-12


@pytest.mark.slow
def test_dopri8_carries_it_to_rounding():
    assert gap(solver="dopri8", num_steps=10) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("solver", ["tsit5", "dopri8"])
def test_adaptive_steps_carry_it_within_ten_times_their_tolerance(solver, tolerance):
    assert gap(solver=solver, tolerance=tolerance) < 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"solver": "gauss4", "num_steps": 4}, {"solver": "dopri8", "num_steps": 10}])
def test_one_pass_is_two_passes(settings):
    from ergodica.estimators import PathGradient

    flow = continuous_flow(jax.random.key(0), DIM, width=6, depth=1, start=4.0, **settings)
    gradients = []
    for passes in (1, 2):
        estimator = PathGradient(flow, lambda x: -jnp.sum(jnp.cosh(x)), num_samples=8, passes=passes)
        estimate, _ = jax.jit(lambda key, e=estimator: e.estimate(key, e.params, None))(jax.random.key(3))
        gradients.append(estimate.gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), *gradients)


@pytest.mark.slow
def test_adjoints_agree():
    def slopes(adjoint):
        def total(layer, x):
            return jnp.sum(jnp.cos(layer.forward_with_score(x, x)[0]))

        layer = Continuous(field(), solver="dopri8", num_steps=16, adjoint=adjoint)
        return jax.jit(jax.grad(total))(layer, points()[0, 0]).field

    for other in ("backsolve", "direct"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), slopes("checkpoint"), slopes(other)
        )


@pytest.mark.parametrize("double", [False, True])
def test_gauss_steps_are_found_far_from_the_origin(double):
    """What rounding leaves of a point of size 100 is more than that of its increment: the iteration must not wait for less."""
    with jax.enable_x64(double):
        layer = Continuous(lambda t, x: jnp.sin(3 * x), solver="gauss4", num_steps=8)
        x = 100 + jax.random.normal(jax.random.key(0), (50, DIM))
        y, log_det = jax.jit(jax.vmap(layer.forward))(x)
        assert jnp.all(jnp.isfinite(y))
        assert jnp.all(jnp.isfinite(log_det))


def test_a_solve_that_fails_is_nan():
    layer = Continuous(field(), solver="tsit5", tolerance=1e-9, max_steps=2)
    y, log_det = layer.forward(jnp.ones(DIM))
    assert np.isnan(y).all()
    assert np.isnan(log_det)


def test_without_diffrax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'ergodica\[flows\]'"):
        Continuous(field(), num_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either num_steps .* or tolerance"),
        ({"num_steps": 3, "tolerance": 0.1}, "either num_steps .* or tolerance"),
        ({"solver": "gauss4", "tolerance": 0.1}, "does not estimate its error"),
        ({"solver": "rk4", "num_steps": 3}, "solver must be one of"),
        ({"num_steps": 3, "trace": "hutchinson"}, "trace must be 'exact', or Hutchinson"),
        ({"num_steps": 3, "adjoint": "none"}, "adjoint must be one of"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Continuous(field(), **settings)
