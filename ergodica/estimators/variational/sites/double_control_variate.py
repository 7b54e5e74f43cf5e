"""Double control variates: leave-one-out baselines of a cost that the other particles' slopes have made flatter."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.leave_one_out import leave_one_out_mean
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.rebar import check_path_of_cost
from ergodica.estimators.variational.sites.relaxation import (
    as_value,
    check_relaxable,
    cost_and_slope,
    draw_from_law,
    log_mass,
    over_elements,
    sum_elements,
)
from ergodica.estimators.variational.sites.reparam import other_than_reparam
from ergodica.estimators.variational.sites.score import check_has_others


class DoubleControlVariate(AbstractSiteEstimator):
    r"""Double control variates: in the particle's own cost a linear one, and in the leave-one-out baseline another.

    .. math::

        \hat g = \frac1K \sum_k \Big[ \Big( f_k - a\, b_k - \frac{1}{K-1} \sum_{j \ne k} (f_j - a\, b_j) \Big)
        \nabla \log q(D_k) + a\, \bar g_{-k}^\top \nabla \pi \Big], \qquad b_k = \bar g_{-k}^\top (D_k - \pi)

    with :math:`\bar g_{-k} = \frac{1}{K-1} \sum_{j \ne k} f'(D_j)`, the mean slope at the other particles' draws; at bits and
    one-hot vectors ``Multinomial(1, probs=…)``.

    Parameters
    ----------
    strength : float
        :math:`a`; 0 is `ergodica.estimators.LeaveOneOut`, 1 is exact for a cost that is linear. (The paper adds, with
        :math:`\alpha = -a`.)
    tuned : bool
        Learn it from there on, by the gradient of :math:`-\tfrac12 \|\hat g\|^2` with respect to the site's logits, from the same
        particles. It is declared by ``loss.guide(model, guide)``, and SVI's optimiser trains it with the rest.

    Raises
    ------
    SiteError
        At any other law; with a single particle; in plates that a term downstream is outside of; under objectives that are no mean
        over particles.

    Notes
    -----
    Unbiased for every strength: given the other particles :math:`b_k` has mean zero, and its product with the score a mean that is
    put back; :math:`b_j` depends on :math:`D_k` through the slope, but has mean zero over :math:`D_j` for every :math:`D_k`. The
    program must be differentiable at hard values; where it cuts the derivative, this is leave-one-out. Values in between are
    never taken.

    Cost: two runs of the program a particle, and the derivative of one. (The first and the second are the same program, which a
    compiler may see.)

    When not to use it: where the slope at 0 and 1 says nothing of the difference, as of :math:`(b - .49)^2`: there a fixed
    strength of 1 adds much noise, and tuning finds one near 0.

    References
    ----------
    Titsias and Shi (2022), section 3; see also Shi et al. (2022).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=4, sites={"z": erg.estimators.DoubleControlVariate()})
    """

    strength: Array
    tuned: bool = eqx.field(static=True)

    references: ClassVar = ("titsias2022",)

    def __init__(self, strength: float = 1.0, *, tuned: bool = False) -> None:
        self.strength = check.positive("strength", strength, allow_zero=True)
        self.tuned = tuned

    def check(self, site: Site, context: Context) -> None:
        """Raise where there are no slopes of other particles to be had."""
        check_relaxable(self, site, context)
        check_slopes_of_others(self, site, context)

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """One, at the draw, for its derivative."""
        return 1

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and record log probabilities."""
        return draw_from_law(self, key, fn, site)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def parameters(self, key: Key, site: Site, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Where the strength starts, if it is tuned."""
        return {"strength": self.strength} if self.tuned else None

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times both costs less those of the others; what the linear one's mean becomes; and the tuning."""
        log_probs, one_hot = downstream.record
        mean, cost = jax.lax.stop_gradient((jnp.exp(log_probs), downstream.cost))
        _, slope = jax.lax.stop_gradient(cost_and_slope(site, downstream, one_hot))
        slope = leave_one_out_mean(slope)
        linear = sum_elements(slope * (one_hot - mean), cost)
        signal, of_linear = cost - leave_one_out_mean(cost), linear - leave_one_out_mean(linear)
        a = (downstream.params["strength"] if self.tuned else self.strength).astype(cost.dtype)
        score = score_surrogate(downstream.log_prob, signal - a * of_linear)
        put_back = jax.lax.stop_gradient(a).astype(slope.dtype) * slope * jnp.exp(log_probs)
        main = jnp.sum(score) + jnp.sum(put_back)
        if not self.tuned:
            return main
        correction = mean * (slope - jnp.sum(mean * slope, axis=-1, keepdims=True))
        by_logits = over_elements(signal - a * of_linear, mean) * (one_hot - mean) + a.astype(mean.dtype) * correction
        return main + minus_half_square(as_value(site, by_logits))


def minus_half_square(by_logits: Array) -> Array:
    r""":math:`-\tfrac12 \|\hat g\|^2` of the particles' mean, times their number, which a surrogate is divided by."""
    return -0.5 * by_logits.shape[0] * jnp.sum(jnp.mean(by_logits, axis=0) ** 2)


def check_slopes_of_others(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise where the slopes of other particles' costs say nothing of this one's, or would count a term more than once."""
    if not context.linear:
        reason = f"{context.objective} is no mean over particles, so that the others' slopes are not of this one's cost"
        raise site.refuse(estimator, reason, other_than_reparam(site, context))
    check_has_others(estimator, site, context)
    check_path_of_cost(estimator, site, context)
