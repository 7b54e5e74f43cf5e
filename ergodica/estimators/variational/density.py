"""Log densities of NumPyro distributions, with the right derivative where theirs is not."""

import copy
from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist

from ergodica.estimators.variational.facts import Distribution

_TINY = 1e-30


def log_density(fn: Distribution, value: Any, intermediates: Any = None) -> Any:
    r"""Log density of a value.

    NumPyro's densities of Bernoulli and binomial laws have the wrong derivative where a logit is exactly 0, as many are
    at the start: :math:`\max(x, 0)` and :math:`|x|` have a kink there that cancels in the value only. Such a
    logit gets 1e-30 more.
    """
    if intermediates:
        return fn.log_prob(value, intermediates)
    return _off_the_kink(fn).log_prob(value)


def _off_the_kink(fn: Any) -> Any:
    """The same distribution, with logits of 0 moved."""
    if isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        inner = _off_the_kink(fn.base_dist)
        if inner is fn.base_dist:
            return fn
        changed = copy.copy(fn)
        changed.base_dist = inner
        return changed
    if isinstance(fn, dist.BernoulliLogits | dist.BinomialLogits):
        changed, logits = copy.copy(fn), jnp.asarray(fn.logits, jnp.result_type(float))
        changed.logits = logits + jnp.where(logits == 0, jnp.asarray(_TINY, logits.dtype), 0)
        return changed
    return fn
