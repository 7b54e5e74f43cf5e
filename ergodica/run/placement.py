"""Where the parts of a run live: chains spread over devices, everything else copied to each of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ergodica.core.types import PyTree


class Placement(NamedTuple):
    """Shardings over one row of devices; ``None`` where nothing is to be moved.

    Attributes
    ----------
    chains : NamedSharding
        For arrays whose leading axis runs over the chains.
    draws : NamedSharding
        For arrays (draw, chain, …).
    copies : NamedSharding
        For what every device needs.
    """

    chains: NamedSharding | None = None
    draws: NamedSharding | None = None
    copies: NamedSharding | None = None


def placement_over(devices: Sequence[Any], num_chains: int) -> Placement:
    """Spread chains over devices, the same number on each.

    Raises
    ------
    TypeError, ValueError
        If ``devices`` is empty, holds anything but devices or one twice, or their number does not divide that of the chains.
    """
    devices = list(devices)
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(f"devices must be a sequence of JAX devices, such as jax.devices(); got {devices!r}.")
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices must be different devices; got {devices!r}.")
    if num_chains % len(devices):
        raise ValueError(
            f"num_chains must be a multiple of the number of devices, {len(devices)}; got {num_chains}. Each device runs the "
            "same number of chains."
        )
    mesh = Mesh(np.asarray(devices), ("chain",))
    specs = PartitionSpec("chain"), PartitionSpec(None, "chain"), PartitionSpec()
    return Placement(*(NamedSharding(mesh, spec) for spec in specs))


def put(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Move all arrays of a tree; ``None`` leaves them where they are."""
    return tree if sharding is None else jax.device_put(tree, sharding)
