r"""Path gradients of normalizing flows: the score is carried along the sampling pass."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import Flow, check_flow, constant, flat_log_density
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree
from ergodica.estimators.flows.gradient import AbstractFlowGradient, check_draws, dtype_of, rows

type Direction = Literal["reverse", "forward"]

_BLOCK = 1024


def path_term(new: Array, score: Array, force: Array) -> Array:
    r"""A scalar whose gradient by the parameters is minus the path gradient of the divergence, for one draw.

    .. math:: \left(\frac{\partial x_\theta}{\partial\theta}\right)^{\!\top}
              \left(\nabla_x \log p(x) - \nabla_x \log q_\theta(x)\right)

    Parameters
    ----------
    new : array (D,)
        The draw where the pass ends, :math:`x_\theta`, differentiable in the parameters.
    score : array (D,)
        Of the law of that draw there.
    force : array (D,)
        Score of the law that it is to have.

    Notes
    -----
    One formula serves both divergences. With the flow's map from its base, :math:`p` is the target and the divergence is
    :math:`\mathrm{KL}(q_\theta\|p)`. With the map to the base, the draws are the target's, :math:`q` is their law after it,
    :math:`p` the base, and the divergence is :math:`\mathrm{KL}(p\|q_\theta)`.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024), algorithm 1.
    """
    return jnp.sum(jax.lax.stop_gradient(force - score) * new)


class PathGradient(AbstractFlowGradient):
    r"""Gradient of minus a Kullback--Leibler divergence between a flow and a target, without the noise of the score term.

    .. math:: \nabla_\theta \mathrm{KL}(q_\theta\|p) = \mathrm{E}_{z \sim q_0}
              \Big[\left(\tfrac{\partial T_\theta(z)}{\partial\theta}\right)^{\!\top}
              \nabla_x\left(\log q_\theta - \log p\right)(x)\Big|_{x = T_\theta(z)}\Big]

    What the total derivative has beside it, :math:`\mathrm{E}_q \nabla_\theta\log q_\theta(x)`, is zero in the mean and noise in a
    sample. The same vector averaged over draws of the target is :math:`\nabla_\theta \mathrm{KL}(p\|q_\theta)`.

    Parameters
    ----------
    flow : Flow
        Where to start from; its inexact arrays are the parameters (`params`).
    target : callable or Posterior
        Log density of the target, up to a constant: a function of one point (D,), an object with a method ``log_density``, or a
        posterior.
    direction : {"reverse", "forward"}
        :math:`\mathrm{KL}(q\|p)`, from draws of the flow; or :math:`\mathrm{KL}(p\|q)`, from draws of the target.
    num_samples : int
        Draws a call.
    draws : array (N, D), optional
        For "forward": draws of the target. Each call takes ``num_samples`` of them at random; a batch of others can be handed over.
    forces : array (N, D), optional
        For "forward": gradients of the target's log density at the draws; computed once unless given.
    passes : {1, 2}
        With 2, draw first and differentiate the flow's log density at the draws, through its inverse, afterwards ("sticking the
        landing"): the same gradient for more work, to compare with.

    Raises
    ------
    ValueError, TypeError
        For a target of another dimension, draws where none are used or none where they are needed.

    Notes
    -----
    Positions are trees of the flow's structure with ``None`` in place of what is no parameter; ``flow(params)`` puts them together.
    The gradient ascends. ``value`` is :math:`\mathrm{E}_q[\log p - \log q]` for "reverse", :math:`\mathrm{E}_p \log q` for
    "forward". ``aux["log_weight"]`` (num_samples,) is :math:`\log p - \log q` of each draw for "reverse".

    Where the flow equals the target the gradient is zero for every draw, so that its variance vanishes as the fit gets
    better. Far from there it may be *larger* than that of the standard gradient: the term that is left out is correlated with the
    rest. `ergodica.compare_gradients` says which it is.

    Forces at the target's draws carry information that the draws alone do not: "forward" does not overfit a small set of draws as
    maximum likelihood does, and needs the target's gradient to do so.

    Cost: ``num_samples`` gradients of the target ("forward": none after construction), one pass through the flow and its
    derivative, and for each layer the derivative of its conditioner that carries the score. With networks as conditioners that
    is 4/3 of the standard gradient's arithmetic, and 4/5 of that of two passes. Layers that cannot be inverted in closed form
    need no root in the reverse direction, and one with two passes, or in the forward direction.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024), algorithms 1 to 3; Roeder, Wu and Duvenaud (2017); Vaitl, Nicoli, Nakajima and
    Kessel (2022).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=4)
    >>> gradient = PathGradient(flow, lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), num_samples=256)
    >>> estimate, _ = gradient.estimate(jax.random.key(1), gradient.params, None)
    >>> estimate.aux["log_weight"].shape
    (256,)
    """

    template: Flow
    target: Callable[[Array], Array] | None
    draws: Array | None
    forces: Array | None
    direction: Direction = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    passes: int = eqx.field(static=True)

    references: ClassVar = ("vaitl2024", "roeder2017")

    def __init__(
        self,
        flow: Flow,
        target: Any,
        direction: Direction = "reverse",
        num_samples: int = 256,
        *,
        draws: Array | None = None,
        forces: Array | None = None,
        passes: Literal[1, 2] = 1,
    ) -> None:
        self.template = check_flow(flow)
        self.direction = check.one_of("direction", direction, ("reverse", "forward"))  # pyright: ignore[reportAttributeAccessIssue]
        self.num_samples = check.integer("num_samples", num_samples)
        self.passes = check.integer("passes", passes, most=2)
        self.target = None if target is None else as_partial(flat_log_density(target, flow.dim))
        if direction == "reverse":
            if draws is not None or forces is not None:
                raise ValueError("draws= and forces= are for direction='forward'; the reverse one draws from the flow.")
            if target is None:
                raise ValueError("direction='reverse' needs a target.")
            self.draws = self.forces = None
            return
        if draws is None:
            raise ValueError("direction='forward' needs draws= of the target, an array (N, D).")
        if target is None and forces is None:
            raise ValueError("direction='forward' needs a target, or forces= at the draws.")
        self.draws = check_draws("draws", draws, flow.dim)
        self.forces = check_draws("forces", self._forces(self.draws) if forces is None else forces, flow.dim)
        if self.forces.shape != self.draws.shape:
            raise ValueError(f"forces must have the shape of draws, {self.draws.shape}; got {self.forces.shape}.")

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        """Estimate the gradient from fresh draws of the flow, or from draws of the target."""
        if self.direction == "reverse":
            return self._reverse(key, params, batch), state
        return self._forward(key, params, batch), state

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
        """The base's draws one by one, for "reverse" where the base is standard normal.

        They are not linearised: the score that a pass carries has no derivative in the draw.
        """
        if self.direction == "forward" or linearise:
            return None
        _takes_no(batch)
        draws = self.draws_of_base(key, params, self._term)
        return None if draws is None else (draws, state)

    def _term(self, flow: Flow, z: Array) -> tuple[Array, Array]:
        """Path term and log weight of a draw of the base (D,)."""
        x, log_q, score = draw_with_score(flow, z, self.passes)
        log_p, force = jax.value_and_grad(self.target)(jax.lax.stop_gradient(x))  # pyright: ignore[reportArgumentType]
        return path_term(x, score, force), log_p - log_q

    def _reverse(self, key: Key, params: PyTree, batch: Batch | None) -> Estimate:
        _takes_no(batch)
        z = self.base_draws(key, params)

        def objective(params: PyTree) -> tuple[Array, Array]:
            flow = self.flow(params)
            terms, log_weight = jax.vmap(lambda z: self._term(flow, z))(z)
            return jnp.mean(terms), log_weight

        gradient, log_weight = jax.grad(objective, has_aux=True)(params)
        return Estimate(gradient, jnp.mean(log_weight), {"log_weight": log_weight}, n_grad=self.num_samples)

    def _forward(self, key: Key, params: PyTree, batch: Batch | None) -> Estimate:
        batch = rows(key, (self.draws, self.forces), self.num_samples) if batch is None else self._with_forces(batch)
        dtype = dtype_of(params)
        x, forces, weight = (a.astype(dtype) for a in (*batch.data, batch.weight))

        def objective(params: PyTree) -> tuple[Array, Array]:
            flow = self.flow(params)
            terms, log_q = jax.vmap(lambda x, force: term_of_target_draw(flow, x, force, self.passes))(x, forces)
            return jnp.sum(weight * terms), jnp.sum(weight * log_q)

        gradient, value = jax.grad(objective, has_aux=True)(params)
        return Estimate(gradient, value, n_grad=len(weight))

    def _with_forces(self, batch: Batch) -> Batch:
        if isinstance(batch.data, tuple) and len(batch.data) == 2:
            return batch
        if self.target is None:
            raise ValueError("Without a target, a batch must hold pairs (draws, forces).")
        draws = check_draws("batch", batch.data, self.template.dim)  # pyright: ignore[reportArgumentType]
        return Batch((draws, self._forces(draws)), batch.weight)

    def _forces(self, draws: Array) -> Array:
        return jax.lax.map(jax.grad(self.target), draws, batch_size=_BLOCK)  # pyright: ignore[reportArgumentType]


def _takes_no(batch: Batch | None) -> None:
    if batch is not None:
        raise ValueError("direction='reverse' draws from the flow and takes no batch that is handed over.")


def draw_with_score(flow: Flow, z: Array, passes: int = 1) -> tuple[Array, Array, Array]:
    """The flow's draw from a base draw (D,), differentiable in its parameters; log density and score there, constants."""
    if passes == 1:
        x, log_det, score = flow.layer.forward_with_score(z, flow.base.score(z))
        return x, flow.base.log_prob(z) - log_det, score
    x, log_det = flow.layer.forward(z)
    score = jax.grad(constant(flow).log_prob)(jax.lax.stop_gradient(x))
    return x, jax.lax.stop_gradient(flow.base.log_prob(z) - log_det), score


def term_of_target_draw(flow: Flow, x: Array, force: Array, passes: int = 1) -> tuple[Array, Array]:
    """Path term of the forward divergence for a draw (D,) of the target, and the flow's log density there, a constant."""
    if passes == 1:
        z, log_det, score = flow.layer.inverse_with_score(x, force)
        return path_term(z, score, flow.base.score(jax.lax.stop_gradient(z))), jax.lax.stop_gradient(
            flow.base.log_prob(z) + log_det
        )
    fixed = constant(flow)
    log_q, score = jax.value_and_grad(fixed.log_prob)(x)
    z = fixed.layer.inverse(x)[0]
    return path_term(flow.layer.forward(z)[0], score, force), log_q
