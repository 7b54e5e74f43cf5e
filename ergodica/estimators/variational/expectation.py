"""Gradients of expectations without a program: a NumPyro distribution and any JAX function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers

from ergodica.core import check, rng
from ergodica.core.types import Estimate, Key, PyTree
from ergodica.estimators.variational.facts import Distribution
from ergodica.estimators.variational.objectives.elbo import ELBO
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.structure import Program

SITE = "x"


def expectation_gradient(
    key: Key,
    params: PyTree,
    distribution: Callable[[PyTree], Distribution],
    f: Callable[[Any], Any],
    estimator: AbstractSiteEstimator | str = "auto",
    num_samples: int = 1,
) -> Estimate:
    r"""Estimate :math:`\nabla_\theta \mathrm{E}_{x \sim q_\theta} f(x)`, by any of the estimators for sites of programs.

    Parameters
    ----------
    key : typed PRNG key
    params : pytree of floating point arrays
        :math:`\theta`.
    distribution : callable
        ``distribution(params)``, a NumPyro distribution. Elements of its batch are independent; ``f`` may mix them.
    f : callable
        ``f(x)``, a scalar, of a value with the distribution's batch and event shape. It must not depend on ``params`` otherwise.
    estimator : AbstractSiteEstimator or "auto"
    num_samples : int

    Returns
    -------
    Estimate
        ``gradient`` like ``params``, ``value`` the mean of ``f``, and ``n_grad`` the evaluations of ``f``.

    Raises
    ------
    SiteError
        Where the estimator cannot be right for the distribution. The site is called ``"x"`` in its messages.
    ValueError, TypeError
        If ``f`` does not return a scalar, or ``distribution`` no distribution.

    Notes
    -----
    Cost: ``num_samples`` evaluations of ``f`` (times the estimator's branches) and one derivative. Estimators that remember or
    learn from step to step need a loop that keeps their state, as SVI does, and are refused.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ergodica as erg
    >>> coin = lambda p: dist.Bernoulli(probs=p)
    >>> estimate = erg.estimators.expectation_gradient(
    ...     jax.random.key(0), jnp.array(0.3), coin, lambda b: (b - 0.49) ** 2, erg.estimators.Enumerate()
    ... )
    >>> print(f"{estimate.gradient:.3f}")
    0.020
    """
    rng.check_key(key)
    params = check.position("params", params)
    check.function("distribution", distribution)
    check.function("f", f)
    objective = ELBO(num_samples, {SITE: estimator}, vectorize_particles=True)

    def value(params: PyTree) -> jax.Array:
        program = Program(_model(distribution, f, jax.lax.stop_gradient(params)), _guide(distribution, params))
        return objective.evaluate(key, {}, program, {}, {}).value

    gradient_of = jax.value_and_grad(value)
    mean, gradient = gradient_of(params)
    plan = objective.plan(_model(distribution, f, params), _guide(distribution, params))
    return Estimate(gradient, mean, n_grad=num_samples * plan.rows[0].runs)


def _guide(distribution: Callable, params: PyTree) -> Callable:
    """Draw, without a term of its own in the objective."""

    def guide() -> None:
        with handlers.mask(mask=False):
            numpyro.sample(SITE, _checked(distribution(params)))

    return guide


def _model(distribution: Callable, f: Callable, params: PyTree) -> Callable:
    """Take the value, and count ``f`` of it."""

    def model() -> None:
        with handlers.mask(mask=False):
            x = numpyro.sample(SITE, distribution(params))
        value = jnp.asarray(f(x))
        if value.shape != ():
            raise ValueError(f"f must return a scalar; got shape {value.shape} for a value of shape {jnp.shape(x)}.")
        numpyro.factor("f", value.astype(jnp.result_type(value, float)))

    return model


def _checked(distribution: Any) -> Distribution:
    if not isinstance(distribution, numpyro.distributions.Distribution):
        raise TypeError(f"distribution must return a NumPyro distribution; got {type(distribution).__name__}.")
    return distribution
