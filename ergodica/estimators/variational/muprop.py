"""MuProp: the score function, with the cost's expansion about the mean as a control variate."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.rebar import check_path_of_cost
from ergodica.estimators.variational.relaxation import (
    BITS,
    check_relaxable,
    draw_one_hot,
    log_mass,
    log_probabilities,
)
from ergodica.estimators.variational.site import AbstractSiteEstimator, only_gradient, score_surrogate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mean_value(log_probs: Array, one_hot: Array, axes: tuple[int, ...]) -> Array:  # noqa: ARG001
    r"""The mean :math:`\pi`, at which the cotangent :math:`f'(\pi)` becomes the gradient of MuProp's linear terms.

    .. math:: f'(\pi)_i^\top \nabla\pi_i - \Big( \sum_j f'(\pi)_j^\top (D_j - \pi_j) \Big) \nabla \log q(D_i)

    The sum is over ``axes``: those along which elements share costs, and that of an element's own entries.
    """
    return jnp.exp(log_probs) + 0 * one_hot  # one for each draw, since so are the cotangents


def _forward(log_probs: Array, one_hot: Array, axes: tuple[int, ...]) -> tuple[Array, tuple[Array, Array]]:
    mean = mean_value(log_probs, one_hot, axes)
    return mean, (mean, one_hot)


def _backward(axes: tuple[int, ...], residuals: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    mean, one_hot = residuals
    linear = jnp.sum(slope * (one_hot - mean), axis=axes, keepdims=True)
    return slope * mean - linear * one_hot, jnp.zeros_like(one_hot)


mean_value.defvjp(_forward, _backward)


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
    are continued linearly there (`ergodica.estimators.variational.relaxation`); the objective sees the hard draw alone. In reverse
    mode only (`jax.grad`).

    Cost: three runs of the program a particle, and the derivative of two; the paper's two, and one to cancel what does not go
    through the value.

    When not to use it: where values far from the mean matter, since the expansion is worst there; at large sites
    `ergodica.estimators.LeaveOneOut` needs no derivative. DARN, which expands about the draw and lets the bias stand, is at a bit
    the same as `ergodica.estimators.ReinMax`.

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

    def num_branches(self, site: Site) -> int:  # noqa: ARG002
        """The draw, and the mean with and without its derivative."""
        return 3

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Take the draw, or the mean."""
        log_probs = log_probabilities(self, fn, site)
        one_hot = draw_one_hot(key, log_probs)
        joint = tuple(i for i, n in enumerate(site.joint_shape) if n > 1)
        mean = mean_value(log_probs, one_hot, (*joint, log_probs.ndim - 1))
        value = jnp.stack([one_hot, mean, jax.lax.stop_gradient(mean)])[branch]
        return Draw(value[..., 1] if site.distribution in BITS else value)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Score times the difference from the mean's cost; and what the mean's derivative becomes, everything else cancelling."""
        hard, moving, still = (downstream.cost[:, i] for i in range(3))
        return jnp.sum(score_surrogate(downstream.log_prob[:, 0], hard - still)) + only_gradient(moving - still)
