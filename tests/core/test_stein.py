"""Stein's operator on polynomials and kernels, against its definition by automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core.stein import num_controls, polynomial_controls, stein_kernel

pytestmark = pytest.mark.usefixtures("x64")

DIM, SCALE = 3, 0.7


def log_density(x):
    return -jnp.sum(jnp.cosh(x)) + x[0] * x[1] - 0.3 * x[2] ** 2


def operator(u, x):
    """Laplacian, and derivative along the score."""
    return jnp.trace(jax.hessian(u)(x)) + jax.grad(u)(x) @ jax.grad(log_density)(x)


def points(seed, n):
    return jax.random.normal(jax.random.key(seed), (n, DIM))


def test_polynomials_are_the_operator_on_monomials():
    x = points(0, 4)
    score = jax.vmap(jax.grad(log_density))(x)
    monomials = [lambda x, i=i: x[i] for i in range(DIM)]
    monomials += [lambda x, i=i, j=j: x[i] * x[j] for i in range(DIM) for j in range(i, DIM)]
    expected = jnp.stack([jax.vmap(lambda x, u=u: operator(u, x))(x) for u in monomials], axis=-1)
    found = polynomial_controls(x, score, 2)
    assert found.shape == (4, num_controls(DIM, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    on_host = polynomial_controls(np.asarray(x), np.asarray(score), 2)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_allclose(on_host, found, rtol=1e-14)
    np.testing.assert_array_equal(polynomial_controls(x, score, 1), score)


def test_kernel_is_the_operator_in_both_arguments():
    def kernel(x, y):
        return (SCALE**2 + jnp.sum((x - y) ** 2)) ** -0.5

    def first_order(x, y):
        """Divergences and scores in both arguments (the operator on vector fields: half of a Laplacian's)."""
        score_x, score_y = jax.grad(log_density)(x), jax.grad(log_density)(y)
        mixed = jnp.trace(jax.jacfwd(jax.grad(kernel, 0), 1)(x, y))
        by_x, by_y = jax.grad(kernel, (0, 1))(x, y)
        return mixed + score_x @ by_y + score_y @ by_x + kernel(x, y) * (score_x @ score_y)

    x, y = points(1, 4), points(2, 5)
    score_x, score_y = (jax.vmap(jax.grad(log_density))(v) for v in (x, y))
    expected = jax.vmap(lambda a: jax.vmap(lambda b: first_order(a, b))(y))(x)
    np.testing.assert_allclose(stein_kernel(x, score_x, y, score_y, SCALE), expected, rtol=1e-11, atol=1e-11)


def test_means_are_zero_by_quadrature():
    """Under a skewed law in one dimension, and not with the operator's sign wrong."""
    grid = np.linspace(-14.0, 8.0, 200_001)[:, None]
    weights = np.exp(3 * grid - np.exp(grid))[:, 0]
    weights /= weights.sum()
    score = 3 - np.exp(grid)
    np.testing.assert_allclose(weights @ polynomial_controls(grid, score, 2), 0.0, atol=1e-9)
    assert np.all(np.abs(weights @ polynomial_controls(grid, -score, 2))[1:] > 1.0)
    at = np.array([[0.4], [-1.0]])
    np.testing.assert_allclose(weights @ stein_kernel(grid, score, at, 3 - np.exp(at), 1.0), 0.0, atol=1e-9)
