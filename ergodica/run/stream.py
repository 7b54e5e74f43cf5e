"""Run a sampler on data that are read as it goes: files larger than memory, loaders, endless streams."""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ergodica.core import check, rng
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Key, Position, PyTree
from ergodica.run.chains import run_chains
from ergodica.run.checkpoint import Checkpoint
from ergodica.run.feed import Batches, Feed

if TYPE_CHECKING:
    import xarray


class RowBlocks:
    """Blocks of rows of arrays that stay on disk, each epoch in a fresh random order.

    Parameters
    ----------
    arrays : pytree of array-likes
        With one row a datum along the leading axis: ``numpy.load("x.npy", mmap_mode="r")``, an HDF5 or Zarr data set,
        ``xarray.open_zarr(path)["x"]`` (a `DataArray`). They need ``shape``, ``dtype`` and slices.
    batch_size : int
        Rows a block, at most.
    key : typed PRNG key, optional
        For the orders; a fixed key unless given.

    Raises
    ------
    ValueError, TypeError
        If the arrays disagree in length, or the batch size is out of range.

    Notes
    -----
    ``num_data`` rows are cut into ``batches_per_epoch = ceil(num_data / batch_size)`` contiguous blocks of equal size, give
    or take one row. A block is one read of neighbouring rows. Each row weighs ``batches_per_epoch / num_data``, so that an
    epoch of gradients averages to the full one. The order of epoch ``e`` depends on the key and ``e`` alone: ``blocks(step)``
    reads on from any step.

    Rows stay in the order of the file. If neighbours there are alike (sorted by time, by class), blocks differ more than
    random batches would, and gradients are noisier by as much: shuffle the file once.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = RowBlocks({"y": np.arange(10.0)}, batch_size=4)
    >>> blocks.batches_per_epoch, blocks.block(0).weight.round(2).tolist()
    (3, [0.3, 0.3, 0.3, 0.3])
    """

    def __init__(self, arrays: PyTree, batch_size: int, key: Key | None = None) -> None:
        key = jax.random.key(0) if key is None else key
        rng.check_key(key)
        self.arrays = arrays
        shapes = jax.tree.map(lambda x: np.broadcast_to(np.zeros(()), x.shape), arrays)  # looks at no data
        self.num_data = check.leading_length("arrays", shapes)
        check.integer("batch_size", batch_size, most=self.num_data, hint=f"There are {self.num_data} rows.")
        self.batches_per_epoch = -(-self.num_data // batch_size)
        self._words = [int(w) for w in np.asarray(jax.random.key_data(key)).ravel()]

    def __call__(self, start_step: int) -> Iterator[Batch]:
        """Read the batches from a step on, without end."""
        epoch, place = divmod(start_step, self.batches_per_epoch)
        while True:
            for block in self._order(epoch)[place:]:
                yield self.block(int(block))
            epoch, place = epoch + 1, 0

    def block(self, index: int) -> Batch:
        """Read one block; all have the same length, and a surplus row weighs nothing."""
        short, num_long = divmod(self.num_data, self.batches_per_epoch)
        length = short + (num_long > 0)
        first = index * short + min(index, num_long)
        begin = min(first, self.num_data - length)
        data = jax.tree.map(lambda x: np.asarray(x[begin : begin + length]), self.arrays)
        place = begin - first + np.arange(length)
        inside = (place >= 0) & (place < short + (index < num_long))
        weight: Any = np.where(inside, self.batches_per_epoch / self.num_data, 0.0)
        return Batch(data, weight)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self._words, epoch]).permutation(self.batches_per_epoch)

    @property
    def fingerprint(self) -> str:
        """Identify arrays and orders: structure, shapes, dtypes, the first and the last block, and the key."""
        digest = hashlib.sha256(f"{self._words} {self.batches_per_epoch} {jax.tree.structure(self.arrays)}".encode())
        for block in (self.block(0), self.block(self.batches_per_epoch - 1)):
            for leaf in jax.tree.leaves(block.data):
                digest.update(f"{leaf.shape} {leaf.dtype}".encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


def stream(
    key: Key,
    sampler: AbstractKernel,
    batches: Batches,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    thin: int = 1,
    initial: Position | Callable[[Key], Position] | None = None,
    posterior: Posterior | None = None,
    *,
    batches_per_epoch: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    throw: bool = True,
    probes: bool = True,
) -> "xarray.DataTree":
    """Draw from a posterior whose data are handed over in batches, instead of held.

    Parameters
    ----------
    key : typed PRNG key
    sampler : AbstractKernel
        Of any kind that takes batches; its posterior is made without data:
        ``Posterior(log_prior, log_likelihood, num_data=N, initial=…)``.
    batches : RowBlocks, callable or iterable
        Step ``i`` uses batch ``i``. ``RowBlocks(arrays, batch_size)`` for arrays on disk; ``batches(start_step)``, a function that
        gives an iterator from any step on; or an iterable (a list, a data loader), which is begun anew when it ends. A batch is
        a `Batch` with weights, or rows: arrays with a common leading axis, as ``log_likelihood`` takes them.
    num_samples, num_warmup, num_chains, thin, initial, posterior
        As for `ergodica.sample`.
    batches_per_epoch : int, optional
        How many batches go over the data once. Each row then weighs ``batches_per_epoch / num_data``, so that an epoch with a
        short last batch stays unbiased. Without it each row weighs one over the length of its batch, which is right for
        batches that are random samples; a batch that is shorter than the first is then refused. ``RowBlocks`` brings its own.
    progress, checkpoint, throw
        As for `ergodica.sample`. To resume, batches must be ``RowBlocks`` or a function of the step.
    probes : bool
        Where the posterior holds its data all the same, probe gradients are evaluated as by `ergodica.sample`. Otherwise there is
        nothing to take an independent gradient from: the result has no ``t_conf``, no ``grad_noise`` and no group ``probe``,
        and `ergodica.diagnose` says that it could not check for bias.

    Returns
    -------
    xarray.DataTree
        As from `ergodica.sample`, without ``observed_data``. If an iterator ends before the run does, a warning says so and
        the attribute ``result`` is ``interrupted``.

    Raises
    ------
    ValueError, TypeError
        For batches that are empty, longer than the first, of another structure or short without a weight; for a source whose
        number of rows is not the posterior's; for a checkpoint with batches that cannot be read from the middle.
    SamplingError, CheckpointError
        As for `ergodica.sample`.

    Notes
    -----
    All chains see the same batch at each step, so that one read serves all. Their gradient noise is therefore shared, and
    their agreement says less than that of independent chains: R-hat and standard errors between chains do not see the
    common part. Run again with other orders (another key of ``RowBlocks``) to see it.

    Memory: three stacks of at most 16 MiB of batches (at least one batch each), beside the chains. The next stack is read while
    the device works on the last one. Cost a step: that of the sampler, and of reading one batch.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np, ergodica as erg
    >>> posterior = erg.Posterior(
    ...     lambda t: -0.5 * t**2, lambda t, rows: -0.5 * (rows - t) ** 2, num_data=100, initial=jnp.array(0.0)
    ... )
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 10), step_size=1e-3)
    >>> blocks = RowBlocks(np.linspace(-1.0, 1.0, 100, dtype=np.float32), batch_size=10)
    >>> dt = stream(jax.random.key(0), sampler, blocks, num_samples=50, num_warmup=20, num_chains=2)
    >>> dict(dt.posterior.sizes)
    {'chain': 2, 'draw': 50}
    """
    sampler = check.instance("sampler", sampler, AbstractKernel, "such as SGLD(gradient, step_size)")
    target = sampler.posterior if posterior is None else posterior
    num_data = _num_data(batches, target)
    if batches_per_epoch is not None:
        check.integer("batches_per_epoch", batches_per_epoch, most=num_data, hint=f"There are {num_data} data.")
    feed = Feed(batches, num_data, batches_per_epoch)
    if checkpoint is not None and not feed.can_seek:
        raise ValueError(
            "A checkpoint needs batches that can be read from any step: RowBlocks(arrays, batch_size), or a function "
            f"batches(start_step); got {type(batches).__name__}."
        )
    return run_chains(
        key,
        sampler,
        (num_samples, num_warmup, num_chains, thin),
        initial,
        posterior,
        progress=progress,
        checkpoint=checkpoint,
        throw=throw,
        probes=probes,
        feed=feed,
    )


def _num_data(batches: Any, posterior: Posterior | None) -> int:
    if posterior is None or posterior.num_data == 0:
        raise ValueError(
            "The sampler has no posterior with data to stream; give log_likelihood= and num_data= to Posterior."
        )
    if isinstance(batches, RowBlocks) and batches.num_data != posterior.num_data:
        raise ValueError(f"The arrays have {batches.num_data} rows, and the posterior num_data={posterior.num_data}.")
    return posterior.num_data
