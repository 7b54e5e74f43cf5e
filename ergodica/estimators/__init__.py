"""Gradient estimators."""

from ergodica.estimators.minibatch import ControlVariate, Minibatch

__all__ = ["ControlVariate", "Minibatch"]
