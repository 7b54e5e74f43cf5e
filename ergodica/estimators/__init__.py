"""Gradient estimators."""

from ergodica.estimators.local_latents import LocalLatents
from ergodica.estimators.minibatch import (
    SAGA,
    SVRG,
    Clipped,
    ControlVariate,
    DataParallel,
    Minibatch,
    RecentringControlVariate,
    RobustAggregate,
    importance_probabilities,
)

__all__ = [
    "SAGA",
    "SVRG",
    "Clipped",
    "ControlVariate",
    "DataParallel",
    "LocalLatents",
    "Minibatch",
    "RecentringControlVariate",
    "RobustAggregate",
    "importance_probabilities",
]
