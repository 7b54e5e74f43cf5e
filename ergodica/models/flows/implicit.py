r"""Couplings by monotone maps without an inverse in closed form.

Draws, their log densities and their scores come without any root finding; only the way back, from a given point to the base,
takes it.
"""

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key
from ergodica.models.flows.conditioner import START, Activation, Conditioner, tanh
from ergodica.models.flows.coupling import AbstractCoupling
from ergodica.models.flows.masks import Split
from ergodica.models.flows.monotone import AbstractMonotoneMap, CircularMixture, LogisticMixture


class AbstractMonotoneCoupling(AbstractCoupling):
    """A coupling by a monotone map whose parameters, one row each, are the network's output."""

    monotone: eqx.AbstractVar[AbstractMonotoneMap]

    def curve(self, x: Array, raw: Array) -> tuple[Array, Array]:
        """Maps and their log slopes."""
        return self.monotone.forward(x, raw.reshape(self.monotone.num_params, -1))

    def curve_inverse(self, y: Array, raw: Array) -> tuple[Array, Array]:
        """Roots, and the log slopes of the maps there."""
        return self.monotone.inverse(y, raw.reshape(self.monotone.num_params, -1))


class LogisticMixtureCoupling(AbstractMonotoneCoupling):
    r"""Moves some coordinates by the log odds of mixtures of logistic laws that depend on the others (Flow++).

    .. math:: y_t = e^a\, \mathrm{logit} \sum_k w_k\, \sigma\!\left(\frac{x_t - \mu_k}{s_k}\right) + b,
              \qquad (w, \mu, s, a, b) = N(x_c)

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    moved : sequence of int
        Indices of the coordinates that are moved.
    num_components : int
        K; the network has 3K + 2 outputs for each moved coordinate.
    width, depth, activation, start
        Of the network, see `Conditioner`.

    Raises
    ------
    ValueError, TypeError
        For indices that are not distinct ones of D, or are all of them or none.

    Notes
    -----
    Cost: one pass of the network, 2K logistic functions a moved coordinate, with scores the derivative of both by the network's
    input in addition. The inverse finds roots, at several times the logistic functions: where densities at given points are
    what you need most, as in maximum likelihood, take splines or turn the flow around.

    References
    ----------
    Ho, Chen, Srinivas, Duan and Abbeel (2019); Vaitl, Winkler, Richter and Kessel (2024).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = LogisticMixtureCoupling(jax.random.key(0), 3, moved=(2,))
    >>> y, log_det = layer.forward(jnp.ones(3))
    >>> [float(v) for v in y[:2]]
    [1.0, 1.0]
    """

    conditioner: Conditioner
    split: Split
    monotone: LogisticMixture

    references: ClassVar[tuple[str, ...]] = ("ho2019",)

    def __init__(
        self,
        key: Key,
        dim: int,
        moved: Sequence[int],
        *,
        num_components: int = 6,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        start: float = START,
    ) -> None:
        self.split = Split(dim, moved)
        self.monotone = LogisticMixture(num_components)
        num_out = self.monotone.num_params * len(self.split.moved)
        self.conditioner = Conditioner(key, len(self.split.kept), num_out, width, depth, activation, start)


class Angular(eqx.Module):
    """A network that sees angles by their cosines and sines, in which a full turn makes no difference."""

    network: Conditioner

    def __call__(self, x: Array) -> Array:
        """Output of the network for angles (n,)."""
        return self.network(jnp.concatenate([jnp.cos(x), jnp.sin(x)]))


class CircularCoupling(AbstractMonotoneCoupling):
    r"""Moves some angles by maps of the circle to itself that depend on the others.

    .. math:: y_t = t + \sum_k w_k\, 2 \arctan\!\left(\alpha_k \tan\frac{x_t}{2} + \beta_k\right) \mod 2\pi,
              \qquad (w, \alpha, \beta, t) = N(\cos x_c, \sin x_c)

    Moved angles come back in :math:`[-\pi, \pi)`.

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    moved : sequence of int
        Indices of the angles that are moved.
    num_components : int
        K; the network has 3K + 1 outputs for each moved angle.
    width, depth, activation, start
        Of the network, see `Conditioner`.

    Raises
    ------
    ValueError, TypeError
        For indices that are not distinct ones of D, or are all of them or none.

    Notes
    -----
    Cost: one pass of the network, K arcus tangents a moved angle, with scores the derivative of both by the network's input in
    addition. The inverse finds roots, at several times the arcus tangents.

    References
    ----------
    Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan and Cranmer (2020); Kanwar et al. (2020).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = CircularCoupling(jax.random.key(0), 3, moved=(2,))
    >>> y, log_det = layer.forward(jnp.ones(3))
    >>> [float(v) for v in y[:2]]
    [1.0, 1.0]
    """

    conditioner: Angular
    split: Split
    monotone: CircularMixture

    references: ClassVar[tuple[str, ...]] = ("kanwar2020", "rezende2020")

    def __init__(
        self,
        key: Key,
        dim: int,
        moved: Sequence[int],
        *,
        num_components: int = 6,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        start: float = START,
    ) -> None:
        self.split = Split(dim, moved)
        self.monotone = CircularMixture(num_components)
        num_out = self.monotone.num_params * len(self.split.moved)
        self.conditioner = Angular(Conditioner(key, 2 * len(self.split.kept), num_out, width, depth, activation, start))
