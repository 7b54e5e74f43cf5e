"""Whether a fitted guide is near the posterior: the tail of the importance weights between them."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng
from ergodica.core.types import Key
from ergodica.diagnostics.guide_program import check_program, log_weight

CLOSE, USABLE = 0.5, 0.7
MEAN_ERROR = 0.5
"""A guide whose own means may be off by more standard deviations than this is not called close."""
_LANES = 256
_ROUNDING_UNITS = 4


@dataclass(frozen=True)
class GuideCheck:
    r"""How far a guide is from the posterior, judged by importance weights :math:`w = p(x, z) / q(z)`. Printing it gives text.

    Attributes
    ----------
    status : {"passed", "undecided", "failed"}
    verdict : str
        ``"close"``, ``"usable with weights"``, ``"too few draws"``, ``"too few values"``, ``"far"`` or ``"not finite"``.
    sentence : str
        What was found, and what to do.
    pareto_k, pareto_k_error : float
        Shape :math:`\hat k` of the generalised Pareto law fitted to the largest weights, and the fit's standard error,
        :math:`(1 + \hat k)/\sqrt M` for :math:`M` weights in the tail. ``-inf`` where the largest weights are all the same,
        NaN where no such law can be fitted.
    threshold : float
        Above it, weighted means of so many draws must not be trusted: :math:`\min(1 - 1/\log_{10} S, 0.7)`.
    ess : float
        Of the weights, :math:`(\sum w)^2 / \sum w^2`.
    log_evidence, log_evidence_error : float
        Logarithm of the mean weight, and its standard error by the delta method; the latter means nothing above the threshold.
    elbo, elbo_error : float
        Mean of the log weights.
    log_weights : array (S,)
    """

    status: Literal["passed", "undecided", "failed"]
    verdict: str
    sentence: str
    pareto_k: float
    pareto_k_error: float
    threshold: float
    ess: float
    log_evidence: float
    log_evidence_error: float
    elbo: float
    elbo_error: float
    log_weights: np.ndarray = field(repr=False)

    references: ClassVar = ("yao2018", "vehtari2024")

    @property
    def mean_error(self) -> float:
        r"""Bound on the error of the guide's own means, in its standard deviations: :math:`\sqrt{S/\text{ESS} - 1}`."""
        return float(np.sqrt(max(self.num_draws / self.ess - 1, 0.0)))

    @property
    def num_draws(self) -> int:
        """How many draws of the guide were weighted."""
        return len(self.log_weights)

    def __str__(self) -> str:
        rows = [
            ("Pareto k", f"{self.pareto_k:.2f} ± {self.pareto_k_error:.2f}, threshold {self.threshold:.2f}"),
            ("ESS of the weights", f"{self.ess:.0f} of {self.num_draws}"),
            ("own means off by", f"{self.mean_error:.2f} sd at most"),
            ("log evidence", f"{self.log_evidence:.3f} ± {self.log_evidence_error:.3f}"),
            ("ELBO", f"{self.elbo:.3f} ± {self.elbo_error:.3f}"),
        ]
        lines = [f"Guide: {self.status}, {self.verdict}", *textwrap.wrap(self.sentence, 100), ""]
        return "\n".join(lines + [f"{name:<20}{value}" for name, value in rows])


def check_guide(
    key: Key,
    model: Callable,
    guide: Callable,
    params: dict[str, Any],
    *args: Any,
    num_draws: int = 4000,
    **kwargs: Any,
) -> GuideCheck:
    r"""Weigh draws of a guide against the model's posterior, and say whether the guide can be believed.

    The weights :math:`w = p(x, z)/q(z)` of draws from a perfect guide are all the same. How heavy their right tail is says how
    much of the posterior the guide misses: the tail is fitted by a generalised Pareto law of shape :math:`k`, under which the
    weights have :math:`1/k` moments.

    Parameters
    ----------
    key : typed PRNG key
    model, guide : callable
        NumPyro programs; autoguides too, discrete sites too.
    params : dict
        Fitted parameters as model and guide see them: ``svi.run(...).params``, or ``svi.get_params(state)``.
    *args, **kwargs
        What model and guide are called with: all the data.
    num_draws : int
        :math:`S`, of the guide; 100 or more. The threshold is lower below 2,155.

    Returns
    -------
    GuideCheck
        :math:`\hat k`, its threshold, the ESS of the weights, the log evidence, and a sentence.

    Raises
    ------
    ValueError
        If the guide does not draw what the model does, places a site without a density (``AutoDelta``), parameters are missing or
        outside of their constraints, or a plate is subsampled.

    Notes
    -----
    Below :math:`\hat k = 0.7`, means under the posterior can be had from weighted draws of the guide. Above they cannot, and the
    guide misses part of the posterior, most often because it is too narrow. With fewer than 2,155 draws the line is at
    :math:`1 - 1/\log_{10} S`. A guide that is too wide has a low :math:`\hat k` and a low ESS.

    A guide is called close if :math:`\hat k \le 0.5` and its own means are off by half a standard deviation at most, by the
    inequality of Cauchy and Schwarz (up to the noise of the ESS):

    .. math:: |\mathrm{E}_p f - \mathrm{E}_q f| \le \text{sd}_q(f) \sqrt{S/\text{ESS} - 1} \quad\text{for any } f

    It is a judgement of the *joint* law. A guide with many latents can fail it while single means are right, since small errors of
    many sites multiply up. Where every datum has latents of its own and nothing is shared, check some data one at a time.

    It sees the posterior only where the guide draws. A mode that the guide never visits leaves no trace in the weights; start
    the fit from several places and compare the log evidence.

    Where all latents are discrete the weights may take few values, to which no Pareto law can be fitted (``"too few values"``).

    Cost: one run of model and guide a draw.

    References
    ----------
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: evaluating variational inference; Vehtari, Simpson, Gelman, Yao
    and Gabry (2024), Pareto smoothed importance sampling. The fit is ArviZ's.

    Examples
    --------
    >>> import jax, numpyro, numpyro.distributions as dist
    >>> def model():
    ...     numpyro.sample("w", dist.Normal(0.0, 1.0))
    >>> def guide():
    ...     numpyro.sample("w", dist.Normal(0.0, 0.1))
    >>> found = check_guide(jax.random.key(0), model, guide, {})
    >>> found.verdict, found.pareto_k > 0.7
    ('far', True)
    """
    rng.check_key(key)
    check.function("model", model)
    check.function("guide", guide)
    check.integer("num_draws", num_draws, least=100, hint="Fewer have no tail to fit.")
    check_program(model, guide, params, args, kwargs)

    @jax.jit
    def weigh(keys: Key, params: dict) -> tuple:
        return jax.lax.map(lambda k: log_weight(k, model, guide, params, args, kwargs), keys, batch_size=_LANES)

    log_weights, absolute = jax.device_get(weigh(jax.random.split(key, num_draws), params))
    rounding = _ROUNDING_UNITS * float(jnp.finfo(log_weights.dtype).eps) * absolute.astype(np.float64)
    return judge_weights(log_weights.astype(np.float64), rounding=float(np.max(rounding)))


def judge_weights(log_weights: np.ndarray, *, rounding: float = 0.0) -> GuideCheck:
    """Make the check from log weights (S,); those that differ by no more than ``rounding`` are taken as equal."""
    num, threshold = len(log_weights), reliable_below(len(log_weights))
    bad = int(np.sum(np.isnan(log_weights) | (log_weights == np.inf)))
    if bad or np.all(np.isneginf(log_weights)):
        what = f"{bad} of {num} weights are NaN or infinite" if bad else "the model has no density at any draw"
        sentence = (
            f"Nothing can be said: {what}. Look at the model's log density where the guide draws (support, overflow)."
        )
        nan = float("nan")
        return GuideCheck("failed", "not finite", sentence, nan, nan, threshold, nan, nan, nan, nan, nan, log_weights)
    k, error = fit_tail(log_weights, rounding)
    scaled = np.exp(log_weights - np.max(log_weights))
    relative = np.std(scaled, ddof=1) / np.mean(scaled) / np.sqrt(num)
    ess = float(np.sum(scaled) ** 2 / np.sum(scaled**2))
    finite = bool(np.all(np.isfinite(log_weights)))
    return GuideCheck(
        *_judge(k, threshold, ess, num),
        pareto_k=k,
        pareto_k_error=error,
        threshold=threshold,
        ess=ess,
        log_evidence=float(np.max(log_weights) + np.log(np.mean(scaled))),
        log_evidence_error=float(relative),
        elbo=float(np.mean(log_weights)),
        elbo_error=float(np.std(log_weights, ddof=1) / np.sqrt(num)) if finite else float("inf"),
        log_weights=log_weights,
    )


def reliable_below(num_draws: int) -> float:
    r""":math:`\min(1 - 1/\log_{10} S, 0.7)` (Vehtari et al. 2024)."""
    return min(1 - 1 / np.log10(num_draws), USABLE)


def draws_needed(k: float) -> float:
    r""":math:`10^{1/(1 - \max(0, k))}`, the inverse of the threshold (Vehtari et al. 2024)."""
    return 10 ** (1 / (1 - max(0.0, k))) if k < 1 else np.inf


def fit_tail(log_weights: np.ndarray, rounding: float) -> tuple[float, float]:
    r"""Shape :math:`\hat k` of the largest weights by ArviZ, and its standard error (Zhang and Stephens 2009).

    The tail are the :math:`3\sqrt S` largest, at most a fifth.
    """
    from arviz_stats.base import array_stats

    num = len(log_weights)
    tail = int(3 * num**0.5) if num > 225 else num // 5
    ordered = np.sort(log_weights)
    if ordered[-1] - ordered[-tail] <= rounding:  # all of the tail is one value
        return float("-inf"), 0.0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        k = float(array_stats.psislw(-log_weights)[1])
    return k, (1 + max(k, -0.5)) / tail**0.5


def _judge(k: float, threshold: float, ess: float, num: int) -> tuple[Any, str, str]:
    """Status, verdict and sentence."""
    worth = f"(worth {ess:.0f} of the posterior)"
    if np.isnan(k):
        sentence = (
            "The largest weights take too few values for a Pareto law, as those of discrete sites do. Their ESS is "
            f"{ess:.0f} of {num}: it says how uneven they are, and nothing of values that the guide did not draw."
        )
        return "undecided", "too few values", sentence
    if k <= min(CLOSE, threshold) and num / ess - 1 <= MEAN_ERROR**2:
        sentence = (
            f"Where the guide draws, it is close to the posterior, and weights make up for the rest: {num} weighted draws "
            f"{worth}. A mode that it never visits would not show."
        )
        return "passed", "close", sentence
    if k <= threshold:
        sentence = (
            f"The guide differs from the posterior. Take means of its weighted draws {worth}, and not the guide's own mean and "
            "spread. A mode that it never visits would not show."
        )
        return "passed", "usable with weights", sentence
    if k <= USABLE:
        sentence = f"Pareto k is above the threshold for {num} draws. About {draws_needed(k):,.0f} would do."
        return "undecided", "too few draws", sentence
    sentence = (
        f"The guide misses part of the posterior: a few draws carry the weight (ESS {ess:.0f} of {num}), and more draws do not "
        "mend it. Most often it is too narrow, or lacks a dependence that the posterior has. Take a richer guide, or MCMC; "
        "do not trust its spread."
    )
    return "failed", "far", sentence
