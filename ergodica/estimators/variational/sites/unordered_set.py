"""Unordered sets: distinct values of a discrete site, by sampling without replacement."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site, base, list_support
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.enumerate import check_listable, configurations, num_configurations

MAX_SIZE = 12
"""Probabilities of sets of k values take 2^k terms."""


class SetWeights(NamedTuple):
    r"""Weights of the members of a set (…, k): :math:`\log p(s) R(S, s)`; and of all in each member's baseline (…, k, k)."""

    log_weight: Array
    baseline: Array


class UnorderedSet(AbstractSiteEstimator):
    r"""Sum over a random set of distinct values of a discrete site, with a baseline built in.

    .. math::

        \hat g = \sum_{s \in S} p(s) R(S, s) \Big( f(s) - \sum_{s' \in S} p(s') R^{\setminus s}(S, s') f(s') \Big)
        \nabla \log p(s), \qquad R(S, s) = \frac{p^{\setminus s}(S \setminus s)}{p(S)}

    :math:`S` are ``size`` values drawn without replacement (the largest log probabilities with Gumbel noise), :math:`p(S)` is the
    probability of drawing the set in any order, and :math:`p^{\setminus s}` that of drawing the rest of it once :math:`s` is drawn;
    :math:`R^{\setminus s}(S, s')` is the same ratio one draw later, and 1 for :math:`s' = s`. The rest of the program runs for each
    value, with common random numbers; its own derivatives are weighted by :math:`p(s) R(S, s)`.

    Along a plate that all terms downstream are inside of, each element has a set of its own. Elements that some term depends on
    jointly have a set of joint configurations.

    Parameters
    ----------
    size : int
        Values in the set, 2 to 12.

    Raises
    ------
    SiteError
        Where the support cannot be listed, has fewer values than the set or more than 65,536 joint configurations, and where the
        objective is not a mean over particles.

    Notes
    -----
    Unbiased. With ``size`` the number of values it is `ergodica.estimators.Enumerate`. It has less noise than as many particles
    with `ergodica.estimators.LeaveOneOut`, the more so the fewer values carry the probability: no value is drawn twice.

    Cost: ``size`` runs of the program, times the branches of other sites; :math:`k\, 2^k` additions for the weights, and the log
    probabilities of all (joint) configurations, though the program runs for ``size`` of them.

    The weights sum to 1 for every set, and so do those of the baseline: a constant in the objective adds no noise.

    When not to use it: few values, which can be enumerated; very many equally likely ones, where draws with replacement are as
    good.

    References
    ----------
    Kool, van Hoof and Welling (2020), section 3: the unordered set policy gradient estimator with a baseline built in.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ergodica as erg
    >>> costs = jnp.array([1.0, 0.3, 2.0])
    >>> estimate = erg.estimators.expectation_gradient(
    ...     jax.random.key(0), jnp.array([0.3, -1.0, 0.5]), lambda t: dist.Categorical(logits=t), lambda z: costs[z],
    ...     erg.estimators.UnorderedSet(2),
    ... )
    >>> estimate.n_grad
    2
    """

    size: int = eqx.field(static=True)

    references: ClassVar = ("kool2020",)

    def __init__(self, size: int) -> None:
        hint = "The baseline takes two values, and probabilities of sets 2^size terms."
        self.size = check.integer("size", size, least=2, most=MAX_SIZE, hint=hint)

    def check(self, site: Site, context: Context) -> None:
        """Raise where values cannot be listed or are too few or many, and where their mean is not what the objective needs."""
        check_listable(self, site, context)
        configurations = num_configurations(site)
        assert configurations is not None
        if self.size > configurations:
            raise site.refuse(
                self,
                f"size is {self.size}, and it has {configurations} values",
                f"Enumerate(), or size={configurations}",
            )

    def num_branches(self, site: Site) -> int:  # noqa: ARG002
        """One for each value of the set."""
        return self.size

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw the set, and take the value of the branch."""
        log_probs = jax.lax.stop_gradient(configuration_log_probs(fn, site))
        members = draw_set(key, log_probs, self.size)
        rest = jax.nn.logsumexp(jnp.put_along_axis(log_probs, members, -jnp.inf, -1, inplace=False), axis=-1)
        weights = set_weights(jnp.take_along_axis(log_probs, members, axis=-1), rest)
        value = configuration(fn, site, jnp.take(members, branch, axis=-1))
        own = SetWeights(jnp.take(weights.log_weight, branch, axis=-1), jnp.take(weights.baseline, branch, axis=-2))
        return Draw(value, own)

    def log_weights(self, log_prob: Array, record: SetWeights) -> Array:  # noqa: ARG002
        """Weigh each value; the weights' derivatives are in the surrogate, where each element has its own terms and baseline."""
        return record.log_weight

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Weighted scores, times cost less baseline."""
        cost, record = jax.lax.stop_gradient((downstream.cost, downstream.record))
        every = jnp.moveaxis(cost, 1, -1)[:, None]
        baseline = jnp.sum(record.baseline * every, axis=-1)
        return score_surrogate(downstream.log_prob, jnp.exp(record.log_weight) * (cost - baseline))


def draw_set(key: Key, log_probs: Array, size: int) -> Array:
    """Draw distinct indices (…, size) from log probabilities (…, A), in the order of drawing without replacement (Gumbel top-k)."""
    return jax.lax.top_k(log_probs + jax.random.gumbel(key, log_probs.shape, log_probs.dtype), size)[1]


def set_weights(log_probs: Array, log_rest: Array) -> SetWeights:
    r"""Weights of the members of a set that was drawn without replacement.

    With :math:`\phi(A)` the probability of drawing the rest of the set, in any order, once :math:`A \subseteq S` is drawn,

    .. math:: \phi(S) = 1, \qquad \phi(A) = \sum_{s \in S \setminus A} \frac{p(s)}{1 - p(A)}\, \phi(A \cup s)

    the ratios are :math:`R(S, s) = \phi(s) / \phi(\emptyset)` and :math:`R^{\setminus s}(S, s') = \phi(\{s, s'\}) / \phi(s)`. All
    terms are positive, and :math:`1 - p(A)` is summed from what is left: nothing cancels.

    Parameters
    ----------
    log_probs : array (…, k)
        Of the members.
    log_rest : array (…)
        Log probability of all other values together; minus infinity if there are none.
    """
    size = log_probs.shape[-1]
    log_phi = jnp.zeros((*log_probs.shape[:-1], 2**size), log_probs.dtype)
    masks = np.arange(2**size)
    inside = masks[:, None] >> np.arange(size) & 1
    for drawn in reversed(range(size)):
        at = masks[inside.sum(axis=1) == drawn]
        left = np.stack([np.flatnonzero(inside[mask] == 0) for mask in at])
        of_left = log_probs[..., left]
        remaining = jnp.logaddexp(jax.nn.logsumexp(of_left, axis=-1), log_rest[..., None])
        total = jax.nn.logsumexp(of_left + log_phi[..., at[:, None] | 1 << left], axis=-1)
        log_phi = log_phi.at[..., at].set(total - remaining)
    single = 1 << np.arange(size)
    alone = log_phi[..., single]
    pairs = log_phi[..., single[:, None] | single] - alone[..., None]
    baseline = jnp.exp(log_probs[..., None, :] + pairs)
    return SetWeights(log_probs + alone - log_phi[..., :1], baseline)


def configuration_log_probs(fn: Distribution, site: Site) -> Array:
    """Log probabilities of all joint configurations (batch, 1 along what is joint, C); what cannot be drawn has a tiny one."""
    law, support = base(fn), list_support(fn)
    assert support is not None
    values = support.reshape(support.shape[0], *(1,) * len(law.batch_shape), *site.element_shape)
    full = _elements(site)
    each = law.log_prob(values)
    each = jnp.broadcast_to(
        each.reshape(-1, *(1,) * (len(full) - each.ndim + 1), *each.shape[1:]), (len(support), *full)
    )
    joint = jnp.take_along_axis(each, jnp.broadcast_to(configurations(site), (num_configurations(site), *full)), axis=0)
    axes = tuple(1 + i for i, n in enumerate(site.joint_shape) if n > 1)
    joint = jnp.sum(joint, axis=axes, keepdims=True)
    joint = joint.reshape(joint.shape[: 1 + len(site.batch_shape)])
    return jnp.moveaxis(jnp.maximum(joint, jnp.log(jnp.finfo(joint.dtype).tiny)), 0, -1)


def configuration(fn: Distribution, site: Site, index: Array) -> Array:
    """Value (batch, event) of a site, from the index of a configuration (batch, 1 along what is joint)."""
    full, support = _elements(site), list_support(fn)
    assert support is not None
    digits = jnp.broadcast_to(configurations(site), (num_configurations(site), *full))
    index = index.reshape(1, *index.shape, *(1,) * (len(full) - index.ndim))
    digit = jnp.take_along_axis(digits, jnp.broadcast_to(index, (1, *full)), axis=0)[0]
    return jax.lax.stop_gradient(support[digit])


def _elements(site: Site) -> tuple[int, ...]:
    """Shape of a site's elements: batch, and what ``to_event`` reinterprets."""
    return site.batch_shape + site.event_shape[: len(site.event_shape) - len(site.element_shape)]
