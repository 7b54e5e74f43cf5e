"""Independent gradients of a loss on one of the exact programs."""

import functools

import jax
import numpy as np

from ergodica.core import tree

LANES = 500


def gradients(loss, case, num_repeats, seed=0):
    """Ascending gradients (R, D) of a NumPyro loss, coordinates in the order of `ergodica.core.tree.ravel`."""

    def one(key):
        def value(params):
            return -loss.loss(key, params, case.model, case.guide, *case.args)

        return tree.ravel(jax.grad(value)(case.params))

    keys = jax.random.split(jax.random.key(seed), num_repeats)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=LANES))(keys))


@functools.cache
def _exact(make_case, exact, _precision):
    case = make_case()
    return np.asarray(jax.jit(lambda p: tree.ravel(jax.grad(lambda q: exact(case, q))(p)))(case.params))


def exact_gradient(make_case, exact):
    """Exact gradient (D,) of a case, computed once."""
    return _exact(make_case, exact, bool(jax.config.jax_enable_x64))


def replicates(loss, params, model, guide, *args, num_repeats=8_000):
    """Gradients (R, D) of a NumPyro loss on any program."""

    def one(key):
        return tree.ravel(jax.grad(lambda p: -loss.loss(key, p, model, guide, *args))(params))

    keys = jax.random.split(jax.random.key(2), num_repeats)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys))
