"""Who visits whom: the order in which chains travel over clients."""

import abc
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.permutation import AliasTable, permutation_at


class AbstractVisits(eqx.Module):
    """Says at which client a chain makes its ``visit``-th visit.

    It is a function of random words drawn once, so that an order can be known ahead, and a run that is resumed goes on in it.
    """

    @property
    def independent(self) -> bool:
        """Whether each visit is drawn from one law, whatever came before."""
        return False

    @abc.abstractmethod
    def begin(self, words: Array) -> tuple[Array, Array]:
        """Give the words that a chain will use, and its number, from random words of its own (2,) uint32."""

    @abc.abstractmethod
    def client(self, words: Array, chain: Array, visit: Array) -> Array:
        """Give the client (int32 scalar) of a visit."""


class IndependentVisits(AbstractVisits):
    """Each visit is drawn anew: of client ``s`` with its probability, whatever came before."""

    table: AliasTable

    @property
    def independent(self) -> bool:
        """Whether each visit is drawn from one law: yes."""
        return True

    def begin(self, words: Array) -> tuple[Array, Array]:
        """Keep the words, which are the chain's own."""
        return words, jnp.zeros((), jnp.int32)

    def client(self, words: Array, chain: Array, visit: Array) -> Array:  # noqa: ARG002
        """Draw a client by a hash of the words and the visit's number."""
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), visit)
        return self.table.draw(jax.random.bits(key, (2,), jnp.uint32))


class PermutedVisits(AbstractVisits):
    r"""Chains go through one random order of the clients, each from a place of its own, and then through another.

    Visit :math:`v` of chain :math:`c` is at client :math:`\pi_{\lfloor v / S \rfloor}((c + v) \bmod S)`, with a fresh permutation
    :math:`\pi` for each round of :math:`S` visits: a chain visits every client once a round, and no two chains make their
    :math:`v`-th visit at the same client.
    """

    num_clients: int = eqx.field(static=True)

    def begin(self, words: Array) -> tuple[Array, Array]:
        """Share the words of the first of the chains that are vectorised together, and count these."""
        return _together(self.num_clients)(words)

    def client(self, words: Array, chain: Array, visit: Array) -> Array:
        """Evaluate the permutation of the round at the chain's place."""
        size = self.num_clients
        of_round = words ^ jnp.stack([(visit // size).astype(jnp.uint32), jnp.zeros((), jnp.uint32)])
        return jax.lax.optimization_barrier(permutation_at(of_round, (chain + visit) % size, size))


@functools.cache
def _together(num_clients: int) -> Callable[[Array], tuple[Array, Array]]:
    """A function of a chain's words that sees, under `jax.vmap`, the words of all chains."""

    @jax.custom_batching.custom_vmap
    def begin(words: Array) -> tuple[Array, Array]:
        return words, jnp.zeros((), jnp.int32)

    @begin.def_vmap
    def _(axis_size: int, in_batched: list[bool], words: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        if axis_size > num_clients:
            raise ValueError(
                f"schedule='permutation' is for at most as many chains as clients, {num_clients}, so that no two meet at one; "
                f"got {axis_size} chains. Take fewer, or schedule='independent'."
            )
        first = words[0] if in_batched[0] else words
        return (jnp.tile(first, (axis_size, 1)), jnp.arange(axis_size, dtype=jnp.int32)), (True, True)

    return begin


def make_visits(schedule: Any, probabilities: Array, local_steps: Array) -> AbstractVisits:
    r"""Make the order of visits, at rates :math:`f_s / \tau_s`, so that a share :math:`f_s` of steps is made at each client."""
    if isinstance(schedule, AbstractVisits):
        return schedule
    check.one_of("schedule", schedule, ("independent", "permutation"))
    rate = visit_probabilities(probabilities, local_steps)
    if schedule == "independent":
        return IndependentVisits(AliasTable(rate))
    if not np.allclose(rate * rate.size, 1, rtol=1e-3):
        raise ValueError(
            "schedule='permutation' visits all clients equally often: the gradient's probabilities must be in proportion to "
            f"local_steps (probabilities='uniform' where these are equal); got visits in proportion {rate / rate.min()}."
        )
    return PermutedVisits(rate.size)


def visit_probabilities(probabilities: Any, local_steps: Any) -> np.ndarray:
    """Probability of a visit to each client, from its share of steps and the steps of a visit."""
    rate = np.asarray(probabilities, np.float64) / np.asarray(local_steps, np.float64)
    return rate / rate.sum()


def balanced_local_steps(seconds: Any, mean: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Lengths of visits that take all clients the same time, and the shares of steps that belong to them.

    .. math:: \tau_s \propto 1 / \text{seconds}_s, \qquad f_s = \tau_s / \textstyle\sum_r \tau_r

    Clients are then visited equally often, none keeps the others waiting, and the gradient's weights make up for the steps that
    a slow client does not make: with ``probabilities=f`` the mean drift over time is that of the posterior. (Dividing by the
    probability of a *visit* instead would weight each client by its speed.)

    Parameters
    ----------
    seconds : array (S,)
        Time of one step at each client, in any unit.
    mean : float
        Steps of a visit, on average over the clients.

    Returns
    -------
    local_steps : int array (S,)
        Rounded to whole steps, at least 1.
    probabilities : array (S,)

    References
    ----------
    Ahn, Shahbaba and Welling (2014), section 3.3.

    Examples
    --------
    >>> steps, shares = balanced_local_steps([1.0, 1.0, 4.0], mean=30)
    >>> steps.tolist(), shares.round(3).tolist()
    ([40, 40, 10], [0.444, 0.444, 0.111])
    """
    speed = 1 / np.asarray(check.positive("seconds", seconds), np.float64)
    steps = np.maximum(1, np.rint(float(check.positive("mean", mean)) * speed / speed.mean())).astype(np.int64)
    return steps, steps / steps.sum()
