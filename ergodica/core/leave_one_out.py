"""What the others lead one to expect: averages along the leading axis without the entry itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def leave_one_out_mean(x: Array) -> Array:
    r"""Mean of the others, :math:`\frac{1}{K-1}\sum_{j\ne k} x_j`, along the leading axis (Kool, van Hoof and Welling 2019)."""
    return (jnp.sum(x, axis=0, keepdims=True) - x) / (x.shape[0] - 1)


def leave_one_out_logsumexp(x: Array) -> Array:
    r""":math:`\log\sum_{j\ne k} e^{x_j}` along the leading axis, without subtraction: sums from both ends."""
    below = jax.lax.cumlogsumexp(x, axis=0)
    above = jax.lax.cumlogsumexp(x, axis=0, reverse=True)
    nothing = jnp.full_like(x[:1], -jnp.inf)
    return jnp.logaddexp(jnp.concatenate([nothing, below[:-1]]), jnp.concatenate([above[1:], nothing]))
