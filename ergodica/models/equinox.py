"""Posteriors of networks: any equinox module with a prior on its arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Key, PyTree

_DRAWS_AT_ONCE = 64
_OBSERVED = "y"


class EquinoxSource(eqx.Module):
    """What a posterior made by `from_equinox` keeps of the network, as ``posterior.source``.

    Attributes
    ----------
    shapes : pytree
        The network with ``None`` for all that is no floating-point array (those are what is sampled), as shapes.
    buffers : pytree
        Its other arrays.
    static : pytree
        All else.
    likelihood : callable
    """

    shapes: PyTree = eqx.field(static=True)
    buffers: PyTree
    static: PyTree = eqx.field(static=True)
    likelihood: Callable

    holds_data: ClassVar = False

    def network(self, position: Mapping[str, Array]) -> Any:
        """Put the network together from a position, or from one draw of ``dt.posterior`` by name."""

        def leaf(path: tuple, _: Any) -> Array:
            return position[tree.path_name(path)]

        return eqx.combine(jax.tree_util.tree_map_with_path(leaf, self.shapes), self.buffers, self.static)

    def law(self, position: Mapping[str, Array], x: PyTree) -> Any:
        """Distribution of the observations, one a row of ``x``."""
        from numpyro.distributions import Distribution

        law, rows = self.likelihood(self.network(position), x), check.leading_length("x", x)
        if not isinstance(law, Distribution):
            raise TypeError(
                "likelihood must return a NumPyro distribution, such as numpyro.distributions.Normal(mean, sd); got "
                f"{type(law).__name__}. A log density goes into ergodica.Posterior."
            )
        if law.batch_shape != (rows,):
            raise ValueError(
                f"likelihood must return one law a row, of batch shape ({rows},); got {law.batch_shape}. Drop an axis of the "
                "network's output ([:, 0], out_size='scalar'), or declare it part of one observation (.to_event(1))."
            )
        return law

    def log_density_of_rows(self, position: Mapping[str, Array], rows: dict[str, PyTree]) -> Array:
        """Log likelihood of each row."""
        return self.law(position, rows["x"]).log_prob(rows[_OBSERVED])

    def log_likelihood(
        self, samples: Mapping[str, Any], data: dict[str, Any], *, batch_size: int = 1000
    ) -> dict[str, np.ndarray]:
        """Log likelihood of each row under each draw, (chain, draw, N), under the name ``"y"``."""
        rows = {"x": data["x"], _OBSERVED: data[_OBSERVED]}
        return {_OBSERVED: self._by_chunks(_log_likelihood, samples, rows, batch_size)}

    def predictive(
        self, key: Key, samples: Mapping[str, Any], data: dict[str, Any], *, batch_size: int = 1000
    ) -> dict[str, np.ndarray]:
        """Draw one observation for each draw and row, (chain, draw, N, …), under the name ``"y"``."""
        rng.check_key(key)
        return {_OBSERVED: self._by_chunks(_simulate, samples, {"x": data["x"]}, batch_size, key)}

    def _by_chunks(
        self, function: Callable, samples: Mapping[str, Any], rows: PyTree, size: int, key: Key | None = None
    ) -> np.ndarray:
        leaves = tree.named_leaves(self.shapes)
        flat = {name: jnp.asarray(samples[name]).reshape(-1, *leaf.shape) for name, leaf in leaves.items()}
        leading = np.shape(samples[next(iter(leaves))])[:2]
        rows = jax.tree.map(jnp.asarray, rows)
        num_rows, size, chunks = check.leading_length("data", rows), check.integer("batch_size", size), []
        for i, begin in enumerate(range(0, num_rows, size)):
            part = jax.tree.map(lambda x, begin=begin: x[begin : begin + size], rows)
            chunks.append(np.asarray(function(self, flat, part, key if key is None else jax.random.fold_in(key, i))))
        values = np.concatenate(chunks, axis=1)
        return values.reshape(*leading, *values.shape[1:])


def fan_in_scale(name: str, shape: tuple[int, ...]) -> float:
    r"""Prior standard deviation :math:`1/\sqrt{\text{fan-in}}` for weights, 1 for vectors and scalars (biases, offsets).

    For arrays of shape (outputs, inputs, …), as equinox has them in linear and convolutional layers. It keeps the size of
    activations the same from layer to layer, whatever the width (Neal 1996).

    Examples
    --------
    >>> fan_in_scale("layers.0.weight", (50, 16)), fan_in_scale("layers.0.bias", (50,))
    (0.25, 1.0)
    """
    del name
    return math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1.0


def from_equinox(
    network: PyTree,
    likelihood: Callable[[Any, PyTree], Any],
    x: PyTree,
    y: Any,
    *,
    prior_scale: float | Callable[[str, tuple[int, ...]], float] = fan_in_scale,
    log_prior: Callable[[Any], Array] | None = None,
    initial: Any = "prior",
) -> Posterior:
    r"""Make a posterior over the floating-point arrays of an equinox module.

    .. math:: w_j \sim N(0, s_j^2), \qquad y_i \sim \text{likelihood}(\text{network}_w, x_i)

    Parameters
    ----------
    network : equinox.Module
        Any pytree with floating-point arrays, which are sampled; its other arrays and all else are kept as they are.
    likelihood : callable
        ``likelihood(network, x) -> NumPyro distribution`` of batch shape (n,), for the n rows of ``x`` that it gets:
        ``lambda net, x: dist.Normal(jax.vmap(net)(x)[:, 0], 0.1)``. A scale to be learnt is one more array of the module.
    x : pytree of arrays
        Inputs, one row a datum.
    y : array (N, ...)
        Observations.
    prior_scale : float or callable
        :math:`s_j`, the same for all, or ``prior_scale(name, shape) -> float`` for each array.
    log_prior : callable, optional
        ``log_prior(network) -> scalar``, in place of the Gaussian.
    initial : {"prior", "network"} or callable
        Where chains start: each at a draw from the Gaussian prior, all at the ``network`` given, or each at
        ``initial(key) -> network``, such as the function that made it.

    Returns
    -------
    Posterior
        Positions are dicts of the arrays by name, such as ``layers.0.weight``. ``posterior.source.network(position)`` is the
        network again. Held-out data for `ergodica.predictive` are ``dict(x=…, y=…)``.

    Raises
    ------
    ValueError, TypeError
        If the network has no floating-point array, scales are not positive, ``likelihood`` returns no distribution or one
        of another batch shape, or ``initial`` makes another network.

    Notes
    -----
    The same as a NumPyro model with ``numpyro.contrib.module.random_eqx_module`` under `ergodica.from_numpyro`, with a start
    that suits networks. The log prior is normalised.

    Not for modules that look at several rows at once (batch normalisation), nor for dropout, which needs a key: their
    likelihood has no terms for single data. Weights have symmetries, so that their R-hat and means mean nothing; look at
    the function (`ergodica.diagnostics.function_draws`).

    Examples
    --------
    >>> import equinox as eqx, jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> x = jnp.linspace(-1.0, 1.0, 20)[:, None]
    >>> net = eqx.nn.MLP(1, 1, width_size=8, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    >>> posterior = from_equinox(net, lambda net, x: dist.Normal(jax.vmap(net)(x)[:, 0], 0.1), x, jnp.sin(3 * x[:, 0]))
    >>> posterior.num_data, list(posterior.shape())[:2]
    (20, ['layers.0.bias', 'layers.0.weight'])
    """
    params, others = eqx.partition(network, eqx.is_inexact_array)
    leaves = tree.named_leaves(params)
    if not leaves:
        raise ValueError(f"network must hold at least one floating-point array; got {network!r}.")
    buffers, static = eqx.partition(others, eqx.is_array)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    source = EquinoxSource(shapes, buffers, static, as_partial(check.function("likelihood", likelihood)))
    scales = {name: _scale(prior_scale, name, leaf) for name, leaf in leaves.items()}
    if log_prior is None:
        prior: Callable = Partial(gaussian_log_prior, scales)
    else:
        prior = Partial(_prior_of_network, source, as_partial(check.function("log_prior", log_prior)))
    return Posterior(
        prior,
        Partial(EquinoxSource.log_density_of_rows, source),
        {"x": x, _OBSERVED: y},
        initial=_start(initial, leaves, scales, own_prior=log_prior is not None),
        source=source,
    )


class MadeBy(eqx.Module):
    """A start at the arrays of a network that a function makes."""

    make: Callable
    names: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, key: Key) -> dict[str, Array]:
        """Make a network, and take its arrays by name."""
        leaves = tree.named_leaves(eqx.filter(self.make(key), eqx.is_inexact_array))
        if tuple(leaves) != self.names:
            raise ValueError(
                f"initial must make the network that was given, with the arrays {self.names}; got {tuple(leaves)}."
            )
        return leaves


def gaussian_log_prior(scales: dict[str, Array], position: dict[str, Array]) -> Array:
    """Log density of independent Gaussians N(0, scale²), normalised."""
    terms = [
        jnp.sum(-0.5 * (w / scales[name]) ** 2 - jnp.log(scales[name]) - 0.5 * math.log(2 * math.pi))
        for name, w in position.items()
    ]
    return jnp.sum(jnp.stack(terms))


def _scale(prior_scale: Any, name: str, leaf: Array) -> Array:
    value = prior_scale(name, leaf.shape) if callable(prior_scale) else prior_scale
    return check.positive(f"prior_scale of {name}", value).astype(leaf.dtype)


def _start(initial: Any, leaves: dict[str, Array], scales: dict[str, Array], *, own_prior: bool) -> Any:
    if jax.tree.leaves(eqx.filter(initial, eqx.is_array)):
        raise TypeError(
            f"initial must be 'prior', 'network' or a function of a key that makes a network; got {initial!r}, which holds arrays."
        )
    if callable(initial):
        return MadeBy(as_partial(initial), tuple(leaves))
    check.one_of("initial", initial, ("prior", "network"))
    if initial == "network":
        return dict(leaves)
    if own_prior:
        raise ValueError("initial='prior' draws from the Gaussian prior; with log_prior= give 'network' or a function.")
    return Partial(_prior_draw, scales, {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()})


def _prior_draw(scales: dict[str, Array], like: dict[str, Array], key: Key) -> dict[str, Array]:
    return jax.tree.map(lambda s, z: s * z, scales, rng.normal_like(key, like))


def _prior_of_network(source: EquinoxSource, log_prior: Callable, position: dict[str, Array]) -> Array:
    return log_prior(source.network(position))


@jax.jit
def _log_likelihood(source: EquinoxSource, samples: PyTree, rows: PyTree, key: None) -> Array:  # noqa: ARG001
    return jax.lax.map(lambda sample: source.log_density_of_rows(sample, rows), samples, batch_size=_DRAWS_AT_ONCE)


@jax.jit
def _simulate(source: EquinoxSource, samples: PyTree, rows: PyTree, key: Key) -> Array:
    keys = jax.random.split(key, jax.tree.leaves(samples)[0].shape[0])

    def one(sample: tuple[PyTree, Key]) -> Array:
        return source.law(sample[0], rows["x"]).sample(sample[1])

    return jax.lax.map(one, (samples, keys), batch_size=_DRAWS_AT_ONCE)
