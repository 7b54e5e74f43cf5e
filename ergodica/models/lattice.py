"""Angles on the links of a periodic square lattice."""

import math

import jax.numpy as jnp
from jaxtyping import Array


def wrap(angle: Array) -> Array:
    r"""The same angle in :math:`[-\pi, \pi)`."""
    return jnp.mod(angle + math.pi, 2 * math.pi) - math.pi


def plaquettes(links: Array) -> Array:
    r"""Sums of angles around the squares of a periodic lattice, not wrapped.

    .. math:: P(x) = \theta_0(x) + \theta_1(x + \hat 0) - \theta_0(x + \hat 1) - \theta_1(x)

    Parameters
    ----------
    links : array (2, L, T)
        :math:`\theta_\mu(x)`: the angle of the link from site x in direction :math:`\mu`.

    Returns
    -------
    array (L, T)
    """
    first, second = links[0], links[1]
    return first + jnp.roll(second, -1, axis=0) - jnp.roll(first, -1, axis=1) - second


def gauge_transform(links: Array, turns: Array) -> Array:
    r"""Turn the frame at each site, which changes no sum around a square.

    .. math:: \theta'_\mu(x) = \theta_\mu(x) + \alpha(x) - \alpha(x + \hat\mu)

    Parameters
    ----------
    links : array (2, L, T)
    turns : array (L, T)
        :math:`\alpha`.
    """
    return links + jnp.stack([turns - jnp.roll(turns, -1, axis=mu) for mu in range(2)])
