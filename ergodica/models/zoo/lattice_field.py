r"""Scalar :math:`\phi^4` theory on a periodic lattice in two dimensions."""

import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.models.zoo.phi4_reference import (
    free_log_normaliser,
    free_precision,
    free_reference,
    stored_reference,
    strip_reference,
)
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue, finite_float

_DIRECTIONS = 2


class Parameters(NamedTuple):
    """Parameters in another parameterisation.

    Attributes
    ----------
    quadratic : float
        mass2 or kappa.
    coupling : float
    scale : float
        The field there is this times the field here.
    """

    quadratic: float
    coupling: float
    scale: float


def hopping_to_mass(kappa: float, coupling: float) -> Parameters:
    r"""From the hopping to the mass parameterisation.

    .. math:: m^2 = \frac{1 - 2\lambda}{\kappa} - 4, \qquad g = \frac{\lambda}{4\kappa^2}, \qquad \varphi = \sqrt{2\kappa}\,\phi
    """
    return Parameters((1 - 2 * coupling) / kappa - 2 * _DIRECTIONS, coupling / (4 * kappa**2), math.sqrt(2 * kappa))


def mass_to_hopping(mass2: float, coupling: float) -> Parameters:
    r"""From the mass to the hopping parameterisation, the opposite of `hopping_to_mass`.

    .. math:: 8 g \kappa^2 + (m^2 + 4)\kappa - 1 = 0, \qquad \lambda = 4 g \kappa^2, \qquad \phi = \varphi/\sqrt{2\kappa}
    """
    linear = mass2 + 2 * _DIRECTIONS
    if coupling == 0 and linear <= 0:
        raise ValueError(f"mass2 must be above -4 where coupling is 0, or there is no hopping parameter; got {mass2}.")
    root = math.sqrt(linear**2 + 32 * coupling)
    kappa = 2 / (linear + root) if linear > 0 else (root - linear) / (16 * coupling)
    return Parameters(kappa, 4 * coupling * kappa**2, 1 / math.sqrt(2 * kappa))


class Phi4(AbstractTarget):
    r"""Scalar :math:`\phi^4` theory on a periodic lattice of T x L sites; made by `phi4`.

    .. math:: -\log\pi(\phi) = S(\phi)
              = \sum_x \left( -2\kappa \sum_{\mu=1}^{2} \phi_x \phi_{x+\hat\mu} + a \phi_x^2 + \lambda \phi_x^4 \right)

    Both usual parameterisations are of this form: ``hopping`` is :math:`\kappa`, ``quadratic`` a and ``coupling``
    :math:`\lambda`. Points are arrays (T L,), sites row by row.
    """

    dim: int = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    hopping: float = eqx.field(static=True)
    quadratic: float = eqx.field(static=True)
    coupling: float = eqx.field(static=True)

    source: ClassVar[str] = "Albergo, Kanwar and Shanahan (2019); Nicoli et al. (2021); Vaitl et al. (2024)."
    licence: ClassVar[str] = "A formula; references by the project's own scripts, under its licence."
    references: ClassVar[tuple[str, ...]] = ("albergo2019", "nicoli2021")

    def __init__(self, shape: tuple[int, int], hopping: float, quadratic: float, coupling: float) -> None:
        self.shape = shape
        self.dim = shape[0] * shape[1]
        self.hopping, self.quadratic, self.coupling = hopping, quadratic, coupling

    def action(self, field: Array) -> Array:
        """S of a field (T, L)."""
        neighbours = jnp.roll(field, 1, axis=0) + jnp.roll(field, 1, axis=1)
        square = field**2
        return jnp.sum(-2 * self.hopping * field * neighbours + self.quadratic * square + self.coupling * square**2)

    def log_density(self, x: Array) -> Array:
        """-S."""
        return -self.action(x.reshape(self.shape))

    def score(self, x: Array) -> Array:
        r"""The force :math:`2\kappa \sum_{\pm\mu} \phi_{x\pm\hat\mu} - 2a\phi_x - 4\lambda\phi_x^3`."""
        field = x.reshape(self.shape)
        neighbours = sum(jnp.roll(field, step, axis) for step in (1, -1) for axis in (0, 1))
        force = 2 * self.hopping * neighbours - 2 * self.quadratic * field - 4 * self.coupling * field**3
        return force.ravel()

    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars of one field; see `phi4`."""
        field = x.reshape(self.shape)
        slices = jnp.mean(field, axis=1)
        magnetisation = jnp.mean(slices)
        action, quartic = self.action(field), self.coupling * jnp.sum(field**4)
        values = {
            "magnetisation": magnetisation,
            "abs_magnetisation": jnp.abs(magnetisation),
            "susceptibility": self.dim * magnetisation**2,
            "square": jnp.mean(field**2),
            "action": action / self.dim,
            "virial": (2 * action + 2 * quartic) / self.dim,
        }
        return values | {
            f"two_point[{t}]": jnp.mean(slices * jnp.roll(slices, t)) for t in range(self.shape[0] // 2 + 1)
        }

    @property
    def log_normaliser(self) -> ReferenceValue | None:
        """In closed form (free), by quadrature (strips of width 1 and 2), or as stored."""
        if self.is_free:
            return free_log_normaliser(self.shape, self.hopping, self.quadratic)
        return self._interacting().get("log_normaliser")

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Closed forms (free), quadratures (strips of width 1 and 2), what is stored, and what is true of all."""
        exact = {"magnetisation": ReferenceValue(0.0), "virial": ReferenceValue(1.0)}
        found = free_reference(self.shape, self.hopping, self.quadratic) if self.is_free else self._interacting()
        return {name: value for name, value in (found | exact).items() if name != "log_normaliser"}

    def _interacting(self) -> dict[str, ReferenceValue]:
        arguments = self.shape, self.hopping, self.quadratic, self.coupling
        return strip_reference(*arguments) if self.shape[1] <= 2 else stored_reference(*arguments)

    @property
    def is_free(self) -> bool:
        """Whether the coupling is 0."""
        return self.coupling == 0

    @property
    def has_draws(self) -> bool:
        """In the free theory."""
        return self.is_free

    def start(self, key: Key) -> Array:
        """Draw independent normals."""
        return jax.random.normal(key, (self.dim,))

    def _draws(self, key: Key, num_draws: int) -> Array:
        noise = jax.random.normal(key, (num_draws, *self.shape))
        scale = jnp.asarray(1 / np.sqrt(free_precision(self.shape, self.hopping, self.quadratic)), noise.dtype)
        waves = jnp.fft.fft2(noise)
        return jnp.fft.ifft2(waves * scale.astype(waves.dtype)[None]).real.reshape(num_draws, self.dim)


def phi4(
    size: int | tuple[int, int], *, kappa: float | None = None, mass2: float | None = None, coupling: float
) -> Phi4:
    r"""Scalar :math:`\phi^4` theory on a periodic lattice in two dimensions.

    With ``kappa``, the hopping parameterisation (a constant left out):

    .. math:: S = \sum_x \left( -2\kappa \sum_\mu \phi_x \phi_{x+\hat\mu} + (1 - 2\lambda) \phi_x^2 + \lambda \phi_x^4 \right)

    With ``mass2``, the mass parameterisation:

    .. math:: S = \sum_x \left( \tfrac12 \sum_\mu (\varphi_{x+\hat\mu} - \varphi_x)^2 + \tfrac12 m^2 \varphi_x^2
              + g \varphi_x^4 \right)

    The two are the same law up to the scale of the field (`hopping_to_mass`, `mass_to_hopping`). With
    :math:`\varphi = \sqrt 2\,\tilde\varphi` the second is the form without halves of the flow literature,
    :math:`\sum_x \tilde\varphi \square \tilde\varphi + m^2 \tilde\varphi^2 + \tilde g \tilde\varphi^4`, at
    :math:`g = \tilde g / 4`.

    Parameters
    ----------
    size : int, or (int, int)
        Sites along each direction; a pair is (T, L). At 2 sites a direction has two bonds between the same neighbours,
        at 1 a site is its own neighbour.
    kappa, mass2 : float
        One of them. A negative ``mass2`` with a coupling favours two signs of the field; so does a large ``kappa``.
    coupling : float
        :math:`\lambda` with ``kappa``, :math:`g` with ``mass2``; at least 0.

    Returns
    -------
    Phi4

    Raises
    ------
    ValueError, TypeError
        If not exactly one of ``kappa`` and ``mass2`` is given, or the free theory (``coupling=0``) is not normalisable.

    Notes
    -----
    Observables, with :math:`V = TL` and m the mean of the field:

    - ``magnetisation`` m (0 by symmetry), ``abs_magnetisation`` :math:`|m|`, ``susceptibility`` :math:`V m^2` (take
      :math:`V \langle|m|\rangle^2` off for the connected one in the phase of broken symmetry);
    - ``square``, the mean of :math:`\phi_x^2`; ``action``, S/V;
    - ``virial``, :math:`\sum_x \phi_x\, \partial S/\partial\phi_x / V`, whose expectation is 1 at any coupling;
    - ``two_point[t]``, t up to T/2: the two-point function at zero momentum, the mean over s of
      :math:`\bar\phi_s \bar\phi_{s+t}` with :math:`\bar\phi_s` the mean over row s.

    References: closed forms where ``coupling`` is 0; quadrature by transfer matrices for L = 1 and 2 at any coupling
    (``abs_magnetisation`` for a single site only); else for square lattices of 4, 6 and 8 sites a side at
    ``coupling=0.022`` and ``kappa`` 0.2 (one phase) and 0.3 (two signs): quadrature for 4 and 6 (the error is the difference of
    two rules), and for 8, and for ``abs_magnetisation`` at all sizes, hybrid Monte Carlo, with standard errors between independent
    chains, and annealed importance sampling for the normaliser (``benchmarks/phi4_reference.py``). Elsewhere only what is true at
    any coupling.

    Draws are exact in the free theory. Cost of an evaluation: O(V).

    References
    ----------
    Albergo, Kanwar and Shanahan (2019); Nicoli et al. (2021).

    Examples
    --------
    >>> free = phi4(4, mass2=1.0, coupling=0.0)
    >>> round(free.reference["susceptibility"].value, 6), round(free.log_normaliser.value, 6)
    (1.0, 2.687046)
    >>> phi4((6, 1), kappa=0.3, coupling=0.022).log_normaliser.standard_error
    0.0
    """
    shape = _shape(size)
    coupling = finite_float("coupling", coupling, least=0.0)
    if (kappa is None) == (mass2 is None):
        raise ValueError(f"Give one of kappa and mass2; got kappa={kappa!r}, mass2={mass2!r}.")
    if kappa is not None:
        hopping = finite_float("kappa", kappa, least=0.0)
        quadratic = 1 - 2 * coupling
    else:
        hopping = 0.5
        quadratic = _DIRECTIONS + 0.5 * finite_float("mass2", mass2)
    if coupling == 0 and 2 * quadratic - 4 * _DIRECTIONS * hopping <= 0:
        raise ValueError(
            f"The free theory is normalisable for kappa < 1/4, or mass2 > 0; got kappa={kappa!r}, mass2={mass2!r}, coupling=0."
        )
    return Phi4(shape, hopping, quadratic, coupling)


def _shape(size: Any) -> tuple[int, int]:
    if isinstance(size, tuple):
        if len(size) != 2:
            raise ValueError(f"size must be an integer or a pair of integers; got {size!r}.")
        return check.integer("size[0]", size[0]), check.integer("size[1]", size[1])
    side = check.integer("size", size)
    return side, side
