"""Objectives written as programs over densities."""

from ergodica.estimators.variational.programmed.objective import ProgrammedObjective
from ergodica.estimators.variational.programmed.resampling import marginal, normalise

__all__ = ["ProgrammedObjective", "marginal", "normalise"]
