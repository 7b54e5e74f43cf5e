"""Gradients of a log posterior from some of the data."""

from ergodica.estimators.minibatch.control_variate import ControlVariate
from ergodica.estimators.minibatch.subsample import Minibatch

__all__ = ["ControlVariate", "Minibatch"]
