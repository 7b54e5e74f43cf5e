"""Where the batches of a streamed run come from: read on the host, several steps' worth at a time, of one shape."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ergodica.core import check
from ergodica.core.types import Batch, PyTree

type Batches = Iterable[Any] | Callable[[int], Iterable[Any]]

_FEED_BYTES = 1 << 24
_MOST_STEPS = 1024


class Feed:
    """Batches by step, stacked for several steps.

    Parameters
    ----------
    batches : iterable or callable
        See `ergodica.run.stream`.
    num_data : int
        How many data the stream stands for.
    batches_per_epoch : int or None
        How many batches go over the data once.

    Attributes
    ----------
    first : Batch
        The batch of step 0; all others are brought to its length.
    capacity : int
        How many steps' batches are read at a time.
    """

    def __init__(self, batches: Batches, num_data: int, batches_per_epoch: int | None) -> None:
        self._open = _opener(batches)
        self.can_seek = callable(batches)
        self.fingerprint = str(
            getattr(batches, "fingerprint", getattr(batches, "__qualname__", type(batches).__name__))
        )
        self._row_weight = None if batches_per_epoch is None else batches_per_epoch / num_data
        self._iterator, self._next = iter(self._open(0)), 0
        first = next(self._iterator, None)
        if first is None:
            raise ValueError("batches must hold at least one batch; got none.")
        self._length: int | None = None
        self.first = self._whole(first)
        self._length = len(self.first.weight)
        self._iterator = itertools.chain([self.first], self._iterator)
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(self.first))
        self.capacity = max(1, min(_MOST_STEPS, _FEED_BYTES // max(1, size)))
        self._buffer: list[Batch] = []

    def take(self, step: int, num_steps: int) -> tuple[int, Batch]:
        """Give the batches of the steps from ``step`` on, at most ``num_steps``: how many, and a stack of ``capacity``.

        Fewer come where the stack holds no more or the stream has ended. What the stack holds beyond is filling.
        """
        if step != self._next - len(self._buffer):
            self._seek(step)
        num_steps = min(num_steps, self.capacity)
        self._read(num_steps)
        taken, self._buffer = self._buffer[:num_steps], self._buffer[num_steps:]
        filling = [self.first] * (self.capacity - len(taken))
        return len(taken), jax.tree.map(lambda *leaves: np.stack(leaves), *taken, *filling)

    def prefetch(self, num_steps: int) -> None:
        """Read ahead for so many steps, or as much as a stack holds."""
        self._read(min(num_steps, self.capacity))

    def _seek(self, step: int) -> None:
        if not self.can_seek:
            raise ValueError(
                f"The run goes on at step {step}, and these batches can only be read from their start: give a function "
                "batches(start_step), or RowBlocks, to resume from a checkpoint."
            )
        self._iterator, self._next, self._buffer = iter(self._open(step)), step, []

    def _read(self, num: int) -> None:
        while len(self._buffer) < num:
            batch = next(self._iterator, None)
            if batch is None:
                self._iterator = iter(self._open(self._next))
                batch = next(self._iterator, None)
            if batch is None:
                return
            self._buffer.append(self._whole(batch))
            self._next += 1

    def _whole(self, batch: Any) -> Batch:
        """Bring a batch to the form and length of the first: surplus rows weigh nothing."""
        if not isinstance(batch, Batch):
            batch = Batch(batch, self._equal_weights(batch))
        data = jax.tree.map(np.asarray, batch.data)
        weight: Any = np.asarray(batch.weight, np.result_type(float))
        length = check.leading_length("batch", data)
        if weight.shape != (length,):
            raise ValueError(
                f"The weights of a batch of {length} rows must have the shape ({length},); got {weight.shape}."
            )
        if self._length is None or length == self._length:
            return Batch(data, weight)
        if length > self._length:
            raise ValueError(f"No batch may be longer than the first, of {self._length} rows; got one of {length}.")
        lacking = self._length - length
        data = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], lacking, axis=0)]), data)
        weight = np.pad(weight, (0, lacking))
        return Batch(data, weight)

    def _equal_weights(self, rows: PyTree) -> Any:
        length = check.leading_length("batch", jax.tree.map(np.asarray, rows))
        if self._row_weight is not None:
            return np.full(length, self._row_weight)
        if self._length not in (None, length):
            raise ValueError(
                f"A batch of {length} rows came after one of {self._length}, and it is not known what its rows stand for: give "
                "ergodica Batch objects with weights or, if the posterior knows num_data and the batches go over the data one "
                "epoch after the other, batches_per_epoch=."
            )
        return np.full(length, 1.0 / length)


def _opener(batches: Batches) -> Callable[[int], Iterable[Any]]:
    """Give a function of the step to read from; an iterable begins anew each time, unless it is an iterator."""
    if callable(batches):
        return batches
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches or a function of a step that gives one; got {type(batches).__name__}."
        )
    return lambda _: batches
