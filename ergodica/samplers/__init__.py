"""Markov kernels."""

from ergodica.samplers.langevin import SGLD
from ergodica.samplers.splitting import ABOBA, BAOA, BAOAB, OBABO, SGHMC, UBU, LieTrotter, Splitting

__all__ = ["ABOBA", "BAOA", "BAOAB", "OBABO", "SGHMC", "SGLD", "UBU", "LieTrotter", "Splitting"]
