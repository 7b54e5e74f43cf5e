r"""Couplings: some coordinates are moved by an elementwise map whose parameters are a network's output at the others.

With :math:`x = (x_c, x_t)`, :math:`\phi = N(x_c)` and an increasing :math:`f`,

.. math:: y_c = x_c, \qquad y_t = f(x_t; \phi), \qquad \log|\det J| = \sum \ell, \quad \ell = \log f'(x_t; \phi)
"""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import AbstractLayer, constant
from ergodica.core.types import Key
from ergodica.models.flows import splines
from ergodica.models.flows.conditioner import START, Activation, Conditioner, tanh
from ergodica.models.flows.masks import Split


def moved_scores(score: Array, slope: Array, bend: Array) -> Array:
    r"""Score of the moved coordinates after an elementwise map.

    .. math:: s'_t = \frac{s_t - \partial_{x_t} \ell}{f'(x_t)}

    Parameters
    ----------
    score, slope, bend : array
        :math:`s_t`, :math:`\ell = \log f'` and :math:`\partial_{x_t} \ell`.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024).
    """
    return (score - bend) * jnp.exp(-slope)


class AbstractCoupling(AbstractLayer):
    r"""What couplings have in common: how the score goes through them.

    .. math:: s'_t = \frac{s_t - \partial_{x_t}\ell}{f'}, \qquad
              s'_c = s_c - \left(\frac{\partial y_t}{\partial x_c}\right)^{\!\top} s'_t - \partial_{x_c} \sum \ell

    and the other way :math:`s_t = f' s'_t + \partial_{x_t} \ell`, :math:`s_c = s'_c + (\partial y_t/\partial x_c)^\top s'_t +
    \partial_{x_c}\sum\ell`. The two last terms are one derivative of the network, with the cotangents of both put together before
    it; nothing is inverted.
    """

    conditioner: eqx.AbstractVar[Callable[[Array], Array]]
    split: eqx.AbstractVar[Split]

    @abc.abstractmethod
    def curve(self, x: Array, raw: Array) -> tuple[Array, Array]:
        r""":math:`f(x; \phi)` and :math:`\log f'(x; \phi)`, elementwise, from the network's output."""

    @abc.abstractmethod
    def curve_inverse(self, y: Array, raw: Array) -> tuple[Array, Array]:
        r"""The :math:`x` with :math:`f(x; \phi) = y`, and :math:`\log f'(x; \phi)`, elementwise."""

    def bend(self, x: Array, raw: Array) -> Array:
        r""":math:`\partial_x \log f'(x; \phi)`, elementwise."""
        return jax.jvp(lambda x: self.curve(x, raw)[1], (x,), (jnp.ones_like(x),))[1]

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Move."""
        kept, moved = self.split.apart(x)
        new, slope = self.curve(moved, self.conditioner(kept))
        return self.split.together(kept, new), jnp.sum(slope)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Move back."""
        kept, moved = self.split.apart(y)
        new, slope = self.curve_inverse(moved, self.conditioner(kept))
        return self.split.together(kept, new), -jnp.sum(slope)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Move, with one derivative of the network beside."""
        y, _ = self.forward(x)
        score_kept, score_moved = self.split.apart(jax.lax.stop_gradient(score))
        slope, bend, pull = self._derivatives(*self.split.apart(jax.lax.stop_gradient(x)))
        score_moved = moved_scores(score_moved, slope, bend)
        score_kept = score_kept - pull(score_moved)
        return y, jnp.sum(slope), self.split.together(score_kept, score_moved)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Move back, with one derivative of the network beside."""
        x, _ = self.inverse(y)
        score_kept, score_moved = self.split.apart(jax.lax.stop_gradient(score))
        slope, bend, pull = self._derivatives(*self.split.apart(jax.lax.stop_gradient(x)))
        score_kept = score_kept + pull(score_moved)
        score_moved = score_moved * jnp.exp(slope) + bend
        return x, -jnp.sum(slope), self.split.together(score_kept, score_moved)

    def _derivatives(self, kept: Array, moved: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
        """Slope, bend, and the pull back to the kept coordinates of scores of the new ones and of the log determinant."""
        fixed = constant(self)

        def moved_by(kept: Array) -> tuple[tuple[Array, Array], Array]:
            raw = fixed.conditioner(kept)
            return fixed.curve(moved, raw), raw

        (_, slope), pull, raw = jax.vjp(moved_by, kept, has_aux=True)
        return slope, fixed.bend(moved, raw), lambda score: pull((score, jnp.ones_like(slope)))[0]


class AffineCoupling(AbstractCoupling):
    r"""Moves some coordinates by a scale and a shift that depend on the others (RealNVP).

    .. math:: y_t = x_t \odot e^{a} + b, \qquad (a, b) = N(x_c), \qquad \log|\det J| = \sum a

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    moved : sequence of int
        Indices of the coordinates that are moved: `half_mask`, `alternating_mask`, `checkerboard_mask` or any others.
    width, depth, activation, start
        Of the network, see `Conditioner`.
    bound : float, optional
        Keeps log scales within :math:`\pm` bound, by :math:`a = \text{bound} \tanh(\hat a/\text{bound})`. Without it one bad step
        of an optimiser can overflow the exponential.

    Raises
    ------
    ValueError, TypeError
        For indices that are not distinct ones of D, or are all of them or none.

    Notes
    -----
    Cost: one pass of the network in both directions; with scores its derivative by its input in addition.

    References
    ----------
    Dinh, Sohl-Dickstein and Bengio (2017).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = AffineCoupling(jax.random.key(0), 3, moved=(2,))
    >>> y, log_det = layer.forward(jnp.ones(3))
    >>> [float(v) for v in y[:2]]
    [1.0, 1.0]
    """

    conditioner: Conditioner
    split: Split
    bound: float | None = eqx.field(static=True)

    references: ClassVar[tuple[str, ...]] = ("dinh2017",)

    def __init__(
        self,
        key: Key,
        dim: int,
        moved: Sequence[int],
        *,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        bound: float | None = 3.0,
        start: float = START,
    ) -> None:
        self.split = Split(dim, moved)
        self.bound = None if bound is None else float(check.positive("bound", bound, hint="None for no bound."))
        num_kept, num_moved = dim - len(self.split.moved), len(self.split.moved)
        self.conditioner = Conditioner(key, num_kept, 2 * num_moved, width, depth, activation, start)

    def curve(self, x: Array, raw: Array) -> tuple[Array, Array]:
        """Scale and shift."""
        log_scale, shift = self._scale_and_shift(raw)
        return x * jnp.exp(log_scale) + shift, log_scale

    def curve_inverse(self, y: Array, raw: Array) -> tuple[Array, Array]:
        """Shift and scale back."""
        log_scale, shift = self._scale_and_shift(raw)
        return (y - shift) * jnp.exp(-log_scale), log_scale

    def bend(self, x: Array, raw: Array) -> Array:  # noqa: ARG002
        """Zero: scales do not depend on what is moved."""
        return jnp.zeros_like(x)

    def _scale_and_shift(self, raw: Array) -> tuple[Array, Array]:
        size = len(self.split.moved)
        return bounded(raw[:size], self.bound), raw[size:]


def bounded(log_scale: Array, bound: float | None) -> Array:
    """Log scales within a bound, unchanged to second order near zero."""
    return log_scale if bound is None else bound * jnp.tanh(log_scale / bound)


class SplineCoupling(AbstractCoupling):
    r"""Moves some coordinates by monotone rational-quadratic splines whose knots depend on the others.

    Each moved coordinate has ``num_bins`` bins on :math:`[-\text{bound}, \text{bound}]`, with free widths, heights and slopes at
    the knots between them; outside it stays where it is, and the slope is 1 at both ends.

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    moved : sequence of int
        Indices of the coordinates that are moved.
    num_bins : int
        Bins of each spline; the network has 3 ``num_bins`` - 1 outputs for each coordinate.
    bound : float
        Half the length of the box, in the units of the coordinates: mass outside is not reshaped by this coordinate's splines.
    width, depth, activation, start
        Of the network, see `Conditioner`.

    Raises
    ------
    ValueError, TypeError
        For indices that are not distinct ones of D, or are all of them or none; for fewer than two bins.

    Notes
    -----
    Cost: one pass of the network in both directions, and about 2 ``num_bins`` exponentials a moved coordinate; with scores the
    derivative of both by the network's input in addition.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios (2019).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = SplineCoupling(jax.random.key(0), 2, moved=(1,))
    >>> y, log_det = layer.forward(jnp.array([0.0, 7.0]))
    >>> [float(v) for v in y]
    [0.0, 7.0]
    """

    conditioner: Conditioner
    split: Split
    num_bins: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)

    references: ClassVar[tuple[str, ...]] = ("durkan2019",)

    def __init__(
        self,
        key: Key,
        dim: int,
        moved: Sequence[int],
        *,
        num_bins: int = 8,
        bound: float = 5.0,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        start: float = START,
    ) -> None:
        self.split = Split(dim, moved)
        self.num_bins = splines.check_bins(num_bins)
        self.bound = float(check.positive("bound", bound))
        num_kept, num_moved = dim - len(self.split.moved), len(self.split.moved)
        num_out = splines.num_parameters(num_bins) * num_moved
        self.conditioner = Conditioner(key, num_kept, num_out, width, depth, activation, start)

    def curve(self, x: Array, raw: Array) -> tuple[Array, Array]:
        """Splines and their log slopes."""
        return splines.spline(x, self._table(raw), self.bound)[:2]

    def curve_inverse(self, y: Array, raw: Array) -> tuple[Array, Array]:
        """Inverse splines and the log slopes of the splines."""
        return splines.spline_inverse(y, self._table(raw), self.bound)

    def bend(self, x: Array, raw: Array) -> Array:
        """Derivatives of the log slopes."""
        return splines.spline(x, self._table(raw), self.bound)[2]

    def _table(self, raw: Array) -> Array:
        return raw.reshape(splines.num_parameters(self.num_bins), len(self.split.moved))
