"""Layers made of layers: turned round, or many of one kind in a loop."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import AbstractLayer


class Inverted(AbstractLayer):
    """A layer turned round: its inverse is the way forward.

    Parameters
    ----------
    layer : AbstractLayer

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ergodica.models.flows import Autoregressive
    >>> layer = Inverted(Autoregressive(jax.random.key(0), 3, width=8))
    >>> layer.forward(jnp.ones(3))[0].shape
    (3,)
    """

    layer: AbstractLayer

    def __init__(self, layer: AbstractLayer) -> None:
        self.layer = check.instance("layer", layer, AbstractLayer, "an affine coupling")

    def forward(self, x: Array) -> tuple[Array, Array]:
        """The layer's inverse."""
        return self.layer.inverse(x)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """The layer itself."""
        return self.layer.forward(y)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """The layer's inverse, with its rule."""
        return self.layer.inverse_with_score(x, score)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """The layer itself, with its rule."""
        return self.layer.forward_with_score(y, score)


class Stacked(AbstractLayer):
    """Layers of one structure, one after the other, in a loop over their stacked parameters.

    Compiles in the time of one layer, however many there are. Runs a little slower than `Chain`, which lets the compiler see
    across layers.

    Parameters
    ----------
    layers : sequence of AbstractLayer
        Of the same class, shapes and settings, the first one applied first. Couplings whose masks alternate are put in pairs
        before, each a `Chain`.

    Raises
    ------
    ValueError
        For layers of different structure, or none.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ergodica.models.flows import ElementwiseAffine
    >>> stack = Stacked([ElementwiseAffine(2) for _ in range(8)])
    >>> stack.layers.shift.shape
    (8, 2)
    """

    layers: AbstractLayer
    num_layers: int = eqx.field(static=True)

    def __init__(self, layers: Sequence[AbstractLayer]) -> None:
        layers = [check.instance("layers", layer, AbstractLayer, "an affine coupling") for layer in layers]
        if not layers:
            raise ValueError("layers must hold at least one layer; got none.")
        for i, layer in enumerate(layers):
            same = jax.tree.structure(layer) == jax.tree.structure(layers[0])
            if not same or [jnp.shape(x) for x in jax.tree.leaves(layer)] != [
                jnp.shape(x) for x in jax.tree.leaves(layers[0])
            ]:
                raise ValueError(
                    f"layers must have the same class, settings and shapes; number {i} differs from the first. "
                    "Put those that alternate in pairs, as Chain([first, second])."
                )
        self.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        self.num_layers = len(layers)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Through all layers."""
        return self._loop(lambda layer, x: layer.forward(x), (x,))

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Back through all layers."""
        return self._loop(lambda layer, y: layer.inverse(y), (y,), reverse=True)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Through all layers, each by its own rule."""
        return self._loop(lambda layer, x, score: layer.forward_with_score(x, score), (x, score))

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Back through all layers, each by its own rule."""
        return self._loop(lambda layer, y, score: layer.inverse_with_score(y, score), (y, score), reverse=True)

    def _loop(self, rule: Callable, start: tuple[Array, ...], *, reverse: bool = False) -> tuple:
        def step(carry: tuple, layer: AbstractLayer) -> tuple[tuple, None]:
            point, total, *score = carry
            point, log_det, *score = rule(layer, point, *score)
            return (point, total + log_det, *score), None

        point, *score = start
        carry = (point, jnp.zeros((), point.dtype), *score)
        return jax.lax.scan(step, carry, self.layers, length=self.num_layers, reverse=reverse)[0]
