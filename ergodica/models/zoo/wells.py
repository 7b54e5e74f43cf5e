"""Double wells side by side: a stand-in for a molecule with many metastable states, with exact answers."""

import functools
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue, finite_float

_CELLS = 1024
_NODES = 16
_DEPTH = 745.0
"""Beyond it the exponential of a double underflows."""


class ManyWell(AbstractTarget):
    r"""A product of D/2 double wells in the plane, with :math:`2^{D/2}` modes.

    .. math:: \log\pi(x, y) = \sum_{i=1}^{D/2} \left( t x_i + b x_i^2 - c x_i^4 - \tfrac12 y_i^2 \right)

    The coordinates are ordered :math:`x_1, y_1, x_2, y_2, \dots`.

    Parameters
    ----------
    dim : int
        D, even.
    tilt : float
        t: how much one well is preferred to the other.
    quadratic, quartic : float
        b and c; the barrier between the wells is about :math:`b^2/4c` high.

    Raises
    ------
    ValueError, TypeError
        For an odd ``dim``, or a ``quartic`` that is not positive.

    Notes
    -----
    Observables: ``x``, ``x_square``, ``y_square``, averages over the wells; ``right``, the share of wells with x > 0;
    ``all_right``, whether all are; ``log_density``. The references are Gauss--Legendre quadratures in one dimension,
    right to rounding.

    Draws are exact: the density of x is bounded by a step function of 1,024 cells (the maxima of a quartic in each cell
    are known), from which points are drawn and accepted; 98 % are at the
    default parameters. The number of rounds is that of the unluckiest coordinate.

    References
    ----------
    Noé, Olsson, Köhler and Wu (2019); Midgley, Stimper, Simm, Schölkopf and Hernández-Lobato (2023), whose parameters are the
    defaults at ``dim=32``.

    Examples
    --------
    >>> import jax
    >>> target = many_well(32)
    >>> round(target.log_normaliser.value, 5), target.draws(jax.random.key(0), 2).shape
    (164.69568, (2, 32))
    """

    dim: int = eqx.field(static=True)
    tilt: float = eqx.field(static=True)
    quadratic: float = eqx.field(static=True)
    quartic: float = eqx.field(static=True)

    source: ClassVar[str] = "Noé, Olsson, Köhler and Wu (2019); Midgley et al. (2023), section 4.2."
    licence: ClassVar[str] = "A formula; no data."
    references: ClassVar[tuple[str, ...]] = ("midgley2023", "noe2019")

    def __init__(self, dim: int, tilt: float = 0.5, quadratic: float = 6.0, quartic: float = 1.0) -> None:
        self.dim = check.integer("dim", dim, least=2)
        if self.dim % 2:
            raise ValueError(f"dim must be even, as each well has two coordinates; got {dim}.")
        self.tilt = finite_float("tilt", tilt)
        self.quadratic = finite_float("quadratic", quadratic)
        self.quartic = finite_float("quartic", quartic, positive=True)

    @property
    def num_wells(self) -> int:
        """D/2."""
        return self.dim // 2

    def log_density(self, x: Array) -> Array:
        """Sum over the wells."""
        pairs = x.reshape(self.num_wells, 2)
        return jnp.sum(self._exponent(pairs[:, 0])) - 0.5 * jnp.sum(pairs[:, 1] ** 2)

    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars at one point."""
        pairs = x.reshape(self.num_wells, 2)
        right = (pairs[:, 0] > 0).astype(x.dtype)
        return {
            "x": jnp.mean(pairs[:, 0]),
            "x_square": jnp.mean(pairs[:, 0] ** 2),
            "y_square": jnp.mean(pairs[:, 1] ** 2),
            "right": jnp.mean(right),
            "all_right": jnp.prod(right),
            "log_density": self.log_density(x),
        }

    @property
    def log_normaliser(self) -> ReferenceValue:
        """D/2 times that of one well."""
        return ReferenceValue(self.num_wells * (self._law.log_normaliser + 0.5 * math.log(2 * math.pi)))

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Quadratures, right to rounding."""
        law = self._law
        right = law.mean(lambda x: x > 0)
        values = {
            "x": law.mean(lambda x: x),
            "x_square": law.mean(lambda x: x**2),
            "y_square": 1.0,
            "right": right,
            "all_right": right**self.num_wells,
            "log_density": self.num_wells * (law.mean(self._exponent) - 0.5),
        }
        return {name: ReferenceValue(value) for name, value in values.items()}

    def start(self, key: Key) -> Array:
        """Draw a point of the target."""
        return self._draws(key, 1)[0]

    @property
    def has_draws(self) -> bool:
        """Always."""
        return True

    def _draws(self, key: Key, num_draws: int) -> Array:
        key_x, key_y = jax.random.split(key)
        x = quartic_draws(key_x, (self.tilt, self.quadratic, self.quartic), (num_draws, self.num_wells))
        y = jax.random.normal(key_y, x.shape)
        return jnp.stack([x, y], axis=-1).reshape(num_draws, self.dim)

    def _exponent[T: (Array, np.ndarray)](self, x: T) -> T:
        return self.tilt * x + self.quadratic * x**2 - self.quartic * x**4

    @property
    def _law(self) -> "QuarticLaw":
        return quartic_law(self.tilt, self.quadratic, self.quartic)


def many_well(dim: int, tilt: float = 0.5, quadratic: float = 6.0, quartic: float = 1.0) -> ManyWell:
    """`ManyWell`: a product of double wells in the plane."""
    return ManyWell(dim, tilt, quadratic, quartic)


class QuarticLaw:
    r"""The law :math:`\pi(x) \propto \exp(t x + b x^2 - c x^4)`, by composite Gauss--Legendre quadrature with a knot at 0.

    ``log_normaliser`` is that of this unnormalised density; ``mean(f)`` an expectation, right to rounding for smooth
    functions and for those with a step at 0. ``cells``: left ends (K,), width, and the maximum of the exponent in each (K,).
    """

    def __init__(self, tilt: float, quadratic: float, quartic: float) -> None:
        polynomial = np.polynomial.Polynomial([0.0, tilt, quadratic, 0.0, -quartic])
        slope = polynomial.deriv().roots()
        peaks = np.real(slope[np.abs(np.imag(slope)) < 1e-9 * (1 + np.abs(slope))])
        top = polynomial(peaks).max()
        ends = (polynomial - (top - _DEPTH)).roots()
        reach = np.abs(np.real(ends[np.abs(np.imag(ends)) < 1e-9 * (1 + np.abs(ends))])).max()
        knots = np.linspace(-reach, reach, _CELLS + 1)
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        width = knots[1] - knots[0]
        points = (knots[:-1, None] + 0.5 * width * (nodes + 1)).ravel()
        masses = np.tile(0.5 * width * weights, _CELLS) * np.exp(polynomial(points) - top)
        self.log_normaliser = float(top + np.log(masses.sum()))
        self._points, self._masses = points, masses / masses.sum()
        inside = np.stack([np.clip(p, knots[:-1], knots[1:]) for p in peaks] + [knots[:-1], knots[1:]])
        self.cells = knots[:-1], width, polynomial(inside).max(axis=0)

    def mean(self, function) -> float:  # noqa: ANN001
        """Expectation of a function of arrays."""
        return float(self._masses @ np.asarray(function(self._points), np.float64))


quartic_law = functools.cache(QuarticLaw)


def quartic_draws(key: Key, parameters: tuple[float, float, float], shape: tuple[int, ...]) -> Array:
    r"""Independent draws of :math:`\pi(x) \propto \exp(t x + b x^2 - c x^4)`, by rejection from a step function above it.

    .. math:: x \sim \text{uniform in cell } k \text{ with probability} \propto e^{M_k}, \qquad
              \text{accepted with probability } e^{f(x) - M_k}, \quad M_k = \max_{\text{cell } k} f

    Parameters
    ----------
    key : typed PRNG key
    parameters : (t, b, c)
    shape : tuple of int
        How many; in the default precision.

    Notes
    -----
    Exact up to the rounding of the uniform numbers: in single precision cells of mass below :math:`2^{-23}` are hit too
    seldom or too often.
    """
    tilt, quadratic, quartic = parameters
    left, width, most = quartic_law(*parameters).cells
    keep = most > most.max() - _DEPTH / 8  # what is left out has less mass than 1e-35
    dtype = jnp.result_type(float)
    share = np.cumsum(np.exp(most[keep] - most.max()))
    edges = jnp.asarray((share / share[-1])[:-1], dtype)
    left, most = (jnp.asarray(a[keep], dtype) for a in (left, most))

    def propose(key: Key) -> tuple[Array, Array]:
        key_cell, key_place, key_accept = jax.random.split(key, 3)
        cell = jnp.searchsorted(edges, jax.random.uniform(key_cell, shape), side="right")
        x = left[cell] + jnp.asarray(width, dtype) * jax.random.uniform(key_place, shape)
        exponent = tilt * x + quadratic * x**2 - quartic * x**4 - most[cell]
        return x, jnp.log1p(-jax.random.uniform(key_accept, shape)) <= exponent

    def body(carry: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        key, x, done = carry
        key, key_now = jax.random.split(key)
        proposed, accepted = propose(key_now)
        return key, jnp.where(done, x, proposed), done | accepted

    start = (key, jnp.zeros(shape, dtype), jnp.zeros(shape, bool))
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), body, start)[1]
