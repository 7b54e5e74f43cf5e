"""DARN: the cost's expansion about the draw, evaluated half way between the two values of a bit."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.rebar import check_path_of_cost
from ergodica.estimators.variational.sites.relaxation import (
    BITS,
    check_relaxable,
    cost_and_slope,
    draw_from_law,
    log_mass,
)


class DARN(AbstractSiteEstimator):
    r"""DARN: score function with the cost's expansion about the draw as its baseline, and without the correction for it.

    .. math::

        \hat g_i = \left( f(b) - \left[ f(b) + f'(b)_i \left( \tfrac12 - b_i \right) \right] \right) \nabla \log q(b_i)
                  = f'(b)_i \left( b_i - \tfrac12 \right) \nabla \log q(b_i)

    for each bit :math:`i` of a site by itself, with the derivative of the cost that all share.

    Raises
    ------
    SiteError
        At any other law than Bernoulli; in plates that a term downstream is outside of.

    Notes
    -----
    **Biased**, unless the cost is quadratic in each bit: the baseline depends on the draw, and the gradient of its mean is left
    out. The mean is :math:`p q\,(f'(0) + f'(1)) / 2`, the trapezoidal rule, where the derivative is
    :math:`p q\,(f(1) - f(0))`: that of `ergodica.estimators.ReinMax`, which is the same at a bit but for noise of the site's own
    :math:`-\log q`, and knows one-hot vectors. `ergodica.estimators.MuProp` expands about the mean and puts the
    correction back. Where the program cuts the derivative, by a comparison or an index, nothing is left of the gradient.

    Cost: two runs of the program a particle, and the derivative of one. (The first and the second are the same program, which a
    compiler may see.)

    When not to use it: where bias matters; compare with `ergodica.estimators.LeaveOneOut` by `ergodica.compare_gradients`.

    References
    ----------
    Gregor, Danihelka, Mnih, Blundell and Wierstra (2014); in this form Gu, Levine, Sutskever and Mnih (2016).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=1, sites={"z": erg.estimators.DARN()})
    """

    references: ClassVar = ("gregor2014", "gu2016")

    @property
    def unbiased(self) -> bool:
        """Biased, but for quadratic costs."""
        return False

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value is no bit, or elements share costs across a plate."""
        check_relaxable(self, site, context)
        if site.distribution not in BITS:
            reason = "the point half way is between two values, and it has more"
            raise site.refuse(self, reason, "ReinMax(), which is DARN at a bit, or MuProp()")
        check_path_of_cost(self, site, context)

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """One, at the draw, for its derivative."""
        return 1

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and record log probabilities."""
        return draw_from_law(self, key, fn, site)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Each bit's own score, times what the expansion says of the other value."""
        log_probs, one_hot = downstream.record
        _, slope = cost_and_slope(site, downstream, one_hot)
        signal = jax.lax.stop_gradient(slope[..., 1:] * (one_hot[..., 1:] - 0.5))
        return signal * jnp.sum(one_hot * log_probs, axis=-1, keepdims=True)
