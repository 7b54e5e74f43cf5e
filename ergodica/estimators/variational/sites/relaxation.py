r"""What relaxations of discrete sites have in common: which sites they can be used at, and densities off the support.

A bit or a one-hot vector gets a real value, through which derivatives flow. Its log probability is then needed where the law has
none, in the guide and in the model, and is continued linearly:

.. math:: \log p(y) = \sum_k y_k \log \pi_k, \qquad \text{for a bit } y \log p + (1 - y) \log(1 - p)

which is the law's own at its values. At relaxed values the objective is then no bound on anything; at hard values (straight-through
estimators) it has the value that it should have.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import (
    ONE_HOT,
    Context,
    Distribution,
    Downstream,
    Draw,
    Site,
    SiteError,
    base,
    is_one_trial,
)
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.reparam import other_than_reparam

BITS = ("BernoulliProbs", "BernoulliLogits")


class AbstractRelaxation(AbstractSiteEstimator):
    """An estimator whose value moves with the probabilities, at a bit or a one-hot vector."""

    entropy: ClassVar = "keep"

    @property
    def unbiased(self) -> bool:
        """Biased, but for special costs."""
        return False

    @abc.abstractmethod
    def relax(self, key: Key, log_probs: Array) -> Array:
        """Draw vectors from log probabilities (…, A), with derivatives through them."""

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value is neither a bit nor a one-hot vector."""
        check_relaxable(self, site, context)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw the relaxed value."""
        return Draw(as_value(site, self.relax(key, log_probabilities(self, fn, site))))

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)


def check_relaxable(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise unless a site is a bit or a one-hot vector, outside of scans."""
    others = other_than_reparam(site, context)
    if site.distribution.startswith("Categorical"):
        reason = "its value is an index, which has nothing between 0 and 1"
        one_hot = (
            f"numpyro.sample({site.name!r}, dist.Multinomial(1, logits=…)) instead, in model and guide, whose value is a one-hot "
            f"vector (with it, {site.name} @ table is what table[{site.name}] was); or "
        )
        raise site.refuse(estimator, reason, one_hot + others)
    if site.distribution not in (*BITS, *ONE_HOT):
        raise site.refuse(estimator, "it is neither Bernoulli nor a one-hot vector, Multinomial(1, probs=…)", others)
    if site.in_scan:
        raise site.refuse(estimator, "it is inside a scan, where its value cannot be taken hold of", others)


def log_probabilities(estimator: AbstractSiteEstimator, fn: Distribution, site: Site) -> Array:
    """Log probabilities of a site's values (batch, joint event, A), normalised; those of 0 and 1 for bits."""
    law = base(fn)
    if site.distribution in BITS:
        logits = jnp.broadcast_to(law.logits, site.batch_shape + site.event_shape)
        return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
    if not is_one_trial(law):
        raise site.refuse(
            estimator, "its total_count is not the constant 1, so it is no one-hot vector", "LeaveOneOut()"
        )
    return jax.nn.log_softmax(jnp.broadcast_to(law.logits, site.batch_shape + site.event_shape), axis=-1)


def log_mass(fn: Distribution, value: Array) -> Array:
    """Log probability of a bit or a one-hot vector, continued linearly, under any wrappers of NumPyro's."""
    return log_density(fn, value, lambda log_probs, y: jnp.sum(y * log_probs, axis=-1))


def log_density(fn: Distribution, value: Array, element: Callable[[Array, Array], Array]) -> Array:
    """Apply ``element(log_probs, y)``, on vectors (…, A), inside of expansions, masks and reinterpreted dimensions."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = log_density(fn.base_dist, value, element)
        return jnp.where(jnp.asarray(fn._mask), inner, 0)
    if isinstance(fn, dist.Independent):
        inner = log_density(fn.base_dist, value, element)
        return jnp.sum(inner, axis=tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, dist.ExpandedDistribution):
        return jnp.broadcast_to(log_density(fn.base_dist, value, element), fn.batch_shape)
    if type(fn).__name__ in BITS:
        log_probs = jnp.stack([jax.nn.log_sigmoid(-fn.logits), jax.nn.log_sigmoid(fn.logits)], axis=-1)
        return element(log_probs, jnp.stack([1 - value, value], axis=-1))
    if type(fn).__name__ in ONE_HOT and is_one_trial(fn):
        return element(jax.nn.log_softmax(fn.logits, axis=-1), value)
    raise SiteError(
        f"A relaxed value has no density under {type(fn).__name__}: model and guide must both say Bernoulli, or both "
        "Multinomial(1, probs=…), at a relaxed site."
    )


def as_value(site: Site, one_hot: Array) -> Array:
    """The site's value of a vector (…, A): itself, or its second entry for a bit."""
    return one_hot[..., 1] if site.distribution in BITS else one_hot


def draw_from_law(estimator: AbstractSiteEstimator, key: Key, fn: Distribution, site: Site) -> Draw:
    """Draw hard values as the score function does, for arithmetic; record log probabilities and the one-hot vectors."""
    log_probs = log_probabilities(estimator, fn, site)
    value = jax.lax.stop_gradient(fn(rng_key=key)).astype(log_probs.dtype)
    one_hot = jnp.stack([1 - value, value], axis=-1) if site.distribution in BITS else value
    return Draw(value, (log_probs, one_hot))


def cost_and_slope(site: Site, downstream: Downstream, y: Array) -> tuple[Array, Array]:
    """Cost of vectors ``y`` (K, A, batch …, …), and its derivative by each entry; the parameters are held."""
    assert downstream.cost_of is not None
    cost_of = downstream.cost_of
    cost, pull = jax.vjp(lambda y: cost_of(as_value(site, y)), y)
    return cost, pull(jnp.ones_like(cost))[0]


def sum_elements(x: Array, like: Array) -> Array:
    """Sum over a vector's entries, and over elements that share a cost: all axes that ``like``, such as a cost, does not have."""
    x = jnp.sum(x, axis=tuple(range(like.ndim, x.ndim)))
    axes = tuple(i for i in range(2, x.ndim) if like.shape[i] == 1 and x.shape[i] > 1)
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)


def over_elements(x: Array, like: Array) -> Array:
    """Give a cost axes for the elements and entries of ``like``."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)).astype(like.dtype)


def draw_one_hot(key: Key, log_probs: Array) -> Array:
    """Draw one-hot vectors (…, A)."""
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_probs), axis=-1)
    return jax.nn.one_hot(drawn, log_probs.shape[-1], dtype=log_probs.dtype)


def with_derivative(value: Array, of: Array) -> Array:
    """A value, exactly, with the derivatives of another array."""
    return jax.lax.stop_gradient(value) + (of - jax.lax.stop_gradient(of))
