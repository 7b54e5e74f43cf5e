"""From repeats to figures and verdicts, for all estimators and points of a comparison."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.diagnostics.gradient_bias import (
    Errors,
    Target,
    detectable,
    errors_of,
    holm,
    largest_bias,
    look_for_bias,
    size_of_bias,
    without_own_share,
)
from ergodica.diagnostics.gradient_statistics import (
    Replicates,
    signal_to_noise,
    summarise,
    variance_ratios,
)

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_settings import Settings
    from ergodica.diagnostics.gradients import Taken

type Figures = dict[str, np.ndarray]


def judge(taken: "list[Taken]", settings: "Settings") -> tuple[Figures, dict[str, Any]]:
    """Test all estimators at all points for bias; arrays by estimator, point (and coordinate), and facts of the tests."""
    from scipy.stats import norm

    names, alpha = list(taken[0].replicates), 1 - settings.confidence
    errors = [[errors_of(name, cell.replicates, cell.target) for cell in taken] for name in names]
    tested = [[look_for_bias(e) for e in row] for row in errors]
    z, p = (np.array([[getattr(t, field) for t in row] for row in tested]) for field in ("z", "p"))
    joint = np.array([[t.joint for t in row] for row in tested])
    num_tests = int(np.sum(np.isfinite(p)) + np.sum(np.isfinite(joint)))
    level = alpha / num_tests
    adjusted = holm(np.concatenate([p, joint[..., None]], axis=-1))
    smallest = np.nanmin(adjusted, axis=-1)
    cells = [
        [
            _judge_cell(errors[i][j], cell, name, smallest[i, j] < alpha, level, smallest.size, settings)
            for j, cell in enumerate(taken)
        ]
        for i, name in enumerate(names)
    ]
    figures = {field: np.array([[cell[field] for cell in row] for row in cells]) for field in cells[0][0]}
    figures |= {
        "bias": np.array([[e.bias for e in row] for row in errors]),
        "standard_error": np.array([[e.standard_error for e in row] for row in errors]),
        "z": z,
        "p_adjusted": adjusted[..., :-1],
        "p_joint": adjusted[..., -1],
        "p_value": smallest,
    }
    return figures, {"num_tests": num_tests, "critical_z": float(norm.isf(level / 2))}


def _judge_cell(
    errors: Errors,
    cell: "Taken",
    name: str,
    biased: bool,  # noqa: FBT001
    level: float,
    num_cells: int,
    settings: "Settings",
) -> dict[str, Any]:
    """Verdict, bound, control and size of the bias of one estimator at one point."""
    target, tolerance = cell.target, settings.bias_tolerance
    errors = without_own_share(errors, target, name)
    bounds, scale = largest_bias(errors, level), float(np.max(np.abs(target.gradient)))
    bound = float(np.max(bounds))
    relative = bound / scale if scale > 0 else (0.0 if bound == 0 else np.inf)
    rounding = Errors(0 * errors.bias, None, target.rounding)
    mere_rounding = bound <= 2 * float(np.max(largest_bias(rounding, level)))
    verdict = "biased" if biased else "unbiased" if relative <= tolerance or mere_rounding else "undecided"
    variance = summarise(cell.replicates[name], settings.confidence).variance
    size = size_of_bias(errors, target, variance, 1 - (1 - settings.confidence) / num_cells)
    return {
        "verdict": verdict,
        "bias_bound": relative,
        "control": _control(errors, cell.replicates[name], target, name, level, tolerance / 2),
        "detectable": detectable(errors, target.gradient, level),
        "relative_bias": size.relative,
        "relative_bias_lower": size.lower,
        "relative_bias_upper": size.upper,
        "mse": size.mse,
        "cosine": size.cosine,
    }


def _control(errors: Errors, replicates: Replicates, target: Target, name: str, level: float, shrinkage: float) -> str:
    """Whether the estimator's own repeats, shrunk as by a baseline that includes the sample itself, are found biased."""
    if np.all(target.weights.get(name, 0.0) == 1):
        return "none"
    tested = look_for_bias(errors, -shrinkage * replicates.mean)
    return "found" if np.nanmin([*tested.p, tested.joint]) < level else "missed"


def measure(taken: "list[Taken]", settings: "Settings") -> Figures:
    """Variances with their intervals, ratios, signal to noise, and cost; arrays by estimator, point (and coordinate)."""
    names = list(taken[0].replicates)
    spreads = [[summarise(cell.replicates[name], settings.confidence) for cell in taken] for name in names]

    def table(field: str) -> np.ndarray:
        return np.array([[getattr(s, field) for s in row] for row in spreads])

    ratios = [
        variance_ratios({n: r.deviations for n, r in cell.replicates.items()}, names[0], settings.confidence)
        for cell in taken
    ]
    ratio = np.array([[ratios[j][name] for j in range(len(taken))] for name in names])
    snr = np.array([[signal_to_noise(c.target.gradient, c.replicates[name]) for c in taken] for name in names])
    return {
        "variance": table("variance"),
        "variance_lower": table("lower"),
        "variance_upper": table("upper"),
        "variance_by_coordinate": np.array(
            [[cell.replicates[name].gradients.var(axis=0, ddof=1) for cell in taken] for name in names]
        ),
        "variance_ratio": ratio[..., 0],
        "variance_ratio_lower": ratio[..., 1],
        "variance_ratio_upper": ratio[..., 2],
        "kurtosis": table("kurtosis"),
        "trustworthy": table("trustworthy"),
        "repeats_for_variance": table("repeats_for_variance"),
        "snr": snr,
        "snr_median": np.median(snr, axis=-1),
        "datum_gradients": table("cost"),
        "repeats": table("num_repeats"),
        "repeats_needed": np.array([[cell.needed.get(name, np.nan) for cell in taken] for name in names]),
        "rounding_variance": np.array([np.sum(cell.target.rounding**2) for cell in taken]),
    }
