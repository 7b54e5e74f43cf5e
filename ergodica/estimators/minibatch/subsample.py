"""Minibatch gradients of a log posterior."""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch import importance, reshuffle

SCHEMES = ("blocks", "uniform", "full", "importance", "symmetric")

type Scheme = Literal["blocks", "uniform", "full", "importance", "symmetric"]


class MinibatchState(NamedTuple):
    """Where the epoch stands: a `reshuffle.Cursor`, or ``None`` for the schemes that have none."""

    cursor: Any


class Minibatch(AbstractGradientEstimator):
    r"""Unbiased minibatch gradient of a log posterior.

    .. math:: \hat g(\theta) = \nabla\log p(\theta) + N \sum_{i \in B} w_i \nabla\log p(x_i \mid \theta)

    Parameters
    ----------
    posterior : Posterior
    batch_size : int, optional
        Rows a gradient, between 1 and the number of data; left out for ``scheme="full"``.
    scheme : {"blocks", "uniform", "full", "importance", "symmetric"}
        ``"blocks"`` shuffles the rows once, at construction, cuts them into ``K = ceil(N / batch_size)`` contiguous
        blocks of equal size (give or take one row) and visits them in a fresh random order each epoch; a block's
        estimate is ``K`` times its sum, so that the mean over the blocks is the full gradient. ``"uniform"`` draws
        ``batch_size`` rows with replacement at each call. ``"full"`` uses all rows, without noise. ``"importance"`` draws
        with replacement as ``"uniform"`` does, but row ``i`` with probability :math:`p_i` and weight
        :math:`w_i = 1 / (n N p_i)`. ``"symmetric"`` visits the blocks of ``"blocks"`` in a random order and then in the
        reverse one.
    probabilities : array (N,), optional
        For ``scheme="importance"``: positive and with sum one, such as those of `importance_probabilities`.
    key : typed PRNG key, optional
        For the one shuffle of the rows; a fixed key unless given.

    Raises
    ------
    ValueError, TypeError
        For a batch size out of range, an unknown scheme, probabilities that are none or are missing, or a posterior that
        cannot be cut into data.

    Notes
    -----
    Cost: ``batch_size`` likelihood gradients a call (``N / K`` on average for blocks), and the same for a probe.
    With ``N`` large the gather of random rows costs more than the gradient; a contiguous block avoids it.

    Successive gradients of ``"blocks"`` are not independent: over an epoch their noise cancels. The bias that gradient
    noise puts on the stationary covariance of a Langevin sampler is therefore of second order in the step while an
    epoch is short against relaxation: about :math:`K h \lambda / 3` times the bias under ``"uniform"`` for
    :math:`K h \lambda \ll 1`, and nearly the same once :math:`K h \lambda \gg 1`. Closed-form laws for independent
    batches hold for ``"uniform"`` only.

    Under ``"symmetric"`` an epoch of ``2K`` steps is a symmetric composition, if each step is one too and sees one batch alone:
    ``UBU``, or ``BAOAB`` with ``one_batch=True``. It is then of second order for each order of the blocks, not only on average
    over the orders. The size of the error is nearly that of ``"blocks"``: on an isotropic Gaussian the noise bias of SGLD is at
    most 13% larger, so ``"blocks"`` is the default.

    Do not use it where the likelihood does not factorise over the rows (time series, Gaussian processes).

    References
    ----------
    Welling and Teh (2011), equation 4. Blocks: Shamir (2016); the shuffle: Hoang, Morris and Rogaway (2012). Importance
    sampling of rows: Putcha, Nemeth and Fearnhead (2023).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = Minibatch(posterior, batch_size=2)
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> estimates = []
    >>> for i in range(3):
    ...     estimate, state = gradient.estimate(jax.random.key(i), jnp.array(0.0), state)
    ...     estimates.append(float(estimate.gradient))
    >>> sum(estimates) / 3  # an epoch averages to the full gradient
    15.0
    """

    target: Posterior
    rows: PyTree
    proposal: importance.Proposal | None
    batch_size: int = eqx.field(static=True)
    scheme: str = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)

    references: ClassVar = ("welling2011",)

    def __init__(
        self,
        posterior: Posterior,
        batch_size: int | None = None,
        scheme: Scheme = "blocks",
        *,
        probabilities: Any = None,
        key: Key | None = None,
    ) -> None:
        if not isinstance(posterior, Posterior):
            raise TypeError(
                f"posterior must be an ergodica Posterior; got {type(posterior).__name__}. "
                "Make one by from_numpyro(model, data=...) or Posterior(log_prior, log_likelihood, data)."
            )
        self.target = posterior
        self.scheme = check.one_of("scheme", scheme, SCHEMES)
        n = posterior.num_data
        if scheme == "full":
            if batch_size is not None and batch_size != n:
                raise ValueError(f"scheme='full' uses all {n} data; leave batch_size out (got {batch_size}).")
            batch_size = n
        elif n == 0:
            raise ValueError("The posterior has no data to draw from; use scheme='full'.")
        else:
            batch_size = check.integer("batch_size", batch_size, least=1, most=n, hint=f"There are {n} data.")
        if (scheme == "importance") != (probabilities is not None):
            raise ValueError(
                "probabilities belong to scheme='importance', which needs them (see importance_probabilities); got "
                f"scheme={scheme!r} {'without' if probabilities is None else 'with'} probabilities."
            )
        self.proposal = None if probabilities is None else importance.make_proposal(probabilities, n)
        self.batch_size = batch_size
        self.num_blocks = -(-n // batch_size) if n else 1
        self.rows = posterior.data
        if self.reshuffles and posterior.data is not None:
            order = np.asarray(jax.random.permutation(jax.random.key(0) if key is None else key, n))
            self.rows = jax.tree.map(lambda x: x[order], posterior.data)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> MinibatchState:  # noqa: ARG002
        """Open the first epoch; ``params`` and ``batch`` do not matter."""
        return MinibatchState(reshuffle.start(key) if self.reshuffles else None)

    def draw(self, key: Key, state: MinibatchState) -> tuple[Batch, MinibatchState]:
        """Draw the next batch. Estimators that wrap this one call it once a step and reuse the batch."""
        self._require_data()
        if self.reshuffles:
            symmetric = self.scheme == "symmetric"
            block, cursor = reshuffle.advance(key, state.cursor, self.num_blocks, symmetric=symmetric)
            return self.block(block), MinibatchState(cursor)
        return self.independent_batch(key), state

    def independent_batch(self, key: Key) -> Batch:
        """Draw a batch that has nothing to do with those of `draw`: for probes."""
        self._require_data()
        if self.scheme == "full":
            return Batch(self.rows, jnp.full((self.batch_size,), 1.0 / self.batch_size))
        if self.reshuffles:
            return self.block(jax.random.randint(key, (), 0, self.num_blocks))
        if self.proposal is None:
            rows = jax.random.randint(key, (self.batch_size,), 0, self.target.num_data)
            weight = jnp.full((self.batch_size,), 1.0 / self.batch_size)
        else:
            rows, weight = importance.draw_rows(key, self.proposal, self.batch_size)
        return Batch(jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), self.rows), weight)

    def block(self, index: Array | int) -> Batch:
        """Cut out one block of the shuffled rows.

        The first ``N mod K`` blocks have one row more than the others. All are cut with the length of the longer
        ones; the surplus row of a shorter block, a real datum, has weight 0.
        """
        n, k = self.target.num_data, self.num_blocks
        short, num_long = divmod(n, k)
        index = jnp.asarray(index, jnp.int32)
        length = short + (num_long > 0)
        first = index * short + jnp.minimum(index, num_long)
        begin = jnp.minimum(first, n - length)
        data = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, length), self.rows)
        if num_long == 0:
            return Batch(data, jnp.full((length,), k / n))
        place = begin + jnp.arange(length, dtype=jnp.int32) - first
        inside = (place >= 0) & (place < jnp.where(index < num_long, short + 1, short))
        return Batch(data, jnp.where(inside, k / n, 0.0))

    def log_likelihood(self, params: PyTree, batch: Batch) -> Array:
        """Estimate the log likelihood of all the data from a batch (scalar)."""
        values = self.target.log_likelihood(params, batch.data)
        scale = jnp.asarray(self.target.num_data, values.dtype)
        return scale * jnp.sum(batch.weight.astype(values.dtype) * values)

    def at(self, params: PyTree, batch: Batch | None) -> Estimate:
        """Estimate value and gradient from a given batch."""

        def log_density(params: PyTree) -> Array:
            prior = self.target.log_prior(params)
            return prior if batch is None else prior + self.log_likelihood(params, batch).astype(prior.dtype)

        value, gradient = jax.value_and_grad(log_density)(params)
        return Estimate(gradient, value, n_grad=0 if batch is None else batch.weight.shape[0])

    def estimate(
        self, key: Key, params: PyTree, state: MinibatchState, batch: Batch | None = None
    ) -> tuple[Estimate, MinibatchState]:
        """Estimate the gradient at ``params`` from the next batch, or from the one given."""
        if batch is not None:
            batch = as_batch(batch)
        elif self.target.num_data:
            batch, state = self.draw(key, state)
        return self.at(params, batch), state

    def probe(self, key: Key, params: PyTree, state: MinibatchState) -> Estimate | None:  # noqa: ARG002
        """Estimate from a batch that is independent of the epoch; ``None`` where the data are streamed."""
        if self.target.data is None and self.target.num_data:
            return None
        return self.at(params, self.independent_batch(key) if self.target.num_data else None)

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is estimated."""
        return self.target

    @property
    def exact(self) -> bool:
        """Whether all data are used at each call."""
        return self.scheme == "full"

    @property
    def reshuffles(self) -> bool:
        """Whether the noise cancels over an epoch."""
        return self.scheme in ("blocks", "symmetric")

    @property
    def batch_source(self) -> "Minibatch | None":
        """The estimator itself, where it draws batches at all."""
        return None if self.exact or self.target.data is None else self

    def _require_data(self) -> None:
        if self.target.data is None:
            raise ValueError(
                "The posterior holds no data, so no batch can be drawn: give batch= at each step (streamed data), or make "
                "the posterior with its data."
            )


def as_batch(batch: Any) -> Batch:
    """Take a `Batch`, or rows of data that each count the same."""
    if isinstance(batch, Batch):
        return batch
    length = check.leading_length("batch", batch)
    return Batch(batch, jnp.full((length,), 1.0 / length))
