"""How deep the well is in which a chain is kept during a visit to a client."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core.federated import AbstractFederatedGradient
from ergodica.core.types import Position

REACH = 30.0
"""How far from the centre is looked at, in posterior sds."""
NUM_PLACES = 121


def escape_barriers(gradient: AbstractFederatedGradient, centre: Position, curvature: np.ndarray) -> np.ndarray:
    r"""Height of the barrier over which chains can leave, for each client (S,), in nats; ``inf`` where none is found.

    During a visit to client :math:`s` a chain follows

    .. math::

        \log p(\theta) + \tfrac{1}{f_s} \log p(x_s \mid \theta)
            + \alpha \left[ \log q(\theta) - \tfrac{1}{f_s} \log q_s(\theta) \right].

    Where :math:`q_s` is steeper than its share of the others, all but the likelihood *rises* with the distance, quadratically for
    Gaussian surrogates. A likelihood that is quadratic outweighs that everywhere; one with lighter tails (logistic, robust) does
    so near the mode only, and the density cannot be normalised. A chain that stays long enough leaves.

    Parameters
    ----------
    gradient : AbstractFederatedGradient
    centre : pytree
        The mode.
    curvature : array (D, D)
        Negative Hessian of the log posterior there; it gives the unit of length.

    Notes
    -----
    The density is followed from the centre to both sides along one line, that of the most negative curvature of all but the
    likelihood, out to 30 posterior sds. What is found is an upper bound of the barrier: there may be a lower one elsewhere.
    Cost: ``D`` Hessian-vector products and 121 likelihoods of each datum.
    """
    root = np.linalg.inv(np.linalg.cholesky(curvature)).T  # columns of unit length in posterior sds
    tails = np.asarray(_curvature_of_tails(gradient, centre), np.float64)
    values, vectors = np.linalg.eigh(root.T @ tails @ root)
    lines = np.einsum("ij,sj->si", root, vectors[:, :, 0])
    heights = np.asarray(_along(gradient, centre, jnp.asarray(lines, ravel_pytree(centre)[0].dtype)), np.float64)
    found = np.array([barrier(line) for line in heights])
    return np.where(values[:, 0] < 0, found, np.inf)


def barrier(heights: np.ndarray) -> float:
    """How far a log density on a line falls, from its top, before it rises to an end of it; ``inf`` where it rises to none."""
    rising = np.diff(heights) > 0
    last_fall, first_rise = np.flatnonzero(~rising), np.flatnonzero(rising)
    right = last_fall[-1] + 1 if len(last_fall) else 0  # from here on it rises to the right
    left = first_rise[0] if len(first_rise) else len(heights) - 1  # up to here it falls from the left
    if left >= right:
        return 0.0 if len(heights) > 1 and (left > 0 or right < len(heights) - 1) else np.inf
    ends = [heights[k] for k, end in ((left, 0), (right, len(heights) - 1)) if k != end]
    return float(heights[left : right + 1].max() - max(ends)) if ends else np.inf


@jax.jit
def _curvature_of_tails(gradient: AbstractFederatedGradient, centre: Position) -> Array:
    """Negative Hessian (S, D, D), at the centre, of what a chain follows at each client less the client's own likelihood."""
    flat, unravel = ravel_pytree(centre)

    def of_client(client: Array) -> Array:
        def rest(theta: Array) -> Array:
            params, shards = unravel(theta), gradient.shards
            own = shards.log_likelihood(params, client, shards.whole(client))
            whole = gradient.mean_log_density(params, client)
            return whole - own.astype(whole.dtype) / gradient.probabilities[client].astype(whole.dtype)

        def column(i: Array) -> Array:
            return -jax.jvp(jax.grad(rest), (flat,), (jnp.zeros_like(flat).at[i].set(1),))[1]

        found = jax.lax.map(column, jnp.arange(flat.size))
        return (found + found.T) / 2

    return jax.lax.map(of_client, jnp.arange(gradient.shards.num_clients, dtype=jnp.int32))


@jax.jit
def _along(gradient: AbstractFederatedGradient, centre: Position, lines: Array) -> Array:
    """What a chain follows at each client, along a line of its own (S, places)."""
    flat, unravel = ravel_pytree(centre)
    places = jnp.linspace(-REACH, REACH, NUM_PLACES, dtype=flat.dtype)

    def of_client(given: tuple[Array, Array]) -> Array:
        client, line = given
        return jax.lax.map(lambda t: gradient.mean_log_density(unravel(flat + t * line), client), places)

    return jax.lax.map(of_client, (jnp.arange(gradient.shards.num_clients, dtype=jnp.int32), lines))
