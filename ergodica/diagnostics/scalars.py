"""Draws as a table of scalar parameters, whatever the shapes of the variables were."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

SAMPLE_DIMS = ("chain", "draw")


def has_group(dt: "xr.DataTree", group: str) -> bool:
    """Whether a result has a group with something in it."""
    return group in dt.children and len(dt.children[group].data_vars) > 0


def variable(dt: "xr.DataTree", group: str, name: str) -> "xr.DataArray | None":
    """Give a variable of a result, or ``None`` where it has none."""
    return dt.children[group].data_vars[name] if has_group(dt, group) and name in dt.children[group].data_vars else None


def scalar_draws(dt: "xr.DataTree", group: str = "posterior") -> "xr.DataArray":
    """Flatten draws into one array.

    Parameters
    ----------
    dt : DataTree
    group : str
        Its variables are numeric, with the dims ``chain`` and ``draw``.

    Returns
    -------
    xarray.DataArray (chain, draw, parameter)
        ``parameter`` holds names such as ``beta[2]`` or ``beta[age]``.
    """
    import xarray as xr

    names: list[str] = []
    columns: list[np.ndarray] = []
    for name, values in dt.children[group].data_vars.items():
        ordered = values.transpose(*SAMPLE_DIMS, ...)
        names += element_names(str(name), ordered)
        columns.append(ordered.values.reshape(*ordered.shape[:2], -1))
    values = np.concatenate(columns, axis=-1) if columns else np.zeros((0, 0, 0))
    labels = {d: np.arange(n) for d, n in zip(SAMPLE_DIMS, values.shape[:2], strict=True)}
    return xr.DataArray(values, dims=(*SAMPLE_DIMS, "parameter"), coords=labels | {"parameter": names})


def varying(draws: "xr.DataArray") -> "xr.DataArray":
    """Leave out the parameters that are one constant in all chains (such as the diagonal of a correlation matrix)."""
    flat = draws.values.reshape(-1, draws.sizes["parameter"])
    with np.errstate(invalid="ignore"):
        return draws.isel(parameter=np.flatnonzero(np.ptp(flat, axis=0) != 0))


def element_names(name: str, variable: "xr.DataArray") -> list[str]:
    """Name each element beyond chain and draw, by its labels where the axes have some."""
    axes = [d for d in variable.dims if d not in SAMPLE_DIMS]
    labels = [variable.coords[d].values if d in variable.coords else np.arange(variable.sizes[d]) for d in axes]
    return [
        f"{name}[{', '.join(str(axis[i]) for axis, i in zip(labels, index, strict=True))}]" if index else name
        for index in np.ndindex(*(variable.sizes[d] for d in axes))
    ]


def listed(names: list[str], limit: int = 5) -> str:
    """Join names for a sentence; beyond a limit the rest is counted."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
