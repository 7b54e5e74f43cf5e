"""What log weights at draws of a flow and of its target say: estimates, errors that hold, notes."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ergodica.diagnostics import flow_weights
from ergodica.diagnostics.control_variates import standard_errors
from ergodica.diagnostics.flow_metrics import estimates
from ergodica.diagnostics.flow_weights import Estimated
from ergodica.diagnostics.guide import fit_tail, reliable_below

if TYPE_CHECKING:
    import pandas as pd

NORMAL, MARKOV = 1.959964, float(np.log(40))
"""Half a 95% interval of a normal law; what Markov's inequality allows with 97.5%: a mean 40 times too large."""
FAR_BELOW, UNSEEN, DISAGREE = 0.5, 0.01, 4.0
_LEAST_TAIL = 100
_RANGES = {"ess": (0.0, 1.0), "acceptance": (0.0, 1.0), "kl": (0.0, np.inf), "log": (-np.inf, np.inf)}


class Judgement(NamedTuple):
    """What `flow_report` reports; see `FlowReport`.

    Attributes
    ----------
    found : dict of str to Estimated
    errors : dict of str to float
        Their standard errors, as if all moments were finite.
    k, k_forward : float
        Pareto shapes of the weights at the flow's and at the target's draws.
    heavy, heavy_forward : bool
        Whether these are above their thresholds.
    gap, unseen : float
    below : bool or None
        Whether the forward effective sample size is far below the reverse one.
    broken : int
        Weights that are NaN or infinite.
    """

    found: dict[str, Estimated]
    errors: dict[str, float]
    k: float
    k_forward: float
    heavy: bool
    heavy_forward: bool
    gap: float
    unseen: float
    below: bool | None
    broken: int


def judge(
    of_flow: np.ndarray, of_target: np.ndarray | None = None, *, log_z: float | None = None, rounding: float = 0.0
) -> Judgement:
    """Judge log weights in double precision.

    Parameters
    ----------
    of_flow : array (n,)
        At draws of the flow.
    of_target : array (m,) or (chain, draw), optional
        At draws of the target.
    log_z : float, optional
        Where it is known.
    rounding : float
        Weights that differ by no more are taken as equal.
    """
    flat = None if of_target is None else of_target.ravel()
    broken = int(np.sum(np.isnan(of_flow) | (of_flow == np.inf)))
    broken += 0 if flat is None else int(np.sum(~np.isfinite(flat)))
    with np.errstate(all="ignore"):
        found = estimates(of_flow, flat, log_z, None if of_target is None else _num_effective(of_target))
        errors = {name: _standard_error(estimate, of_target) for name, estimate in found.items()}
        gap = np.nan if flat is None else _gap(found["log_z"], found["log_z_bridge"], of_target)
    k, k_forward = (np.nan if broken else _tail(x, rounding) for x in (of_flow, flat))
    compared = flat is not None and not broken
    return Judgement(
        found=found,
        errors=errors,
        k=float(k),
        k_forward=float(k_forward),
        heavy=bool(k > reliable_below(len(of_flow))),
        heavy_forward=flat is not None and bool(k_forward > reliable_below(len(flat))),
        gap=float(gap),
        unseen=float(np.mean(flat > np.max(of_flow))) if flat is not None and compared else np.nan,
        below=_far_below(found, errors) if compared else None,
        broken=broken,
    )


def log_z_bounds(of_flow: np.ndarray, of_target: np.ndarray | None) -> tuple[float, float]:
    r"""Markov's inequality on the means of :math:`w` under the flow and of :math:`1/w` under the target."""
    lower = float(flow_weights.importance_log_z(of_flow).value - MARKOV)
    upper = np.inf if of_target is None else float(MARKOV - flow_weights.importance_log_z(-of_target.ravel()).value)
    return lower, upper


def table_of(judgement: Judgement, log_z: float | None) -> "pd.DataFrame":
    """Estimates with intervals; where tails are too heavy for a standard error, with what can be said without."""
    import pandas as pd

    found = judgement.found
    bridged = "log_z_bridge" in found
    rests_on_tail = {"ess_reverse", "log_z"} | (set() if bridged else {"acceptance_rate"})
    rests_on_tail |= set() if bridged or log_z is not None else {"kl_reverse"}
    rows = {}
    for name, estimate in found.items():
        value, error = float(estimate.value), judgement.errors[name]
        least, most = _RANGES[name.partition("_")[0]]
        lower, upper = max(value - NORMAL * error, least), min(value + NORMAL * error, most)
        if judgement.heavy and name in rests_on_tail:
            error, upper = np.nan, most
            lower = max(value - MARKOV, least) if name in ("log_z", "kl_reverse") else least
        if judgement.heavy_forward and name == "ess_forward":
            error, lower = np.nan, least
        rows[name] = (value, error, lower, upper)
    columns = ["estimate", "standard_error", "lower", "upper"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("quantity")


def notes_of(judgement: Judgement, *, approximate: bool) -> list[str]:
    """Sentences on what was found; ``approximate`` says that the target's draws are known to follow another law."""
    if judgement.broken:
        return [
            f"Nothing can be said: {judgement.broken} weights are NaN or infinite. Look at the log densities of target and flow "
            "at the draws (support, overflow)."
        ]
    notes = []
    if judgement.below:
        forward, reverse = (float(judgement.found[f"ess_{name}"].value) for name in ("forward", "reverse"))
        what = "Modes or tails dropped" if judgement.unseen >= UNSEEN else "Tails too light, or a small mode dropped"
        notes.append(
            f"{what}: the forward effective sample size, {forward:.2g}, is far below the reverse one, {reverse:.2g}, and both "
            f"estimate the same number. {judgement.unseen:.1%} of the target's draws weigh more than any of the flow's: so much of "
            "the target the flow hardly visits."
        )
    if judgement.heavy:
        notes.append(
            f"Pareto k of the weights is {judgement.k:.2f}: from the flow's draws there are no standard errors, and log Z by "
            "importance sampling has a lower bound alone (Markov's inequality)."
        )
    if judgement.heavy_forward and not judgement.below:
        notes.append(
            "The weights at the target's draws have a heavy tail: the forward effective sample size may be lower still."
        )
    if abs(judgement.gap) > DISAGREE:
        notes.append(
            f"Importance and bridge sampling disagree about log Z by {abs(judgement.gap):.1f} standard errors: believe the bridge, "
            "if the target's draws are good."
        )
    if approximate:
        notes.append("The target's draws come from an approximate sampler; what rests on them carries its bias.")
    if judgement.below is None:
        notes.append("No draws of the target were given: a mode that the flow never visits would not show.")
    return notes


def _num_effective(of_target: np.ndarray) -> float:
    """Independent draws that those of the target are worth for the mean log weight."""
    if of_target.ndim == 1 or np.ptp(of_target) == 0 or not np.all(np.isfinite(of_target)):
        return float(of_target.size)
    import arviz_stats

    return min(float(arviz_stats.ess(of_target, method="mean")), float(of_target.size))


def _standard_error(estimate: Estimated, of_target: np.ndarray | None) -> float:
    """By the influences of the flow's draws, which are independent, and of the target's, which may be chains."""
    of_flow = _error_of_mean(np.atleast_1d(estimate.flow))
    if of_target is None or np.ndim(estimate.target) == 0:
        return of_flow
    influences = estimate.target.reshape(of_target.shape)
    if of_target.ndim == 1 or not np.all(np.isfinite(influences)):
        return float(np.hypot(of_flow, _error_of_mean(influences.ravel())))
    return float(np.hypot(of_flow, standard_errors(influences[..., None])[0]))


def _error_of_mean(influences: np.ndarray) -> float:
    return 0.0 if influences.size == 1 else float(np.std(influences, ddof=1) / np.sqrt(influences.size))


def _tail(log_weights: np.ndarray | None, rounding: float) -> float:
    if log_weights is None or len(log_weights) < _LEAST_TAIL:
        return np.nan
    return fit_tail(log_weights, rounding)[0]


def _gap(importance: Estimated, bridge: Estimated, of_target: np.ndarray | None) -> float:
    """Difference of the two logarithms of the normalising constant, in its standard errors."""
    difference = Estimated(importance.value - bridge.value, importance.flow - bridge.flow, -bridge.target)
    error = _standard_error(difference, of_target)
    return float(difference.value / error) if error > 0 else 0.0


def _far_below(found: dict[str, Estimated], errors: dict[str, float]) -> bool:
    """Whether the forward effective sample size is less than half of the reverse one, and not by chance."""
    forward, reverse = float(found["ess_forward"].value), float(found["ess_reverse"].value)
    most = forward + NORMAL * errors["ess_forward"]
    return forward < FAR_BELOW * reverse and most < reverse - NORMAL * errors["ess_reverse"]
