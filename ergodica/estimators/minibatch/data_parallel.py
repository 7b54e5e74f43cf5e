"""Minibatch gradients whose rows are spread over devices."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch import reshuffle
from ergodica.estimators.minibatch.subsample import Minibatch, MinibatchState, as_batch

_AXIS = "data"
_SHARES = PartitionSpec(None, _AXIS)


class DataParallel(AbstractGradientEstimator):
    r"""The gradient of a `Minibatch`, each device taking its share of every batch.

    .. math:: \hat g(\theta) = \nabla\log p(\theta) + N \sum_{s=1}^{S} \sum_{i \in B_s} w_i \nabla\log p(x_i \mid \theta)

    Parameters
    ----------
    gradient : Minibatch
        With reshuffled blocks or all data. Blocks and their order are the same, so that the gradients are, up to the order of
        summation.
    devices : sequence of jax.Device, optional
        :math:`S` devices, of one process or several; ``jax.devices()`` unless given.

    Raises
    ------
    ValueError, TypeError
        For the schemes that draw random rows, a posterior without data, or devices that are none.

    Notes
    -----
    Each block is cut into :math:`S` shares of equal length, the last filled up with rows of weight 0, and share :math:`B_s` lies
    on device :math:`s`. Position and chains are the same everywhere, and one all-reduce a gradient, of as many numbers as there
    are parameters and one, adds the shares up. Cost: as for the `Minibatch`, with the likelihood divided by :math:`S`, plus that
    collective. It pays where the gradient of one batch takes much longer than the collective: large networks, large
    batches, ``"full"``. Where several chains are wanted anyway, spread these instead (``ergodica.sample(…, devices=…)``); the
    two do not combine.

    The estimator's own posterior holds no data, so that no device has them all: give ``posterior=`` to `ergodica.sample` for
    ``observed_data`` in the result. Models made by `ergodica.from_numpyro` keep their data for the prior all the same, on each
    device.

    References
    ----------
    Welling and Teh (2011), equation 4, with the sum split over devices.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = DataParallel(erg.estimators.Minibatch(posterior, scheme="full"))
    >>> float(gradient.estimate(jax.random.key(0), jnp.array(0.0), gradient.init(jax.random.key(1), jnp.array(0.0)))[0].gradient)
    15.0
    """

    minibatch: Minibatch
    shares: Batch
    num_rows: int = eqx.field(static=True)
    mesh: Mesh = eqx.field(static=True)

    references: ClassVar = ("welling2011",)

    def __init__(self, gradient: Minibatch, devices: Sequence[Any] | None = None) -> None:
        if not isinstance(gradient, Minibatch):
            raise TypeError(f"gradient must be a Minibatch; got {type(gradient).__name__}.")
        if not (gradient.reshuffles or gradient.exact):
            raise ValueError(
                f"scheme={gradient.scheme!r} gathers rows from everywhere; use Minibatch(…, scheme='blocks') or 'full'."
            )
        if gradient.target.data is None:
            raise ValueError(
                "DataParallel lays out all the data over devices; the posterior of this Minibatch holds none."
            )
        self.mesh = Mesh(np.asarray(check_devices(devices)), (_AXIS,))
        if gradient.exact:
            blocks = jax.tree.map(lambda x: x[None], gradient.independent_batch(jax.random.key(0)))
        else:
            blocks = jax.vmap(gradient.block)(jnp.arange(gradient.num_blocks))
        self.num_rows = blocks.weight.shape[1]
        laid_out = NamedSharding(self.mesh, _SHARES)
        self.shares = jax.tree.map(lambda x: jax.device_put(x, laid_out), in_shares(blocks, self.mesh.size))
        self.minibatch = eqx.tree_at(
            lambda m: (m.target, m.rows), gradient, (without_data(gradient.target), None), is_leaf=lambda x: x is None
        )

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> MinibatchState:
        """Open the first epoch."""
        return self.minibatch.init(key, params, batch)

    def estimate(
        self, key: Key, params: PyTree, state: MinibatchState, batch: Batch | None = None
    ) -> tuple[Estimate, MinibatchState]:
        """Estimate the gradient at ``params`` from the next batch, or from the one given."""
        if batch is not None:
            batch = as_batch(batch)
            shares = in_shares(jax.tree.map(lambda x: jnp.asarray(x)[None], batch), self.mesh.size)
            return self._at(params, shares, jnp.zeros((), jnp.int32), batch.weight.shape[0]), state
        if self.exact:
            return self._at(params, self.shares, jnp.zeros((), jnp.int32), self.num_rows), state
        symmetric = self.minibatch.scheme == "symmetric"
        block, cursor = reshuffle.advance(key, state.cursor, self.minibatch.num_blocks, symmetric=symmetric)
        return self._at(params, self.shares, block, self.num_rows), MinibatchState(cursor)

    def probe(self, key: Key, params: PyTree, state: MinibatchState) -> Estimate:  # noqa: ARG002
        """Estimate from a batch that is independent of the epoch."""
        return self._at(params, self.shares, jax.random.randint(key, (), 0, self.shares.weight.shape[0]), self.num_rows)

    def _at(self, params: PyTree, shares: Batch, block: Array, num_rows: int) -> Estimate:
        """Add up the shares of one block, and the prior."""
        everywhere = PartitionSpec()
        summed = jax.shard_map(
            _sum_over_devices,
            mesh=self.mesh,
            in_specs=(everywhere, everywhere, _SHARES, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
        value, gradient = summed(self.minibatch, params, shares, block)
        prior, prior_gradient = jax.value_and_grad(self.minibatch.target.log_prior)(params)
        return Estimate(tree.add(prior_gradient, gradient), prior + value.astype(prior.dtype), n_grad=num_rows)

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is estimated, without its data."""
        return self.minibatch.target

    @property
    def exact(self) -> bool:
        """Whether all data are used at each call."""
        return self.minibatch.exact


def _sum_over_devices(minibatch: Minibatch, params: PyTree, shares: Batch, block: Array) -> tuple[Array, PyTree]:
    """On each device: value and gradient of its share, then one all-reduce of both."""
    batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x[:, 0], block, keepdims=False), shares)
    flat, unravel = ravel_pytree(jax.value_and_grad(minibatch.log_likelihood)(params, batch))
    return unravel(jax.lax.psum(flat, _AXIS))


def in_shares(blocks: Batch, num_devices: int) -> Batch:
    """Cut blocks (block, row, …) into (block, device, row, …); rows that fill up the last share weigh nothing."""
    lacking = -blocks.weight.shape[1] % num_devices

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], num_devices, -1, *x.shape[2:])

    data = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:, -1:], lacking, axis=1)], axis=1), blocks.data)
    return jax.tree.map(cut, Batch(data, jnp.pad(blocks.weight, ((0, 0), (0, lacking)))))


def without_data(posterior: Posterior) -> Posterior:
    """Copy a posterior and leave out its data, so that they are not sent along to every device."""
    target = copy.copy(posterior)
    target.data, target.observed = None, {}
    return target


def check_devices(devices: Sequence[Any] | None) -> list[Any]:
    """Return devices as a list; all of JAX's unless given."""
    devices = jax.devices() if devices is None else list(devices)
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(f"devices must be a sequence of JAX devices, such as jax.devices(); got {devices!r}.")
    return devices
