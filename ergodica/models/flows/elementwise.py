"""Layers that move every coordinate by itself, with parameters of its own."""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import AbstractLayer, constant
from ergodica.models.flows import splines
from ergodica.models.flows.coupling import moved_scores


class AbstractElementwise(AbstractLayer):
    r"""What elementwise layers have in common: :math:`y_i = f_i(x_i)`, :math:`\ell_i = \log f_i'(x_i)`.

    .. math:: s'_i = \frac{s_i - \ell_i'(x_i)}{f_i'(x_i)}
    """

    @abc.abstractmethod
    def curve(self, x: Array) -> tuple[Array, Array]:
        r""":math:`f(x)` and :math:`\log f'(x)`, elementwise."""

    @abc.abstractmethod
    def curve_inverse(self, y: Array) -> tuple[Array, Array]:
        r"""The :math:`x` with :math:`f(x) = y`, and :math:`\log f'(x)`, elementwise."""

    def bend(self, x: Array) -> Array:
        r""":math:`\partial_x \log f'(x)`, elementwise."""
        return jax.jvp(lambda x: self.curve(x)[1], (x,), (jnp.ones_like(x),))[1]

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Move."""
        y, slope = self.curve(x)
        return y, jnp.sum(slope)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Move back."""
        x, slope = self.curve_inverse(y)
        return x, -jnp.sum(slope)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Move, and divide the score by the slope."""
        fixed, x0, score = constant(self), jax.lax.stop_gradient(x), jax.lax.stop_gradient(score)
        _, slope = fixed.curve(x0)
        return self.curve(x)[0], jnp.sum(slope), moved_scores(score, slope, fixed.bend(x0))

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Move back, and multiply the score by the slope."""
        x, _ = self.curve_inverse(y)
        fixed, x0 = constant(self), jax.lax.stop_gradient(x)
        _, slope = fixed.curve(x0)
        return x, -jnp.sum(slope), jax.lax.stop_gradient(score) * jnp.exp(slope) + fixed.bend(x0)


class ElementwiseAffine(AbstractElementwise):
    r"""A scale and a shift of each coordinate.

    .. math:: y = x \odot e^{a} + b, \qquad \log|\det J| = \sum a

    Parameters
    ----------
    dim : int
        D. Starts at the identity.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> ElementwiseAffine(2).forward(jnp.ones(2))[0].tolist()
    [1.0, 1.0]
    """

    log_scale: Array
    shift: Array

    def __init__(self, dim: int) -> None:
        self.log_scale = jnp.zeros(check.integer("dim", dim))
        self.shift = jnp.zeros(dim)

    def curve(self, x: Array) -> tuple[Array, Array]:
        """Scale and shift."""
        return x * jnp.exp(self.log_scale) + self.shift, self.log_scale

    def curve_inverse(self, y: Array) -> tuple[Array, Array]:
        """Shift and scale back."""
        return (y - self.shift) * jnp.exp(-self.log_scale), self.log_scale

    def bend(self, x: Array) -> Array:
        """Zero."""
        return jnp.zeros_like(x)


class SinhArcsinh(AbstractElementwise):
    r"""Skews each coordinate and makes its tails heavier or lighter.

    .. math:: y = \sinh\left(e^{a} (\operatorname{arcsinh} x + b)\right), \qquad
              \log f'(x) = a + \log\cosh\left(e^{a}(\operatorname{arcsinh} x + b)\right) - \tfrac12 \log(1 + x^2)

    In the tails :math:`|y|` grows as :math:`|x|^{e^a}`: :math:`a > 0` makes them heavier than the base's.

    Parameters
    ----------
    dim : int
        D. Starts at the identity.

    References
    ----------
    Jones and Pewsey (2009).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> [round(float(v), 5) for v in SinhArcsinh(2).forward(jnp.array([-1.0, 2.0]))[0]]
    [-1.0, 2.0]
    """

    log_tail: Array
    skew: Array

    references: ClassVar[tuple[str, ...]] = ("jones2009",)

    def __init__(self, dim: int) -> None:
        self.log_tail = jnp.zeros(check.integer("dim", dim))
        self.skew = jnp.zeros(dim)

    def curve(self, x: Array) -> tuple[Array, Array]:
        """Move."""
        inner = jnp.exp(self.log_tail) * (jnp.arcsinh(x) + self.skew)
        return jnp.sinh(inner), self._slope(x, inner)

    def curve_inverse(self, y: Array) -> tuple[Array, Array]:
        """Move back."""
        inner = jnp.arcsinh(y)
        x = jnp.sinh(jnp.exp(-self.log_tail) * inner - self.skew)
        return x, self._slope(x, inner)

    def _slope(self, x: Array, inner: Array) -> Array:
        size = jnp.abs(inner)
        log_cosh = size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(jnp.full_like(size, 2.0))
        return self.log_tail + log_cosh - 0.5 * jnp.log1p(x**2)


class ElementwiseSpline(AbstractElementwise):
    r"""A monotone rational-quadratic spline of each coordinate on :math:`[-\text{bound}, \text{bound}]`, the identity outside.

    Parameters
    ----------
    dim : int
        D. Starts at the identity.
    num_bins : int
        Bins of each spline.
    bound : float
        Half the length of the box, in the units of the coordinates.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios (2019).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> ElementwiseSpline(2, num_bins=4).forward(jnp.array([-9.0, 9.0]))[0].tolist()
    [-9.0, 9.0]
    """

    table: Array
    bound: float = eqx.field(static=True)

    references: ClassVar[tuple[str, ...]] = ("durkan2019",)

    def __init__(self, dim: int, num_bins: int = 8, bound: float = 5.0) -> None:
        self.table = jnp.zeros((splines.num_parameters(splines.check_bins(num_bins)), check.integer("dim", dim)))
        self.bound = float(check.positive("bound", bound))

    def curve(self, x: Array) -> tuple[Array, Array]:
        """Move."""
        return splines.spline(x, self.table, self.bound)[:2]

    def curve_inverse(self, y: Array) -> tuple[Array, Array]:
        """Move back."""
        return splines.spline_inverse(y, self.table, self.bound)

    def bend(self, x: Array) -> Array:
        """Derivatives of the log slopes, in closed form."""
        return splines.spline(x, self.table, self.bound)[2]
