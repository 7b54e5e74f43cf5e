"""Whether predictions deserve the confidence that they show: one table of scores on held-out data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.core import check
from ergodica.diagnostics.predictive import COVERAGE_LEVELS, crps, log_mean_exp
from ergodica.diagnostics.scalars import has_group
from ergodica.diagnostics.scoring import (
    binomial_interval,
    brier_score,
    check_classes,
    check_gaussians,
    crps_gaussian_mixture,
    expected_calibration_error,
    gaussian_mixture_log_density,
    gaussian_mixture_pit,
    rank_pit,
)

if TYPE_CHECKING:
    import xarray as xr

_Rows = dict[str, tuple[float, float, float, float, float]]
_NAN = float("nan")


def calibration(
    dt: "xr.DataTree | None" = None,
    *,
    site: str | None = None,
    observed: Any = None,
    draws: Any = None,
    gaussians: tuple[Any, Any] | None = None,
    probabilities: Any = None,
    log_likelihood: Any = None,
    levels: Sequence[float] = COVERAGE_LEVELS,
    num_bins: int = 15,
) -> "xr.Dataset":
    r"""Score predictions of held-out data, and compare their confidence with what happened.

    Parameters
    ----------
    dt : DataTree
        From ``ergodica.predictive(dt, posterior, data=held_out, ...)``, with ``key=`` for numbers, with ``classes=`` for
        labels. Left out, the predictions are given as arrays:
    site : str, optional
        Which site of ``dt`` to look at, where it has several.
    observed : array (N,)
        What happened.
    draws : array (..., N)
        Simulated observations; all axes but the last run over draws.
    gaussians : pair of arrays (S, N)
        Mean and standard deviation of each datum under each draw: the predictive law is their mixture, and scores of it
        are exact. In place of ``draws``.
    probabilities : array (N, C)
        Of labels 0 to C - 1, averaged over draws.
    log_likelihood : array (..., N), optional
        Beside ``draws``: log density of the datum under each draw, for the NLL.
    levels : sequence of float
        Of the central intervals whose coverage is counted.
    num_bins : int
        Bins of the confidence, for the calibration error of labels.

    Returns
    -------
    Dataset
        Over ``score``: ``value``; ``low`` and ``high``, its 95% interval over data; ``calibrated_low`` and
        ``calibrated_high``, where it would be found 95 times in 100 were the predictions calibrated. Of numbers: ``nll``,
        ``crps`` and ``coverage50``, ``coverage90``, and ``pit`` by datum. Of labels: ``nll``, ``brier``, ``accuracy`` and
        ``ece``, and by ``bin`` what a reliability diagram shows. ``.to_dataframe()`` of the variables over ``score`` is the
        table.

    Raises
    ------
    ValueError, TypeError
        If predictions are given in no form or in several, shapes disagree, probabilities are none, or ``dt`` holds nothing
        held out.

    Notes
    -----
    Intervals take the data as independent: ± 1.96 standard errors for means over data, Clopper–Pearson for coverage. The
    ``ece`` has no interval, since it is biased upwards: compare it with its range under calibration
    (`ergodica.diagnostics.expected_calibration_error`).

    From draws, coverage goes by the rank r of the datum among them: inside the central interval of level L if
    :math:`(r + 1/2)/(S + 1)` is within L/2 of 1/2. Of S + 1 ranks, all equally likely under calibration, a whole number does
    that, and ``calibrated_low`` and ``calibrated_high`` are for this share, which is L to 1/S. The CRPS from draws is the fair
    one, without bias at any S. Both take the draws of a datum as independent of each other: thin first.

    Coverage and ``ece`` can be perfect for useless predictions; read them beside a proper score (``nll``, ``crps``,
    ``brier``). None of them sees that the posterior was sampled wrongly where that makes better predictions:
    `ergodica.diagnose` does.

    References
    ----------
    Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation.

    Examples
    --------
    >>> generator = np.random.default_rng(0)
    >>> table = calibration(observed=generator.normal(size=400), draws=generator.normal(size=(1000, 400)))
    >>> table["value"].sel(score="coverage90").item()
    0.92
    >>> sorted(table["score"].values.tolist())
    ['coverage50', 'coverage90', 'crps']
    """
    if dt is not None:
        if any(x is not None for x in (observed, draws, gaussians, probabilities, log_likelihood)):
            raise ValueError("Give dt, or arrays, and not both.")
        observed, draws, probabilities, log_density = _from_datatree(dt, site)
    else:
        log_density = None if log_likelihood is None else log_mean_exp(np.asarray(log_likelihood, float))
    given = [x is not None for x in (draws, gaussians, probabilities)]
    if sum(given) != 1 or observed is None:
        raise ValueError(
            "Predictions must be given in one form, with observed=: as dt, draws=, gaussians= or probabilities=; got "
            f"{sum(given)} of the last three, and observed {'too' if observed is not None else 'missing'}."
        )
    observed = np.asarray(observed)
    if probabilities is not None:
        return labels_table(np.asarray(probabilities), observed, num_bins)
    levels = [_check_level(level) for level in levels]
    if gaussians is not None:
        means, sds, observed = check_gaussians(*gaussians, observed)
        log_density = gaussian_mixture_log_density(means, sds, observed)
        scores, pit = crps_gaussian_mixture(means, sds, observed), gaussian_mixture_pit(means, sds, observed)
        return numbers_table(scores, pit, log_density, levels)
    draws = np.asarray(draws, float)
    if observed.ndim != 1 or draws.ndim < 2 or draws.shape[-1] != len(observed):
        raise ValueError(
            f"draws must be of shape (..., N) and observed of shape (N,); got {draws.shape} and {observed.shape}."
        )
    draws = draws.reshape(-1, draws.shape[-1])
    if len(draws) < 2:
        raise ValueError("draws must hold at least two simulated observations of each datum; got one.")
    return numbers_table(crps(draws, observed), rank_pit(draws, observed), log_density, levels, num_draws=len(draws))


def numbers_table(
    scores: np.ndarray,
    pit: np.ndarray,
    log_density: np.ndarray | None,
    levels: Sequence[float],
    num_draws: int | None = None,
) -> "xr.Dataset":
    """Make the table of predicted numbers from CRPS, PIT and log density of each datum.

    With ``num_draws`` the PIT comes from ranks, and a calibrated one is uniform on their grid and not on [0, 1].
    """
    rows: _Rows = {} if log_density is None else {"nll": _mean_row(-log_density)}
    rows["crps"] = _mean_row(scores)
    for level in levels:
        expected = level
        if num_draws is not None:
            grid = (np.arange(num_draws + 1) + 0.5) / (num_draws + 1)
            expected = float(np.mean(is_central(grid, level)))
        rows[f"coverage{100 * level:g}"] = _coverage_row(is_central(pit, level), expected)
    return _dataset(rows, {"pit": ("row", pit)})


def is_central(pit: np.ndarray, level: float) -> np.ndarray:
    """Whether each PIT lies in the central interval of a level."""
    return np.abs(pit - 0.5) <= level / 2


def labels_table(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> "xr.Dataset":
    """Make the table of predicted labels."""
    p, y = check_classes(probabilities, labels)
    found = expected_calibration_error(p, y, num_bins=num_bins)
    with np.errstate(divide="ignore"):
        nll = -np.log(p[np.arange(len(y)), y])
    correct = p.argmax(1) == y
    rows: _Rows = {
        "nll": _mean_row(nll),
        "brier": _mean_row(brier_score(p, y)),
        "accuracy": (float(correct.mean()), *binomial_interval(int(correct.sum()), len(y)), _NAN, _NAN),
        "ece": (found.ece, _NAN, _NAN, found.calibrated_low, found.calibrated_high),
    }
    bins = {name: ("bin", getattr(found, name)) for name in ("confidence", "accuracy", "count")}
    return _dataset(rows, {"row_nll": ("row", nll), **{f"bin_{name}": value for name, value in bins.items()}})


def _mean_row(values: np.ndarray) -> tuple[float, float, float, float, float]:
    mean, n = float(values.mean()), len(values)
    reach = 1.96 * float(values.std(ddof=1)) / n**0.5 if n > 1 and np.all(np.isfinite(values)) else _NAN
    return mean, mean - reach, mean + reach, _NAN, _NAN


def _coverage_row(inside: np.ndarray, expected: float) -> tuple[float, float, float, float, float]:
    from scipy.stats import binom

    n, count = len(inside), int(inside.sum())
    calibrated = binom.ppf([0.025, 0.975], n, expected) / n
    return count / n, *binomial_interval(count, n), float(calibrated[0]), float(calibrated[1])


def _dataset(rows: _Rows, others: dict[str, Any]) -> "xr.Dataset":
    import xarray as xr

    names = ("value", "low", "high", "calibrated_low", "calibrated_high")
    columns = {name: ("score", [row[i] for row in rows.values()]) for i, name in enumerate(names)}
    return xr.Dataset({**columns, **others}, coords={"score": list(rows)})


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"levels must be between 0 and 1; got {level!r}.")
    return float(level)


def _from_datatree(dt: "xr.DataTree", site: str | None) -> tuple[Any, Any, Any, Any]:
    """Observations, draws, probabilities and log predictive density of one site, from what `predictive` stored."""
    import xarray as xr

    dt = check.instance("dt", dt, xr.DataTree, "from ergodica.predictive")
    if not has_group(dt, "held_out"):
        raise ValueError(
            f"dt must have the group 'held_out'; its groups are {sorted(dt.children)}. Calibration on the data that were "
            "fitted flatters: call ergodica.predictive(dt, posterior, data=held_out, …) first."
        )
    held_out = dt.children["held_out"]
    sites = [str(name).removeprefix("observed_") for name in held_out.data_vars if str(name).startswith("observed_")]
    if site is None and len(sites) == 1:
        (site,) = sites
    if site not in sites:
        raise ValueError(
            f"site must be one of the observed sites {sites} that the held-out data name; got {site!r}. Held-out data must be "
            "a dict that names what was observed, and log_likelihood=True."
        )
    observed = held_out[f"observed_{site}"].values
    if f"probability_{site}" in held_out.data_vars:
        return observed, None, held_out[f"probability_{site}"].values, None
    if not has_group(dt, "predictions") or site not in dt.children["predictions"].data_vars:
        raise ValueError(
            f"dt holds no predictions of {site!r}: give ergodica.predictive a key, or classes={{{site!r}: C}} for labels."
        )
    predictions = dt.children["predictions"][site].transpose("chain", "draw", ...).values
    lpd = held_out.data_vars.get(f"lpd_{site}")
    return observed, predictions, None, None if lpd is None else lpd.values
