r"""The contract of a normalizing flow: a base law, layers, and the score carried through both.

A layer maps one point, an array ``(D,)``; callers map over batches with `jax.vmap`. All its inexact array leaves are parameters.
The *score* of a law is :math:`\nabla_x \log q(x)`. It goes through an invertible map :math:`y = T(x)` with Jacobian :math:`J` as

.. math:: \nabla_y \log q_y(y) = J^{-\top} \left( \nabla_x \log q_x(x) - \nabla_x \log|\det J| \right)

(Vaitl, Winkler, Richter and Kessel, 2024, equation 12). Rules for it return the new point differentiable in the layer's
parameters and in the old point; log determinants and scores that come with it are constants to differentiation.
"""

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Key, PyTree


def constant[T](module: T) -> T:
    """The same tree, whose inexact arrays are constants to differentiation."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, module)


class AbstractLayer(eqx.Module):
    """An invertible map of one point ``(D,)``.

    Both rules for scores have defaults that hold for any layer: each differentiates the opposite map, so that
    `forward_with_score` costs an evaluation of `inverse` and its derivative. Override them where the score can be had on the way.
    """

    @abc.abstractmethod
    def forward(self, x: Array) -> tuple[Array, Array]:
        r"""From ``x`` (D,) to ``y`` (D,) and :math:`\log|\det \partial y/\partial x|`."""

    @abc.abstractmethod
    def inverse(self, y: Array) -> tuple[Array, Array]:
        r"""From ``y`` (D,) to ``x`` (D,) and :math:`\log|\det \partial x/\partial y|`."""

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """`forward`, and from the score at ``x`` that at ``y``."""
        y, log_det = self.forward(x)
        return y, jax.lax.stop_gradient(log_det), pull_back(constant(self).inverse, y, score)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """`inverse`, and from the score at ``y`` that at ``x``."""
        x, log_det = self.inverse(y)
        return x, jax.lax.stop_gradient(log_det), pull_back(constant(self).forward, x, score)


type Map = Callable[[Array], tuple[Array, Array]]


def pull_back(opposite: Map, new: Array, score: Array) -> Array:
    r"""Score at a new point by the derivative of the map back from it.

    .. math:: \nabla_y \log q_y(y) = \left(\frac{\partial x}{\partial y}\right)^{\!\top} \nabla_x \log q_x(x)
              + \nabla_y \log\left|\det \frac{\partial x}{\partial y}\right|

    Parameters
    ----------
    opposite : callable
        From the new point to the old one and the log determinant of that map; its parameters constants.
    new, score : array (D,)
        The new point, and the score at the old one.

    Notes
    -----
    Cost: one evaluation of ``opposite`` and its derivative.
    """
    (_, log_det), pull = jax.vjp(opposite, jax.lax.stop_gradient(new))
    return jax.lax.stop_gradient(pull((score, jnp.ones_like(log_det)))[0])


def push_forward(direct: Map, old: Array, score: Array) -> Array:
    r"""Score at the new point by a linear solve with the Jacobian of the map to it, where the map back is not to be had.

    Notes
    -----
    Cost: D derivatives of ``direct``, and :math:`O(D^3)` for the solve.
    """
    old = jax.lax.stop_gradient(old)
    jacobian = jax.jacrev(lambda x: direct(x)[0])(old)
    slope = jax.grad(lambda x: direct(x)[1])(old)
    return jax.lax.stop_gradient(jnp.linalg.solve(jacobian.T, score - slope))


class Chain(AbstractLayer):
    """Layers one after the other, the first one first."""

    layers: tuple[AbstractLayer, ...]

    def __init__(self, layers: Sequence[AbstractLayer]) -> None:
        self.layers = tuple(check.instance("layers", layer, AbstractLayer, "an affine coupling") for layer in layers)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Through all layers."""
        return _through((layer.forward for layer in self.layers), x)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Back through all layers."""
        return _through((layer.inverse for layer in reversed(self.layers)), y)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Through all layers, each by its own rule."""
        return _with_score((layer.forward_with_score for layer in self.layers), x, score)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Back through all layers, each by its own rule."""
        return _with_score((layer.inverse_with_score for layer in reversed(self.layers)), y, score)


def _through(maps: Iterable[Map], point: Array) -> tuple[Array, Array]:
    total = jnp.zeros((), point.dtype)
    for one in maps:
        point, log_det = one(point)
        total = total + log_det
    return point, total


def _with_score(
    maps: Iterable[Callable[[Array, Array], tuple[Array, Array, Array]]], point: Array, score: Array
) -> tuple[Array, Array, Array]:
    total = jnp.zeros((), point.dtype)
    for one in maps:
        point, log_det, score = one(point, score)
        total = total + log_det
    return point, total, score


class AbstractBase(eqx.Module):
    """The law that a flow starts from, without parameters."""

    dim: eqx.AbstractVar[int]

    @abc.abstractmethod
    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws (num_samples, D)."""

    @abc.abstractmethod
    def log_prob(self, z: Array) -> Array:
        """Normalised log density at one point (D,)."""

    @abc.abstractmethod
    def score(self, z: Array) -> Array:
        """Gradient of the log density at one point (D,)."""


class StandardNormal(AbstractBase):
    """Independent standard normals."""

    dim: int = eqx.field(static=True)

    def __init__(self, dim: int) -> None:
        self.dim = check.integer("dim", dim)

    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws (num_samples, D) in the default precision."""
        return rng.normal_like(key, jax.ShapeDtypeStruct((num_samples, self.dim), jnp.result_type(float)))

    def log_prob(self, z: Array) -> Array:
        """Normalised log density."""
        return -0.5 * jnp.sum(z**2) - 0.5 * self.dim * math.log(2 * math.pi)

    def score(self, z: Array) -> Array:
        """-z."""
        return -z


class UniformTorus(AbstractBase):
    r"""Independent uniform angles in :math:`[-\pi, \pi)`."""

    dim: int = eqx.field(static=True)

    def __init__(self, dim: int) -> None:
        self.dim = check.integer("dim", dim)

    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws (num_samples, D) in the default precision."""
        return jax.random.uniform(key, (num_samples, self.dim), minval=-math.pi, maxval=math.pi)

    def log_prob(self, z: Array) -> Array:
        """Minus the logarithm of the volume, everywhere: angles are taken modulo a turn."""
        return jnp.full((), -self.dim * math.log(2 * math.pi), z.dtype)

    def score(self, z: Array) -> Array:
        """Zero."""
        return jnp.zeros_like(z)


class Flow(eqx.Module):
    """The law of a base's draws after an invertible map.

    Parameters
    ----------
    base : AbstractBase
        Or an integer: that many standard normals.
    *layers : AbstractLayer
        The first one is applied to the base's draws.

    Raises
    ------
    ValueError, TypeError
        For layers of another kind, or that do not keep the dimension.

    Notes
    -----
    Cost of `log_prob`: one pass through the inverse of all layers; where you have just sampled take `sample_and_log_prob`, which
    needs no inverse.

    Examples
    --------
    >>> import jax, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=4)
    >>> x, log_q = flow.sample_and_log_prob(jax.random.key(1), 3)
    >>> x.shape, log_q.shape
    ((3, 2), (3,))
    """

    base: AbstractBase
    layer: Chain

    def __init__(self, base: AbstractBase | int, *layers: AbstractLayer) -> None:
        self.base = StandardNormal(base) if isinstance(base, int) else base
        check.instance("base", self.base, AbstractBase, "StandardNormal(2)")
        self.layer = Chain(_arrays_only(layers))
        out = jax.eval_shape(lambda z: self.layer.forward(z), jax.ShapeDtypeStruct((self.dim,), jnp.result_type(float)))
        if [x.shape for x in out] != [(self.dim,), ()]:
            raise ValueError(
                f"The layers must map a point of shape ({self.dim},) to one of that shape and a scalar log determinant; got "
                f"shapes {out[0].shape} and {out[1].shape}."
            )

    @property
    def dim(self) -> int:
        """Dimension of the points."""
        return self.base.dim

    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws (num_samples, D)."""
        return self.sample_and_log_prob(key, num_samples)[0]

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Independent draws (num_samples, D) and their log densities (num_samples,), in one pass."""
        rng.check_key(key)

        def one(z: Array) -> tuple[Array, Array]:
            x, log_det = self.layer.forward(z)
            return x, self.base.log_prob(z) - log_det

        return jax.vmap(one)(self.base.sample(key, num_samples))

    def log_prob(self, x: Array) -> Array:
        """Normalised log density at one point (D,)."""
        z, log_det = self.layer.inverse(x)
        return self.base.log_prob(z) + log_det

    def with_params(self, params: PyTree) -> Self:
        """The flow with other parameters, of the structure of `params`."""
        return eqx.combine(params, self)

    @property
    def params(self) -> PyTree:
        """The inexact arrays of the flow: a tree of its structure, with ``None`` elsewhere."""
        return eqx.filter(self, eqx.is_inexact_array)


def check_flow(flow: Any) -> Flow:
    """Return a flow; raise for anything else."""
    return check.instance("flow", flow, Flow, "such as ergodica.models.flows.real_nvp(key, dim=2)")


def _arrays_only(layers: Sequence[AbstractLayer]) -> Sequence[AbstractLayer]:
    """The same layers with functions among their leaves (activations of networks) made part of the structure, for `jax.jit`."""
    return jax.tree.map(lambda leaf: leaf if eqx.is_array(leaf) or not callable(leaf) else as_partial(leaf), layers)


def flat_log_density(target: Any, dim: int) -> Callable[[Array], Array]:
    """Log density of a target as a function of one point (D,).

    Parameters
    ----------
    target : callable or Posterior
        A function of one point, or an object with a method ``log_density`` of one point, or a posterior, whose positions are
        then raveled in the order of ``ergodica.core.tree.ravel``.
    dim : int
        D.

    Raises
    ------
    ValueError, TypeError
        For a target of another kind or dimension, or one that returns no scalar.
    """
    if isinstance(target, Posterior):
        shape = target.shape()
        size = tree.size(shape)
        if size != dim:
            raise ValueError(f"The flow has dimension {dim}, the positions of the posterior have {size} entries.")
        function: Callable = jax.tree_util.Partial(_posterior_density, target)
    else:
        function = getattr(target, "log_density", target)
        if not callable(function):
            raise TypeError(
                "target must be a function log_density(x) of one point, an object with such a method, or a Posterior; got "
                f"{type(target).__name__}."
            )
    out = jax.eval_shape(function, jax.ShapeDtypeStruct((dim,), jnp.result_type(float)))
    if getattr(out, "shape", None) != ():
        raise ValueError(
            f"target must map one point of shape ({dim},) to a scalar; got {out}. Batches are mapped here."
        )
    return function


def _posterior_density(posterior: Posterior, x: Array) -> Array:
    return posterior.log_density(tree.unravel(x, posterior.shape()))
