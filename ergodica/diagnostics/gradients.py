"""Comparison of gradient estimators: whether they are right, how noisy they are, and what they cost."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, PyTree
from ergodica.diagnostics.gradient_statistics import (
    Moments,
    Replicates,
    Target,
    judge_bias,
    summarise,
    weigh_by_precision,
)
from ergodica.diagnostics.timing import time_estimators

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_table import GradientComparison

REFERENCES = ("auto", "exact", "pooled")
_LANES = 32
_ROWS = 1024
_EXACT_REPEATS = 2
_ROUNDING_UNITS = 4


def compare_gradients(
    key: Key,
    estimators: Mapping[str, AbstractGradientEstimator],
    params: PyTree | list[PyTree],
    reference: str = "auto",
    *,
    num_repeats: int = 1000,
    confidence: float = 0.99,
    bias_tolerance: float = 0.1,
    num_timings: int = 7,
) -> "GradientComparison":
    r"""Compare gradient estimators: bias, variance, cost, and variance for a given cost.

    Parameters
    ----------
    key : typed PRNG key
    estimators : mapping of str to AbstractGradientEstimator
        By the name to call them. Times are given as ratios to the first.
    params : pytree, or list of pytrees
        The points to compare at: a position, or a list of positions. (A position that is itself a list goes into a list.)
    reference : {"auto", "exact", "pooled"}, or the name of an estimator
        What the means are held against. ``"exact"`` is the gradient of the log density over all the data, of the first
        estimator whose posterior holds them. ``"pooled"`` is the mean over the estimators, weighted by their precision:
        it tells whether they agree, not which of them is right. ``"auto"`` is ``"exact"`` where it can be had, else
        ``"pooled"``; the attribute ``reference`` of the result says which. The mean of a named estimator can be taken too.
    num_repeats : int
        Independent estimates for each estimator and point.
    confidence : float
        Of each variance interval. The tests for bias are corrected for their number: if every estimator is unbiased, one is called
        biased with probability at most ``1 - confidence`` in the whole comparison.
    bias_tolerance : float
        An estimator is called unbiased only if its bias is shown to be below this fraction of the gradient's largest entry.
    num_timings : int
        Rounds of timing, each estimator once a round; 0 leaves the time out.

    Returns
    -------
    GradientComparison
        An `xarray.Dataset` with dimensions ``estimator``, ``point`` and ``coordinate``, a table ``.summary``
        (`pandas.DataFrame`) and a figure ``.plot()``. Variables:

        - ``bias``, ``standard_error``, ``z`` for each coordinate; ``p_value``, the smallest over the coordinates, corrected
          (Bonferroni) for all coordinates, points and estimators;
        - ``bias_bound``: with the given confidence no coordinate's bias is larger, as a fraction of the largest entry of
          the reference. A bias up to it would have gone unseen;
        - ``verdict``: ``"biased"``, ``"unbiased"`` (``bias_bound`` within ``bias_tolerance``, or nothing but rounding), or
          ``"undecided"``;
        - ``variance``, summed over the coordinates, with ``variance_lower`` and ``variance_upper``;
        - ``datum_gradients`` of a call; ``seconds`` of a call, and ``time_ratio`` to the first estimator with its range;
        - ``reference``, and ``rounding_variance``: a variance below it is rounding, not noise;
        - ``work_variance``, the variance times ``datum_gradients``, and ``time_variance``, times ``seconds``: what one
          gradient, or one second, buys. The smaller the better.

    Raises
    ------
    ValueError, TypeError
        For points of different structure, an unknown reference, one that cannot be had, or estimates that are not finite.

    Notes
    -----
    Each repeat opens a state with a fresh key and takes its first estimate, so the repeats are independent draws from the
    marginal law: for ``scheme="blocks"``, the first block of a fresh epoch. What reshuffling gains *along* an epoch is
    therefore not in these variances. Estimators that remember earlier positions are seen at their first call only.

    The test is Student's for each coordinate, with the standard error of the repeats (and of the reference, if it is
    noisy), plus a few units of rounding of the sum over the data, so that estimators without noise are compared up to
    rounding. The interval is normal for the logarithm of the mean squared deviation, from the spread of the deviations
    themselves: it does not assume normal gradients. Estimators that say they are exact are called twice.

    A minibatch of rows near a mode has far more noise than gradient, and a bias cannot be seen there: compare at a point
    some posterior standard deviations away too, such as the start of the chains.

    Cost: ``num_repeats`` calls for each estimator and point, twice the full gradient, and some milliseconds of timing.
    Memory: ``num_repeats`` times the number of parameters.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(9.0), initial=jnp.array(0.0))
    >>> estimators = {name: erg.estimators.Minibatch(posterior, 3, name) for name in ("uniform", "blocks")}
    >>> table = compare_gradients(jax.random.key(0), estimators, jnp.array(1.0), num_timings=0)
    >>> table.verdict.sel(point=0).values.tolist()
    ['unbiased', 'unbiased']
    """
    rng.check_key(key)
    estimators = _check_estimators(estimators)
    points = _check_points(params)
    check.integer("num_repeats", num_repeats, least=30, hint="Fewer do not carry the intervals.")
    check.integer("num_timings", num_timings, least=0)
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1; got {confidence!r}.")
    check.positive("bias_tolerance", bias_tolerance)
    reference = _choose_reference(reference, estimators)
    replicates = {
        name: [
            _replicate(name, j, estimator, jax.random.fold_in(key, i * len(points) + j), point, num_repeats)
            for j, point in enumerate(points)
        ]
        for i, (name, estimator) in enumerate(estimators.items())
    }
    moments = {name: [summarise(r, confidence) for r in row] for name, row in replicates.items()}
    targets = [_target(reference, j, point, estimators, moments) for j, point in enumerate(points)]
    num_tests = len(estimators) * len(points) * len(targets[0].gradient)
    tests = {
        name: [
            judge_bias(name, row[j], targets[j], (1 - confidence) / num_tests, bias_tolerance)
            for j in range(len(points))
        ]
        for name, row in moments.items()
    }
    times = time_estimators(estimators, points[0], num_timings) if num_timings else None
    from ergodica.diagnostics.gradient_table import assemble

    attrs = {
        "reference": reference,
        "confidence": confidence,
        "bias_tolerance": bias_tolerance,
        "num_repeats": num_repeats,
        "num_tests": num_tests,
    }
    return assemble(moments, tests, targets, times, tree.coordinate_names(points[0]), attrs)


def _check_estimators(
    estimators: Mapping[str, AbstractGradientEstimator],
) -> dict[str, AbstractGradientEstimator]:
    if not isinstance(estimators, Mapping) or not estimators:
        raise TypeError(
            f"estimators must map names to estimators, such as {{'blocks': Minibatch(posterior, 100)}}; got {estimators!r}."
        )
    for name, estimator in estimators.items():
        check.instance(
            f"estimators[{name!r}]", estimator, AbstractGradientEstimator, "such as Minibatch(posterior, 100)"
        )
    return dict(estimators)


def _check_points(params: PyTree | list[PyTree]) -> list[PyTree]:
    points = params if isinstance(params, list) else [params]
    if not points:
        raise ValueError("params must hold at least one point to compare at; got an empty list.")
    points = [check.position(f"params[{j}]", point) for j, point in enumerate(points)]
    for j, point in enumerate(points):
        check.same_structure(f"params[{j}]", point, "params[0]", points[0])
    return points


def _choose_reference(reference: str, estimators: dict[str, AbstractGradientEstimator]) -> str:
    if reference in estimators:
        return reference
    check.one_of("reference", reference, [*REFERENCES, *estimators])
    exact = _holder_of_data(estimators) is not None
    if reference == "exact" and not exact:
        raise ValueError(
            "reference='exact' needs an estimator whose posterior holds its data, and none of these does. "
            "Take 'pooled', or the name of an estimator that you trust."
        )
    chosen = "exact" if exact and reference == "auto" else "pooled" if reference == "auto" else reference
    if chosen == "pooled" and len(estimators) < 2:
        raise ValueError(
            "A single estimator without a posterior that holds its data has nothing to be compared with; "
            "add an estimator of the same gradient that you trust."
        )
    return chosen


def _holder_of_data(estimators: dict[str, AbstractGradientEstimator]) -> Posterior | None:
    for estimator in estimators.values():
        posterior = estimator.posterior
        if isinstance(posterior, Posterior) and (posterior.data is not None or not posterior.num_data):
            return posterior
    return None


def _replicate(
    name: str, j: int, estimator: AbstractGradientEstimator, key: Key, point: PyTree, num_repeats: int
) -> Replicates:
    """Take independent estimates at the point; raise where one is not finite."""
    keys = jax.random.split(key, _EXACT_REPEATS if estimator.exact else num_repeats)
    gradients, costs = jax.device_get(_first_estimates(estimator, keys, point))
    gradients = gradients.astype(np.float64)
    finite = np.isfinite(gradients)
    if not finite.all():
        worst = tree.coordinate_names(point)[int(np.argmin(finite.mean(axis=0)))]
        raise ValueError(
            f"estimators[{name!r}] gave gradients that are NaN or infinite at point {j}, in "
            f"{np.sum(~finite.all(axis=1))} of {len(keys)} estimates, most often in {worst}. "
            "Check the log density at that point (support, overflow) and the data for NaN."
        )
    cost = float(np.mean(costs))
    return Replicates(gradients, cost if cost > 0 else np.nan)


@eqx.filter_jit
def _first_estimates(estimator: AbstractGradientEstimator, keys: Key, point: PyTree) -> tuple:
    """First estimates (R, D) of freshly opened states, with their costs (R,)."""

    def first_estimate(key: Key) -> tuple:
        key_init, key_estimate = jax.random.split(key)
        estimate, _ = estimator.estimate(key_estimate, point, estimator.init(key_init, point))
        return tree.ravel(estimate.gradient), jnp.asarray(estimate.n_grad, jnp.float32)

    return jax.lax.map(first_estimate, keys, batch_size=_LANES)


def _target(
    reference: str,
    j: int,
    point: PyTree,
    estimators: dict[str, AbstractGradientEstimator],
    moments: dict[str, list[Moments]],
) -> Target:
    """Reference gradient at one point."""
    means = {name: row[j].mean for name, row in moments.items()}
    squared_errors = {name: row[j].squared_error for name, row in moments.items()}
    unit = _ROUNDING_UNITS * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(point))).eps)
    if reference == "exact":
        gradient, absolute = jax.device_get(_exact_gradient(_holder_of_data(estimators), point))
        return Target(gradient.astype(np.float64), unit * absolute.astype(np.float64), {}, squared_errors)
    if reference == "pooled":
        weights, rounding = weigh_by_precision(means, squared_errors, unit)
    else:
        weights, rounding = {reference: np.ones_like(means[reference])}, unit * np.abs(means[reference])
    gradient = np.sum([w * means[name] for name, w in weights.items()], axis=0)
    return Target(gradient, rounding, weights, squared_errors)


@eqx.filter_jit
def _exact_gradient(posterior: Any, point: PyTree) -> tuple:
    """Gradient of the log density (D,), and the sum of the absolute values of its terms, the scale of rounding."""
    gradient = tree.ravel(jax.grad(posterior.log_density)(point))
    prior = jnp.abs(tree.ravel(jax.grad(posterior.log_prior)(point)))
    if posterior.data is None:
        return gradient, prior

    def of_one(row: PyTree) -> Any:
        one = jax.tree.map(lambda x: x[None], row)
        return tree.ravel(jax.grad(lambda theta: posterior.log_likelihood(theta, one)[0])(point))

    terms = jax.lax.map(lambda row: jnp.abs(of_one(row)), posterior.data, batch_size=_ROWS)
    return gradient, prior + jnp.sum(terms, axis=0)
