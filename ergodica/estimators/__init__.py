"""Gradient estimators."""

from ergodica.estimators.federated import (
    Conducive,
    ExponentialSurrogates,
    GaussianSurrogates,
    laplace_surrogates,
    moment_surrogates,
)
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
    "Conducive",
    "ControlVariate",
    "DataParallel",
    "ExponentialSurrogates",
    "GaussianSurrogates",
    "LocalLatents",
    "Minibatch",
    "RecentringControlVariate",
    "RobustAggregate",
    "importance_probabilities",
    "laplace_surrogates",
    "moment_surrogates",
]
