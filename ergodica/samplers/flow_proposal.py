"""Independence Metropolis with a normalizing flow as the proposal."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.flow import Flow, check_flow, flat_log_density
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Batch, Key, Position


class FlowIMHState(NamedTuple):
    """A chain: its position, and the log densities of target and flow there."""

    position: Position
    log_density: Array
    log_proposal: Array


class FlowIMHInfo(NamedTuple):
    r"""What a step reports.

    Attributes
    ----------
    lp : scalar
        The target's log density at the new position.
    log_weight : scalar
        :math:`\log\tilde p - \log q` there. A chain is stuck where it is large.
    acceptance_rate : scalar
        Probability of acceptance, mean over the step's proposals.
    n_grad : int32 scalar
        Log densities evaluated, counted as gradients.
    diverging : bool
        Whether the weight of a proposal was NaN or infinite; such a proposal is rejected. Or that of the position at the start
        of the step: from NaN the first proposal that can be weighed is accepted, infinity is never left.
    """

    lp: Array
    log_weight: Array
    acceptance_rate: Array
    n_grad: Array
    diverging: Array


class FlowIMH(AbstractKernel):
    r"""Independence Metropolis: proposals are draws of a flow, whatever the position.

    .. math:: y \sim q, \qquad \alpha(x, y) = \min\left(1, \frac{w(y)}{w(x)}\right), \qquad w = \tilde p / q

    Parameters
    ----------
    flow : Flow
        :math:`q`, fitted to the target, and fixed from here on.
    target : callable or Posterior
        :math:`\log\tilde p`: a function of one point (D,), an object with a method ``log_density``, or a posterior, whose
        positions are raveled in the order of ``ergodica.core.tree.ravel``.
    num_proposals : int
        Proposals a step. They are drawn and weighed together, and accepted or not one after the other: a step is so many of
        independence Metropolis, of which the last is stored.

    Raises
    ------
    ValueError, TypeError
        For a target of another dimension or kind, a position of another structure, or a batch that is handed over.

    Notes
    -----
    The target is left invariant, whatever the flow. How fast the chain forgets its start is decided by the largest weight,
    :math:`w^* = \sup_x p(x)/q(x)`: after :math:`t` proposals the distance to the target in total variation is
    :math:`(1 - 1/w^*)^t`, from the worst start. Where the flow lacks part of the target :math:`w^*` is huge: the chain rarely
    gets there, and then stays. `ergodica.diagnostics.flow_report` with draws of the target tells.

    Start chains at draws of the flow, ``initial=sampler.start``. A start in the flow's far tail has a weight that no proposal
    beats, and the chain stays there.

    Cost: ``num_proposals`` draws of the flow, in its cheap direction, and as many log densities of the target over all the
    data, counted as gradients; no gradient. The flow's inverse is taken once, at the start.

    Not in many dimensions with a flow that is merely good: the acceptance rate falls exponentially with the dimension, for the
    same quality a coordinate. Take the flow as a change of variables then (`ergodica.models.flows.neutra`).

    References
    ----------
    Tierney (1994), section 2.3.3; Wang (2022), for the rate; Albergo, Kanwar and Shanahan (2019).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=2)
    >>> sampler = FlowIMH(flow, lambda x: -0.5 * jnp.sum(x**2))
    >>> dt = erg.sample(jax.random.key(1), sampler, num_samples=50, num_warmup=10, num_chains=2, initial=sampler.start)
    >>> dt.attrs["exact"], dt.posterior["position"].shape
    ('exact', (2, 50, 2))
    """

    flow: Flow
    target: Posterior | Callable[[Array], Array]
    num_proposals: int = eqx.field(static=True)

    references: ClassVar = ("tierney1994", "wang2022", "albergo2019")

    def __init__(self, flow: Flow, target: Any, num_proposals: int = 1) -> None:
        self.flow = check_flow(flow)
        function = flat_log_density(target, flow.dim)
        self.target = target if isinstance(target, Posterior) else as_partial(function)
        self.num_proposals = check.integer("num_proposals", num_proposals)

    @property
    def exact(self) -> bool:
        """Whether the target is left invariant: it is."""
        return True

    @property
    def posterior(self) -> Posterior | None:
        """The posterior that is sampled; ``None`` where the target is a function."""
        return self.target if isinstance(self.target, Posterior) else None

    @property
    def n_grad_unit(self) -> int:
        """Single data in one log density."""
        return 1 if self.posterior is None else max(1, self.posterior.num_data)

    def start(self, key: Key) -> Position:
        """A draw of the flow as a position, to start a chain at."""
        x = self.flow.sample(key, 1)[0]
        return x if self.posterior is None else tree.unravel(x, self.posterior.shape())

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> FlowIMHState:  # noqa: ARG002
        """Start a chain at ``position``. Cost: one pass through the flow's inverse."""
        _refuse(batch)
        position = check.position("position", position)
        like = jax.ShapeDtypeStruct((self.flow.dim,), jnp.result_type(float))
        expected = like if self.posterior is None else self.posterior.shape()
        check.same_structure("position", position, "what the target takes", expected)
        log_q = self.flow.log_prob(tree.ravel(position).astype(like.dtype))
        return FlowIMHState(position, self._log_density(position), log_q)

    def step(self, key: Key, state: FlowIMHState, batch: Batch | None = None) -> tuple[FlowIMHState, FlowIMHInfo]:
        """Propose draws of the flow and accept them or not."""
        _refuse(batch)
        key_flow, key_accept = jax.random.split(key)
        x, log_q = self.flow.sample_and_log_prob(key_flow, self.num_proposals)
        proposals = jax.vmap(lambda x: tree.unravel(x, state.position))(x)
        log_p = jax.vmap(self._log_density)(proposals)
        log_weights = log_weight(log_p, log_q)
        bad = jnp.isnan(log_weights) | (log_weights == jnp.inf)
        uniforms = jax.random.uniform(key_accept, log_weights.shape, log_weights.dtype)
        now = log_weight(state.log_density, state.log_proposal)
        stuck = jnp.isnan(now) | (now == jnp.inf)
        now = jnp.where(jnp.isnan(now), -jnp.inf, now)
        last, rate = metropolis_path(now, jnp.where(bad, -jnp.inf, log_weights), uniforms)
        candidates = FlowIMHState(proposals, log_p, log_q)
        chosen = jax.tree.map(lambda leaf: leaf[jnp.maximum(last, 0)], candidates)
        state = tree.select(last >= 0, chosen, state)
        info = FlowIMHInfo(
            lp=state.log_density,
            log_weight=log_weight(state.log_density, state.log_proposal),
            acceptance_rate=rate,
            n_grad=jnp.asarray(self.num_proposals, jnp.int32),
            diverging=jnp.any(bad) | stuck,
        )
        return state, info

    def _log_density(self, position: Position) -> Array:
        target = self.target
        return target.log_density(position) if isinstance(target, Posterior) else target(position)


def log_weight(log_density: Array, log_proposal: Array) -> Array:
    r""":math:`\log\tilde p(x) - \log q(x)`."""
    return log_density.astype(log_proposal.dtype) - log_proposal


def metropolis_path(log_weight: Array, proposed: Array, uniforms: Array) -> tuple[Array, Array]:
    r"""Accept or reject proposals one after the other, each with probability :math:`\min(1, w' / w)`.

    Parameters
    ----------
    log_weight : scalar
        Of the position at the start.
    proposed : array (B,)
        Log weights of the proposals.
    uniforms : array (B,)
        In [0, 1).

    Returns
    -------
    last : int32 scalar
        Index of the proposal where the chain ends; -1 where all were rejected.
    rate : scalar
        Probability of acceptance, mean over the proposals.
    """

    def one(carry: tuple[Array, Array], given: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        last, now = carry
        index, other, u = given
        rate = acceptance(now, other)
        accepted = u < rate
        return (jnp.where(accepted, index, last), jnp.where(accepted, other, now)), rate

    index = jnp.arange(proposed.shape[0], dtype=jnp.int32)
    start = (jnp.full((), -1, jnp.int32), log_weight)
    (last, _), rates = jax.lax.scan(one, start, (index, proposed, uniforms))
    return last, jnp.mean(rates)


def acceptance(log_weight: Array, proposed: Array) -> Array:
    r""":math:`\min(1, w' / w)` from logarithms; 0 where neither has density."""
    gain = proposed - log_weight
    return jnp.where(jnp.isnan(gain), 0, jnp.exp(jnp.minimum(gain, 0)))


def _refuse(batch: Batch | None) -> None:
    if batch is not None:
        raise ValueError("FlowIMH weighs proposals by all the data: batch= cannot be handed over.")
