"""RODEO: leave-one-out baselines with control variates from a Stein operator on bits."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.leave_one_out import leave_one_out_mean
from ergodica.core.stein import flip_probability, gibbs_stein_flips
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.double_control_variate import check_slopes_of_others, minus_half_square
from ergodica.estimators.variational.sites.relaxation import (
    BITS,
    check_relaxable,
    cost_and_slope,
    draw_from_law,
    log_mass,
    over_elements,
    sum_elements,
)
from ergodica.estimators.variational.sites.reparam import other_than_reparam


def scored_stein(bits: Array, p: Array, total: Array, at_flips: Array, centre: Array, flip: Array) -> Array:
    r"""The operator applied to :math:`(h(x) - c)\,(x_m - p_m)`, for each bit :math:`m`, from ``total`` :math:`= \mathcal A h`.

    .. math:: (x_m - p_m)\, (\mathcal A h)(x) + q(\lnot x_m)\, (1 - 2 x_m)\, (h(x^{\lnot m}) - c)
    """
    return (bits - p) * total + flip * (1 - 2 * bits) * (at_flips - centre)


class RODEO(AbstractSiteEstimator):
    r"""RODEO: score function with control variates that a Stein operator makes of functions of the other particles.

    .. math::

        \hat g = \frac1K \sum_k \Big[ \Big( f_k - \frac{1}{K-1} \sum_{j \ne k} \left( f_j + \alpha (\mathcal A h_j)(x_j) \right)
        \Big) \nabla \log q(x_k) + \beta (\mathcal A \tilde h_k)(x_k) \Big]

    with :math:`\mathcal A` the sum of `ergodica.core.stein.gibbs_stein_flips` over independent bits and, from the cost's
    expansions about the other particles' draws,

    .. math::

        h_k(y) = \frac{1}{K-1} \sum_{j \ne k} H\!\left( f_j,\, f'(x_j)^\top (y - x_j) \right), \qquad
        \tilde h_k(y) = \left( h_k(y) - h_k(p) \right) (y - p)

    at bits with probabilities :math:`p`. :math:`H(f, d) = f + d` unless given.

    Parameters
    ----------
    apply : callable, optional
        :math:`H`: ``apply(psi, cost, difference)`` of two numbers, another's cost and what its slope says of the difference;
        returns a number. It is learned.
    initial : pytree or callable, optional
        Where :math:`\psi` starts, or ``initial(key, *args, **kwargs)``.
    alpha, beta : float
        Strengths in the baselines and in the gradient; with both 0 this is `ergodica.estimators.LeaveOneOut`.
    tuned : bool
        Learn both from there on; implied by ``apply``. What is learned is declared by ``loss.guide(model, guide)`` and trained by
        SVI's optimiser with the rest, by the gradient of :math:`-\tfrac12 \|\hat g\|^2` with respect to the site's logits.

    Raises
    ------
    SiteError
        At any other law than Bernoulli; with a single particle; in plates that a term downstream is outside of; under objectives
        that are no mean over particles.

    Notes
    -----
    Unbiased for every :math:`H` and strength: :math:`h_k` does not depend on :math:`x_k`, over which :math:`\mathcal A h_k` has
    mean zero. The paper divides the operator by the number of bits; here :math:`\alpha` and :math:`\beta` take that up. The program
    must be differentiable at hard values.

    With one bit :math:`\mathcal A h = \mathrm{E} h - h`, and at a linear cost :math:`\alpha = \beta = 1` leaves no noise. With
    more bits that share a cost, :math:`\mathcal A \tilde h` subtracts products of different bits twice, and the best
    :math:`\beta` is nearer to one half.

    Cost: two runs of the program a particle, and the derivative of one; :math:`K^2 (D + 2)` evaluations of :math:`H` for
    :math:`D` bits, which are all kept.

    When not to use it: many particles and bits, for the memory; as `ergodica.estimators.DoubleControlVariate`, where slopes at 0
    and 1 say nothing of the cost.

    References
    ----------
    Shi, Zhou, Hwang, Titsias and Mackey (2022), sections 3 and 4.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=4, sites={"z": erg.estimators.RODEO()})
    """

    apply: Callable | None = eqx.field(static=True)
    initial: Any
    alpha: Array
    beta: Array
    tuned: bool = eqx.field(static=True)

    references: ClassVar = ("shi2022",)

    def __init__(
        self,
        apply: Callable | None = None,
        initial: PyTree | Callable = None,
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        tuned: bool = False,
    ) -> None:
        self.apply = None if apply is None else check.function("apply", apply)
        self.initial = initial
        self.alpha = check.positive("alpha", alpha, allow_zero=True)
        self.beta = check.positive("beta", beta, allow_zero=True)
        self.tuned = tuned or apply is not None

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value is no bit, or there are no slopes of other particles to be had."""
        check_relaxable(self, site, context)
        if site.distribution not in BITS:
            reason = "the operator here changes a bit to its other value, and it has more"
            raise site.refuse(self, reason, "DoubleControlVariate(), " + other_than_reparam(site, context))
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
        """Both strengths, and those of the function."""
        if not self.tuned:
            return None
        psi = self.initial(key, *args, **kwargs) if callable(self.initial) else self.initial
        return {"alpha": self.alpha, "beta": self.beta} | ({} if psi is None else {"psi": psi})

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times the difference, the operator's part of the gradient, and what lowers the variance."""
        learned = downstream.params if self.tuned else {"alpha": self.alpha, "beta": self.beta}
        log_probs, one_hot = downstream.record
        p, bits, cost = jax.lax.stop_gradient((jnp.exp(log_probs[..., 1]), one_hot[..., 1], downstream.cost))
        _, slope = jax.lax.stop_gradient(cost_and_slope(site, downstream, one_hot))
        flip = flip_probability(bits, p)
        at_draw, at_flips, at_mean = self._functions(learned.get("psi"), cost, slope[..., 1], bits, p)
        total = sum_elements(gibbs_stein_flips(over_elements(at_draw, bits), at_flips, flip), cost)
        signal = cost - leave_one_out_mean(cost + learned["alpha"].astype(cost.dtype) * total)
        stein = scored_stein(bits, p, over_elements(total, bits), at_flips, over_elements(at_mean, bits), flip)
        stein = learned["beta"].astype(stein.dtype) * stein
        score = score_surrogate(downstream.log_prob, signal)
        logits = log_probs[..., 1] - log_probs[..., 0]
        main = jnp.sum(score) + jnp.sum(jax.lax.stop_gradient(stein) * logits)
        if not self.tuned:
            return main
        return main + minus_half_square(over_elements(signal, bits) * (bits - p) + stein)

    def _functions(self, psi: PyTree, cost: Array, slope: Array, bits: Array, p: Array) -> tuple[Array, Array, Array]:
        """:math:`h_k` at every particle's draw, at that with each bit changed, and at the mean."""

        def expansion(cost_j: Array, slope_j: Array, bits_j: Array) -> tuple[Array, Array, Array]:
            at_draw, at_mean = (sum_elements(slope_j * (y - bits_j), cost) for y in (bits, p))
            at_flips = over_elements(at_draw, bits) + slope_j * (1 - 2 * bits)
            return (
                self._function(psi, cost_j, at_draw),
                self._function(psi, over_elements(cost_j, bits), at_flips),
                self._function(psi, cost_j, at_mean),
            )

        every = jax.vmap(expansion)(cost[:, None], slope[:, None], bits[:, None])
        return jax.tree.map(self._mean_of_others, every)

    def _function(self, psi: PyTree, cost: Array, difference: Array) -> Array:
        """:math:`H`, number by number."""
        apply = self.apply
        if apply is None:
            return cost + difference
        flat = (jnp.broadcast_to(cost, difference.shape).ravel(), difference.ravel())
        return jax.vmap(lambda c, d: apply(psi, c, d))(*flat).reshape(difference.shape)

    @staticmethod
    def _mean_of_others(x: Array) -> Array:
        """Mean over the leading axis, without the diagonal of the first two."""
        num = x.shape[0]
        others = (1 - jnp.eye(num, dtype=x.dtype)) / (num - 1)
        return jnp.sum(x * others.reshape(num, num, *(1,) * (x.ndim - 2)), axis=0)
