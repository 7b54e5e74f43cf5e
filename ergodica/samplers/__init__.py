"""Markov kernels."""

from ergodica.samplers.averaged import Averaged
from ergodica.samplers.langevin import SGLD
from ergodica.samplers.noise_corrected import NoiseCorrectedSGLD
from ergodica.samplers.preconditioned import PreconditionedSGLD
from ergodica.samplers.splitting import ABOBA, BAOA, BAOAB, OBABO, SGHMC, UBU, LieTrotter, Splitting
from ergodica.samplers.thermostat import BADODAB, SGNHT, Thermostat

__all__ = [
    "ABOBA",
    "BADODAB",
    "BAOA",
    "BAOAB",
    "OBABO",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "UBU",
    "Averaged",
    "LieTrotter",
    "NoiseCorrectedSGLD",
    "PreconditionedSGLD",
    "Splitting",
    "Thermostat",
]
