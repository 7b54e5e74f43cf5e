"""Predictions from draws, pointwise log likelihoods, and scores on held-out data."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position, PyTree
from ergodica.diagnostics.full_gradient import unconstrained_positions
from ergodica.diagnostics.scalars import has_group

if TYPE_CHECKING:
    import xarray as xr

COVERAGE_LEVELS = (0.5, 0.9)


def predictive(
    dt: "xr.DataTree",
    posterior: Posterior,
    *,
    key: Key | None = None,
    data: PyTree = None,
    log_likelihood: bool = True,
    classes: Mapping[str, int] | None = None,
    batch_size: int = 1000,
) -> "xr.DataTree":
    r"""Predict from the draws, and score the predictions.

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`.
    posterior : Posterior
        What was sampled.
    key : typed PRNG key, optional
        For draws of new observations. Left out, none are drawn. Needs a posterior from ``from_numpyro`` or
        ``from_equinox``: a plain one knows densities, and not how data come about.
    data : pytree, optional
        Held-out data in the form of the posterior's own; the posterior's data unless given.
    log_likelihood : bool
        Whether to compute the log likelihood of every datum under every draw.
    classes : mapping of str to int, optional
        Of held-out labels, by their name in ``data``: how many values they can take, from 0 on. The predictive probability of
        each is stored, for `ergodica.diagnostics.calibration`. Frequencies among simulated labels would be noisier.
    batch_size : int
        Data that are worked on at a time; memory goes with it, times the number of draws.

    Returns
    -------
    DataTree
        A copy of ``dt`` with, for the posterior's own data, the groups ``posterior_predictive`` and ``log_likelihood``
        (so that ``arviz.loo`` works); for held-out data ``predictions`` and ``held_out``. The latter holds, for each
        datum, the log predictive density ``lpd_<site>``, what ``data`` says, ``observed_<site>``, for labels
        ``probability_<site>``, and where predictions were drawn of a site that ``data`` names, its CRPS ``crps_<site>``.
        Attributes: ``elpd`` (sum over data), ``elpd_se`` (over data), ``elpd_mcse`` (over draws), ``nll`` and ``nll_mcse``
        (mean negative log predictive density of a datum), ``coverage50_<site>`` and ``coverage90_<site>`` (share of data
        inside the central predictive intervals).

    Raises
    ------
    ValueError, TypeError
        If there is nothing to compute, predictions are asked of a plain posterior, or the draws do not fit it.

    Notes
    -----
    Cost: ``chains * draws * num_data`` likelihood evaluations, and as many simulated data. The result holds an array of
    that size: thin ``dt`` first where it is too large (``dt.isel(draw=slice(None, None, 10))``). ``classes`` adds a likelihood
    evaluation for each class, of which the part that does not see the label (a network, say) is evaluated once. Scores are
    insensitive to errors of the posterior when data are many: they are no replacement for `ergodica.diagnose`.

    Examples
    --------
    >>> import arviz as az, numpy as np, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(3.0), initial=jnp.array(0.0))
    >>> dt = az.from_dict({"posterior": {"position": np.random.default_rng(0).normal(size=(4, 100))}})
    >>> predictive(dt, posterior)["log_likelihood"]["obs"].shape
    (4, 100, 3)
    """
    import xarray as xr

    check.instance("posterior", posterior, Posterior, "what was sampled")
    batch_size = check.integer("batch_size", batch_size)
    if key is None and not log_likelihood:
        raise ValueError("There is nothing to compute: give key for predictions, or leave log_likelihood=True.")
    held_out = data is not None
    if not held_out and posterior.data is None:
        raise ValueError("posterior holds no data; give data.")
    if classes and not (held_out and log_likelihood):
        raise ValueError("classes needs held-out data, data=, and log_likelihood=True.")
    groups: dict[str, xr.Dataset] = {}
    if key is not None:
        groups["predictions" if held_out else "posterior_predictive"] = _as_dataset(
            _simulate(key, dt, posterior, data, batch_size)
        )
    if log_likelihood:
        values = pointwise_log_likelihood(dt, posterior, data, batch_size)
        if held_out:
            probabilities = {
                name: class_probabilities(
                    dt, posterior, data, name, check.integer(f"classes[{name!r}]", count, least=2), batch_size
                )
                for name, count in (classes or {}).items()
            }
            groups["held_out"] = scores(values, groups.get("predictions"), data, probabilities)
        else:
            groups["log_likelihood"] = _as_dataset(values)
    kept = {name: node.to_dataset() for name, node in dt.children.items() if name not in groups}
    result = xr.DataTree.from_dict(kept | groups)
    result.attrs = dict(dt.attrs)
    return result


def scores(
    log_likelihood: dict[str, np.ndarray],
    predictions: "xr.Dataset | None",
    data: PyTree,
    probabilities: Mapping[str, np.ndarray] | None = None,
) -> "xr.Dataset":
    """Score predictions of held-out data.

    Parameters
    ----------
    log_likelihood : dict of arrays (chain, draw, N)
        By site.
    predictions : Dataset, optional
        Draws of the same sites.
    data : pytree
        If a dictionary that names a site, this site's predictions are scored too.
    probabilities : mapping of str to array (N, C), optional
        Of labels, by site.
    """
    import xarray as xr

    variables: dict[str, Any] = {}
    total = sum(log_likelihood.values())  # of one datum over its sites
    attrs = elpd(np.asarray(total))
    for site, values in log_likelihood.items():
        variables[f"lpd_{site}"] = ("row", log_mean_exp(values))
    observed = data if isinstance(data, dict) else {}
    for site in {*log_likelihood, *(probabilities or {})} & observed.keys():
        value = np.asarray(observed[site])
        variables[f"observed_{site}"] = (("row", *(f"{site}_dim_{i}" for i in range(value.ndim - 1))), value)
    for site, values in (probabilities or {}).items():
        variables[f"probability_{site}"] = (("row", f"{site}_class"), values)
    for site, values in {} if predictions is None else predictions.data_vars.items():
        if site not in observed:
            continue
        drawn, truth = values.values, np.asarray(observed[site])
        drawn = drawn.reshape(-1, *drawn.shape[2:]).astype(float)
        if drawn.shape[1:] != truth.shape or truth.ndim != 1:
            continue
        variables[f"crps_{site}"] = ("row", crps(drawn, truth))
        for level in COVERAGE_LEVELS:
            attrs[f"coverage{level * 100:.0f}_{site}"] = coverage(drawn, truth, level)
    return xr.Dataset(variables, attrs=attrs)


def class_probabilities(
    dt: "xr.DataTree", posterior: Posterior, data: PyTree, name: str, num_classes: int, batch_size: int = 1000
) -> np.ndarray:
    r"""Predictive probability of every label of every datum, :math:`\frac1S\sum_s p(y_i = c \mid \theta_s)`: (N, C).

    The likelihood of the posterior is evaluated with all the labels replaced by each class in turn.
    """
    if posterior.log_likelihood is None or not isinstance(data, dict) or name not in data:
        names = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"classes names {name!r}, which must be an entry of data with labels that the likelihood reads; got {names}. "
            "NumPyro models must take their data by from_numpyro(model, data=dict(...))."
        )
    positions = jax.tree.map(jnp.asarray, unconstrained_positions(dt, posterior))
    data = jax.tree.map(jnp.asarray, data)
    chunks = []
    for start in range(0, check.leading_length("data", data), batch_size):
        rows = jax.tree.map(lambda x, begin=start: x[begin : begin + batch_size], data)
        chunks.append(np.asarray(_class_probabilities(posterior, positions, rows, name, num_classes), float))
    probabilities = np.concatenate(chunks)
    sums = probabilities.sum(1)
    if not np.allclose(sums, 1, atol=1e-3):
        raise ValueError(
            f"The likelihoods of the classes 0 to {num_classes - 1} of {name!r} must sum to 1; got sums from {sums.min():.4g} to "
            f"{sums.max():.4g}. Name all the classes, and drop no constants from log_likelihood."
        )
    return probabilities / sums[:, None]


@partial(jax.jit, static_argnames=("name", "num_classes"))
def _class_probabilities(
    posterior: Posterior, positions: Position, rows: dict[str, jax.Array], name: str, num_classes: int
) -> jax.Array:
    def of_position(position: Position) -> jax.Array:
        def of_class(label: jax.Array) -> jax.Array:
            labels = jnp.full_like(rows[name], label.astype(rows[name].dtype))
            return posterior.log_likelihood(position, {**rows, name: labels})

        return jax.vmap(of_class, out_axes=1)(jnp.arange(num_classes))

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), positions)
    log_probabilities = jax.lax.map(of_position, flat)
    return jnp.exp(log_probabilities).mean(0)


def log_mean_exp(log_likelihood: np.ndarray) -> np.ndarray:
    """Log of the mean over draws of the likelihood, for each datum: (chain, draw, N) to (N,)."""
    flat = log_likelihood.reshape(-1, log_likelihood.shape[-1]).astype(float)
    return np.logaddexp.reduce(flat, axis=0) - np.log(len(flat))


def elpd(log_likelihood: np.ndarray) -> dict[str, float]:
    r"""Sum the log predictive densities of held-out data, with two errors.

    The error over draws is of first order: draw :math:`s` moves the sum by :math:`\sum_i p_{is} / \bar p_i`, and the
    MCSE of that series, which allows for autocorrelation, is the MCSE of the sum.
    """
    import arviz_stats

    lpd = log_mean_exp(log_likelihood)
    influence = np.exp(log_likelihood - lpd).sum(-1)
    n, mcse = len(lpd), float(arviz_stats.mcse(influence, method="mean"))
    return {
        "elpd": float(lpd.sum()),
        "elpd_se": float(np.sqrt(n * lpd.var(ddof=1))) if n > 1 else float("nan"),
        "elpd_mcse": mcse,
        "nll": float(-lpd.mean()),
        "nll_mcse": mcse / n,
    }


def crps(draws: np.ndarray, observed: np.ndarray) -> np.ndarray:
    r"""Continuous ranked probability score :math:`E|X - y| - E|X - X'|/2` of each datum, from draws (S, N); smaller is better."""
    ordered = np.sort(draws, axis=0)
    size = len(ordered)
    weights = (2 * np.arange(1, size + 1) - size - 1) / (size * (size - 1))
    spread = np.einsum("s,sn->n", weights, ordered)  # half of E|X - X'|, without bias
    return np.abs(draws - observed).mean(0) - spread


def coverage(draws: np.ndarray, observed: np.ndarray, level: float) -> float:
    """Share of data inside their central predictive intervals."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return float(np.mean((low <= observed) & (observed <= high)))


def _simulate(key: Key, dt: "xr.DataTree", posterior: Posterior, data: PyTree, batch_size: int) -> dict[str, Any]:
    rng.check_key(key)
    if posterior.source is None:
        raise ValueError(
            "Predictions need a posterior made by from_numpyro or from_equinox: this one has a log likelihood, and no program "
            "that draws data. Leave key out to compute the log likelihood alone."
        )
    return posterior.source.predictive(key, _samples(dt), data=_for_source(posterior, data), batch_size=batch_size)


def pointwise_log_likelihood(
    dt: "xr.DataTree", posterior: Posterior, data: PyTree, batch_size: int
) -> dict[str, np.ndarray]:
    """Log likelihood of every datum under every draw, by site: (chain, draw, N)."""
    if posterior.source is not None:
        values = posterior.source.log_likelihood(_samples(dt), data=_for_source(posterior, data), batch_size=batch_size)
        return {site: np.asarray(value, float) for site, value in values.items()}
    if posterior.log_likelihood is None:
        raise ValueError("posterior has no log_likelihood; its target is log_prior alone, so no datum can be scored.")
    positions = jax.tree.map(jnp.asarray, unconstrained_positions(dt, posterior))
    data = posterior.data if data is None else jax.tree.map(jnp.asarray, data)
    num_rows, chunks = check.leading_length("data", data), []
    for start in range(0, num_rows, batch_size):
        rows = jax.tree.map(lambda x, begin=start: x[begin : begin + batch_size], data)
        chunks.append(np.asarray(_log_likelihood(posterior, positions, rows), float))
    return {"obs": np.concatenate(chunks, axis=-1)}


def _for_source(posterior: Posterior, data: PyTree) -> PyTree:
    """Hand the posterior's own data to a source that does not hold them."""
    return posterior.data if data is None and not getattr(posterior.source, "holds_data", True) else data


@jax.jit
def _log_likelihood(posterior: Posterior, positions: Position, rows: PyTree) -> jax.Array:
    def of_chain(chain: Position) -> jax.Array:
        return jax.lax.map(lambda position: posterior.log_likelihood(position, rows), chain)

    return jax.lax.map(of_chain, positions)


def _samples(dt: "xr.DataTree") -> dict[str, np.ndarray]:
    if not has_group(dt, "posterior"):
        raise ValueError(f"dt must have a group 'posterior'; its groups are {sorted(dt.children)}.")
    return {str(n): v.transpose("chain", "draw", ...).values for n, v in dt.children["posterior"].data_vars.items()}


def _as_dataset(values: dict[str, Any]) -> "xr.Dataset":
    """Label arrays (chain, draw, …) by site, with ArviZ's default names for the other axes."""
    import xarray as xr

    variables = {}
    for site, value in values.items():
        axes = [f"{site}_dim_{i}" for i in range(np.ndim(value) - 2)]
        variables[site] = (("chain", "draw", *axes), np.asarray(value))
    return xr.Dataset(variables)
