"""Hyper-parameters that are numbers or functions of the step count."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check

type Hyperparameter = Array | jax.tree_util.Partial


def hyperparameter(name: str, value: Any, *, allow_zero: bool = False) -> Hyperparameter:
    """Check a number, or take a schedule (a function of the step count, such as optax's).

    A number becomes a strongly typed array, and so a leaf: another value does not retrace, and `jax.vmap` may map over
    it. A schedule is static: another function retraces.
    """
    if callable(value):
        return value if isinstance(value, jax.tree_util.Partial) else jax.tree_util.Partial(value)
    return check.positive(
        name, value, allow_zero=allow_zero, hint="A function of the step count (an optax schedule) is taken too."
    )


def value_at(value: Hyperparameter, count: Array) -> Array:
    """Evaluate a hyper-parameter at a step count."""
    return jnp.asarray(value(count), jnp.result_type(float)) if callable(value) else value
