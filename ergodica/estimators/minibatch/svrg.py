"""Control variates whose centre follows the chain, at the same cost at every step.

The textbook form stops every so often for a pass over all the data. In a compiled loop over many chains such a branch is
taken by all of them at each step. Here the pass for the *next* centre is spread over the steps, one block a step, and the
centre moves when the pass is complete.
"""

import abc
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch.control_variate import (
    check_centre,
    check_holds_data,
    corrected_estimate,
    full_likelihood_gradient,
)
from ergodica.estimators.minibatch.likelihood import LogLikelihood
from ergodica.estimators.minibatch.subsample import Minibatch, MinibatchState, as_batch


class Snapshot(NamedTuple):
    """A centre, and the log likelihood there: of all the data, or summed over the blocks visited so far."""

    centre: PyTree
    full: LogLikelihood


class SnapshotState(NamedTuple):
    """The state of a control variate that moves.

    Attributes
    ----------
    minibatch : MinibatchState
    active, coming : Snapshot
        The one in use, and the one that is being summed.
    num_summed : int32 scalar
        Blocks in the sum of ``coming``.
    candidate : pytree
        The centre after ``coming``, as far as the chain has come.
    unpaid : int32 scalar
        Gradients that `init` took and that the next drawn estimate will count as its own.
    """

    minibatch: MinibatchState
    active: Snapshot
    coming: Snapshot
    num_summed: Array
    candidate: PyTree
    unpaid: Array


class AbstractMovingControlVariate(AbstractGradientEstimator):
    """What `SVRG` and `RecentringControlVariate` share: all but the choice of the next centre."""

    minibatch: Minibatch
    start: Snapshot | None

    def __init__(self, gradient: Minibatch, *, centre: PyTree | None = None) -> None:
        self.minibatch = check_holds_data(gradient, f"{type(self).__name__} needs all the data")
        self.start = None
        if centre is not None:
            centre = check_centre(gradient, centre)
            self.start = Snapshot(centre, LogLikelihood(*full_likelihood_gradient(gradient.target, centre)))

    @abc.abstractmethod
    def next_centre(self, candidate: PyTree, params: PyTree, num_visited: Array) -> PyTree:
        """Update the candidate for the next centre by a position.

        Parameters
        ----------
        candidate : pytree
            From the call before.
        params : pytree
            Where the chain is.
        num_visited : int32 scalar
            Positions of this pass that the candidate has seen; 0 at the first of a pass.
        """

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> SnapshotState:
        """Open the first epoch; without a centre, take the gradient of all the data at ``params``."""
        active, cost = self.start, 0
        if active is None:
            active = Snapshot(params, LogLikelihood(*full_likelihood_gradient(self.posterior, params)))
            cost = self.posterior.num_data
        return SnapshotState(
            minibatch=self.minibatch.init(key, params, batch),
            active=active,
            coming=Snapshot(params, _zeros(active.full)),
            num_summed=jnp.zeros((), jnp.int32),
            candidate=params,
            unpaid=jnp.asarray(cost, jnp.int32),
        )

    def estimate(
        self, key: Key, params: PyTree, state: SnapshotState, batch: Batch | None = None
    ) -> tuple[Estimate, SnapshotState]:
        """Estimate the gradient at ``params`` from the next batch, and sum one more block at the coming centre.

        A batch that is given is corrected at the active centre, which then stays where it is.
        """
        if batch is not None:
            return self._at(params, as_batch(batch), state), state
        batch, minibatch_state = self.minibatch.draw(key, state.minibatch)
        estimate = self._at(params, batch, state)
        block = self.minibatch.block(state.num_summed)
        n_grad = state.unpaid + estimate.n_grad + block.weight.shape[0]
        state = self._walk(state, params, block)
        return estimate._replace(n_grad=n_grad), state._replace(minibatch=minibatch_state)

    def probe(self, key: Key, params: PyTree, state: SnapshotState) -> Estimate:
        """Estimate from a batch that is independent of the epoch, around the active centre."""
        return self._at(params, self.minibatch.independent_batch(key), state)

    def _at(self, params: PyTree, batch: Batch, state: SnapshotState) -> Estimate:
        return corrected_estimate(self.minibatch, params, batch, *state.active)

    def _walk(self, state: SnapshotState, params: PyTree, block: Batch) -> SnapshotState:
        """Add a block to the sum; once all blocks are in it, move on to the coming centre and open the next sum."""
        num_blocks, coming = self.minibatch.num_blocks, state.coming
        of_block = LogLikelihood(*jax.value_and_grad(self.minibatch.log_likelihood)(coming.centre, block))
        coming = Snapshot(coming.centre, tree.axpy(1 / num_blocks, of_block, coming.full))
        candidate = self.next_centre(state.candidate, params, state.num_summed)
        complete = state.num_summed + 1 == num_blocks
        opened = Snapshot(candidate, _zeros(coming.full))
        return SnapshotState(
            minibatch=state.minibatch,
            active=tree.select(complete, coming, state.active),
            coming=tree.select(complete, opened, coming),
            num_summed=jnp.where(complete, 0, state.num_summed + 1),
            candidate=candidate,
            unpaid=jnp.zeros((), jnp.int32),
        )

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is estimated."""
        return self.minibatch.target

    @property
    def exact(self) -> bool:
        """Whether all data are used at each call."""
        return self.minibatch.exact


def _zeros(like: LogLikelihood) -> LogLikelihood:
    return jax.tree.map(jnp.zeros_like, like)


class SVRG(AbstractMovingControlVariate):
    r"""Control variate around a recent position of the chain: stochastic variance-reduced gradients.

    .. math::

        \hat g(\theta) = \nabla\log p(\theta) + \sum_{i=1}^N \nabla\ell_i(c)
            + N \sum_{i \in B} w_i \left[ \nabla\ell_i(\theta) - \nabla\ell_i(c) \right]

    with a centre :math:`c` that is renewed each :math:`K = \lceil N / n \rceil` steps, for batches of ``n`` rows. While one
    centre is in use, the sum over all data at the next is taken block by block, one block a step. The centre in use is
    therefore a position that the chain had between ``K`` and ``2 K`` steps ago.

    Parameters
    ----------
    gradient : Minibatch
        The estimator to correct, of any scheme.
    centre : pytree, optional
        The first centre. The sum over all the data is then taken here once; without it, by `init` at the position where
        each chain starts.

    Raises
    ------
    ValueError, TypeError
        If the posterior holds no data, or the centre does not have the structure of a position.

    Notes
    -----
    Unbiased at each step, in value and in gradient. The variance is that of a `ControlVariate` around the same centre: it
    falls with the square of the distance that the chain has moved since, and is zero where the likelihood is quadratic with
    equal curvatures. In return for three gradients a row it needs no mode, and follows a chain from one mode to another.
    It does not pay where ``2 K`` steps carry the chain across the posterior: there, the centre is no better than another
    draw, and a fixed `ControlVariate` around the mode is both less noisy and cheaper.

    Cost: ``3 n`` gradients a step, the same at each step and for any number of vectorised chains; ``N`` at the start,
    counted in ``n_grad`` of the first estimate (not counted if ``centre`` is given, as for `ControlVariate`). A probe costs
    ``2 n``. State: five times the parameters a chain. Batches that are handed over (streamed data) are corrected but do not
    renew the centre.

    References
    ----------
    Johnson and Zhang (2013); for Langevin dynamics Dubey et al. (2016), Algorithm 2. Both stop for a pass over the data at each
    renewal; spreading the pass over the steps leaves the estimate unbiased and makes the centre older by one pass.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -jnp.cosh(x - t), jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = SVRG(erg.estimators.Minibatch(posterior, batch_size=2))
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> costs = []
    >>> for i in range(3):
    ...     estimate, state = gradient.estimate(jax.random.key(i), jnp.array(0.0), state)
    ...     costs.append(int(estimate.n_grad))
    >>> costs
    [12, 6, 6]
    """

    references: ClassVar = ("johnson2013", "dubey2016")

    def next_centre(self, candidate: PyTree, params: PyTree, num_visited: Array) -> PyTree:  # noqa: ARG002
        """Take the position itself."""
        return params


class RecentringControlVariate(AbstractMovingControlVariate):
    r"""Control variate around a running mean of the chain.

    As `SVRG`, but the next centre is the mean of the positions of the last pass (:math:`K` steps) instead of the last of
    them.

    Parameters
    ----------
    gradient : Minibatch
        The estimator to correct, of any scheme.
    centre : pytree, optional
        The first centre, such as a mode; the position where each chain starts unless given.

    Raises
    ------
    ValueError, TypeError
        If the posterior holds no data, or the centre does not have the structure of a position.

    Notes
    -----
    A centre that is a draw lies as far from the chain, in mean square, as two draws from each other: twice the posterior
    variance. The mean of many draws lies at half of that, the posterior variance alone. So this is the better choice
    once ``K`` steps are long against relaxation, and `SVRG` where they are short: there, the last position is the closest.
    A chain in transit leaves both behind by about two passes.

    Unbiased at each step. Cost and state as for `SVRG`.

    References
    ----------
    Baker et al. (2019) for the fixed centre; Johnson and Zhang (2013) for centres that follow.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -jnp.cosh(x - t), jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = RecentringControlVariate(erg.estimators.Minibatch(posterior, batch_size=3))
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> for theta in (0.0, 1.0, 2.0, 3.0):
    ...     _, state = gradient.estimate(jax.random.key(0), jnp.array(theta), state)
    >>> float(state.active.centre), float(state.coming.centre)
    (0.5, 2.5)
    """

    references: ClassVar = ("baker2019", "johnson2013")

    def next_centre(self, candidate: PyTree, params: PyTree, num_visited: Array) -> PyTree:
        """Take the mean of the positions of this pass."""
        return jax.tree.map(lambda c, p: c + (p - c) / (num_visited + 1).astype(p.dtype), candidate, params)
