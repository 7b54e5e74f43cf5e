"""Gradients of a log posterior from some of the data."""

from ergodica.estimators.minibatch.control_variate import ControlVariate
from ergodica.estimators.minibatch.data_parallel import DataParallel
from ergodica.estimators.minibatch.importance import importance_probabilities
from ergodica.estimators.minibatch.robust import Clipped, RobustAggregate
from ergodica.estimators.minibatch.saga import SAGA
from ergodica.estimators.minibatch.subsample import Minibatch
from ergodica.estimators.minibatch.svrg import SVRG, RecentringControlVariate

__all__ = [
    "SAGA",
    "SVRG",
    "Clipped",
    "ControlVariate",
    "DataParallel",
    "Minibatch",
    "RecentringControlVariate",
    "RobustAggregate",
    "importance_probabilities",
]
