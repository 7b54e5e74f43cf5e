"""Figures: the temperature of a run, and ArviZ's own plots of a choice of parameters."""

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.diagnostics.scalars import scalar_draws, variable, varying
from ergodica.diagnostics.temperature import measure, run_temperature

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

ARVIZ_PLOTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plot_trace": (
        "Trace",
        "Each line is a chain. Chains that overlap and wander without trend agree.",
        {},
    ),
    "plot_rank": (
        "Ranks",
        "Each line is a chain, thinned to near independence: how its ranks among all draws depart from even. p is the chance "
        "of departures as large if the chains share one law; black dots mark where a small p comes from.",
        {"method": "mtc_c", "thin": True},
    ),
    "plot_ess_evolution": (
        "Effective sample size",
        "Of the bulk (blue) and the tails (orange), against the draws of all chains. It should grow in proportion and end "
        "above the dashed line.",
        {},
    ),
    "plot_autocorr": (
        "Autocorrelation",
        "How long each chain remembers, in stored draws. Values inside the grey band cannot be told from zero.",
        {},
    ),
}
"""ArviZ's plots by function: title, how to read it, options."""


def plot_temperature(
    dt: "xr.DataTree", *, tolerance: float = 0.05, alpha: float = 0.01, max_coordinates: int = 20
) -> "Figure":
    r"""Draw the temperature of each coordinate and their mean, with simultaneous intervals and the line at 1.

    Parameters
    ----------
    dt : DataTree
        With a group ``probe``.
    tolerance, alpha : float
        Of the band drawn, and of the intervals, as for `ergodica.diagnose`.
    max_coordinates : int
        The coordinates farthest from 1 in units of their error are drawn; the title says how many there are.

    Raises
    ------
    ValueError
        If there are no probes, or the run's temperature is not a constant above zero.
    """
    from matplotlib.figure import Figure

    measured = measure(_probe(dt), _asked(dt))
    num, count = len(measured.names), min(len(measured.names), max_coordinates)
    score = np.nan_to_num(np.abs(measured.values - 1) / measured.mcse, nan=np.inf)
    shown = np.sort(np.argsort(-score, kind="stable")[:count])
    quantile = NormalDist().inv_cdf(1 - alpha / (2 * (num + 1 if num > 1 else 1)))
    values = np.append(measured.mean, measured.values[shown])
    errors = quantile * np.append(measured.mean_mcse, measured.mcse[shown])
    labels = ["mean", *(measured.names[i] for i in shown)]
    figure = Figure(figsize=(8, 1.3 + 0.28 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(1 - tolerance, 1 + tolerance, color="0.9", label=f"tolerance, ±{tolerance:.3g}")
    axes.axvline(1, color="black", lw=1, label="exact")
    off = np.abs(values - 1) > errors
    for mask, colour, label in ((~off, "C0", "interval holds 1"), (off, "C3", "interval misses 1")):
        if mask.any():
            rows = np.arange(len(labels))[mask]
            axes.errorbar(values[mask], rows, xerr=errors[mask], fmt="o", ms=4, color=colour, label=label)
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("temperature over that of the run (about the ratio of variances)")
    which = (
        f"{count} of {num} coordinates, those farthest from 1 in standard errors"
        if count < num
        else f"all {num} coordinates"
    )
    axes.set_title(f"Temperature of {which}; simultaneous {1 - alpha:.0%} intervals", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def plot_running_temperature(dt: "xr.DataTree") -> "Figure":
    """Draw the running mean of the temperature over the draws: of each chain, and of all with two standard errors.

    Raises
    ------
    ValueError
        As for `plot_temperature`.
    """
    import arviz_stats
    from matplotlib.figure import Figure

    series = (_probe(dt).mean("coordinate") / _asked(dt)).transpose("chain", "draw").values
    draws = np.arange(1, series.shape[1] + 1)
    running = np.cumsum(series, axis=1) / draws
    overall = running.mean(0)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="black", lw=1, label="exact")
    for i, chain in enumerate(running):
        axes.plot(draws, chain, color="C0", alpha=0.35, lw=0.8, label="one chain" if i == 0 else None)
    axes.plot(draws, overall, color="C3", label="all chains")
    points = np.unique(np.linspace(max(len(draws) // 10, 4), len(draws), 8).astype(int))
    points = points[points <= len(draws)]
    errors = [2 * float(arviz_stats.mcse(series[:, :n], method="mean")) for n in points]
    axes.errorbar(points, overall[points - 1], yerr=errors, fmt="none", color="C3", label="± 2 MCSE")
    visible = running[:, len(draws) // 20 :]
    low, high = min(visible.min(), 1.0), max(visible.max(), 1.0)
    margin = 0.1 * (high - low) + 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("stored draws")
    axes.set_ylabel("mean temperature")
    axes.set_title("Running mean of the temperature over coordinates", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def worst_parameters(dt: "xr.DataTree", limit: int) -> list[str]:
    """Names of the parameters with the smallest bulk effective sample size, in their own order; constants are left out."""
    import arviz_stats

    draws = varying(scalar_draws(dt))
    ess = arviz_stats.ess(draws, method="bulk").values
    worst = np.sort(np.argsort(np.nan_to_num(ess, nan=-1.0), kind="stable")[:limit])
    return [str(name) for name in draws["parameter"].values[worst]]


def arviz_figure(dt: "xr.DataTree", plot: str, names: list[str]) -> "Figure":
    """Make one of `ARVIZ_PLOTS` for some scalar parameters; the caller owns the figure.

    Parameters
    ----------
    dt : DataTree
    plot : str
        Name of the function in ArviZ.
    names : list of str
        As `worst_parameters` gives them.
    """
    import arviz as az
    import xarray as xr

    chosen = scalar_draws(dt).sel(parameter=names)
    tree = xr.DataTree.from_dict({"posterior": chosen.to_dataset("parameter")})
    options = ARVIZ_PLOTS[plot][2]
    return _take(getattr(az, plot)(tree, backend="matplotlib", col_wrap=3, figure_kwargs=_size(len(names)), **options))


def plot_energy(dt: "xr.DataTree") -> "Figure":
    """Draw ArviZ's energy plot of a Hamiltonian sampler (``sample_stats.energy``)."""
    import arviz as az

    return _take(az.plot_energy(dt, backend="matplotlib", figure_kwargs={"figsize": (8, 3.2)}))


def _take(collection: Any) -> "Figure":
    """Take the figure out of a PlotCollection and off pyplot's list of open figures."""
    import matplotlib.pyplot as plt

    figure = collection.viz["figure"].item()
    figure.set_layout_engine("constrained")
    plt.close(figure)
    return figure


def _size(count: int) -> dict[str, tuple[float, float]]:
    return {"figsize": (11, 2.6 * -(-count // 3))}


def _probe(dt: "xr.DataTree") -> "xr.DataArray":
    series = variable(dt, "probe", "temperature")
    if series is None:
        raise ValueError("dt has no group 'probe'; sample with probes=True.")
    return series


def _asked(dt: "xr.DataTree") -> float:
    asked = run_temperature(dt)
    if asked is None or not asked > 0:
        raise ValueError(
            f"The run's temperature must be a constant above zero; it was {'changed' if asked is None else asked}."
        )
    return asked
