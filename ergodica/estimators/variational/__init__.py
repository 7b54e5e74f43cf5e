"""Gradient estimators for NumPyro programs, one for each sample site."""

from ergodica.estimators.variational.baselines import MovingAverage, Network
from ergodica.estimators.variational.elbo import ELBO
from ergodica.estimators.variational.enumerate import Enumerate
from ergodica.estimators.variational.expectation import expectation_gradient
from ergodica.estimators.variational.facts import SiteError
from ergodica.estimators.variational.gradient import VariationalGradient
from ergodica.estimators.variational.iwelbo import IWELBO
from ergodica.estimators.variational.measure_valued import MeasureValued
from ergodica.estimators.variational.reparam import Reparam
from ergodica.estimators.variational.score import VIMCO, LeaveOneOut, Score
from ergodica.estimators.variational.site import AbstractSiteEstimator

__all__ = [
    "ELBO",
    "IWELBO",
    "VIMCO",
    "AbstractSiteEstimator",
    "Enumerate",
    "LeaveOneOut",
    "MeasureValued",
    "MovingAverage",
    "Network",
    "Reparam",
    "Score",
    "SiteError",
    "VariationalGradient",
    "expectation_gradient",
]
