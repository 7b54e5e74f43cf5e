"""Closed forms of the stationary variances on N(0, 1/lam), with independent gradient noise of variance s2 a call."""

import numpy as np

VARIANCES = {}


def law(*names):
    def register(f):
        VARIANCES.update(dict.fromkeys(names, f))
        return f

    return register


# Each takes h, lam, gamma, T, s2, at unit mass, with c = exp(-gamma h) and D = 4 - h^2 lam.
# The names say the scheme and how many gradients a step draws.


@law("BAOA", "BAOAB1")
def _(h, lam, gamma, T, s2):
    c, D = np.exp(-gamma * h), 4 - h**2 * lam
    return T / lam + h**2 * s2 * (1 + c) / (lam * (1 - c) * D)


@law("BAOAB2")
def _(h, lam, gamma, T, s2):
    c, D = np.exp(-gamma * h), 4 - h**2 * lam
    return T / lam + h**2 * s2 * (1 + c) / (2 * lam * (1 - c) * D)


@law("OBABO2", "LieTrotter2")
def _(h, lam, gamma, T, s2):
    c, D = np.exp(-gamma * h), 4 - h**2 * lam
    return (4 * T * (1 - c**2) + h**2 * s2 * (1 + c**2)) / (lam * (1 - c**2) * D)


@law("ABOBA2")
def _(h, lam, gamma, T, s2):
    c = np.exp(-gamma * h)
    return T / lam + h**2 * s2 * (1 + c**2) / (4 * lam * (1 - c**2))


@law("ABOBA1")
def _(h, lam, gamma, T, s2):
    c = np.exp(-gamma * h)
    return T / lam + h**2 * s2 * (1 + c) / (4 * lam * (1 - c))


@law("OABAO")
def _(h, lam, gamma, T, s2):
    c, D = np.exp(-gamma * h), 4 - h**2 * lam
    return T * (1 - h**2 * lam / 4) / lam + h**2 * s2 * ((1 + c) ** 2 - c * h**2 * lam) / (lam * (1 - c**2) * D)


@law("SGHMC")
def _(h, lam, gamma, T, s2):
    return (2 * T * gamma + h * s2) * (2 - gamma * h) / (gamma * lam * (4 - 2 * gamma * h - h**2 * lam))


def sgld_variance(h, lam, T, s2):
    """Of theta + h g + sqrt(2 h T) xi."""
    return (2 * T + h * s2) / (lam * (2 - h * lam))


def with_mass(variance, mass):
    """Variance at another mass: p = sqrt(M) q and theta = phi / sqrt(M) turn it into unit mass with lam/M, s2/M."""
    return lambda h, lam, gamma, T, s2: variance(h, lam / mass, gamma, T, s2 / mass) / mass
