"""Exact moments of estimators that are driven by a few normals: all points of a Gauss-Hermite rule through the shipped code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import rng, tree


def normal_rule(dimension, num_points=3):
    """Points (P, dimension) and weights (P,): exact for polynomials of degree ``2 num_points - 1`` in each normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_points)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(points, repeat=dimension)))
    return grid, np.prod(list(itertools.product(weights, repeat=dimension)), axis=1)


def normals(vector):
    """A source of normals that hands out the entries of a vector in the order of the leaves, and no more than it has."""

    def source(like):
        leaves, treedef = jax.tree.flatten(like)
        sizes = np.cumsum([0, *(int(np.prod(x.shape)) for x in leaves)])
        assert sizes[-1] == vector.shape[0], f"{sizes[-1]} normals were asked for; the rule has {vector.shape[0]}"
        cut = [vector[a:b].reshape(x.shape).astype(x.dtype) for a, b, x in zip(sizes, sizes[1:], leaves, strict=False)]
        return jax.tree.unflatten(treedef, cut)

    return source


def moments(values, weights):
    """Mean (D,) and covariance (D, D) of values (P, D)."""
    values = np.asarray(values)
    mean = weights @ values
    return mean, (values - mean).T @ (weights[:, None] * (values - mean))


def exact_moments(estimator, params, num_normals, num_points=3):
    """Mean and covariance of a first estimate, raveled, over all normals that it draws."""
    points, weights = normal_rule(num_normals, num_points)

    def of(vector):
        with rng.normals_from(normals(vector)):
            state = estimator.init(jax.random.key(0), params)
            return tree.ravel(estimator.estimate(jax.random.key(1), params, state)[0].gradient)

    return moments(jax.jit(jax.vmap(of))(jnp.asarray(points)), weights)
