r"""Autoregressive layers: each coordinate is moved by a scale and a shift that depend on those before it."""

import itertools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.flow import AbstractLayer, constant
from ergodica.core.types import Key
from ergodica.models.flows.conditioner import START, Activation, starting_weights, tanh
from ergodica.models.flows.coupling import bounded


class MaskedConditioner(eqx.Module):
    """A fully connected network (D,) to (2, D) whose outputs i depend on inputs before i alone (MADE).

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    width, depth : int
        Units and number of hidden layers; at least D - 1 units, so that every input has one.
    activation : callable
        Elementwise.
    start : float
        Factor on the last layer's weights at the start.

    References
    ----------
    Germain, Gregor, Murray and Larochelle (2015).
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    dim: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self, key: Key, dim: int, width: int, depth: int, activation: Activation = tanh, start: float = START
    ) -> None:
        rng.check_key(key)
        self.dim = check.integer("dim", dim, least=2)
        width = check.integer("width", width, least=dim - 1, hint="Every input but the last needs a hidden unit.")
        sizes = [dim, *[width] * check.integer("depth", depth), 2 * dim]
        self.activation = check.function("activation", activation)
        self.weights = starting_weights(key, sizes, start)
        self.biases = tuple(jnp.zeros(size) for size in sizes[1:])

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Two outputs (D,) for each coordinate of a point."""
        *masks, last = self._masks()
        for weight, bias, mask in zip(self.weights[:-1], self.biases[:-1], masks, strict=True):
            x = self.activation(x @ jnp.where(mask, weight, jnp.zeros_like(weight)) + bias)
        out = x @ jnp.where(last, self.weights[-1], jnp.zeros_like(self.weights[-1])) + self.biases[-1]
        return out[: self.dim], out[self.dim :]

    def _masks(self) -> list[np.ndarray]:
        """Masks (in, out) of the weights: hidden unit of degree k sees inputs up to k, output i units of degree below i."""
        degrees = [np.arange(1, self.dim + 1)]
        degrees += [1 + np.arange(bias.shape[0]) % (self.dim - 1) for bias in self.biases[:-1]]
        masks = [before[:, None] <= after for before, after in itertools.pairwise(degrees)]
        return [*masks, degrees[-1][:, None] < np.tile(degrees[0], 2)]


class Autoregressive(AbstractLayer):
    r"""Moves each coordinate by a scale and a shift that depend on the coordinates before it.

    .. math:: y_i = x_i e^{a_i(x_{<i})} + b_i(x_{<i}), \qquad \log|\det J| = \sum_i a_i

    From x to y in one pass of the network (the direction of an inverse autoregressive flow: fast draws), from y to x in D of them,
    one after the other. `Inverted` turns it round (the direction of a masked autoregressive flow: fast log densities of data).

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    width, depth, activation, start
        Of the network, see `MaskedConditioner`.
    bound : float, optional
        Keeps log scales within :math:`\pm` bound.

    Notes
    -----
    The Jacobian is triangular. ``forward_with_score`` solves :math:`J^\top s' = s - \nabla\sum a` by back substitution with the
    whole Jacobian, D + 1 derivatives of the network: :math:`O(D)` times the cost of ``forward`` and D² numbers a point; not for
    hundreds of dimensions. ``inverse_with_score`` needs only one derivative, since there the score is multiplied by
    :math:`J^\top`: the passes cost D evaluations, the score one more.

    References
    ----------
    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016); Papamakarios, Pavlakou and Murray (2017).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = Autoregressive(jax.random.key(0), 3, width=8)
    >>> x = jnp.array([1.0, 2.0, 3.0])
    >>> bool(jnp.allclose(layer.inverse(layer.forward(x)[0])[0], x, rtol=1e-5))
    True
    """

    conditioner: MaskedConditioner
    bound: float | None = eqx.field(static=True)

    references: ClassVar[tuple[str, ...]] = ("germain2015", "kingma2016", "papamakarios2017")

    def __init__(
        self,
        key: Key,
        dim: int,
        *,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        bound: float | None = 3.0,
        start: float = START,
    ) -> None:
        self.conditioner = MaskedConditioner(key, dim, width, depth, activation, start)
        self.bound = None if bound is None else float(check.positive("bound", bound, hint="None for no bound."))

    def forward(self, x: Array) -> tuple[Array, Array]:
        """All coordinates at once."""
        log_scale, shift = self._scale_and_shift(x)
        return x * jnp.exp(log_scale) + shift, jnp.sum(log_scale)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """One coordinate after the other."""
        index = jnp.arange(len(y))

        def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            x, scales = carry
            log_scale, shift = self._scale_and_shift(x)
            x = jnp.where(index == i, (y - shift) * jnp.exp(-log_scale), x)
            return (x, jnp.where(index == i, log_scale, scales)), None

        (x, scales), _ = jax.lax.scan(step, (jnp.zeros_like(y), jnp.zeros_like(y)), index)
        return x, -jnp.sum(scales)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """All coordinates at once; the score by back substitution."""
        y, log_det = self.forward(x)
        fixed = constant(self)
        rows = jax.jacrev(lambda x: jnp.append(*fixed.forward(x)))(jax.lax.stop_gradient(x))
        new = solve_triangular(rows[:-1], jax.lax.stop_gradient(score) - rows[-1], lower=True, trans=1)
        return y, jax.lax.stop_gradient(log_det), new

    def _scale_and_shift(self, x: Array) -> tuple[Array, Array]:
        log_scale, shift = self.conditioner(x)
        return bounded(log_scale, self.bound), shift
