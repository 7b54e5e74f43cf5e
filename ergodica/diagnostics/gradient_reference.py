"""What the means of gradient estimates are held against."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import PyTree
from ergodica.diagnostics.gradient_bias import Target, weigh_by_precision
from ergodica.diagnostics.gradient_statistics import Replicates

REFERENCES = ("auto", "exact", "pooled")
_ROWS = 1024
_ROUNDING_UNITS = 4

type Estimators = dict[str, AbstractGradientEstimator]


def choose_reference(reference: str, estimators: Estimators, points: list[PyTree]) -> tuple[str, list[Target] | None]:
    """Choose by name, and compute exact targets where they are asked for or can be had."""
    check.one_of("reference", reference, [*REFERENCES, *estimators])
    if reference in estimators:
        return reference, None
    exact = None if reference == "pooled" else exact_targets(estimators, points)
    if exact is not None:
        return "exact", exact
    if reference == "exact":
        raise ValueError(
            "reference='exact' needs an estimator whose posterior holds its data, or one of a variational objective on a small "
            "program (ergodica.estimators.ExactGradient says what stands in the way), and none of these is. "
            "Take 'pooled', or the name of an estimator that you trust."
        )
    if len(estimators) < 2:
        raise ValueError(
            "A single estimator without a posterior that holds its data, and without an exact gradient, has nothing to be "
            "compared with; add an estimator of the same gradient that you trust."
        )
    return "pooled", None


def exact_targets(estimators: Estimators, points: list[PyTree]) -> list[Target] | None:
    """Exact gradients at the points, of the first estimator that has them."""
    posterior = _holder_of_data(estimators)
    if posterior is not None:
        return [_of_posterior(posterior, point) for point in points]
    for estimator in estimators.values():
        found = []
        for point in points:
            reference = estimator.reference(point)
            if reference is None:
                break
            gradient, error, rounding = (np.asarray(tree.ravel(x), np.float64) for x in reference)
            found.append(Target(gradient, rounding + _unit(point) * np.abs(gradient), {}, error - rounding))
        if len(found) == len(points):
            return found
    return None


def target_of(reference: str, replicates: dict[str, Replicates], point: PyTree) -> Target:
    """Reference at one point from the estimates themselves: the mean of one, or the mean of all by precision."""
    unit = _unit(point)
    if reference == "pooled":
        weights, rounding = weigh_by_precision(replicates, unit)
    else:
        mean = replicates[reference].mean
        weights, rounding = {reference: np.ones_like(mean)}, unit * np.abs(mean)
    return Target(np.sum([w * replicates[name].mean for name, w in weights.items()], axis=0), rounding, weights)


def _unit(point: PyTree) -> float:
    return _ROUNDING_UNITS * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(point))).eps)


def _holder_of_data(estimators: Estimators) -> Posterior | None:
    for estimator in estimators.values():
        posterior = estimator.posterior
        if isinstance(posterior, Posterior) and (posterior.data is not None or not posterior.num_data):
            return posterior
    return None


def _of_posterior(posterior: Posterior, point: PyTree) -> Target:
    gradient, absolute = jax.device_get(_full_gradient(posterior, point))
    return Target(gradient.astype(np.float64), _unit(point) * absolute.astype(np.float64), {})


@eqx.filter_jit
def _full_gradient(posterior: Any, point: PyTree) -> tuple:
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
