"""Fixtures of the tests of models."""

import jax
import pytest


@pytest.fixture
def numpyro_promotion():
    """JAX's standard promotion, for laws and guides of NumPyro that mix dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
