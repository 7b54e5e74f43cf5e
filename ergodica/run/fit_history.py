"""What a fit keeps on the host: a row a step and a row an evaluation, and their export."""

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

_DESCRIPTIONS: dict[str, str] = {
    "value": "the estimator's value at the parameters before the step",
    "grad_norm": "Euclidean norm of the gradient",
    "update_norm": "Euclidean norm of the optimiser's update",
    "learning_rate": "learning rate of the step",
    "n_grad": "gradient evaluations of single data, up to and with the step",
    "wall_time": "seconds of steps up to and with the step, without compilation and metrics; measured over chunks of steps",
    "status": "0: taken; 1: skipped, since gradient or update was not finite; 2: skipped, since the gradient was a spike",
}
_OF_EVALUATIONS: dict[str, str] = {
    "value": "mean of the estimator's value over the last evaluate_every steps (those taken)",
    "n_grad": "gradient evaluations of single data until then",
    "wall_time": "seconds of steps until then, without compilation and metrics",
}


class Table:
    """Columns that grow at the end.

    Parameters
    ----------
    names : sequence of str
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self._length = sorted(names), 0
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][: self._length] if self._columns else np.zeros(0)

    def append(self, rows: dict[str, np.ndarray]) -> None:
        """Add rows: for each column an array of the same length."""
        num = len(rows[self.names[0]])
        if not self._columns:
            self._columns = {name: np.zeros(max(num, 64), rows[name].dtype) for name in self.names}
        end = self._length + num
        for name in self.names:
            column = self._columns[name]
            if end > len(column):
                column = self._columns[name] = np.concatenate(
                    [column, np.zeros(max(end, 2 * len(column)) - len(column), column.dtype)]
                )
            column[self._length : end] = rows[name]
        self._length = end

    def since(self, first: int) -> list[np.ndarray]:
        """Rows from ``first`` on, column by column in the order of the names."""
        return [self[name][first:] for name in self.names]

    def take(self, columns: Sequence[np.ndarray]) -> None:
        """Add rows that `since` gave."""
        if len(columns[0]):
            self.append(dict(zip(self.names, columns, strict=True)))


def to_datatree(
    steps: Table, evaluations: Table, attributes: dict[str, Any], learning_rate: np.ndarray | None = None
) -> "xarray.DataTree":
    """Make the history of a fit: groups ``steps`` (with the learning rates, if they are not in the table) and ``evaluations``."""
    import xarray

    columns = {name: steps[name] for name in steps.names}
    if learning_rate is not None:
        columns["learning_rate"] = learning_rate
    of_steps = xarray.Dataset(
        {name: ("step", column, _attributes(name, _DESCRIPTIONS)) for name, column in columns.items()},
        coords={"step": ("step", np.arange(len(steps)), {"description": "steps made before"})},
    )
    of_evaluations = xarray.Dataset(
        {
            name: ("step", evaluations[name], _attributes(name, _OF_EVALUATIONS))
            for name in evaluations.names
            if name != "step"
        },
        coords={"step": ("step", evaluations["step"].astype(np.int64), {"description": "steps made before"})},
    )
    root = xarray.Dataset(attrs={**_origin(), **attributes})
    return xarray.DataTree.from_dict({"/": root, "steps": of_steps, "evaluations": of_evaluations})


def _attributes(name: str, descriptions: dict[str, str]) -> dict[str, str]:
    return {"description": descriptions[name]} if name in descriptions else {}


def _origin() -> dict[str, str]:
    return {
        "inference_library": "ergodica",
        "inference_library_version": importlib.metadata.version("ergodica"),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
