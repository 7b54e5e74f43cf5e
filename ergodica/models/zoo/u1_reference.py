r"""What is known of U(1) lattice gauge theory on a periodic lattice in two dimensions.

The N plaquette angles are independent but for their sum, which is a multiple of :math:`2\pi`. All here follows from

.. math:: \varphi(\nu) = \frac{1}{2\pi} \int_{-\pi}^{\pi} e^{\beta \cos\theta} \cos(\nu\theta)\, d\theta, \qquad
          \varphi(n) = I_n(\beta) \text{ for integer } n,

divided by :math:`e^\beta` where it is computed. Functions take :math:`\beta` and N.
"""

import functools
import math

import numpy as np


def _orders(beta: float, num_plaquettes: int) -> int:
    """Largest order in the sums; what is left out is rounding, or for N = 4, where terms fall as the fourth power, 1e-9."""
    return (200 if num_plaquettes < 16 else 60) + math.ceil(12 * math.sqrt(beta))


def _quadrature(beta: float, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles, and weights times exp(beta cos - beta), for waves of up to an order."""
    nodes, weights = np.polynomial.legendre.leggauss(64 + 2 * math.ceil(largest + math.sqrt(beta)))
    angle = math.pi * nodes
    return angle, 0.5 * weights * np.exp(beta * (np.cos(angle) - 1))


def _bessel(beta: float, num_plaquettes: int) -> np.ndarray:
    """I_n(beta) / exp(beta) for n from -M to M."""
    from scipy import special

    most = _orders(beta, num_plaquettes)
    return special.ive(np.abs(np.arange(-most, most + 1)), beta)


def log_partition(beta: float, num_plaquettes: int) -> float:
    r"""Logarithm of the integral of the exponential of minus the action over the 2N link angles.

    .. math:: Z = (2\pi)^{2N} \sum_{n=-\infty}^{\infty} I_n(\beta)^N

    References
    ----------
    Migdal (1975).
    """
    terms = _bessel(beta, num_plaquettes)
    scale = terms.max()
    series = math.log(np.sum((terms / scale) ** num_plaquettes)) + num_plaquettes * (math.log(scale) + beta)
    return series + 2 * num_plaquettes * math.log(2 * math.pi)


def wilson_loop(beta: float, num_plaquettes: int, area: int = 1) -> float:
    r"""Mean cosine of the sum of ``area`` plaquette angles; with 1 the mean plaquette.

    .. math:: \langle W_A \rangle = \frac{\sum_n I_n(\beta)^{N-A} I_{n+1}(\beta)^A}{\sum_n I_n(\beta)^N}
    """
    terms = _bessel(beta, num_plaquettes)
    terms = terms / terms.max()
    return float(np.sum(terms[:-1] ** (num_plaquettes - area) * terms[1:] ** area) / np.sum(terms**num_plaquettes))


def mean_square_charge(beta: float, num_plaquettes: int) -> float:
    r"""Mean of the squared topological charge.

    .. math:: \langle Q^2 \rangle = -\frac{1}{4\pi^2 \sum_n \varphi(n)^N} \sum_n \frac{d^2}{d\nu^2} \varphi(\nu)^N \Big|_{\nu = n}

    from :math:`\langle e^{i\theta Q} \rangle \propto \sum_n \varphi(n + \theta/2\pi)^N`.
    """
    most = _orders(beta, num_plaquettes)
    angle, weight = _quadrature(beta, most)
    phase = np.multiply.outer(np.arange(-most, most + 1), angle)
    cosine = np.cos(phase)
    value, first, second = cosine @ weight, -np.sin(phase) @ (weight * angle), -cosine @ (weight * angle**2)
    first, second = first / value.max(), second / value.max()
    value, n = value / value.max(), num_plaquettes
    bend = n * value ** (n - 1) * second + n * (n - 1) * value ** (n - 2) * first**2
    return float(-np.sum(bend) / np.sum(value**n) / (4 * math.pi**2))


@functools.lru_cache
def charge_law(beta: float, num_plaquettes: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Probabilities of the topological charges.

    .. math:: P(Q) = \frac{1}{2\pi \sum_n \varphi(n)^N} \int_{-\pi}^{\pi} e^{-i\theta Q} \sum_n \varphi(n + \theta/2\pi)^N\, d\theta

    Returns
    -------
    charges : array of int (M,)
        All that are possible, or as many as ten standard deviations of uniform plaquettes.
    probabilities : array (M,)
    """
    largest = min(num_plaquettes // 2, 2 + math.ceil(10 * math.sqrt(num_plaquettes / 12)))
    charges = np.arange(-largest, largest + 1)
    count = len(charges)
    most = _orders(beta, num_plaquettes)
    orders = np.add.outer(np.arange(count) / count, np.arange(-most, most + 1.0))
    angle, weight = _quadrature(beta, most + 1)
    characters = np.cos(np.multiply.outer(orders, angle)) @ weight
    generating = np.sum((characters / characters.max()) ** num_plaquettes, axis=1)
    waves = np.cos(2 * math.pi * np.multiply.outer(charges, np.arange(count)) / count)
    return charges, np.maximum(waves @ generating / count / generating[0], 0.0)
