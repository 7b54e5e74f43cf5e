"""Stein's operators on polynomials, kernels and vector fields, against their definitions, and the discrete one by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core.stein import (
    diagonal_controls,
    flip_probability,
    gibbs_stein_flips,
    gibbs_stein_terms,
    num_controls,
    polynomial_controls,
    stein_kernel,
    vector_controls,
)
from tests.support.quadrature import normal_rule

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


def test_vector_form_is_the_operator_on_fields_of_one_component():
    """Against automatic differentiation; for a standard normal, mean zero over a rule that is exact for the degrees at hand."""

    def function(x):
        return jnp.stack([x[0] * x[1], jnp.sum(x**2), x[0]])

    x = points(3, 4)
    score = jax.vmap(jax.grad(log_density))(x)
    found = vector_controls(function, x, score)
    slopes = jax.vmap(jax.jacfwd(function))(x)
    for m, d in np.ndindex(3, DIM):
        np.testing.assert_allclose(
            found[:, m, d], jax.vmap(function)(x)[:, m] * score[:, d] + slopes[:, m, d], rtol=1e-12
        )
    grid, weights = normal_rule(DIM)
    np.testing.assert_allclose(
        jnp.einsum("n,nmd->md", weights, vector_controls(function, grid, -grid)), 0.0, atol=1e-13
    )
    wrong = jnp.einsum("n,nmd->md", weights, vector_controls(function, grid, grid))
    assert np.max(np.abs(wrong)) > 1.0


def test_diagonal_controls_are_the_polynomials_of_each_coordinate():
    x = points(4, 5)
    score = jax.vmap(jax.grad(log_density))(x)
    found, every = diagonal_controls(x, score, 2), polynomial_controls(x, score, 2)
    squares = DIM + np.array([0, 3, 5])
    np.testing.assert_allclose(found[:, 0], every[:, :DIM], rtol=1e-14)
    np.testing.assert_allclose(2 * found[:, 1], every[:, squares], rtol=1e-14)


def dependent_law(generator):
    """A law (3, 2, 2) of one coordinate with three values and two with two, all dependent."""
    law = generator.random((3, 2, 2)) + 0.1
    return law / law.sum()


def test_gibbs_operator_has_mean_zero_term_by_term():
    """Over all values of a dependent law and of any function; not with the marginal probabilities in place of conditional ones."""
    generator = np.random.default_rng(5)
    law, h = dependent_law(generator), generator.normal(size=(3, 2, 2))

    def means(conditional_of):
        terms = []
        for i in range(3):
            at_values = np.broadcast_to(np.expand_dims(np.moveaxis(h, i, -1), i), (*h.shape, h.shape[i]))
            terms.append(gibbs_stein_terms(h, at_values[..., None, :], conditional_of(i)[..., None, :])[..., 0])
        return np.array([np.sum(law * term) for term in terms])

    def conditional(i):
        joint = np.expand_dims(np.moveaxis(law, i, -1), i)
        return np.broadcast_to(joint / joint.sum(-1, keepdims=True), (*law.shape, law.shape[i]))

    def marginal(i):
        others = tuple(j for j in range(3) if j != i)
        return np.broadcast_to(law.sum(others), (*law.shape, law.shape[i]))

    np.testing.assert_allclose(means(conditional), 0.0, atol=1e-15)
    assert np.max(np.abs(means(marginal))) > 0.01


def test_flips_are_the_gibbs_operator_on_bits():
    generator = np.random.default_rng(6)
    p, h = np.array([0.3, 0.8]), generator.normal(size=(2, 2))
    for bits in itertools.product((0, 1), repeat=2):
        at_values = np.stack([h[:, bits[1]], h[bits[0], :]])
        conditional = np.stack([1 - p, p], axis=-1)
        at_flips = np.array([h[1 - bits[0], bits[1]], h[bits[0], 1 - bits[1]]])
        flip = flip_probability(np.array(bits), p)
        expected = gibbs_stein_terms(np.array(h[bits]), at_values, conditional)
        np.testing.assert_allclose(gibbs_stein_flips(h[bits], at_flips, flip), expected, rtol=1e-13)
