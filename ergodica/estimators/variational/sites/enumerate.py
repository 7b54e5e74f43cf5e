"""Enumeration: the exact mean over the values of a discrete site."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Draw, Site, list_support
from ergodica.estimators.variational.site import AbstractSiteEstimator

MAX_CONFIGURATIONS = 2**16
"""More runs of the program than this are refused."""


class Enumerate(AbstractSiteEstimator):
    r"""Exact sum over all values of a discrete site.

    .. math:: \nabla_\theta \sum_z q_\theta(z) f(z) = \sum_z f(z) \nabla_\theta q_\theta(z) + q_\theta(z) \nabla_\theta f(z)

    The rest of the program runs once for each value, with common random numbers. Along a plate that all terms downstream are
    inside of, all elements take the value at once, and each is weighted by its own probability; elements that some term depends on
    jointly are enumerated jointly, :math:`A^n` runs for :math:`n` of them. Enumerated sites multiply. One-hot vectors,
    ``Multinomial(1, probs=…)``, have as many values as entries.

    Raises
    ------
    SiteError
        Where the support cannot be listed, more than 65,536 configurations are needed, or the objective is not a mean over
        particles.

    Notes
    -----
    No noise of its own. Cost: one run for each configuration, times those of other enumerated sites.

    When not to use it: joint elements grow the cost exponentially (`explain` shows the factor). For long chains of discrete sites
    use ``numpyro.infer.TraceEnum_ELBO``, which eliminates variables.

    References
    ----------
    Mnih and Rezende (2016) discuss when sums pay; the identity itself is the definition of an expectation.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=2, sites={"z": erg.estimators.Enumerate()})
    """

    references: ClassVar = ("mnih2016",)
    entropy: ClassVar = "keep"

    def check(self, site: Site, context: Context) -> None:
        """Raise where the values cannot be listed, are too many, or their mean is not what the objective needs."""
        check_listable(self, site, context)

    def num_branches(self, site: Site) -> int:
        """One for each configuration."""
        configurations = num_configurations(site)
        assert configurations is not None
        return configurations

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Take the configuration of the branch."""
        support = list_support(fn)
        assert support is not None
        value = support[configurations(site)[branch]]
        return Draw(jax.lax.stop_gradient(jnp.broadcast_to(value, site.batch_shape + site.event_shape)))

    def log_weights(self, log_prob: Array, record: PyTree) -> Array:  # noqa: ARG002
        """Weigh each branch by its probability."""
        return log_prob


def num_configurations(site: Site) -> int | None:
    """How many joint values the elements of a site have, or ``None`` if they cannot be listed."""
    return None if site.support_size is None else site.support_size**site.num_joint


def configurations(site: Site) -> Array:
    """Index into the support of every element, for every joint configuration: (A, joint shape)."""
    assert site.support_size is not None
    shape = (site.support_size,) * site.num_joint
    digits = np.stack(np.unravel_index(np.arange(site.support_size**site.num_joint), shape), axis=-1)
    return jnp.asarray(digits.reshape(-1, *site.joint_shape))


def check_listable(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise where joint configurations cannot be listed, are too many, or their mean is not what the objective needs."""
    others = "LeaveOneOut() with num_particles of at least 2, or Score(baseline=…)"
    if not context.linear:
        reason = (
            f"{context.objective} is no mean over particles, so the values of one particle cannot be summed over alone"
        )
        raise site.refuse(estimator, reason, "VIMCO() or LeaveOneOut()")
    configurations = num_configurations(site)
    if configurations is None:
        raise site.refuse(estimator, "its support cannot be listed", others)
    if site.in_scan:
        raise site.refuse(estimator, "it is inside a scan, whose steps would have to be enumerated jointly", others)
    if configurations > MAX_CONFIGURATIONS:
        reason = (
            f"terms downstream depend on {site.num_joint} of its elements jointly, which have "
            f"{site.support_size}^{site.num_joint} configurations; elements are separate where every term downstream is in the "
            "site's plates"
        )
        raise site.refuse(estimator, reason, others)
