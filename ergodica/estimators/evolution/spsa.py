"""Simultaneous perturbation: the gradient from two evaluations, all parameters moved at once."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.types import Estimate, Key, PyTree
from ergodica.estimators.evolution.objective import (
    AbstractBlackBox,
    Ascended,
    Objective,
    repeated,
    signs_like,
    weighted_sum,
)


def simultaneous_perturbation(plus: Array, minus: Array, signs: PyTree, radius: Array) -> PyTree:
    r"""Average of central differences along signs (Spall 1992).

    .. math:: \hat g_j = \frac1k \sum_{i=1}^k \frac{f(\theta + c\Delta_i) - f(\theta - c\Delta_i)}{2c\,\Delta_{ij}}

    Parameters
    ----------
    plus, minus : array (k,)
        The objective at :math:`\theta \pm c\Delta_i`.
    signs : pytree
        :math:`\Delta_i`, leading axis (k,), entries -1 or 1 (so that dividing by them is multiplying).
    radius : scalar array
        :math:`c`.
    """
    slopes = (plus - minus) / (2 * tree.cast_like(radius, plus))
    return weighted_sum(slopes / slopes.shape[0], signs)


class SPSA(AbstractBlackBox):
    r"""Simultaneous perturbation stochastic approximation's gradient, for functions that cannot be differentiated.

    .. math:: \hat g_j = \frac{f(\theta + c\Delta) - f(\theta - c\Delta)}{2c\,\Delta_j},
       \qquad \Delta_j = \pm 1 \text{ with probability } \tfrac12

    averaged over ``num_pairs`` independent :math:`\Delta`.

    Parameters
    ----------
    objective : callable, Posterior or Minibatch
        What is ascended: ``objective(params) -> scalar``, or a posterior's log density.
    radius : float
        :math:`c`, in units of the parameters. Too small and rounding decides: the error from it is about ``eps * |f| / c``.
    num_pairs : int
    takes_key : bool
        Whether the objective is ``objective(params, key)``. Both sides of all pairs share the key.

    Raises
    ------
    ValueError, TypeError
        For an objective of another kind, one that returns no scalar, or numbers out of range.

    Notes
    -----
    Biased: the difference sees odd derivatives above the first. It is exact in the mean on quadratics, and on
    :math:`\sum_j a_j \theta_j^3` the bias is :math:`c^2 a_j`. On a quadratic the covariance is that of
    `ForwardGradient` with signs, in total :math:`(d - 1)\lVert g\rVert^2/k`.

    Cost: ``2 * num_pairs`` evaluations; memory for as many copies of the parameters.

    Not where derivatives can be had: `ForwardGradient` has no bias and no radius to choose.

    References
    ----------
    Spall (1992).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> gradient = SPSA(lambda x: -jnp.sum(x**2), radius=0.1)
    >>> estimate, _ = gradient.estimate(jax.random.key(0), jnp.array([1.5]), None)  # one parameter, quadratic: exact
    >>> print(f"{estimate.gradient[0]:.3f}", estimate.n_grad)
    -3.000 2
    """

    objective: Objective
    radius: Array
    num_pairs: int = eqx.field(static=True)

    references: ClassVar = ("spall1992",)

    def __init__(self, objective: Ascended, radius: float, num_pairs: int = 1, *, takes_key: bool = False) -> None:
        self.objective = Objective(objective, takes_key=takes_key)
        self.radius = check.positive("radius", radius)
        self.num_pairs = check.integer("num_pairs", num_pairs)

    def search(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Estimate:
        """Difference the function along ``num_pairs`` vectors of signs."""
        signs = signs_like(key, repeated(self.num_pairs, params))
        plus = jax.vmap(lambda v: function(tree.axpy(self.radius, v, params)))(signs)
        minus = jax.vmap(lambda v: function(tree.axpy(-self.radius, v, params)))(signs)
        gradient = simultaneous_perturbation(plus, minus, signs, self.radius)
        return Estimate(gradient, jnp.mean(plus + minus) / 2, n_grad=2 * self.num_pairs)
