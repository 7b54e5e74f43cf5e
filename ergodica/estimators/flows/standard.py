"""The standard gradients for flows: the reparameterised one of the reverse divergence, and maximum likelihood."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import Flow, check_flow, flat_log_density
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree
from ergodica.estimators.flows.gradient import AbstractFlowGradient, check_draws, dtype_of, rows


class ReverseKL(AbstractFlowGradient):
    r"""Reparameterised gradient of :math:`-\mathrm{KL}(q_\theta\|p)`: the total derivative, score term included.

    .. math:: \nabla_\theta\, \frac1n \sum_i \left[\log p(T_\theta(z_i)) + \log|\det \partial T_\theta/\partial z_i|\right],
              \qquad z_i \sim q_0

    Parameters
    ----------
    flow : Flow
    target : callable or Posterior
        Log density of the target, up to a constant, as for `PathGradient`.
    num_samples : int
        Draws a call.

    Raises
    ------
    ValueError, TypeError
        For a target of another dimension or kind.

    Notes
    -----
    Unbiased. Its noise does not vanish at a perfect fit, unlike that of `PathGradient`; far from one it may have less. ``value``
    and ``aux`` are those of `PathGradient`.

    Cost: ``num_samples`` gradients of the target, one pass through the flow and its derivative; no inverse.

    References
    ----------
    Rezende and Mohamed (2015).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=4)
    >>> gradient = ReverseKL(flow, lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), num_samples=256)
    >>> estimate, _ = gradient.estimate(jax.random.key(1), gradient.params, None)
    >>> estimate.n_grad
    256
    """

    template: Flow
    target: Callable[[Array], Array]
    num_samples: int = eqx.field(static=True)

    references: ClassVar = ("rezende2015",)

    def __init__(self, flow: Flow, target: Any, num_samples: int = 256) -> None:
        self.template = check_flow(flow)
        self.target = as_partial(flat_log_density(target, flow.dim))
        self.num_samples = check.integer("num_samples", num_samples)

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        """Estimate the gradient from fresh draws of the flow."""
        self._takes_no(batch)
        z = self.base_draws(key, params)

        def objective(params: PyTree) -> tuple[Array, Array]:
            flow = self.flow(params)
            log_weight = jax.vmap(lambda z: self._log_weight(flow, z))(z)
            return jnp.mean(log_weight), log_weight

        (value, log_weight), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return Estimate(gradient, value, {"log_weight": log_weight}, n_grad=self.num_samples), state

    def per_draw(
        self,
        key: Key,
        params: PyTree,
        state: None,
        batch: Batch | None = None,
        *,
        linearise: bool = False,
        independent: bool = False,  # noqa: ARG002  (all draws are fresh)
    ) -> tuple[Draws, None] | None:
        """The base's draws one by one, where the base is standard normal."""
        self._takes_no(batch)

        def objective(flow: Flow, z: Array) -> tuple[Array, Array]:
            log_weight = self._log_weight(flow, z)
            return log_weight, log_weight

        draws = self.draws_of_base(key, params, objective, linearise=linearise)
        return None if draws is None else (draws, state)

    def _log_weight(self, flow: Flow, z: Array) -> Array:
        x, log_det = flow.layer.forward(z)
        return self.target(x) + log_det - flow.base.log_prob(z)

    @staticmethod
    def _takes_no(batch: Batch | None) -> None:
        if batch is not None:
            raise ValueError("ReverseKL draws from the flow and takes no batch that is handed over.")


class MaximumLikelihood(AbstractFlowGradient):
    r"""Gradient of the mean log density of a flow over draws of its target: that of :math:`-\mathrm{KL}(p\|q_\theta)`.

    Parameters
    ----------
    flow : Flow
    draws : array (N, D)
        Of the target.
    num_samples : int
        Draws a call, taken at random; a batch of others can be handed over.

    Raises
    ------
    ValueError, TypeError
        For draws of another shape.

    Notes
    -----
    Needs no density of the target. With the target's gradient at the draws, `PathGradient` with ``direction="forward"`` has less
    noise near a fit, and does not overfit a small set of draws.

    Cost: one pass through the flow's inverse and its derivative for each draw.

    References
    ----------
    Papamakarios et al. (2021), section 2.3.

    Examples
    --------
    >>> import jax, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=4)
    >>> gradient = MaximumLikelihood(flow, 1.0 + jax.random.normal(jax.random.key(1), (1000, 2)), num_samples=100)
    >>> estimate, _ = gradient.estimate(jax.random.key(2), gradient.params, None)
    >>> estimate.value.shape
    ()
    """

    template: Flow
    draws: Array
    num_samples: int = eqx.field(static=True)

    references: ClassVar = ("papamakarios2021",)

    def __init__(self, flow: Flow, draws: Array, num_samples: int = 256) -> None:
        self.template = check_flow(flow)
        self.draws = check_draws("draws", draws, flow.dim)
        self.num_samples = check.integer("num_samples", num_samples)

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        """Estimate the gradient from some of the draws."""
        batch = rows(key, self.draws, self.num_samples) if batch is None else batch
        x, weight = batch.data.astype(dtype_of(params)), batch.weight.astype(dtype_of(params))

        def objective(params: PyTree) -> Array:
            return jnp.sum(weight * jax.vmap(self.flow(params).log_prob)(x))

        value, gradient = jax.value_and_grad(objective)(params)
        return Estimate(gradient, value, n_grad=len(weight)), state
