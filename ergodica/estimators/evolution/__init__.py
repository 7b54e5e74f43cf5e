"""Black-box and forward gradients: from evaluations, or from derivatives along directions."""

from ergodica.estimators.evolution.forward import ForwardGradient
from ergodica.estimators.evolution.low_rank import LowRankEvolution, PerturbedMatrix
from ergodica.estimators.evolution.spsa import SPSA
from ergodica.estimators.evolution.strategy import EvolutionStrategy
from ergodica.estimators.evolution.unrolled import EvolutionSingle, PersistentEvolution

__all__ = [
    "SPSA",
    "EvolutionSingle",
    "EvolutionStrategy",
    "ForwardGradient",
    "LowRankEvolution",
    "PersistentEvolution",
    "PerturbedMatrix",
]
