"""Which sites of a NumPyro model belong to the data: found from shapes alone, without sampling anything.

The model is traced abstractly at two data lengths. What grows belongs to the data: the axis of a log probability that
grows is the one the data run along, and a plate that grows is the data plate. Whether a site is observed does not
decide it, since Jacobians and factors count as observed, and priors may hold observed sites too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ergodica.core import check
from ergodica.core.types import PyTree
from ergodica.models.numpyro_arguments import Arguments
from ergodica.models.numpyro_latents import (
    EnumeratedSite,
    LocalSite,
    check_few_combinations,
    enumerated_site,
    local_site,
)
from ergodica.models.numpyro_trace import Record, Records, log_det_name, record


@dataclass(frozen=True)
class DataSite:
    """A site with one term a datum.

    Attributes
    ----------
    name : str
    axis : int
        Of the log probability, counted from the right: where the data run.
    event_dim : int
        Axes of the value to the right of those of the log probability.
    """

    name: str
    axis: int
    event_dim: int


@dataclass(frozen=True)
class Structure:
    """What belongs to the data and what does not.

    Attributes
    ----------
    num_data : int
    plate : str or None
        The plate whose indices are the rows; ``None`` where the rows are arguments of the model.
    latents : tuple of (str, shape)
        The coordinates of a position, with their unconstrained shapes.
    data_sites : tuple of DataSite
        Their terms make the log likelihood; the terms of all other sites make the log prior.
    global_observed : tuple of str
        Observed sites and factors among the latter.
    enumerated : tuple of EnumeratedSite
        Discrete latent sites to be summed out for each datum.
    local : tuple of LocalSite
        Continuous latent sites of which each datum has its own value.
    observed : tuple of str
        All observed sites, factors left out.
    deterministics : tuple of str
        Those to report.
    gathers : bool
        Whether `numpyro.subsample` picks rows by the plate's indices.
    """

    num_data: int
    plate: str | None
    latents: tuple[tuple[str, tuple[int, ...]], ...]
    data_sites: tuple[DataSite, ...]
    global_observed: tuple[str, ...]
    enumerated: tuple[EnumeratedSite, ...]
    local: tuple[LocalSite, ...]
    observed: tuple[str, ...]
    deterministics: tuple[str, ...]
    gathers: bool


def classify_rows_as_arguments(
    model: Callable,
    arguments: Arguments,
    data: dict[str, Any],
    plate: str | None,
    deterministic: str,
    *,
    local_latents: bool,
) -> tuple[Structure, Records]:
    """Find the structure of a model whose arguments ``data`` have one row a datum."""
    n = check.leading_length("data", data)
    first = record(model, arguments, None, _resized(data, n))
    try:
        second = record(model, arguments, None, _resized(data, n + 1))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"The model runs with the {n} rows of data but not with {n + 1}: something in it has a fixed length. Name every "
            "array with one row a datum in data=, and take the size of the data plate from one of them, x.shape[0]."
        ) from error
    grown = [name for name in first.subsampled if first.plates[name] != second.plates.get(name)]
    if grown:
        raise ValueError(
            f"The model subsamples the plate {listed(grown)} itself, so data= may not cut its arguments too: pass the "
            "arrays as plain keywords, from_numpyro(model, x=X, …), or build the model without subsample_size."
        )
    if plate is not None and first.plates.get(plate) == second.plates.get(plate):
        raise ValueError(
            f"plate={plate!r} does not grow with data; the model has {sizes(first.plates, second.plates)}."
        )
    return _structure(first, second, n, None, deterministic, local_latents=local_latents), first


def classify_rows_as_indices(
    model: Callable, arguments: Arguments, plate: str, n: int, deterministic: str, *, local_latents: bool
) -> tuple[Structure, Records]:
    """Find the structure of a model with a plate of its own, of size ``n``, whose indices pick the rows."""
    full = record(model, arguments, plate, jax.ShapeDtypeStruct((n,), jnp.int32))
    try:
        less = record(model, arguments, plate, jax.ShapeDtypeStruct((n - 1,), jnp.int32))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"The model runs with all {n} indices of the plate {plate!r} but not with {n - 1}: pick the rows of every array that "
            "runs over the data by the plate's indices, as in `with plate(...) as i: ... obs=y[i]`."
        ) from error
    return _structure(full, less, n, plate, deterministic, local_latents=local_latents), full


def axis_names(records: Records, structure: Structure) -> dict[str, tuple[str, ...]]:
    """Names of the axes of the reported and the observed sites, where plates or ``infer={"event_dims": …}`` give any."""
    data_axes = {site.name: site.axis - site.event_dim for site in structure.data_sites}
    reported = [name for name, _ in structure.latents] + list(structure.deterministics)
    named = {}
    for name in (*reported, *structure.observed):
        axes = _axes_of(records.sites[name])
        if any(axis is not None for axis in axes):
            full = [axis or f"{reported_name(name)}_dim_{i}" for i, axis in enumerate(axes)]
            if name in data_axes:
                full.insert(0, full.pop(data_axes[name]))
            named[reported_name(name)] = tuple(full)
    return named


def reported_name(site: str) -> str:
    """Name under which a site is reported: ``"layer/weight"`` becomes ``"layer.weight"``, since xarray refuses slashes."""
    return site.replace("/", ".")


def _structure(
    first: Records, second: Records, num_data: int, plate: str | None, deterministic: str, *, local_latents: bool
) -> Structure:
    sites = list(first.sites.values())
    if first.sites.keys() != second.sites.keys():
        raise ValueError(
            f"The sites of the model depend on how many data it sees: {listed(first.sites.keys() ^ second.sites.keys())}."
        )
    _check_observed(sites)
    where = f"the data plate {plate!r}" if plate else _where(first, second)
    latents, data_sites, global_observed, enumerated, local = [], [], [], [], []
    for site in sites:
        other = second.sites[site.name]
        axes = _grown(site.log_prob_shape, other.log_prob_shape)
        if site.discrete:
            enumerated.append(enumerated_site(site, axes, where))
            data_sites.append(DataSite(site.name, axes[0], site.event_dim))
        elif site.latent and _grown(site.shape, other.shape):
            local.append(local_site(site, axes, where, allowed=local_latents))
            data_sites.append(DataSite(site.name, axes[0], site.event_dim))
            data_sites.append(DataSite(log_det_name(site.name), axes[0], 0))
        elif site.latent:
            latents.append((site.name, site.unconstrained_shape))
        elif site.observed:
            if len(axes) > 1 or (not axes and _grown(site.shape, other.shape)):
                raise ValueError(
                    f"The likelihood of the site {site.name!r} does not factorise by datum: its log probability has the shape "
                    f"{site.log_prob_shape} for {num_data} data. Put independent data in a plate (or leave out .to_event over "
                    "the data); joint laws such as Gaussian processes cannot be cut into batches."
                )
            if axes:
                data_sites.append(DataSite(site.name, axes[0], site.event_dim))
            else:
                global_observed.append(site.name)
    observed_data = [site.name for site in data_sites if site.name in first.sites and first.sites[site.name].observed]
    if not latents:
        raise ValueError("The model has no latent site, so there is nothing to sample.")
    if not observed_data:
        raise ValueError(
            f"The likelihood does not factorise by datum: the observed site {listed(global_observed)} has no term for each datum. "
            "Observe the data in a plate over them, or give them as the leading axis of obs=."
        )
    check_few_combinations(tuple(enumerated))
    if enumerated:
        _check_unscaled([first.sites[name] for name in observed_data])
    return Structure(
        num_data=num_data,
        plate=plate,
        latents=tuple(latents),
        data_sites=tuple(data_sites),
        global_observed=tuple(global_observed),
        enumerated=tuple(enumerated),
        local=tuple(local),
        observed=tuple(site.name for site in sites if site.observed and not site.factor),
        deterministics=_reported(first, second, deterministic, hidden=[site.name for site in (*enumerated, *local)]),
        gathers=first.gathers and plate is not None,
    )


def _reported(first: Records, second: Records, deterministic: str, *, hidden: list[str]) -> tuple[str, ...]:
    sites = {name: site for name, site in first.sites.items() if site.kind == "deterministic"}
    if deterministic == "none":
        return ()
    if deterministic == "all" and hidden:
        raise ValueError(
            f"deterministic='all' cannot report sites of data length where the latent sites {listed(hidden)} are local to the "
            "data, since a draw holds no value of theirs. Use deterministic='global'."
        )
    if deterministic == "all":
        return tuple(sites)
    return tuple(name for name, site in sites.items() if not _grown(site.shape, second.sites[name].shape))


def _check_observed(sites: Sequence[Record]) -> None:
    if not any(site.observed for site in sites):
        raise ValueError(
            "The model has no observed site, so it has no likelihood. Pass the observations to the model and on to obs= of a "
            f"sample statement; the sites are {listed(site.name for site in sites)}."
        )


def _check_unscaled(observed: Sequence[Record]) -> None:
    scaled = [site.name for site in observed if site.scaled]
    if scaled:
        raise ValueError(
            f"The sites {listed(scaled)} are scaled, and the sum over enumerated latent sites has no meaning then (a power of a "
            "sum is not the sum of the powers). Take numpyro.handlers.scale away, or marginalise the discrete sites yourself."
        )


def _axes_of(site: Record) -> list[str | None]:
    batch_dim = len(site.shape) - site.event_dim
    axes: list[str | None] = [None] * len(site.shape)
    for name, dim, size in site.plates:
        if -dim <= batch_dim and site.shape[batch_dim + dim] == size:
            axes[batch_dim + dim] = name
    axes[batch_dim:] = (*site.event_dims, *axes[batch_dim + len(site.event_dims) :])[: site.event_dim]
    return axes


def _grown(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    """Axes, counted from the right, along which two shapes differ."""
    if len(a) != len(b):
        return list(range(-max(len(a), len(b)), 0))
    return [i - len(a) for i in range(len(a)) if a[i] != b[i]]


def _resized(data: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), data)


def _where(first: Records, second: Records) -> str:
    grown = [name for name, size in first.plates.items() if second.plates.get(name) != size]
    return f"the data plate {listed(grown)}" if grown else "the rows of the data"


def listed(names: Any) -> str:
    """Names in a message."""
    return ", ".join(map(repr, names))


def sizes(*plates: dict[str, int]) -> str:
    """Plates with their sizes in a message."""
    if not plates[0]:
        return "no plate"
    return "the plates " + ", ".join(f"{name!r} of size {size}" for name, size in plates[0].items())
