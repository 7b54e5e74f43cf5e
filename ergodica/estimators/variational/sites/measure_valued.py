"""Measure-valued derivatives: differences of the cost between a probe and the draw."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site, base
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.reparam import other_than_reparam
from ergodica.estimators.variational.sites.weak_derivatives import LAWS


class MeasureValued(AbstractSiteEstimator):
    r"""Measure-valued (weak) derivatives, with common random numbers downstream.

    .. math::

        \nabla_\theta \mathrm{E}_{q_\theta} f(x) = \sum_{i,\, p} \mathrm{E}\left[
            c_p \left( f(x'_{i,p}, x_{-i}) - f(x) \right) \right] \nabla \theta_{i,p}

    The law's derivative with respect to each parameter :math:`p` of each element :math:`i` is a signed measure. The rest of the
    program runs for the draw :math:`x`, and once for each probe :math:`x'_{i,p}`, in which one element is replaced, with the same
    random numbers. Along a plate that all terms downstream are inside of, all elements are replaced at once, and each has its own
    difference.

    Bernoulli, binomial, categorical, exponential, gamma, geometric, log-normal, normal, Poisson and Weibull laws, with respect to
    all of their parameters; the derivatives are listed in ``ergodica.estimators.variational.sites.weak_derivatives``.

    Raises
    ------
    SiteError
        For other laws, inside a scan, and under `ergodica.estimators.IWELBO` inside plates.

    Notes
    -----
    Unbiased, for costs that need be neither smooth nor continuous. At a Bernoulli or categorical site of one element it has no
    noise of its own; for several joint elements its cost grows linearly, where `ergodica.estimators.Enumerate` grows exponentially
    (known as local expectation gradients).

    Cost: 1 + n·P runs of the program for n joint elements (`explain` shows the factor), with P = 1 for Bernoulli, binomial,
    exponential, geometric and Poisson, 2 for gamma and Weibull, 3 for normal and log-normal, and A - 1 for A categories.

    When not to use it: many joint elements; smooth costs, where `ergodica.estimators.Reparam` needs one run. With respect to a
    gamma's or a Weibull's concentration probes are weighted, which adds noise. In single precision, differences of a
    cost that is large lose digits as in any finite difference.

    References
    ----------
    Pflug (1989); Mohamed, Rosca, Figurnov and Mnih (2020), section 6 and table 1; discrete sites: Titsias and
    Lázaro-Gredilla (2015).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ergodica as erg
    >>> estimate = erg.estimators.expectation_gradient(
    ...     jax.random.key(0), jnp.array(0.3), lambda p: dist.Bernoulli(probs=p), lambda b: (b - 0.49) ** 2,
    ...     erg.estimators.MeasureValued(),
    ... )
    >>> print(f"{estimate.gradient:.3f}", estimate.n_grad)
    0.020 2
    """

    references: ClassVar = ("pflug1989", "mohamed2020", "titsias2015")

    def check(self, site: Site, context: Context) -> None:
        """Raise where the law's derivative is not known, or single elements cannot be replaced."""
        others = other_than_reparam(site, context)
        if site.distribution not in LAWS:
            known = ", ".join(sorted({name.removesuffix("Probs").removesuffix("Logits") for name in LAWS}))
            raise site.refuse(self, f"its weak derivative is not known here; those of {known} are", others)
        if site.in_scan:
            raise site.refuse(self, "it is inside a scan, whose steps would have to be replaced one by one", others)
        if not context.linear and site.shared_plates:
            plates = ", ".join(sorted(site.shared_plates))
            reason = (
                f"{context.objective} is no sum over the elements of plate {plates}, which are replaced all at once"
            )
            raise site.refuse(self, reason, others)

    def num_branches(self, site: Site) -> int:
        """One for the draw, and one for each probe of each joint element."""
        return 1 + LAWS[site.distribution].num_probes(site) * site.num_joint

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and replace one element by the probe of the branch."""
        key_draw, key_probe = jax.random.split(key)
        x = jax.lax.stop_gradient(fn(rng_key=key_draw))
        probes = LAWS[site.distribution].probes(key_probe, base(fn), x)
        probe, element = jnp.divmod(branch - 1, site.num_joint)
        others = jax.lax.stop_gradient(jnp.stack([p.value for p in probes])).astype(x.dtype)
        here = jnp.asarray(element_masks(site))[element] & (branch > 0)
        value = jnp.where(jnp.broadcast_to(here, x.shape), others[probe], x)
        return Draw(value, jnp.stack([jnp.broadcast_to(p.coefficient, x.shape) for p in probes], axis=-1))

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Differences of the cost, times the parameters."""
        cost = jax.lax.stop_gradient(downstream.cost)
        differences = own_differences(site, cost[:, 1:] - cost[:, :1])
        return differences * downstream.record[:, 0]


def element_masks(site: Site) -> np.ndarray:
    """Which element each joint index is: (n, joint shape)."""
    return np.eye(site.num_joint, dtype=bool).reshape(site.num_joint, *site.joint_shape)


def own_differences(site: Site, differences: Array) -> Array:
    """From (K, P·n, …, batch) to (K, …, batch, joint event, P): each element's own, where it was the one replaced."""
    num_joint, num_event = site.num_joint, len(site.joint_shape) - len(site.batch_shape)
    x = differences.reshape(differences.shape[0], -1, num_joint, *differences.shape[2:])
    x = x.reshape(*x.shape, *(1,) * num_event)
    masks = element_masks(site)
    masks = masks.reshape(num_joint, *(1,) * (x.ndim - 3 - len(site.joint_shape)), *site.joint_shape)
    return jnp.moveaxis(jnp.sum(jnp.where(masks, x, 0), axis=2), 1, -1)
