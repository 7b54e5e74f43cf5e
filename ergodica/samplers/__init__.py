"""Markov kernels."""

from ergodica.samplers import schedules as schedules
from ergodica.samplers.amagold import AMAGOLD
from ergodica.samplers.averaged import Averaged
from ergodica.samplers.federated import Federated
from ergodica.samplers.flow_proposal import FlowIMH
from ergodica.samplers.force_gradient import ForceGradient
from ergodica.samplers.langevin import SGLD
from ergodica.samplers.multiplicative import MultiplicativeLangevin
from ergodica.samplers.noise_corrected import NoiseCorrectedSGLD
from ergodica.samplers.preconditioned import PreconditionedSGLD
from ergodica.samplers.replica_exchange import ReplicaExchange
from ergodica.samplers.splitting import ABOBA, BAOA, BAOAB, OBABO, SGHMC, UBU, LieTrotter, Splitting
from ergodica.samplers.thermostat import BADODAB, SGNHT, Thermostat

__all__ = [
    "ABOBA",
    "AMAGOLD",
    "BADODAB",
    "BAOA",
    "BAOAB",
    "OBABO",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "UBU",
    "Averaged",
    "Federated",
    "FlowIMH",
    "ForceGradient",
    "LieTrotter",
    "MultiplicativeLangevin",
    "NoiseCorrectedSGLD",
    "PreconditionedSGLD",
    "ReplicaExchange",
    "Splitting",
    "Thermostat",
]
