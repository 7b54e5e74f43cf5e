"""Leave-one-out and split fits against all the fits they stand for, and their means over every sample of a discrete law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core.regression import (
    decompose,
    leave_one_out_weights,
    pooled_leave_one_out,
    pooled_moments,
    transfer_weights,
)
from ergodica.estimators.stein.shared import split_estimate

pytestmark = pytest.mark.usefixtures("x64")
SIZES = [(9, 4, 0.0), (9, 4, 0.7), (6, 8, 0.5)]


def ridge_fit(controls, f, ridge):
    moved = controls - controls.mean(axis=0)
    return np.linalg.solve(moved.T @ moved + ridge * np.eye(moved.shape[1]), moved.T @ (f - f.mean(axis=0)))


def sample(n, q):
    generator = np.random.default_rng(n + q)
    return generator.normal(size=(n, q)) + 0.3, generator.normal(size=(n, 2))


@pytest.mark.parametrize(("n", "q", "ridge"), SIZES)
def test_leave_one_out_is_all_the_fits(n, q, ridge):
    controls, f = sample(n, q)
    fits = [ridge_fit(np.delete(controls, k, 0), np.delete(f, k, 0), ridge) for k in range(n)]
    expected = np.mean([f[k] - controls[k] @ fits[k] for k in range(n)], axis=0)
    weights = leave_one_out_weights(decompose(controls), ridge)
    np.testing.assert_allclose(weights @ f, expected, rtol=1e-12)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-13)
    on_device = leave_one_out_weights(decompose(jnp.asarray(controls)), ridge)
    np.testing.assert_allclose(on_device, weights, rtol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_control_that_one_draw_alone_has_is_given_up_there(dtype):
    """Least-norm fits to the others, which know nothing of it; rounding must not make a pole of a leverage of one."""
    controls, f = sample(12, 3)
    controls[:, 1] = np.where(np.arange(12) == 4, 1.7, 0.0)
    fits = []
    for k in range(12):
        kept, g = np.delete(controls, k, 0), np.delete(f, k, 0)
        fits.append(np.linalg.lstsq(kept - kept.mean(axis=0), g - g.mean(axis=0))[0])
    expected = np.mean([f[k] - controls[k] @ fits[k] for k in range(12)], axis=0)
    weights = leave_one_out_weights(decompose(controls.astype(dtype)), 0.0)
    rounding = 2e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=rounding)
    np.testing.assert_allclose(weights @ f, expected, rtol=rounding)
    lonely = leave_one_out_weights(decompose(controls[:, 1:2].astype(dtype)), 0.0)
    np.testing.assert_allclose(lonely, 1 / 12, rtol=rounding)


@pytest.mark.parametrize(("n", "q", "ridge"), SIZES[1:])
def test_halves_are_two_fits(n, q, ridge):
    controls, f = sample(n, q)
    first, second = slice(n // 2), slice(n // 2, None)
    expected = f.sum(axis=0)
    for own, other in ((first, second), (second, first)):
        expected -= controls[other].sum(axis=0) @ ridge_fit(controls[own], f[own], ridge * len(f[own]))
    found = split_estimate(jnp.asarray(controls), jnp.asarray(f), ridge, None)
    np.testing.assert_allclose(found, expected / n, rtol=1e-11)


@pytest.mark.parametrize("num_controls", [1, 2])
def test_pooled_leave_one_out_is_all_the_fits(num_controls):
    generator = np.random.default_rng(0)
    controls, f = generator.normal(size=(7, num_controls, 3)) + 0.2, generator.normal(size=(7, 3))
    found = pooled_leave_one_out(*pooled_moments(controls, f), 0.4)
    for k in range(7):
        kept, g = np.delete(controls, k, 0), np.delete(f, k, 0)
        kept, g = kept - kept.mean(axis=0), g - g.mean(axis=0)
        gram, cross = np.einsum("kre,kse->rs", kept, kept), np.einsum("kre,ke->r", kept, g)
        np.testing.assert_allclose(found[k], np.linalg.solve(gram + 0.4 * np.eye(num_controls), cross), rtol=1e-11)


def in_sample_weights(controls, ridge):
    """The mutant: one fit, used at the draws that it was made from."""
    parts = decompose(controls)
    return 1 / controls.shape[0] - transfer_weights(parts, ridge, parts.mean)


def test_only_fits_to_other_draws_are_unbiased():
    """Every sample of four from a law of four atoms. The control has mean zero under it; the function is none of it."""
    atoms = np.array([[-1.3, 0.2], [0.1, -0.9], [1.0, 0.4], [2.0, 1.0]])
    law = np.array([0.3, 0.3, 0.3, 0.1])
    atoms = atoms - law @ atoms
    f = np.array([[1.0, -2.0], [0.3, 0.5], [-0.7, 3.0], [2.0, 1.0]])
    samples = np.array(list(itertools.product(range(4), repeat=4)))
    weight = np.prod(law[samples], axis=1)

    def mean(weights_of):
        weights = jax.jit(jax.vmap(weights_of))(jnp.asarray(atoms[samples]))
        return weight @ np.einsum("sn,snm->sm", weights, f[samples])

    ridge = 0.3
    np.testing.assert_allclose(mean(lambda h: leave_one_out_weights(decompose(h), ridge)), law @ f, rtol=1e-12)
    bias = mean(lambda h: in_sample_weights(h, ridge)) - law @ f
    assert np.all(np.abs(bias) > 0.02)
