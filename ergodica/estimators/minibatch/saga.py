"""Variance reduction by a table of the gradients of all blocks."""

import math
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch import reshuffle
from ergodica.estimators.minibatch.control_variate import check_centre, check_holds_data
from ergodica.estimators.minibatch.likelihood import LogLikelihood, add_prior
from ergodica.estimators.minibatch.subsample import Minibatch


class SAGAState(NamedTuple):
    """The state of `SAGA`.

    Attributes
    ----------
    cursor : reshuffle.Cursor
    table : LogLikelihood
        For each block, what it said at its last visit; leading axis ``K``.
    mean : LogLikelihood
        Mean over the table.
    fresh : LogLikelihood
        Sum of what the blocks of this epoch said, over ``K``: the mean over the table once the epoch ends.
    unpaid : int32 scalar
        Gradients that `init` took and that the next estimate will count as its own.
    """

    cursor: reshuffle.Cursor
    table: LogLikelihood
    mean: LogLikelihood
    fresh: LogLikelihood
    unpaid: Array


class SAGA(AbstractGradientEstimator):
    r"""Gradient of a block, corrected by what each block said when it was visited last.

    .. math::

        \hat g(\theta) = \nabla\log p(\theta) + g_k(\theta) - G_k + \frac1K \sum_{j=1}^K G_j,
        \qquad G_k \leftarrow g_k(\theta)

    where :math:`g_k` is ``K`` times the gradient of the log likelihood of block ``k`` and the table :math:`G` holds one such
    gradient for each of the ``K`` blocks.

    Parameters
    ----------
    gradient : Minibatch
        Of scheme ``"blocks"``.
    centre : pytree, optional
        Where the table is filled first. It is then filled here, once for all chains; without it, by `init` at the position
        where each chain starts.
    max_bytes : int, optional
        The largest table that a chain may hold; a larger one is refused. 1 GiB unless given.

    Raises
    ------
    ValueError, TypeError
        For another scheme, a posterior that holds no data, a table larger than ``max_bytes``, a centre that is no position, or a
        batch that is handed over: which row of the table it belongs to is not known.

    Notes
    -----
    Unbiased: over the partition, whatever the table holds, the estimates average to the full gradient. The variance is
    that of the differences between where the chain is and where it was when the block came up last, one epoch ago or so. On
    a likelihood with equal curvatures it is not zero as for `SVRG`, since the rows of the table were taken at different
    positions.

    Cost: one gradient a row, a third of `SVRG`; ``N`` at the start, counted in ``n_grad`` of the first estimate (not counted if
    ``centre`` is given). Memory: ``K`` times the parameters *a chain*; 1,000 blocks, 10,000 parameters and 4 chains are
    160 MB in single precision. In a compiled loop one row of the table is read and one is written, in place. Over vectorised
    chains these are a gather and a scatter of one row a chain, so time grows with the chains as the gradient's does.
    Checkpoints hold the table too. Not for large networks; there, `SVRG` needs five times the parameters only.

    References
    ----------
    Defazio, Bach and Lacoste-Julien (2014); for Langevin dynamics Dubey et al. (2016), Algorithm 1. There, a table of single
    data and independent draws; here, of blocks in reshuffled order.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -jnp.cosh(x - t), jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = SAGA(erg.estimators.Minibatch(posterior, batch_size=2))
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> estimate, state = gradient.estimate(jax.random.key(1), jnp.array(0.1), state)
    >>> state.table.gradient.shape
    (3,)
    """

    minibatch: Minibatch
    start: LogLikelihood | None
    max_bytes: int = eqx.field(static=True)

    references: ClassVar = ("defazio2014", "dubey2016")

    def __init__(self, gradient: Minibatch, *, centre: PyTree | None = None, max_bytes: int = 2**30) -> None:
        self.minibatch = check_holds_data(gradient, "SAGA needs all the data")
        if gradient.scheme != "blocks":
            raise ValueError(
                f"SAGA needs a Minibatch of scheme='blocks', one row of its table a block; got scheme={gradient.scheme!r}. "
                "SVRG takes any scheme."
            )
        self.max_bytes = check.integer("max_bytes", max_bytes)
        self.start = None if centre is None else self._fill(check_centre(gradient, centre))

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> SAGAState:
        """Open the first epoch; without a centre, take the gradients of all blocks at ``params``."""
        self._refuse(batch)
        table, cost = self.start, 0
        if table is None:
            table, cost = self._fill(params), self.posterior.num_data
        mean = jax.tree.map(lambda rows: jnp.mean(rows, axis=0), table)
        cursor = self.minibatch.init(key, params).cursor
        return SAGAState(cursor, table, mean, _zeros(mean), jnp.asarray(cost, jnp.int32))

    def estimate(
        self, key: Key, params: PyTree, state: SAGAState, batch: Batch | None = None
    ) -> tuple[Estimate, SAGAState]:
        """Estimate the gradient at ``params`` from the next block, and enter what it says into the table."""
        self._refuse(batch)
        num_blocks = self.minibatch.num_blocks
        index, cursor = reshuffle.advance(key, state.cursor, num_blocks)
        before = _row(state.table, index)
        # the row is read before it is written, or the compiler would copy the whole table at each step
        before, table = jax.lax.optimization_barrier((before, state.table))
        now, estimate = self._at(params, index, before, state.mean)
        table = jax.tree.map(lambda rows, x: jax.lax.dynamic_update_index_in_dim(rows, x, index, 0), table, now)
        mean = tree.axpy(1 / num_blocks, tree.subtract(now, before), state.mean)
        fresh = tree.axpy(1 / num_blocks, now, state.fresh)
        # an epoch renews every row, so that its sum is the mean: rounding does not add up over epochs
        ended = cursor.position == 0
        mean = tree.select(ended, fresh, mean)
        fresh = tree.select(ended, _zeros(fresh), fresh)
        estimate = estimate._replace(n_grad=state.unpaid + estimate.n_grad)
        return estimate, SAGAState(cursor, table, mean, fresh, jnp.zeros((), jnp.int32))

    def probe(self, key: Key, params: PyTree, state: SAGAState) -> Estimate:
        """Estimate from a block that is independent of the epoch; the table stays as it is."""
        index = jax.random.randint(key, (), 0, self.minibatch.num_blocks)
        return self._at(params, index, _row(state.table, index), state.mean)[1]

    def _at(
        self, params: PyTree, index: Array, before: LogLikelihood, mean: LogLikelihood
    ) -> tuple[LogLikelihood, Estimate]:
        """Evaluate a block, and estimate from the difference to what it said before."""
        batch = self.minibatch.block(index)
        now = LogLikelihood(*jax.value_and_grad(self.minibatch.log_likelihood)(params, batch))
        corrected = tree.add(tree.subtract(now, before), mean)
        return now, add_prior(self.posterior, params, corrected, n_grad=batch.weight.shape[0])

    def _fill(self, params: PyTree) -> LogLikelihood:
        """Evaluate all blocks at one position."""
        num_blocks = self.minibatch.num_blocks
        row = sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in jax.tree.leaves(params))
        if num_blocks * row > self.max_bytes:
            raise ValueError(
                f"The table of SAGA would take {num_blocks * row:,} bytes a chain ({num_blocks} blocks of {row:,} bytes), "
                f"and max_bytes is {self.max_bytes:,}. Take larger batches, SVRG, or a larger max_bytes."
            )
        return _fill(self.minibatch, params)

    def _refuse(self, batch: Batch | None) -> None:
        if batch is not None:
            raise ValueError(
                "SAGA takes no batch that is handed over: it cannot know to which row of its table the batch belongs. "
                "Use Minibatch, ControlVariate or SVRG with streamed data."
            )

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is estimated."""
        return self.minibatch.target


def _row(table: LogLikelihood, index: Array) -> LogLikelihood:
    return jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, index, 0, keepdims=False), table)


def _zeros(like: LogLikelihood) -> LogLikelihood:
    return jax.tree.map(jnp.zeros_like, like)


@jax.jit
def _fill(minibatch: Minibatch, params: PyTree) -> LogLikelihood:
    of_block = jax.value_and_grad(minibatch.log_likelihood)
    return LogLikelihood(*jax.lax.map(lambda k: of_block(params, minibatch.block(k)), jnp.arange(minibatch.num_blocks)))
