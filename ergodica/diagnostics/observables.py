"""Expectations of named observables with standard errors: from weighted draws of a flow, or from chains."""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ergodica.core import check
from ergodica.diagnostics.guide import fit_tail, reliable_below
from ergodica.diagnostics.scalars import SAMPLE_DIMS, has_group, scalar_draws

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

ERRORS = ("delta", "jackknife")
_LEAST_TAIL = 25


def importance_expectation(
    draws: Any,
    log_weights: Any,
    observables: Any,
    *,
    error: str = "delta",
    reference: Mapping[str, Any] | None = None,
) -> "pd.DataFrame":
    r"""Estimate expectations under a target from independent weighted draws of another law, such as a flow.

    .. math:: \hat\mu = \frac{\sum_i w_i f(x_i)}{\sum_i w_i}, \qquad w_i = \frac{\tilde p(x_i)}{q(x_i)}

    Parameters
    ----------
    draws : array (n, ...)
        Independent draws of q.
    log_weights : array (n,)
        :math:`\log\tilde p(x_i) - \log q(x_i)`, up to a constant; ``-inf`` where the target has no density.
    observables : callable or target
        Maps one draw to a dict of named scalars, or an object with such a method ``observables`` (as the targets of
        ``ergodica.models.zoo`` have).
    error : {"delta", "jackknife"}
        ``"delta"``: :math:`\widehat{\mathrm{se}}^2 = \sum_i \bar w_i^2 (f_i - \hat\mu)^2` with weights normalised to sum 1.
        ``"jackknife"``: from the n estimates that leave out one draw each, with the mean corrected for its bias of order 1/n.
    reference : mapping, optional
        Known expectations, (value, standard error) or numbers by name, to put beside the estimates. That of a target is used
        unless given.

    Returns
    -------
    pandas.DataFrame
        A row for each observable: ``mean``, ``se``; ``ess``, how many independent draws of the *target* would have that error,
        :math:`\widehat{\mathrm{Var}}_p(f) / \widehat{\mathrm{se}}^2`; and where it is known ``reference``,
        ``reference_se`` and ``z``. ``attrs`` holds ``ess_weights`` (:math:`(\sum w)^2/\sum w^2`), ``pareto_k`` and its
        ``threshold``, and ``notes``, sentences on what the errors cannot promise.

    Raises
    ------
    ValueError, TypeError
        For weights that are NaN or ``+inf``, or all zero; shapes that do not fit; observables that are no scalars, or not finite
        where the weight is above zero.

    Notes
    -----
    The errors hold where the weights have two moments: not where ``pareto_k`` is above its threshold, of which ``notes``
    tells. A mode in which q has made no draw leaves no trace in any of these figures. Draws of a chain are not independent: take
    `chain_expectation`.

    Cost: one evaluation of the observables a draw.

    References
    ----------
    Owen (2013), chapter 9; Vehtari, Simpson, Gelman, Yao and Gabry (2024).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x = 1.5 * jax.random.normal(jax.random.key(0), (4000,))
    >>> table = importance_expectation(x, -0.5 * x**2 + 0.5 * (x / 1.5) ** 2, lambda x: {"square": x**2})
    >>> abs(float(table.loc["square", "mean"]) - 1.0) < 4 * float(table.loc["square", "se"])
    True
    """
    import pandas as pd

    check.one_of("error", error, ERRORS)
    weights = normalised_weights(log_weights)
    values = _evaluate(observables, draws, len(weights))
    seen = weights > 0
    rows = {}
    for name, f in values.items():
        if not np.all(np.isfinite(f[seen])):
            raise ValueError(f"The observable {name!r} is NaN or infinite at a draw of weight above zero.")
        f = np.where(seen, f, 0.0)
        mean, se = (ratio_delta if error == "delta" else ratio_jackknife)(weights, f)
        spread = float(weights @ (f - weights @ f) ** 2)
        rows[name] = {"mean": mean, "se": se, "ess": spread / se**2 if se > 0 else np.nan}
    table = pd.DataFrame.from_dict(rows, orient="index")
    known = getattr(observables, "reference", {}) if reference is None else reference
    table = with_reference(table, known)
    table.attrs = _of_weights(np.asarray(log_weights), weights)
    return table


def chain_expectation(
    dt: "xr.DataTree",
    function: "Callable[[xr.Dataset], xr.Dataset] | None" = None,
    *,
    reference: Mapping[str, Any] | None = None,
) -> "pd.DataFrame":
    """Estimate expectations from chains, with ArviZ's Monte Carlo standard errors.

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`. The posterior of a target of ``ergodica.models.zoo`` stores its observables among the draws.
    function : callable, optional
        Maps the dataset of draws to one of what is to be averaged, such as ``lambda draws: draws[["energy"]] ** 2``; the draws
        themselves unless given.
    reference : mapping, optional
        Known expectations, (value, standard error) or numbers by name (with the index, such as ``theta[0]``).

    Returns
    -------
    pandas.DataFrame
        The columns of `importance_expectation`; ``ess`` is ArviZ's for the mean. Rows of `reference` alone are left out.

    Raises
    ------
    ValueError
        For a result without draws, or draws that are not finite.

    Notes
    -----
    The error is that of chains that have found their law; see `ergodica.diagnose`. Under an approximate sampler it says
    nothing of the bias.

    Examples
    --------
    >>> import jax, ergodica as erg
    >>> from ergodica.models.zoo import many_well
    >>> target = many_well(4)
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(target.posterior(), scheme="full"), 0.01)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=200, num_warmup=100, progress=False)
    >>> chain_expectation(dt, reference=target.reference).loc["y_square", "reference"].item()
    1.0
    """
    import arviz_stats
    import pandas as pd
    import xarray as xr

    if not has_group(dt, "posterior"):
        raise ValueError(f"dt must have a group 'posterior'; its groups are {sorted(dt.children)}.")
    draws = dt["posterior"].to_dataset()
    values = scalar_draws(xr.DataTree.from_dict({"posterior": draws if function is None else function(draws)}))
    if not np.all(np.isfinite(values.values)):
        raise ValueError(
            "dt holds draws that are NaN or infinite; their means mean nothing. See ergodica.diagnose(dt)."
        )
    table = pd.DataFrame(
        {
            "mean": values.mean(SAMPLE_DIMS).values,
            "se": arviz_stats.mcse(values, method="mean").values,
            "ess": arviz_stats.ess(values, method="mean").values,
        },
        index=[str(name) for name in values["parameter"].values],
    )
    return with_reference(table, reference or {})


def normalised_weights(log_weights: Any) -> np.ndarray:
    """Weights (n,) that sum to 1, in double precision."""
    logs = np.asarray(log_weights, np.float64)
    if logs.ndim != 1 or logs.size < 2:
        raise ValueError(f"log_weights must have shape (n,), one a draw and two at least; got shape {logs.shape}.")
    if np.any(np.isnan(logs)) or np.any(logs == np.inf):
        raise ValueError(
            f"log_weights must not be NaN or +inf; {int(np.sum(np.isnan(logs) | (logs == np.inf)))} of {logs.size} are. Look at "
            "the draws where the target's log density is not a number, or the flow's is -inf."
        )
    if np.all(logs == -np.inf):
        raise ValueError("All weights are zero: the target has no density at any of the draws.")
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def ratio_delta(weights: np.ndarray, f: np.ndarray) -> tuple[float, float]:
    r"""Weighted mean and :math:`\sqrt{\sum_i \bar w_i^2 (f_i - \hat\mu)^2}`; ``weights`` (n,) sum to 1."""
    mean = weights @ f
    return float(mean), float(np.sqrt(np.sum((weights * (f - mean)) ** 2)))


def ratio_jackknife(weights: np.ndarray, f: np.ndarray) -> tuple[float, float]:
    r"""Weighted mean, corrected for bias, and its standard error from leaving out one draw at a time.

    .. math:: \hat\mu_{(i)} = \frac{\hat\mu - \bar w_i f_i}{1 - \bar w_i}, \qquad
              \hat\mu_J = n\hat\mu - (n - 1)\overline{\hat\mu_{(\cdot)}}, \qquad
              \widehat{\mathrm{se}}^2 = \frac{n-1}{n} \sum_i \left(\hat\mu_{(i)} - \overline{\hat\mu_{(\cdot)}}\right)^2
    """
    num, mean = len(f), weights @ f
    if np.max(weights) > 1 - 1e-12:
        raise ValueError(
            "One draw has all of the weight, so that it cannot be left out; more draws, or a closer law, are needed."
        )
    shifts = weights * (f - mean) / (weights - 1)  # of the estimates without one draw, from the mean
    middle = shifts.mean()
    return float(mean - (num - 1) * middle), float(np.sqrt((num - 1) / num * np.sum((shifts - middle) ** 2)))


def with_reference(table: "pd.DataFrame", reference: Mapping[str, Any]) -> "pd.DataFrame":
    """Add the columns ``reference``, ``reference_se`` and ``z`` where anything is known."""
    pairs = {name: _pair(name, reference[name]) for name in table.index if name in reference}
    if not pairs:
        return table
    known = np.array([pairs.get(name, (np.nan, np.nan)) for name in table.index])
    error = np.hypot(table["se"].to_numpy(), known[:, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (table["mean"].to_numpy() - known[:, 0]) / error
    return table.assign(reference=known[:, 0], reference_se=known[:, 1], z=z)


def _pair(name: str, value: Any) -> tuple[float, float]:
    numbers = np.asarray(value, np.float64)
    if numbers.shape not in ((), (2,)):
        raise ValueError(f"reference[{name!r}] must be a number or a pair (value, standard error); got {value!r}.")
    return (float(numbers), 0.0) if numbers.ndim == 0 else (float(numbers[0]), float(numbers[1]))


def _evaluate(observables: Any, draws: Any, num: int) -> dict[str, np.ndarray]:
    function = check.function("observables", getattr(observables, "observables", observables))
    if check.leading_length("draws", draws) != num:
        raise ValueError(f"draws must have one row a weight, {num}; got {check.leading_length('draws', draws)}.")
    found = jax.jit(jax.vmap(function))(draws)
    if not isinstance(found, dict) or not found:
        raise TypeError(f"observables must return a dict of named scalars; got {type(found).__name__}.")
    for name, value in found.items():
        if value.shape != (num,):
            raise ValueError(f"The observable {name!r} must be a scalar; got shape {value.shape[1:]}.")
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def _of_weights(log_weights: np.ndarray, weights: np.ndarray) -> dict[Hashable, Any]:
    num, precision = len(weights), np.result_type(log_weights, np.float32)
    positive = np.asarray(log_weights, np.float64)[log_weights > -np.inf]
    notes = []
    if len(positive) < _LEAST_TAIL:
        k = threshold = float("nan")
        notes.append(
            f"Only {len(positive)} weights are above zero, too few to judge their tail: the standard errors may be too small."
        )
    else:
        rounding = float(8 * np.finfo(precision).eps * np.max(np.abs(positive)))
        k, threshold = fit_tail(positive, rounding)[0], float(reliable_below(num))
        if not k <= threshold:
            notes.append(
                f"Pareto k is {k:.2f}, above {threshold:.2f}: the weights may have no variance, and then the standard errors "
                "are too small."
            )
    return {"ess_weights": float(1 / np.sum(weights**2)), "pareto_k": k, "threshold": threshold, "notes": notes}
