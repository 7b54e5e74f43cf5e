"""Gradient estimators."""

import importlib
from typing import TYPE_CHECKING, Any

from ergodica.estimators.em import MonteCarloEM, PersistentChains
from ergodica.estimators.evolution import (
    SPSA,
    EvolutionSingle,
    EvolutionStrategy,
    ForwardGradient,
    LowRankEvolution,
    PersistentEvolution,
    PerturbedMatrix,
)
from ergodica.estimators.federated import (
    Conducive,
    ExponentialSurrogates,
    GaussianSurrogates,
    PrivateConducive,
    gaussian_privacy,
    laplace_surrogates,
    moment_surrogates,
)
from ergodica.estimators.flows import MaximumLikelihood, PathGradient, ReverseKL
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
from ergodica.estimators.policy import (
    AbstractAdvantage,
    BetaNormalised,
    ExpectedReward,
    MaxAtK,
    PolicyGradient,
    gradient_variance_allocation,
    optimal_allocation,
)
from ergodica.estimators.stein import SteinControl

if TYPE_CHECKING:
    from ergodica.estimators.flows.numpyro_guide import PathELBO
    from ergodica.estimators.variational import (
        DARN,
        ELBO,
        IWELBO,
        REBAR,
        RELAX,
        RODEO,
        VIMCO,
        AbstractSiteEstimator,
        DisARM,
        DoubleControlVariate,
        Enumerate,
        ExactGradient,
        ForwardKL,
        GumbelSoftmax,
        JointStochasticApproximation,
        LeaveOneOut,
        MarkovianScoreClimbing,
        MeasureValued,
        MovingAverage,
        MuProp,
        Network,
        ProgrammedObjective,
        RaoBlackwellGumbel,
        ReinMax,
        RenyiBound,
        Reparam,
        Score,
        SiteError,
        StraightThrough,
        UnorderedSet,
        VariationalGradient,
        WakeSleep,
        expectation_gradient,
        marginal,
        normalise,
    )

__all__ = [
    "DARN",
    "ELBO",
    "IWELBO",
    "REBAR",
    "RELAX",
    "RODEO",
    "SAGA",
    "SPSA",
    "SVRG",
    "VIMCO",
    "AbstractAdvantage",
    "AbstractSiteEstimator",
    "BetaNormalised",
    "Clipped",
    "Conducive",
    "ControlVariate",
    "DataParallel",
    "DisARM",
    "DoubleControlVariate",
    "Enumerate",
    "EvolutionSingle",
    "EvolutionStrategy",
    "ExactGradient",
    "ExpectedReward",
    "ExponentialSurrogates",
    "ForwardGradient",
    "ForwardKL",
    "GaussianSurrogates",
    "GumbelSoftmax",
    "JointStochasticApproximation",
    "LeaveOneOut",
    "LocalLatents",
    "LowRankEvolution",
    "MarkovianScoreClimbing",
    "MaxAtK",
    "MaximumLikelihood",
    "MeasureValued",
    "Minibatch",
    "MonteCarloEM",
    "MovingAverage",
    "MuProp",
    "Network",
    "PathELBO",
    "PathGradient",
    "PersistentChains",
    "PersistentEvolution",
    "PerturbedMatrix",
    "PolicyGradient",
    "PrivateConducive",
    "ProgrammedObjective",
    "RaoBlackwellGumbel",
    "RecentringControlVariate",
    "ReinMax",
    "RenyiBound",
    "Reparam",
    "ReverseKL",
    "RobustAggregate",
    "Score",
    "SiteError",
    "SteinControl",
    "StraightThrough",
    "UnorderedSet",
    "VariationalGradient",
    "WakeSleep",
    "expectation_gradient",
    "gaussian_privacy",
    "gradient_variance_allocation",
    "importance_probabilities",
    "laplace_surrogates",
    "marginal",
    "moment_surrogates",
    "normalise",
    "optimal_allocation",
]


def __getattr__(name: str) -> Any:
    """Import what is not there yet at first use: what imports NumPyro."""
    if name not in __all__:
        raise AttributeError(f"module 'ergodica.estimators' has no attribute {name!r}")
    module = "flows.numpyro_guide" if name == "PathELBO" else "variational"
    value = getattr(importlib.import_module(f"ergodica.estimators.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
