"""Independent estimates of a gradient at a point, from states that are fresh, frozen, or learned on the same samples."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Key, PyTree
from ergodica.diagnostics.gradient_statistics import Replicates

STATES = ("fresh", "frozen", "same samples")
_LANES = 32
_EXACT_REPEATS = 2


class Opening(NamedTuple):
    """In which state the estimators are seen, and after how many calls at the point."""

    state: str = "fresh"
    warmup: int = 0


def replicate(
    name: str,
    point_name: str,
    estimator: AbstractGradientEstimator,
    key: Key,
    key_state: Key,
    point: PyTree,
    num_repeats: int,
    opening: Opening,
) -> Replicates:
    """Take independent estimates at the point; raise where one is not finite."""
    keys = jax.random.split(key, _EXACT_REPEATS if estimator.exact else num_repeats)
    state = _warm_up(estimator, key_state, point, opening.warmup) if opening.warmup else None
    again = opening.state == "same samples"
    gradients, costs = jax.device_get(_estimates(estimator, keys, point, state, again))
    gradients = gradients.astype(np.float64)
    finite = np.isfinite(gradients)
    if not finite.all():
        worst = tree.coordinate_names(point)[int(np.argmin(finite.mean(axis=0)))]
        raise ValueError(
            f"estimators[{name!r}] gave gradients that are NaN or infinite at {point_name}, in "
            f"{np.sum(~finite.all(axis=1))} of {len(keys)} estimates, most often in {worst}. "
            "Check the log density at that point (support, overflow) and the data for NaN."
        )
    cost = float(np.mean(costs))
    return Replicates(gradients, cost if cost > 0 else np.nan, estimator.exact)


def join(parts: list[Replicates]) -> Replicates:
    """Put lots of repeats together."""
    return parts[0]._replace(gradients=np.concatenate([part.gradients for part in parts]))


@eqx.filter_jit
def _estimates(estimator: AbstractGradientEstimator, keys: Key, point: PyTree, state: Any, again: bool) -> tuple:  # noqa: FBT001
    """Estimates (R, D) with their costs (R,): from freshly opened states, or all from the same one."""

    def one(key: Key) -> tuple:
        key_init, key_estimate = jax.random.split(key)
        opened = estimator.init(key_init, point) if state is None else state
        if again:
            opened = estimator.estimate(key_estimate, point, opened)[1]
        estimate, _ = estimator.estimate(key_estimate, point, opened)
        return tree.ravel(estimate.gradient), jnp.asarray(estimate.n_grad, jnp.float32)

    return jax.lax.map(one, keys, batch_size=_LANES)


@eqx.filter_jit
def _warm_up(estimator: AbstractGradientEstimator, key: Key, point: PyTree, warmup: int) -> Any:
    """State after calls at the point."""
    key_init, key = jax.random.split(key)

    def call(i: Array, state: Any) -> Any:
        return estimator.estimate(jax.random.fold_in(key, i), point, state)[1]

    return jax.lax.fori_loop(0, jnp.asarray(warmup, jnp.int32), call, estimator.init(key_init, point))


class Parts(NamedTuple):
    """Variance from the choice of data, and from all other draws, each with an interval's ends; NaN if it cannot be split."""

    data: float
    data_lower: float
    data_upper: float
    sampling: float
    sampling_lower: float
    sampling_upper: float


def variance_parts(
    estimator: AbstractGradientEstimator, key: Key, point: PyTree, num_pairs: int, confidence: float
) -> Parts:
    r"""Split the variance by the law of total variance, from pairs of estimates on the same data.

    .. math:: \mathrm{Var}\, g = \mathrm{Var}\, \mathrm{E}[g \mid \text{data}] + \mathrm{E}\, \mathrm{Var}[g \mid \text{data}]

    The first is the covariance within pairs, the second half the mean square of their difference.
    """
    from scipy.stats import norm

    pairs = _pairs(estimator, jax.random.split(key, num_pairs), point)
    if pairs is None:
        return Parts(*(np.nan,) * 6)
    a, b = (np.asarray(x, np.float64) for x in jax.device_get(pairs))
    mean = (a.mean(axis=0) + b.mean(axis=0)) / 2
    quantile, ends = norm.ppf(0.5 + confidence / 2), []
    for values in (np.sum((a - mean) * (b - mean), axis=1), np.sum((a - b) ** 2, axis=1) / 2):
        middle, error = values.mean(), values.std(ddof=1) / np.sqrt(num_pairs)
        ends += [float(middle), float(middle - quantile * error), float(middle + quantile * error)]
    return Parts(*ends)


@eqx.filter_jit
def _pairs(estimator: AbstractGradientEstimator, keys: Key, point: PyTree) -> tuple | None:
    """Pairs of estimates (R, D) that share their data; ``None`` if the estimator cannot."""

    def one(key: Key) -> tuple | None:
        key_init, key_data, key_a, key_b = jax.random.split(key, 4)
        state = estimator.init(key_init, point)
        both = [estimator.estimate_apart(key_data, k, point, state) for k in (key_a, key_b)]
        found = tuple(tree.ravel(x.gradient) for x in both if x is not None)
        return found if len(found) == 2 else None

    if jax.eval_shape(one, keys[0]) is None:
        return None
    return jax.lax.map(one, keys, batch_size=_LANES)
