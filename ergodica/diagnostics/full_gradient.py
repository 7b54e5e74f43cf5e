"""Temperatures from full gradients, for draws that came without probes."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import tree
from ergodica.core.posterior import Posterior
from ergodica.core.types import Position
from ergodica.diagnostics.scalars import has_group

if TYPE_CHECKING:
    import xarray as xr


def unconstrained_positions(dt: "xr.DataTree", posterior: Posterior) -> Position:
    """Rebuild the positions of all draws: the structure of a position, with axes (chain, draw) first.

    Raises
    ------
    ValueError
        If a leaf of the position is not among the stored unconstrained draws, or has another shape.
    """
    unconstrained = has_group(dt, "unconstrained_posterior")
    group = dt.children["unconstrained_posterior" if unconstrained else "posterior"]

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = tree.path_name(path)
        if name not in group.data_vars:
            raise ValueError(
                f"posterior has a parameter {name!r} that the draws do not hold; they hold {sorted(map(str, group.data_vars))}. "
                "Give the posterior that was sampled."
            )
        values = group[name].transpose("chain", "draw", ...).values
        if values.shape[2:] != shape.shape:
            raise ValueError(
                f"posterior's parameter {name!r} has shape {shape.shape}; the draws have {values.shape[2:]}."
            )
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, posterior.shape())


def temperature_series(dt: "xr.DataTree", posterior: Posterior) -> "xr.DataArray | None":
    """Compute temperatures of every draw and coordinate from full gradients.

    The centre of a chain is the mean of the other chains, which its draws do not depend on.

    Returns
    -------
    DataArray (chain, draw, coordinate) or None
        ``None`` where there is one chain alone.

    Notes
    -----
    Cost: ``num_data`` gradients for each stored draw.
    """
    import xarray as xr

    positions = unconstrained_positions(dt, posterior)
    theta = np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(positions)], axis=-1)
    num_chains = theta.shape[0]
    if num_chains < 2:
        return None
    means = theta.mean(1, keepdims=True)
    centre = (means.sum(0, keepdims=True) - means) / (num_chains - 1)
    gradients = np.asarray(gradients_of(posterior, jax.tree.map(jnp.asarray, positions)))
    names = tree.coordinate_names(posterior.shape())
    return xr.DataArray(
        -(theta - centre) * gradients, dims=("chain", "draw", "coordinate"), coords={"coordinate": names}
    )


@jax.jit
def gradients_of(posterior: Posterior, positions: Position) -> jax.Array:
    """Gradients of the log density (chain, draw, D) at positions with the axes (chain, draw) first."""

    def gradient(position: Position) -> jax.Array:
        return tree.ravel(jax.grad(posterior.log_density)(position))

    return jax.lax.map(lambda chain: jax.lax.map(gradient, chain), positions)
