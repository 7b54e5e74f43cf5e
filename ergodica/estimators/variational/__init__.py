"""Gradient estimators for NumPyro programs, one for each sample site."""

from ergodica.estimators.variational.exact.gradient import ExactGradient
from ergodica.estimators.variational.expectation import expectation_gradient
from ergodica.estimators.variational.facts import SiteError
from ergodica.estimators.variational.gradient import VariationalGradient
from ergodica.estimators.variational.objectives.elbo import ELBO
from ergodica.estimators.variational.objectives.iwelbo import IWELBO
from ergodica.estimators.variational.objectives.renyi import RenyiBound
from ergodica.estimators.variational.objectives.score_climbing import (
    JointStochasticApproximation,
    MarkovianScoreClimbing,
)
from ergodica.estimators.variational.objectives.wake_sleep import ForwardKL, WakeSleep
from ergodica.estimators.variational.programmed import ProgrammedObjective, marginal, normalise
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.baselines import MovingAverage, Network
from ergodica.estimators.variational.sites.darn import DARN
from ergodica.estimators.variational.sites.disarm import DisARM
from ergodica.estimators.variational.sites.double_control_variate import DoubleControlVariate
from ergodica.estimators.variational.sites.enumerate import Enumerate
from ergodica.estimators.variational.sites.gumbel_softmax import GumbelSoftmax
from ergodica.estimators.variational.sites.measure_valued import MeasureValued
from ergodica.estimators.variational.sites.muprop import MuProp
from ergodica.estimators.variational.sites.rao_blackwell_gumbel import RaoBlackwellGumbel
from ergodica.estimators.variational.sites.rebar import REBAR
from ergodica.estimators.variational.sites.reinmax import ReinMax
from ergodica.estimators.variational.sites.relax import RELAX
from ergodica.estimators.variational.sites.reparam import Reparam
from ergodica.estimators.variational.sites.rodeo import RODEO
from ergodica.estimators.variational.sites.score import VIMCO, LeaveOneOut, Score
from ergodica.estimators.variational.sites.straight_through import StraightThrough
from ergodica.estimators.variational.sites.unordered_set import UnorderedSet

__all__ = [
    "DARN",
    "ELBO",
    "IWELBO",
    "REBAR",
    "RELAX",
    "RODEO",
    "VIMCO",
    "AbstractSiteEstimator",
    "DisARM",
    "DoubleControlVariate",
    "Enumerate",
    "ExactGradient",
    "ForwardKL",
    "GumbelSoftmax",
    "JointStochasticApproximation",
    "LeaveOneOut",
    "MarkovianScoreClimbing",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "Network",
    "ProgrammedObjective",
    "RaoBlackwellGumbel",
    "ReinMax",
    "RenyiBound",
    "Reparam",
    "Score",
    "SiteError",
    "StraightThrough",
    "UnorderedSet",
    "VariationalGradient",
    "WakeSleep",
    "expectation_gradient",
    "marginal",
    "normalise",
]
