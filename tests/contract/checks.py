"""What the contract tests compare with."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(actual, expected):
    """Trees equal up to the rounding that another order of operations in compiled code may bring."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating):
            tolerance = 200 * float(jnp.finfo(jnp.result_type(x)).eps)
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def assert_equal(actual, expected):
    """Trees equal bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def differ(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def abstract(tree):
    """Shape, dtype and weakness of each leaf: what must not change from step to step."""
    return jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x)), bool(getattr(x, "weak_type", False))), tree)
