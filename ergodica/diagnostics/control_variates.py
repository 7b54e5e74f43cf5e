"""Expectations from draws and scores, with control variates of mean zero (Stein)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.stein import num_controls
from ergodica.core.types import Key, Position
from ergodica.diagnostics.control_functions import Control, fit_kernel, fit_polynomial
from ergodica.diagnostics.full_gradient import gradients_of, unconstrained_positions
from ergodica.diagnostics.scalars import SAMPLE_DIMS, has_group, scalar_draws

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

METHODS = ("linear", "quadratic", "kernel", "kernel+linear", "kernel+quadratic")
_DEGREE = {"linear": 1, "quadratic": 2, "kernel": None, "kernel+linear": 1, "kernel+quadratic": 2}
_BLOCKS = 5
_MOST_FOLDS = 10
_SUSPICIOUS = 4.0


def control_variate_expectation(
    dt: "xr.DataTree",
    function: "Callable[[xr.Dataset], xr.Dataset] | None" = None,
    posterior: Posterior | None = None,
    *,
    method: str | Sequence[str] = ("linear", "quadratic"),
    scores: np.ndarray | None = None,
    gradient: AbstractGradientEstimator | None = None,
    key: Key | None = None,
    num_folds: int | None = None,
) -> "pd.DataFrame":
    r"""Estimate posterior expectations from draws and their scores, with far less Monte Carlo error than the plain mean.

    .. math:: \hat\mu = \frac1n \sum_i \left( f(\theta_i) - h_{-}(\theta_i) \right), \qquad \mathrm{E}_\pi h_- = 0

    :math:`h_-` is a function of mean zero that was fitted to :math:`f` on *other* draws: the Langevin--Stein operator on
    polynomials of degree 1 or 2 (zero-variance control variates), on functions of a reproducing kernel (control functionals), or
    on both (semi-exact control functionals).

    Parameters
    ----------
    dt : DataTree
        Draws, as `ergodica.sample` gives them.
    function : callable, optional
        Maps the dataset of draws (on the model's scale) to one of what is to be averaged, such as ``lambda draws: draws**2``; the
        draws themselves unless given.
    posterior : Posterior, optional
        That was sampled. Its full gradient is evaluated at every draw.
    method : str or sequence of str
        ``"linear"``, ``"quadratic"``, ``"kernel"``, ``"kernel+linear"``, ``"kernel+quadratic"``. Of several, each quantity gets the
        one with the least variance on the draws that it was not fitted on; the plain mean is always a candidate.
    scores : array (chain, draw, D), optional
        In place of ``posterior``: the gradients of the log density in unconstrained space, coordinates in the order of
        ``ergodica.core.tree.coordinate_names``.
    gradient : AbstractGradientEstimator, optional
        In place of ``posterior``: an estimator that gives noisy scores, for data too big for full gradients. Needs ``key``.
    key : typed PRNG key, optional
    num_folds : int, optional
        Parts of the draws, each evaluated with a fit on the others: whole chains where there are several (so that fit and
        evaluation are independent), consecutive blocks of a single chain.

    Returns
    -------
    pandas.DataFrame
        A row for each scalar: ``mean`` and its standard error ``mcse``; ``plain_mean`` and ``plain_mcse``; ``variance_ratio``, how
        many times as many draws the plain mean would need; ``method``. ``attrs`` holds ``stein_z`` (below), ``num_controls`` by
        method, ``num_scores`` computed, and ``notes``, a list of sentences on what the result does not promise.

    Raises
    ------
    ValueError, TypeError
        For draws without scores, an unknown method, scores that are not finite, more polynomials than a kernel fit has draws.

    Notes
    -----
    The error is ArviZ's Monte Carlo standard error of the series :math:`f - h_-`. It counts the autocorrelation of what is left.

    Exact for Gaussian targets and polynomials up to the method's degree. Of little use where the draws' tails are heavier than
    the polynomials allow, for functions with steps, and in many dimensions at degree 2 (D + D(D+1)/2 controls: a ridge is chosen
    by generalised cross-validation, and it takes away what the data cannot support).

    Control variates remove noise and not bias. The draws of an approximate sampler follow another law than :math:`\pi`, under
    which :math:`h_-` has a mean; then the result is neither the expectation under that law nor, in general, closer to that under
    :math:`\pi`. The identity itself is a check of the draws: ``stein_z`` is the largest mean of a linear control or of
    :math:`1 + \theta_i s_i`, over all coordinates, in standard errors. Noisy scores of ``gradient`` are as good as exact
    ones in the mean, since their batches do not depend on the draws, but add noise of their own to :math:`h_-`.

    Cost: ``num_data`` gradients a draw (or one call of ``gradient``); for n draws, p controls and each fold
    :math:`O(np \min(n, p))`, with a kernel :math:`O(n^3)`: thin to a few thousand draws.

    References
    ----------
    Assaraf and Caffarel (1999); Mira, Solgi and Imparato (2013); Oates, Girolami and Chopin (2017); South, Karvonen, Nemeth,
    Girolami and Oates (2022).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum((t - 1.0) ** 2), initial=jnp.zeros(2))
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=200, num_warmup=100)
    >>> table = control_variate_expectation(dt, posterior=posterior, method="linear")
    >>> table["mean"].round(3).tolist()
    [1.0, 1.0]
    """
    methods = [method] if isinstance(method, str) else list(method)
    for name in methods:
        check.one_of("method", name, METHODS)
    points = unconstrained_draws(dt, posterior)
    slopes, num_scores = _scores(dt, points, posterior, scores, gradient, key)
    draws = dt["posterior"].to_dataset()
    values = scalar_draws(_as_tree(draws if function is None else _checked(function(draws))))
    if not np.isfinite(values.values).all():
        raise ValueError("The function of the draws is NaN or infinite at some of them, so that it has no mean.")
    folds = _folds(points.shape[0], points.shape[1], num_folds)
    residuals = {"plain": values.values}
    for name in methods:
        residuals[name] = values.values - _out_of_fold(_fit(name), points, slopes, values.values, folds)
    table = _summary(residuals, list(map(str, values["parameter"].values)))
    stein_z = largest_violation(points, slopes)
    table.attrs = {
        "stein_z": stein_z,
        "num_controls": {name: num_controls(points.shape[-1], _DEGREE[name] or 1) for name in methods if _DEGREE[name]},
        "num_scores": num_scores,
        "notes": _notes(dt, stein_z, noisy=gradient is not None, single=points.shape[0] == 1),
    }
    return table


def unconstrained_draws(dt: "xr.DataTree", posterior: Posterior | None) -> np.ndarray:
    """All draws in unconstrained space, (chain, draw, D) in double precision."""
    if posterior is not None:
        check.instance("posterior", posterior, Posterior, "that was sampled")
        leaves = jax.tree.leaves(unconstrained_positions(dt, posterior))
        return np.concatenate([np.asarray(x, np.float64).reshape(*x.shape[:2], -1) for x in leaves], axis=-1)
    group = "unconstrained_posterior" if has_group(dt, "unconstrained_posterior") else "posterior"
    if not has_group(dt, group):
        raise ValueError("dt has no group 'posterior' with draws.")
    return scalar_draws(dt, group).values.astype(np.float64)


def _scores(
    dt: "xr.DataTree",
    points: np.ndarray,
    posterior: Posterior | None,
    scores: np.ndarray | None,
    gradient: AbstractGradientEstimator | None,
    key: Key | None,
) -> tuple[np.ndarray, int]:
    """Scores at all draws (chain, draw, D), and how many were computed."""
    if sum(given is not None for given in (posterior, scores, gradient)) != 1:
        raise ValueError("Give one of posterior=, scores= and gradient=: what the scores at the draws come from.")
    if scores is not None:
        found, count = np.asarray(scores, np.float64), 0
        if found.shape != points.shape:
            raise ValueError(f"scores must have the shape of the draws, {points.shape}; got {found.shape}.")
    elif posterior is not None:
        positions = jax.tree.map(jnp.asarray, unconstrained_positions(dt, posterior))
        found, count = np.asarray(gradients_of(posterior, positions), np.float64), points[..., 0].size
    else:
        check.instance("gradient", gradient, AbstractGradientEstimator, "such as Minibatch(posterior, 100)")
        if key is None:
            raise ValueError("gradient= needs key=, a typed key such as jax.random.key(0).")
        rng.check_key(key)
        target = gradient.posterior  # pyright: ignore[reportOptionalMemberAccess]
        if not isinstance(target, Posterior):
            raise ValueError("gradient= must hold the posterior that was sampled; this estimator holds none.")
        positions = jax.tree.map(jnp.asarray, unconstrained_positions(dt, target))
        found, count = np.asarray(_noisy_scores(gradient, key, positions), np.float64), points[..., 0].size
    if not np.isfinite(found).all():
        raise ValueError("Scores are NaN or infinite at some draws: look at the log density there.")
    return found, count


@jax.jit
def _noisy_scores(gradient: AbstractGradientEstimator, key: Key, positions: Position) -> jax.Array:
    """One estimate at each draw, of freshly opened states, so that no batch depends on the draws."""

    def one(given: tuple) -> jax.Array:
        key, position = given
        key_init, key_estimate = jax.random.split(key)
        return tree.ravel(gradient.estimate(key_estimate, position, gradient.init(key_init, position))[0].gradient)

    shape = jax.tree.leaves(positions)[0].shape[:2]
    keys = jax.random.split(key, shape)
    return jax.lax.map(lambda chain: jax.lax.map(one, chain), (keys, positions))


def _as_tree(dataset: "xr.Dataset") -> "xr.DataTree":
    import xarray as xr

    return xr.DataTree.from_dict({"posterior": dataset})


def _checked(result: Any) -> "xr.Dataset":
    import xarray as xr

    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "function")
    if not isinstance(result, xr.Dataset) or not all({*SAMPLE_DIMS} <= {*v.dims} for v in result.data_vars.values()):
        raise TypeError(
            "function must return a Dataset (or DataArray) with the dims chain and draw, a value a draw: it is averaged here."
        )
    return result


def _folds(num_chains: int, num_draws: int, num_folds: int | None) -> np.ndarray:
    """Fold of each draw (chain, draw): whole chains, or consecutive blocks of one chain."""
    most = num_chains if num_chains > 1 else num_draws
    if num_folds is None:
        num_folds = min(num_chains, _MOST_FOLDS) if num_chains > 1 else _BLOCKS
    check.integer("num_folds", num_folds, least=2)
    if num_folds > most:
        raise ValueError(
            f"num_folds must be at most {most}, the number of {'chains' if num_chains > 1 else 'draws'}; got {num_folds}."
        )
    if num_chains > 1:
        return np.broadcast_to((np.arange(num_chains) * num_folds // num_chains)[:, None], (num_chains, num_draws))
    return (np.arange(num_draws) * num_folds // num_draws)[None, :]


def _fit(method: str) -> Callable[..., Control]:
    if method.startswith("kernel"):
        return partial(fit_kernel, degree=_DEGREE[method])
    return partial(fit_polynomial, degree=_DEGREE[method])


def _out_of_fold(
    fit: Callable[..., Control], points: np.ndarray, scores: np.ndarray, f: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Values of the fitted functions of mean zero (chain, draw, q), each from a fit to the other folds."""
    control = np.zeros(f.shape)
    for fold in range(folds.max() + 1):
        out = folds == fold
        fitted = fit(points[~out], scores[~out], f[~out])
        control[out] = fitted(points[out], scores[out])
    return control


def _summary(residuals: dict[str, np.ndarray], names: list[str]) -> "pd.DataFrame":
    """For each quantity the candidate of least variance."""
    import pandas as pd

    candidates = list(residuals)
    errors = {name: standard_errors(series) for name, series in residuals.items()}
    spread = np.array([residuals[name].var(axis=(0, 1)) for name in candidates])
    best = np.argmin(spread, axis=0)
    chosen = [candidates[i] for i in best]
    mean = np.array([residuals[name][..., j].mean() for j, name in enumerate(chosen)])
    mcse = np.array([errors[name][j] for j, name in enumerate(chosen)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(errors["plain"] == mcse, 1.0, (errors["plain"] / mcse) ** 2)
    columns = {
        "mean": mean,
        "mcse": mcse,
        "plain_mean": residuals["plain"].mean(axis=(0, 1)),
        "plain_mcse": errors["plain"],
        "variance_ratio": ratio,
        "method": chosen,
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="quantity"))


def standard_errors(series: np.ndarray) -> np.ndarray:
    """Monte Carlo standard errors of the means of series (chain, draw, q); 0 for a constant."""
    import arviz_stats

    still = np.ptp(series, axis=(0, 1)) <= 1e-12 * np.abs(series).max(axis=(0, 1), initial=0.0)
    found = np.zeros(series.shape[-1])
    for j in np.flatnonzero(~still):
        found[j] = float(arviz_stats.mcse(series[..., j] - series[..., j].mean(), method="mean"))
    return found


def largest_violation(points: np.ndarray, scores: np.ndarray) -> float:
    """Largest mean of :math:`s_i` and of :math:`1 + (x_i - m_i) s_i`, in standard errors: what Stein's identity says is zero.

    The centre of a chain is the mean of the other chains; of one chain alone its own.
    """
    num_chains = len(points)
    means = points.mean(axis=1, keepdims=True)
    centre = (means.sum(axis=0, keepdims=True) - means) / (num_chains - 1) if num_chains > 1 else means
    controls = np.concatenate([scores, 1 + (points - centre) * scores], axis=-1)
    errors = standard_errors(controls)
    mean = np.abs(controls.mean(axis=(0, 1)))
    return float(
        np.max(np.where(errors > 0, mean / np.where(errors > 0, errors, 1.0), np.where(mean > 1e-10, np.inf, 0)))
    )


def _notes(dt: "xr.DataTree", stein_z: float, *, noisy: bool, single: bool) -> list[str]:
    notes = []
    if dt.attrs.get("exact") == "approximate":
        notes.append(
            "The draws come from an approximate sampler. Control variates take away Monte Carlo error, not its bias, and their own "
            "mean under its law is not zero: the standard error is about neither."
        )
    if stein_z > _SUSPICIOUS:
        notes.append(
            f"Stein's identity fails on these draws by {stein_z:.1f} standard errors: they do not follow the density whose scores "
            "were given, or have not converged."
        )
    if noisy:
        notes.append("Scores are noisy: the variance that control variates can take away is limited by their noise.")
    if single:
        notes.append(
            "One chain: folds are blocks of it, so that fit and evaluation are nearly, not exactly, independent."
        )
    return notes
