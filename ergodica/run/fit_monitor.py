"""What a fit is judged by while it runs: metrics of the user, the best parameters so far, and when to give up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check
from ergodica.core.types import Key, PyTree

type Metric = Callable[[Key, PyTree], Any]
type Metrics = Metric | Mapping[str, Metric]

OWN_COLUMNS = ("step", "value", "n_grad", "wall_time")
"""What an evaluation holds beside the metrics."""


@dataclass(frozen=True)
class Monitor:
    """Which quantity tells good parameters from bad, and when a fit gives up.

    Parameters
    ----------
    metric : str
        Name of a metric, or ``"value"``: the mean of the estimator's value over the last ``evaluate_every`` steps.
    patience : int, optional
        Evaluations in a row without improvement that end the run; unless given, none do. After an interruption it may be
        larger.
    minimise : bool
        Whether small is good.
    least_gain : float
        Improvements by no more than this do not renew the patience, in units of the metric.

    Notes
    -----
    The largest of many noisy evaluations is too large, and its parameters are not better by as much: give a metric that is
    precise, or take the last parameters. NaN is never an improvement.

    Examples
    --------
    >>> Monitor("ess", patience=5)
    Monitor(metric='ess', patience=5, minimise=False, least_gain=0.0)
    """

    metric: str = "value"
    patience: int | None = None
    minimise: bool = False
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise TypeError(f"metric must be a name; got {self.metric!r} of type {type(self.metric).__name__}.")
        if self.patience is not None:
            check.integer("patience", self.patience)
        check.positive("least_gain", self.least_gain, allow_zero=True)


@dataclass
class Best:
    """How good the best evaluation was, and for how long there has been no better one; goes into checkpoints.

    Attributes
    ----------
    score : float
        Of the best parameters; large is good.
    step : int
        Steps made until then.
    mark : float
        The score that has to be beaten by ``least_gain``.
    waited : int
        Evaluations since it was.
    """

    score: float = -math.inf
    step: int = 0
    mark: float = -math.inf
    waited: int = 0

    def update(self, monitor: Monitor, value: float, step: int) -> bool:
        """Take an evaluation into account, and say whether its parameters are the best."""
        score = -value if monitor.minimise else value
        renews = score > self.mark + monitor.least_gain
        self.mark, self.waited = (score, 0) if renews else (self.mark, self.waited + 1)
        better = score > self.score
        if better:
            self.score, self.step = score, step
        return better

    def exhausted(self, monitor: Monitor) -> bool:
        """Whether the patience is at its end."""
        return monitor.patience is not None and self.waited >= monitor.patience


@dataclass
class Evaluator:
    """Calls the metrics.

    Attributes
    ----------
    names : list of str or None
        Of all numbers; known after the first call.
    """

    metrics: dict[str, Metric]
    names: list[str] | None = field(default=None)

    @classmethod
    def of(cls, metrics: Metrics | None) -> "Evaluator":
        """Take one function, or several by name."""
        if metrics is None:
            return cls({}, [])
        if callable(metrics):
            return cls({"": metrics})
        if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and name for name in metrics):
            raise TypeError(
                "metrics must be a function metric(key, params) that returns a dictionary of numbers, or a dictionary of such "
                f"functions by name; got {metrics!r} of type {type(metrics).__name__}."
            )
        return cls({name: check.function(f"metrics[{name!r}]", f) for name, f in metrics.items()})

    def __call__(self, key: Key, params: PyTree) -> dict[str, float]:
        """Evaluate all metrics; each sees a key of its own."""
        found: dict[str, float] = {}
        for (name, metric), own_key in zip(
            self.metrics.items(), jax.random.split(key, max(1, len(self.metrics))), strict=False
        ):
            result = metric(own_key, params)
            if not isinstance(result, Mapping):
                if not name:
                    raise TypeError(
                        "metrics must return a dictionary of numbers by name, such as {'ess': 0.9}; got "
                        f"{type(result).__name__}. A function that returns one number is given by name: "
                        "metrics={'ess': function}."
                    )
                found[name] = _number(name, result)
                continue
            for part, value in result.items():
                full = f"{name}.{part}" if name else str(part)
                found[full] = _number(full, value)
        self._check_names(list(found))
        return found

    def _check_names(self, names: list[str]) -> None:
        if self.names is None:
            taken = sorted(set(names) & set(OWN_COLUMNS))
            if taken:
                raise ValueError(f"A metric may not be called {taken[0]!r}, which the history holds itself; rename it.")
            self.names = names
        if sorted(self.names) != sorted(names):
            raise ValueError(
                f"metrics must return the same names at each evaluation; they returned {', '.join(sorted(self.names))} before, "
                f"and {', '.join(sorted(names))} now."
            )


def check_monitored(monitor: Monitor, names: list[str]) -> None:
    """Raise unless the monitored quantity is among the metrics."""
    if monitor.metric not in ("value", *names):
        raise ValueError(
            f"monitor must name one of {', '.join(map(repr, ('value', *names)))}; got {monitor.metric!r}. Give the metric in "
            "metrics=."
        )


def _number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.shape != () or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(
            f"The metric {name!r} must be one number; got shape {array.shape} and dtype {array.dtype}. Return its entries by name, "
            "or a summary of them."
        )
    return float(array)
