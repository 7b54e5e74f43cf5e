"""Networks that say how a layer moves some coordinates, given the others."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.types import Key

type Activation = Callable[[Array], Array]


@jax.custom_jvp
def tanh(x: Array) -> Array:
    """Hyperbolic tangent that is differentiated from its value: `jax.numpy.tanh` keeps a second array for that.

    Both sweeps of a path gradient differentiate each hidden layer; what they keep is half as much.
    """
    return jnp.tanh(x)


@tanh.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = tanh(*primals)
    return value, tangents[0] * (1 - value * value)


START = 0.01
"""Size of the last weights at the start, relative to those of a plain network: flows start near the identity."""


class Conditioner(eqx.Module):
    r"""A fully connected network with biases, applied to one point.

    All leaves are arrays (the activation is static), so that flows are arguments of ``jax.jit`` as they are.

    Parameters
    ----------
    key : key
    num_in, num_out : int
        Lengths of the input and of the output.
    width : int
        Units of each hidden layer.
    depth : int
        Number of hidden layers; 0 for an affine map.
    activation : callable
        Elementwise.
    start : float
        Factor on the last layer's weights at the start; biases start at zero. With 0 the output starts at zero exactly.

    Notes
    -----
    Weights start uniform in :math:`\pm 1/\sqrt{\text{fan in}}`. Cost of a call: ``num_in * width +
    (depth - 1) * width**2 + width * num_out`` multiplications.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        num_in: int,
        num_out: int,
        width: int = 64,
        depth: int = 2,
        activation: Activation = tanh,
        start: float = START,
    ) -> None:
        rng.check_key(key)
        depth = check.integer("depth", depth, least=0)
        sizes = [
            check.integer("num_in", num_in),
            *[check.integer("width", width)] * depth,
            check.integer("num_out", num_out),
        ]
        self.activation = check.function("activation", activation)
        self.weights = starting_weights(key, sizes, start)
        self.biases = tuple(jnp.zeros(size) for size in sizes[1:])

    def __call__(self, x: Array) -> Array:
        """Output (num_out,) for an input (num_in,)."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(x @ weight + bias)
        return x @ self.weights[-1] + self.biases[-1]


def starting_weights(key: Key, sizes: list[int], start: float) -> tuple[Array, ...]:
    """Weights (in, out) between layers of the given sizes, uniform by fan in; the last ones times ``start``."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(itertools.pairwise(sizes))
    scales = [start if i == len(shapes) - 1 else 1.0 for i in range(len(shapes))]
    return tuple(
        jax.random.uniform(k, shape, minval=-1.0, maxval=1.0) * (scale * shape[0] ** -0.5)
        for k, shape, scale in zip(keys, shapes, scales, strict=True)
    )
