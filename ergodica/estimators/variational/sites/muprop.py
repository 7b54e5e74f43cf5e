"""MuProp: the score function, with the cost's expansion about the mean as a control variate."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.rebar import check_path_of_cost
from ergodica.estimators.variational.sites.relaxation import (
    check_relaxable,
    cost_and_slope,
    draw_from_law,
    log_mass,
    sum_elements,
)


class MuProp(AbstractSiteEstimator):
    r"""MuProp: score function less the cost's first-order expansion about the mean, whose own gradient is known.

    .. math::

        \hat g = \left( f(D) - f(\pi) - f'(\pi)^\top (D - \pi) \right) \nabla \log q(D) + f'(\pi)^\top \nabla \pi

    At bits and one-hot vectors ``Multinomial(1, probs=…)``, with the rest of the program on the same random numbers at :math:`\pi`.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index; in plates that a term downstream is outside of.

    Notes
    -----
    Unbiased, whatever the derivative is: where the program cuts it, by a comparison, less noise is removed. None is left where
    the cost is linear in the value. The program must take the mean for a value: an index by one is an error of JAX's. Densities
    are continued linearly there (`ergodica.estimators.variational.sites.relaxation`); the objective sees the hard draw alone.

    Cost: two runs of the program a particle, and the derivative of one.

    When not to use it: where values far from the mean matter, since the expansion is worst there; at large sites
    `ergodica.estimators.LeaveOneOut` needs no derivative. `ergodica.estimators.DARN` expands about the draw, and lets the bias
    stand.

    References
    ----------
    Gu, Levine, Sutskever and Mnih (2016), equation 5.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=2, sites={"z": erg.estimators.MuProp()})
    """

    references: ClassVar = ("gu2016",)

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value has no mean to run the program at, or elements share costs across a plate."""
        check_relaxable(self, site, context)
        check_path_of_cost(self, site, context)

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """One, at the mean."""
        return 1

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and record what the mean is a function of."""
        return draw_from_law(self, key, fn, site)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times what the expansion leaves of the cost; and the derivative of the expansion's mean."""
        log_probs, one_hot = downstream.record
        mean = jax.lax.stop_gradient(jnp.exp(log_probs))
        at_mean, slope = jax.lax.stop_gradient(cost_and_slope(site, downstream, mean))
        linear = sum_elements(slope * (one_hot - mean), downstream.cost)
        score = score_surrogate(downstream.log_prob, downstream.cost - at_mean - linear)
        return jnp.sum(score) + jnp.sum(slope * jnp.exp(log_probs))
