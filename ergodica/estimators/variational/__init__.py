"""Gradient estimators for NumPyro programs, one for each sample site."""

from ergodica.estimators.variational.baselines import MovingAverage, Network
from ergodica.estimators.variational.darn import DARN
from ergodica.estimators.variational.disarm import DisARM
from ergodica.estimators.variational.double_control_variate import DoubleControlVariate
from ergodica.estimators.variational.elbo import ELBO
from ergodica.estimators.variational.enumerate import Enumerate
from ergodica.estimators.variational.exact_gradient import ExactGradient
from ergodica.estimators.variational.expectation import expectation_gradient
from ergodica.estimators.variational.facts import SiteError
from ergodica.estimators.variational.gradient import VariationalGradient
from ergodica.estimators.variational.gumbel_softmax import GumbelSoftmax
from ergodica.estimators.variational.iwelbo import IWELBO
from ergodica.estimators.variational.measure_valued import MeasureValued
from ergodica.estimators.variational.muprop import MuProp
from ergodica.estimators.variational.programmed import ProgrammedObjective, marginal, normalise
from ergodica.estimators.variational.rao_blackwell_gumbel import RaoBlackwellGumbel
from ergodica.estimators.variational.rebar import REBAR
from ergodica.estimators.variational.reinmax import ReinMax
from ergodica.estimators.variational.relax import RELAX
from ergodica.estimators.variational.renyi import RenyiBound
from ergodica.estimators.variational.reparam import Reparam
from ergodica.estimators.variational.rodeo import RODEO
from ergodica.estimators.variational.score import VIMCO, LeaveOneOut, Score
from ergodica.estimators.variational.score_climbing import JointStochasticApproximation, MarkovianScoreClimbing
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.straight_through import StraightThrough
from ergodica.estimators.variational.unordered_set import UnorderedSet
from ergodica.estimators.variational.wake_sleep import ForwardKL, WakeSleep

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
