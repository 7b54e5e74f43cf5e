"""Kernels whose proposals know nothing of the chain: conditional importance sampling, and Metropolis.

Both see log weights (1 + K, …): the state that the chain is in first, then K independent proposals. All weights must be those
under the *present* parameters, that of the state too: the weight that it was accepted with is that of another target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key


class Selection(NamedTuple):
    """What a kernel makes of a state and its proposals.

    Attributes
    ----------
    weights : array (1 + K, …)
        Of the particles in an expectation; their sum is 1, or 0 where nothing has positive weight.
    index : int32 array (…)
        Which particle the chain is at now; 0 where it stays.
    accepted : array (…)
        Whether it moved; for several Metropolis steps the share of them that did.
    """

    weights: Array
    index: Array
    accepted: Array


def conditional_weights(log_weights: Array) -> Array:
    r"""Normalised weights of the retained state and the proposals.

    .. math:: \tilde w_k = w_k \Big/ \sum_{j=0}^K w_j, \qquad w_k = p_\theta(x, z_k) / q_\phi(z_k)

    A particle drawn with these weights, given that particle 0 is from the posterior and the others from the guide, is from the
    posterior; without particle 0 it is not, for any K. Source: Naesseth, Lindsten and Blei (2020), algorithm 2; after Andrieu,
    Doucet and Holenstein (2010).
    """
    log_weights = _usable(log_weights)
    top = jnp.max(log_weights, axis=0, keepdims=True)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=0, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def conditional_importance(key: Key, log_weights: Array, *, rao_blackwell: bool = True) -> Selection:
    """Draw the chain's next state by the weights of `conditional_weights`; ``rao_blackwell`` keeps these for expectations."""
    weights = conditional_weights(log_weights)
    index = jax.random.categorical(key, jnp.log(weights), axis=0)
    index = jnp.where(jnp.sum(weights, axis=0) > 0, index, 0)
    chosen = weights if rao_blackwell else _one_hot(index, weights) * jnp.sum(weights, axis=0, keepdims=True)
    return Selection(chosen, index, (index > 0).astype(weights.dtype))


def metropolis_path(log_weights: Array, uniforms: Array) -> Array:
    r"""Visit the proposals in turn; accept each with probability :math:`\min(1, w' / w)`.

    Parameters
    ----------
    log_weights : array (1 + K, …)
    uniforms : array (K, …)
        Between 0 and 1.

    Returns
    -------
    int32 array (K, …)
        Which particle the chain is at after each step.

    Notes
    -----
    The weight :math:`w` of the current state is that of the last proposal that was accepted. A program that goes on comparing
    with the first one samples another law as soon as K is 2. Source: Ou and Song (2020), algorithm 1; Tierney (1994).
    """
    log_weights = _usable(log_weights)

    def step(current: tuple[Array, Array], proposal: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (index, log_weight), (number, proposed, uniform) = current, proposal
        accept = jnp.log(uniform) < proposed - log_weight
        index = jnp.where(accept, number, index)
        return (index, jnp.where(accept, proposed, log_weight)), index

    numbers = jnp.arange(1, log_weights.shape[0], dtype=jnp.int32)
    start = (jnp.zeros(log_weights.shape[1:], jnp.int32), log_weights[0])
    return jax.lax.scan(step, start, (numbers, log_weights[1:], uniforms))[1]


def metropolis_independence(key: Key, log_weights: Array) -> Selection:
    """Make one Metropolis step for each proposal; weights are the shares of steps after which the chain was at each particle."""
    shape = (log_weights.shape[0] - 1, *log_weights.shape[1:])
    path = metropolis_path(log_weights, jax.random.uniform(key, shape, log_weights.dtype))
    before = jnp.concatenate([jnp.zeros_like(path[:1]), path[:-1]])
    visits = jnp.mean(_one_hot(path, log_weights), axis=1)
    visits = visits.at[0].set(jnp.where(log_weights[0] > -jnp.inf, visits[0], 0))
    total = jnp.sum(visits, axis=0, keepdims=True)
    return Selection(visits / jnp.where(total > 0, total, 1), path[-1], _mean_of(path != before, visits))


def _usable(log_weights: Array) -> Array:
    """Take what is no number for impossible, and keep infinite weights (a state out of the guide's reach) finite."""
    return jnp.minimum(jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights), jnp.finfo(log_weights.dtype).max)


def _one_hot(index: Array, like: Array) -> Array:
    """One-hot over particles, in front."""
    return jax.nn.one_hot(index, like.shape[0], axis=0, dtype=like.dtype)


def _mean_of(flags: Array, like: Array) -> Array:
    return jnp.mean(flags.astype(like.dtype), axis=0)
