"""Gradients for normalizing flows: path gradients of both Kullback--Leibler divergences, and the standard ones."""

from ergodica.estimators.flows.path import PathGradient
from ergodica.estimators.flows.standard import MaximumLikelihood, ReverseKL

__all__ = ["MaximumLikelihood", "PathGradient", "ReverseKL"]
