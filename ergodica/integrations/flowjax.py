"""Flows from flowjax, and flows for it."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax import bijections, distributions
from jaxtyping import Array

from ergodica.core.flow import AbstractBase, AbstractLayer, Flow, StandardNormal
from ergodica.core.types import Key, PyTree
from ergodica.integrations.flowjax_rules import carry


class Held(eqx.Module):
    """A tree of which nothing is a parameter.

    Floating-point arrays are kept as their bits, as integer arrays: so they are no inexact leaves, and yet arguments of compiled
    programs, not constants of them. All else that is no array is static.
    """

    arrays: tuple[Array, ...]
    dtypes: tuple[str, ...] = eqx.field(static=True)
    rest: tuple = eqx.field(static=True)

    def __init__(self, tree: PyTree) -> None:
        leaves, treedef = jax.tree.flatten(tree)
        is_array = [eqx.is_array(leaf) or hasattr(leaf, "__array__") for leaf in leaves]
        arrays = [jnp.asarray(leaf) for leaf, ours in zip(leaves, is_array, strict=True) if ours]
        self.arrays = tuple(_bits(x) for x in arrays)
        self.dtypes = tuple(str(x.dtype) for x in arrays)
        self.rest = (treedef, tuple(None if ours else leaf for leaf, ours in zip(leaves, is_array, strict=True)))

    @property
    def tree(self) -> Any:
        """The tree as it was given."""
        treedef, static = self.rest
        arrays = (_from_bits(x, dtype) for x, dtype in zip(self.arrays, self.dtypes, strict=True))
        return jax.tree.unflatten(treedef, [next(arrays) if leaf is None else leaf for leaf in static])


def _bits(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(x: Array, dtype: str) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(dtype)) if str(x.dtype) != dtype else x


class FlowjaxLayer(AbstractLayer):
    r"""A bijection of flowjax as a layer.

    Parameters
    ----------
    bijection : flowjax.bijections.AbstractBijection
        Of any shape; points are its raveled arrays (D,).
    condition : array, optional
        What a conditional bijection is conditioned on, once and for all; a constant.

    Attributes
    ----------
    trainable : pytree
        The bijection's arrays that flowjax's own training loops would train (those outside of ``paramax.NonTrainable``, before
        they are unwrapped), and ``None`` elsewhere: the only inexact arrays of the layer.
    held : Held
        All the rest of it.

    Notes
    -----
    Rules for scores are in ``ergodica.integrations.flowjax_rules``, with their costs. Against the way that flowjax calls
    ``transform`` the score goes by a derivative of ``transform`` at the new point, so that an ``Invert`` costs no second inverse.
    """

    trainable: PyTree
    held: Held

    references: ClassVar = ("vaitl2024", "ward2023")

    def __init__(self, bijection: bijections.AbstractBijection, condition: Array | None = None) -> None:
        condition = _check_condition(bijection, condition)
        self.trainable, rest = eqx.partition(bijection, eqx.is_inexact_array, is_leaf=_is_non_trainable)
        self.held = Held((rest, condition))

    @property
    def bijection(self) -> bijections.AbstractBijection:
        """The bijection with the layer's parameters."""
        return eqx.combine(self.trainable, self.held.tree[0])

    def forward(self, x: Array) -> tuple[Array, Array]:
        """The bijection's ``transform``."""
        return self._call("transform_and_log_det", x)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """The bijection's ``inverse``."""
        return self._call("inverse_and_log_det", y)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """``transform``, and the score by the rules of its parts."""
        return self._carry(x, score, inverse=False)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """``inverse``, and the score by the rules of its parts."""
        return self._carry(y, score, inverse=True)

    def _call(self, name: str, point: Array) -> tuple[Array, Array]:
        bijection, condition = paramax.unwrap(self.bijection), self.held.tree[1]
        new, log_det = getattr(bijection, name)(point.reshape(bijection.shape), condition)
        return new.reshape(-1), jnp.sum(log_det)

    def _carry(self, point: Array, score: Array, *, inverse: bool) -> tuple[Array, Array, Array]:
        bijection, condition = paramax.unwrap(self.bijection), self.held.tree[1]
        point, score = point.reshape(bijection.shape), score.reshape(bijection.shape)
        new, log_det, score = carry(bijection, point, score, condition, inverse=inverse)
        return new.reshape(-1), jax.lax.stop_gradient(jnp.sum(log_det)), jax.lax.stop_gradient(score.reshape(-1))


class FlowjaxBase(AbstractBase):
    """A distribution of flowjax that nothing trains, as the base of a flow.

    Parameters
    ----------
    distribution : flowjax.distributions.AbstractDistribution
        Of any shape; points are its raveled arrays (D,).
    condition : array, optional
        As for `FlowjaxLayer`.

    Raises
    ------
    TypeError
        If flowjax would train something of it.

    Notes
    -----
    It draws what flowjax draws with the same key. The score is the derivative of ``log_prob``.
    """

    held: Held
    dim: int = eqx.field(static=True)

    def __init__(self, distribution: distributions.AbstractDistribution, condition: Array | None = None) -> None:
        trainable = eqx.filter(distribution, eqx.is_inexact_array, is_leaf=_is_non_trainable)
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(trainable)[0]]
        if names:
            raise TypeError(
                f"The base {type(distribution).__name__} has parameters that flowjax would train: {', '.join(names)}. A base has "
                "none here: hold them, paramax.non_trainable(base_dist), or start from StandardNormal and put what moves into "
                "the bijection."
            )
        condition = _check_condition(distribution, condition)
        self.held = Held((distribution, condition))
        self.dim = _size(distribution.shape)

    @property
    def distribution(self) -> distributions.AbstractDistribution:
        """The distribution."""
        return self.held.tree[0]

    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws (num_samples, D): those of flowjax with this key."""
        distribution, condition = self.held.tree
        return distribution.sample(key, (num_samples,), condition).reshape(num_samples, self.dim)

    def log_prob(self, z: Array) -> Array:
        """Normalised log density."""
        distribution, condition = self.held.tree
        return distribution.log_prob(z.reshape(distribution.shape), condition)

    def score(self, z: Array) -> Array:
        """Derivative of the log density."""
        return jax.grad(self.log_prob)(z)


def from_flowjax(source: Any, condition: Array | None = None) -> Flow:
    r"""Flow from a distribution or a bijection of flowjax.

    Parameters
    ----------
    source : flowjax.distributions.AbstractDistribution or flowjax.bijections.AbstractBijection
        A distribution, say from ``flowjax.flows``: its base is the innermost one that is not itself transformed, and each
        bijection around it a layer. Or a bijection, which then moves standard normals. Points of any shape are raveled to (D,).
    condition : array, optional
        Value that a conditional flow is conditioned on. It is a constant of the flow.

    Returns
    -------
    Flow
        Draws, densities and parameters are those of flowjax: ``flow.sample(key, n)`` equals ``source.sample(key, (n,))``, and
        the inexact arrays of the flow are those that ``flowjax.train`` would train. ``to_flowjax`` goes back.

    Raises
    ------
    TypeError
        For other objects, and bases with parameters that are not transformed, such as Student's t with free degrees of freedom.
    ValueError
        If a conditional flow lacks its condition, or the other way round.

    Notes
    -----
    Scores are carried by rules for each bijection (``ergodica.integrations.flowjax_rules``), so that
    `ergodica.estimators.PathGradient` takes one pass where flowjax's ``ElboLoss(stick_the_landing=True)`` takes two, one of them
    against the direction in which the flow is cheap. Cost over that of ``transform``: a derivative of a layer for couplings,
    splines, scalar and linear maps, and for any ``Invert``; D derivatives and a triangular solve, O(D²), for masked and block
    autoregressive layers in the direction of their ``transform``.

    A flow made with ``invert=True``, flowjax's default, draws by ``inverse``. For masked autoregressive flows that is a scan
    over dimensions, for block autoregressive ones root finding to the tolerance of their ``inverter``: for reverse divergences
    make them with ``invert=False``.

    The density of ``Planar(negative_slope=...)`` jumps, and where parameters move a jump, no derivative through draws sees it:
    path and standard gradients are both biased. Leave ``negative_slope`` out, which leaves no inverse and needs none here.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024); flowjax: Ward (2023).

    Examples
    --------
    >>> import jax, ergodica as erg
    >>> from flowjax.distributions import StandardNormal
    >>> from flowjax.flows import coupling_flow
    >>> theirs = coupling_flow(jax.random.key(0), base_dist=StandardNormal((2,)), flow_layers=2, invert=False)
    >>> ours = erg.integrations.flowjax.from_flowjax(theirs)
    >>> x, log_q = ours.sample_and_log_prob(jax.random.key(1), 3)
    >>> bool(abs(x - theirs.sample(jax.random.key(1), (3,))).max() < 1e-6)
    True
    """
    if isinstance(source, bijections.AbstractBijection):
        return Flow(StandardNormal(_size(source.shape)), FlowjaxLayer(source, condition))
    if not isinstance(source, distributions.AbstractDistribution):
        raise TypeError(
            f"source must be a distribution or a bijection of flowjax; got {type(source).__name__}. Unwrap it first if it is "
            "wrapped as a whole (paramax.unwrap)."
        )
    _check_condition(source, condition)
    layers = []
    while isinstance(source, distributions.AbstractTransformed):
        layers.append(FlowjaxLayer(source.bijection, None if source.bijection.cond_shape is None else condition))
        source = source.base_dist
    base = FlowjaxBase(source, None if source.cond_shape is None else condition)
    return Flow(base, *reversed(layers))


def to_flowjax(flow: Flow) -> distributions.Transformed:
    """Distribution of flowjax with a flow's parameters.

    Parameters
    ----------
    flow : Flow
        One from `from_flowjax`, say after training, whose bijections come back as they were, in one ``Chain``; or any other, whose
        layers are wrapped.

    Returns
    -------
    flowjax.distributions.Transformed
        Conditional if the bijections are.

    Examples
    --------
    >>> import jax, ergodica as erg
    >>> theirs = erg.integrations.flowjax.to_flowjax(erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=2))
    >>> theirs.sample(jax.random.key(1), (3,)).shape
    (3, 2)
    """
    if isinstance(flow.base, FlowjaxBase):
        base = flow.base.distribution
    elif isinstance(flow.base, StandardNormal):
        base = distributions.StandardNormal((flow.dim,))
    else:
        base = WrappedBase(flow.base)
    shape = paramax.unwrap(base).shape
    parts = [
        layer.bijection if isinstance(layer, FlowjaxLayer) else WrappedLayer(layer, flow.dim)
        for layer in flow.layer.layers
    ]
    parts = [part if part.shape == shape else bijections.Reshape(part, shape) for part in parts]
    return distributions.Transformed(base, bijections.Chain(parts or [bijections.Identity(shape)]))


class WrappedLayer(bijections.AbstractBijection):
    """A layer as a bijection of flowjax; made by `to_flowjax`."""

    layer: AbstractLayer
    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None

    def __init__(self, layer: AbstractLayer, dim: int) -> None:
        self.layer = layer
        self.shape = (dim,)

    def transform_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:  # noqa: ARG002
        """The layer's `forward`."""
        return self.layer.forward(x)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:  # noqa: ARG002
        """The layer's `inverse`."""
        return self.layer.inverse(y)


class WrappedBase(distributions.AbstractDistribution):
    """A base as a distribution of flowjax; made by `to_flowjax`."""

    base: AbstractBase
    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None

    def __init__(self, base: AbstractBase) -> None:
        self.base = base
        self.shape = (base.dim,)

    def _log_prob(self, x: Array, condition: Array | None = None) -> Array:  # noqa: ARG002
        return self.base.log_prob(x)

    def _sample(self, key: Key, condition: Array | None = None) -> Array:  # noqa: ARG002
        return self.base.sample(key, 1)[0]


def _is_non_trainable(leaf: Any) -> bool:
    return isinstance(leaf, paramax.NonTrainable)


def _check_condition(source: Any, condition: Array | None) -> Array | None:
    shape = paramax.unwrap(source).cond_shape
    if shape is None and condition is not None:
        raise ValueError(f"condition was given, and {type(source).__name__} is not conditional. Leave it out.")
    if shape is not None and (condition is None or jnp.shape(condition) != shape):
        raise ValueError(
            f"{type(source).__name__} is conditional: condition must be an array of shape {shape}, at which the flow is taken; "
            f"got {'none' if condition is None else f'shape {jnp.shape(condition)}'}."
        )
    return None if condition is None else jnp.asarray(condition)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
