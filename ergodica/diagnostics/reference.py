"""Errors of a posterior against a reference that is trusted."""

from typing import TYPE_CHECKING

import numpy as np

from ergodica.diagnostics.scalars import has_group, scalar_draws

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def reference_table(dt: "xr.DataTree", reference: "xr.DataTree") -> "pd.DataFrame":
    r"""Compare posterior moments with those of a reference run, such as a long one of NUTS.

    Parameters
    ----------
    dt, reference : DataTree
        With groups ``posterior``. Parameters are compared by name; those that only one of the two has are left out, and
        named in ``table.attrs["left_out"]``.

    Returns
    -------
    pandas.DataFrame
        One row a parameter:

        ``mean_error``
            :math:`(\bar x - \bar x_\mathrm{ref}) / \mathrm{sd}_\mathrm{ref}`.
        ``sd_ratio``
            :math:`\mathrm{sd} / \mathrm{sd}_\mathrm{ref}`.
        ``b2``
            :math:`(\overline{x^2} - \overline{x^2}_\mathrm{ref})^2 / \mathrm{Var}_\mathrm{ref}(x^2)`, the squared bias of the
            second moment in units of its variance; an exact sampler with :math:`n` independent draws has about
            :math:`1/n`. ``table.attrs["b2_max"]`` is the largest.
        ``mean_error_mcse``, ``sd_ratio_mcse``, ``b2_floor``
            What Monte Carlo error of both runs alone explains (for ``b2``: its expectation without bias).

    Raises
    ------
    ValueError
        If a group is missing, no parameter is common, or a draw is not finite.
    """
    import arviz_stats
    import pandas as pd

    ours, theirs = _draws("dt", dt), _draws("reference", reference)
    names = [n for n in theirs["parameter"].values if n in set(ours["parameter"].values)]
    if not names:
        raise ValueError(
            f"dt and reference have no parameter in common: {list(ours['parameter'].values)} and "
            f"{list(theirs['parameter'].values)}."
        )
    left_out = sorted(
        {*map(str, ours["parameter"].values), *map(str, theirs["parameter"].values)} - set(map(str, names))
    )
    ours, theirs = ours.sel(parameter=names), theirs.sel(parameter=names)

    def mean(x: "xr.DataArray") -> np.ndarray:
        return x.mean(("chain", "draw")).values

    def deviation(x: "xr.DataArray") -> np.ndarray:
        return x.std(("chain", "draw"), ddof=1).values

    def error(method: str, x: "xr.DataArray", y: "xr.DataArray") -> tuple[np.ndarray, np.ndarray]:
        return arviz_stats.mcse(x, method=method).values, arviz_stats.mcse(y, method=method).values

    sd_ref, ratio = deviation(theirs), deviation(ours) / deviation(theirs)
    square_sd = deviation(theirs**2)
    sd_errors = error("sd", ours, theirs)
    table = pd.DataFrame(
        {
            "mean_error": (mean(ours) - mean(theirs)) / sd_ref,
            "mean_error_mcse": np.hypot(*error("mean", ours, theirs)) / sd_ref,
            "sd_ratio": ratio,
            "sd_ratio_mcse": ratio * np.hypot(sd_errors[0] / deviation(ours), sd_errors[1] / sd_ref),
            "b2": ((mean(ours**2) - mean(theirs**2)) / square_sd) ** 2,
            "b2_floor": (np.hypot(*error("mean", ours**2, theirs**2)) / square_sd) ** 2,
        },
        index=pd.Index([str(name) for name in names], name="parameter"),
    )
    table.attrs = {"b2_max": float(np.max(table["b2"].to_numpy())), "left_out": left_out}
    return table


def _draws(name: str, dt: "xr.DataTree") -> "xr.DataArray":
    if not has_group(dt, "posterior"):
        raise ValueError(f"{name} must have a group 'posterior'; its groups are {sorted(dt.children)}.")
    draws = scalar_draws(dt)
    if not np.all(np.isfinite(draws.values)):
        raise ValueError(
            f"{name} holds draws that are NaN or infinite; its moments mean nothing. See diagnose({name})."
        )
    return draws
