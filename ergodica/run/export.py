"""From the arrays of a run to an `xarray.DataTree` as ArviZ reads it."""

import dataclasses
import datetime
import importlib.metadata
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np

from ergodica.core import tree
from ergodica.core.cite import cite
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import PyTree
from ergodica.run.loop import Count, Probe, Record

if TYPE_CHECKING:
    import xarray

_CONSTRAIN_AT_ONCE = 256


def describe(algorithm: Any) -> Any:
    """Say the settings of an algorithm in values that JSON knows; data and states are left out."""
    if isinstance(algorithm, Posterior):
        return None
    if isinstance(algorithm, jax.tree_util.Partial):
        return f"schedule {getattr(algorithm.func, '__qualname__', repr(algorithm.func))}"
    if isinstance(algorithm, eqx.Module):
        fields = {f.name: describe(getattr(algorithm, f.name)) for f in dataclasses.fields(algorithm)}
        return {
            "class": type(algorithm).__name__,
            **{name: value for name, value in fields.items() if value is not None},
        }
    if isinstance(algorithm, str | bool | int | float):
        return algorithm
    if isinstance(algorithm, jax.Array | np.ndarray):
        return float(algorithm) if algorithm.shape == () else f"array of shape {algorithm.shape}"
    if isinstance(algorithm, dict | list | tuple):
        return f"{type(algorithm).__name__} of {tree.size(algorithm)} numbers"
    return None


def constrain(posterior: Posterior, positions: PyTree) -> dict[str, np.ndarray]:
    """Values on the scale of the model, for positions with the leading axes (chain, draw)."""
    leading = jax.tree.leaves(positions)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), positions)
    values = jax.device_get(_constrain(posterior, flat))
    return {name: np.asarray(value).reshape(*leading, *value.shape[1:]) for name, value in values.items()}


@jax.jit
def _constrain(posterior: Posterior, positions: PyTree) -> dict[str, jax.Array]:
    return jax.lax.map(posterior.constrain, positions, batch_size=_CONSTRAIN_AT_ONCE)


def to_datatree(
    record: Record,
    kernel: AbstractKernel,
    posterior: Posterior | None,
    centre: np.ndarray,
    summary: dict[str, Any],
    attributes: dict[str, Any],
) -> "xarray.DataTree":
    """Make the result of a run.

    Parameters
    ----------
    record : Record
        Numpy arrays with the leading axes (chain, draw).
    kernel : AbstractKernel
    posterior : Posterior or None
        Constrains the draws, names their axes and gives the data.
    centre : array (num_parameters,)
        Of the configurational temperature.
    summary : dict
        From `summarise`.
    attributes : dict
        Of the root; strings, ints and floats only (netCDF takes no others).
    """
    from arviz_base import from_dict

    unconstrained: dict[str, Any] = tree.named_leaves(record.position)
    groups: dict[str, Any] = {"posterior": unconstrained}
    if posterior is not None:
        groups["posterior"] = constrain(posterior, record.position)
        if posterior.transform is not None:
            groups["unconstrained_posterior"] = unconstrained
    groups["sample_stats"] = sample_stats(record, kernel)
    dims: dict[str, list[str]] = {}
    coords: dict[str, Any] = {}
    if posterior is not None:
        dims = {name: list(axes) for name, axes in posterior.dims.items()}
        coords = {name: list(labels) for name, labels in posterior.coords.items()}
        observed = posterior.observed_data()
        if observed:
            groups["observed_data"] = {name: np.asarray(value) for name, value in observed.items()}
    datatree = from_dict(
        groups, dims=dims, coords=coords, attrs={"/": {**_origin(kernel), **attributes}}, check_conventions=False
    )
    if record.probe is not None:
        datatree["probe"] = _probe_group(record.position, record.probe, centre)
    if summary:
        _add_summary(datatree, summary)
    return datatree


def sample_stats(record: Record, kernel: AbstractKernel) -> dict[str, np.ndarray]:
    """Statistics by the names that ArviZ uses; ``lp`` only where it is the full log density at the draw."""
    stats: dict[str, Any] = dict(record.info)
    if "n_grad" in stats:
        stats["n_grad"] = num_gradients(record, kernel)
    if record.probe is not None:
        stats.pop("lp_minibatch", None)
        stats["lp" if kernel.exact_gradient else "lp_minibatch"] = record.probe.value
        with np.errstate(over="ignore", invalid="ignore"):  # of chains on their way to infinity
            stats["t_conf"] = record.probe.temperature.mean(axis=-1)
        if record.probe.grad_noise is not None:
            stats["grad_noise"] = record.probe.grad_noise
    return stats


def num_gradients(record: Record, kernel: AbstractKernel) -> np.ndarray:
    """Gradient evaluations of single data for each stored draw (int64)."""
    return count(record.n_grad) * kernel.n_grad_unit


def count(words: Count) -> np.ndarray:
    """Put the two words of a count together (int64)."""
    return np.asarray(words.high, np.int64) * (1 << 20) + np.asarray(words.low)


def _probe_group(position: PyTree, probe: Probe, centre: np.ndarray) -> "xarray.DataTree":
    import xarray

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), position)
    chains, draws, _ = probe.temperature.shape
    dataset = xarray.Dataset(
        {"temperature": (("chain", "draw", "coordinate"), probe.temperature), "centre": ("coordinate", centre)},
        coords={"chain": np.arange(chains), "draw": np.arange(draws), "coordinate": tree.coordinate_names(one)},
    )
    return xarray.DataTree(dataset)


def summarise(kernel: AbstractKernel, states: Any) -> dict[str, Any]:
    """Give what the kernel has gathered in each chain (see `AbstractKernel.summary`), as NumPy arrays."""
    return jax.device_get(jax.jit(lambda kernel, states: jax.vmap(kernel.summary)(states))(kernel, states))


def _add_summary(datatree: "xarray.DataTree", summary: dict[str, Any]) -> None:
    import xarray
    from arviz_base import dict_to_dataset

    def dataset(values: dict[str, Any]) -> "xarray.Dataset":
        return dict_to_dataset(values, sample_dims=["chain"], check_conventions=False) if values else xarray.Dataset()

    below = {name: value for name, value in summary.items() if isinstance(value, dict)}
    datatree["summary"] = xarray.DataTree(dataset({k: v for k, v in summary.items() if k not in below}))
    for name, values in below.items():
        datatree[f"summary/{name}"] = xarray.DataTree(dataset(values))


def _origin(kernel: AbstractKernel) -> dict[str, Any]:
    return {
        "inference_library": "ergodica",
        "inference_library_version": importlib.metadata.version("ergodica"),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "sampler": type(kernel).__name__,
        "settings": json.dumps(describe(kernel)),
        "exact": "exact" if kernel.exact else "approximate",
        "references": json.dumps([entry for entry in cite(kernel).split("\n\n") if entry]),
    }


def chain_major(buffer: PyTree, num: int) -> PyTree:
    """Take the first ``num`` draws of a buffer (draw, chain, …) to the host as (chain, draw, …)."""
    return jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1)[:, :num], jax.device_get(buffer))


def allocate(shape: Record, num_samples: int) -> Record:
    """Reserve the arrays of a whole run, chain-major."""
    return jax.tree.map(lambda s: np.zeros((s.shape[0], num_samples, *s.shape[1:]), s.dtype), shape)


def write(into: PyTree, first: int, draws: PyTree) -> None:
    """Copy draws into reserved arrays, from draw ``first`` on."""
    jax.tree.map(partial(_write_leaf, first), into, draws)


def _write_leaf(first: int, into: np.ndarray, draws: np.ndarray) -> None:
    into[:, first : first + draws.shape[1]] = draws
