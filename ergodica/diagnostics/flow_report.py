"""How near a flow is to its target, with intervals and a verdict on dropped modes."""

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.flow import Flow, check_flow, flat_log_density
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Key
from ergodica.diagnostics.control_variates import unconstrained_draws
from ergodica.diagnostics.flow_judgement import UNSEEN, judge, log_z_bounds, notes_of, table_of
from ergodica.diagnostics.flow_metrics import check_draws, map_points, weigh
from ergodica.diagnostics.guide import reliable_below

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_ROUNDING_UNITS = 16


@dataclass(frozen=True)
class FlowReport:
    """How near a flow is to its target. Printing it gives text.

    Attributes
    ----------
    table : pandas.DataFrame
        A row for each quantity: ``estimate``, ``standard_error``, and ``lower`` and ``upper``, a 95% interval. A standard error is
        NaN where the weights' tail is too heavy for one.
    notes : tuple of str
        What was found.
    modes_dropped : bool or None
        Whether the target's draws show what the flow's do not; ``None`` without draws of the target.
    unseen : float
        Share of the target's draws that weigh more than any draw of the flow: about how much of the target the flow never visits.
    pareto_k : float
        Shape of the tail of the weights at the flow's draws.
    pareto_k_forward : float
        The same at the target's draws; NaN without.
    threshold : float
        Above it, ``pareto_k`` says that means of weights must not be trusted.
    log_z_bounds : tuple of float
        Bounds on the logarithm of the normalising constant that hold with probability 95% whatever the tails; the upper one
        is infinite without draws of the target.
    log_z_gap : float
        Importance sampling minus bridge sampling, in standard errors of the difference; NaN without.
    log_weights : array (n,)
        At the flow's draws.
    """

    table: "pd.DataFrame" = field(repr=False)
    notes: tuple[str, ...]
    modes_dropped: bool | None
    unseen: float
    pareto_k: float
    pareto_k_forward: float
    threshold: float
    log_z_bounds: tuple[float, float]
    log_z_gap: float
    log_weights: np.ndarray = field(repr=False)

    references: ClassVar = ("nicoli2023", "meng1996", "vehtari2024")

    def __str__(self) -> str:
        k = "none, for weights of few values" if np.isnan(self.pareto_k) else f"{self.pareto_k:.2f}"
        lines = [self.table.round(4).to_string(), "", f"Pareto k: {k}; threshold {self.threshold:.2f}"]
        for note in self.notes:
            lines += textwrap.wrap(note, 100, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)


def flow_report(
    key: Key,
    flow: Flow,
    target: Any,
    draws: "Array | np.ndarray | xr.DataTree | None" = None,
    num_samples: int = 4000,
    *,
    log_z: float | None = None,
) -> FlowReport:
    r"""Weigh a flow's draws against its target, and the target's draws against the flow.

    Parameters
    ----------
    key : typed PRNG key
    flow : Flow
    target : callable or Posterior
        Log density up to a constant, as `ergodica.estimators.PathGradient` takes it.
    draws : array (N, D) or (chain, draw, D), or DataTree, optional
        Of the target, and not those that the flow was fitted to. An array (N, D) is taken as independent; of chains the
        autocorrelation is counted. A DataTree needs a posterior as ``target``.
    num_samples : int
        Draws of the flow; 100 or more.
    log_z : float, optional
        Logarithm of the normalising constant, where it is known: divergences then have no error from it.

    Returns
    -------
    FlowReport

    Raises
    ------
    ValueError, TypeError
        For a target or draws of another dimension.

    Notes
    -----
    With :math:`w = \tilde p/q` both effective sample sizes estimate :math:`Z^2 / \mathrm{E}_q w^2`,

    .. math:: \text{reverse: } \frac{(\frac1n \sum w_i)^2}{\frac1n \sum w_i^2},\ x_i \sim q; \qquad
              \text{forward: } \frac{1}{\frac1m \sum w_j \cdot \frac1m \sum 1/w_j},\ x_j \sim p.

    The flow's own draws do not show what the flow never visits: a flow on one of two modes has a reverse effective sample
    size near 1, and a forward one near 0. Where the forward one is below half of the reverse one, and their intervals are
    apart, modes (or part of a tail) were dropped.

    :math:`\log Z` comes from importance sampling (draws of the flow) and from bridge sampling (both), which remains right where
    the flow misses part of the target. Divergences take the latter where it is there. The two must agree; ``log_z_gap`` counts
    that both use the same draws of the flow.

    Standard errors are those of the influences of single draws. Those of means of weights exist only if the weights' tail
    is light. Where Pareto's k is above its threshold they are left out: the effective sample size and the acceptance rate from the
    flow's draws then have no interval but their range, and :math:`\log Z` by importance sampling a lower bound alone, from
    Markov's inequality (a mean of non-negative weights is rarely 40 times too large, and may well be far too small). Between
    k = 0.25 and the threshold, the interval of the effective sample size is too short. Bridge sampling and the acceptance rate over
    pairs are means of bounded terms, and have errors at any tail, so long as the target's draws are good. All this is blind to what
    neither set of draws has visited.

    Cost: ``num_samples`` draws of the flow and log densities of the target; as many of the latter as ``draws``, and passes
    through the flow's inverse.

    References
    ----------
    Nicoli et al. (2023), for the two effective sample sizes; Meng and Wong (1996); Vehtari, Simpson, Gelman, Yao and Gabry (2024).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=2)
    >>> found = flow_report(jax.random.key(1), flow, lambda x: -0.5 * jnp.sum(x**2), num_samples=500)
    >>> list(found.table.index)
    ['ess_reverse', 'log_z', 'acceptance_rate', 'kl_reverse']
    """
    rng.check_key(key)
    check_flow(flow)
    check.integer("num_samples", num_samples, least=100, hint="Fewer have no tail to fit.")
    function = as_partial(flat_log_density(target, flow.dim))
    points = None if draws is None else _points(draws, target, flow.dim)
    of_flow, rounding = _log_weights(*weigh(key, flow, function, num_samples))
    of_target = None
    if points is not None:
        flat = jnp.asarray(points.reshape(-1, flow.dim), jnp.result_type(float))
        of_target = _log_weights(map_points(function, flat), map_points(flow.log_prob, flat))[0]
        of_target = of_target.reshape(points.shape[:-1])
    approximate = getattr(draws, "attrs", {}).get("exact") == "approximate"
    return report_of(of_flow, of_target, log_z=log_z, rounding=rounding, approximate=approximate)


def report_of(
    of_flow: np.ndarray,
    of_target: np.ndarray | None = None,
    *,
    log_z: float | None = None,
    rounding: float = 0.0,
    approximate: bool = False,
) -> FlowReport:
    """Make the report from log weights at draws of the flow (n,), and of the target (m,) or (chain, draw)."""
    found = judge(of_flow, of_target, log_z=log_z, rounding=rounding)
    return FlowReport(
        table=table_of(found, log_z),
        notes=tuple(notes_of(found, approximate=approximate)),
        modes_dropped=None if found.below is None else found.below and found.unseen >= UNSEEN,
        unseen=found.unseen,
        pareto_k=found.k,
        pareto_k_forward=found.k_forward,
        threshold=float(reliable_below(len(of_flow))),
        log_z_bounds=log_z_bounds(of_flow, of_target),
        log_z_gap=found.gap,
        log_weights=of_flow,
    )


def _points(draws: Any, target: Any, dim: int) -> np.ndarray:
    """Draws (N, D) that are independent, or (chain, draw, D)."""
    if hasattr(draws, "children"):
        if not isinstance(target, Posterior):
            raise TypeError("draws can be a DataTree where target is the Posterior that was sampled; give an array.")
        draws = unconstrained_draws(draws, target)
    draws = check_draws(draws, dim, ndims=(2, 3))
    if draws.ndim == 3 and draws.shape[1] < 10:
        raise ValueError(f"draws of chains must be ten or more a chain, to see how they correlate; got {draws.shape}.")
    return draws


def _log_weights(log_p: Array, log_q: Array) -> tuple[np.ndarray, float]:
    """Log weights in double precision, and by how much rounding may have moved one."""
    log_p, log_q = jax.device_get((log_p, log_q))
    size = max((float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0)) for x in (log_p, log_q)), default=0.0)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (log_p, log_q))
    with np.errstate(invalid="ignore"):
        return np.asarray(log_p, np.float64) - np.asarray(log_q, np.float64), _ROUNDING_UNITS * eps * size
