"""Gradients from directional derivatives: forward mode alone, no backward pass."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.types import Draws, Estimate, Key, PyTree
from ergodica.estimators.evolution.objective import (
    AbstractBlackBox,
    Ascended,
    Objective,
    normal_draws,
    repeated,
    signs_like,
    weighted_sum,
)

DIRECTIONS = ("gaussian", "signs")


def forward_gradient(derivatives: Array, directions: PyTree) -> PyTree:
    r"""Average of directions, each times the derivative along it (Baydin et al. 2022).

    .. math:: \hat g = \frac1k \sum_{i=1}^k (\nabla f \cdot v_i)\, v_i

    Parameters
    ----------
    derivatives : array (k,)
        :math:`\nabla f \cdot v_i`.
    directions : pytree
        :math:`v_i`, leading axis (k,), with mean 0 and covariance the identity.
    """
    return weighted_sum(derivatives / derivatives.shape[0], directions)


class ForwardGradient(AbstractBlackBox):
    r"""Forward gradient: derivatives along random directions, by forward-mode differentiation.

    .. math:: \hat g = \frac1k \sum_{i=1}^k (\nabla f(\theta) \cdot v_i)\, v_i,
       \qquad \mathrm{E}\, v v^\top = I

    Parameters
    ----------
    objective : callable, Posterior or Minibatch
        What is ascended: ``objective(params) -> scalar``, which JAX can differentiate forwards; or a posterior's log density.
    num_directions : int
        :math:`k`.
    directions : {"gaussian", "signs"}
        Standard normal :math:`v`, or independent signs.
    takes_key : bool
        Whether the objective is ``objective(params, key)``. All directions share the key.

    Raises
    ------
    ValueError, TypeError
        For an objective of another kind, one that returns no scalar, or numbers out of range.

    Notes
    -----
    Unbiased, for any differentiable function. With :math:`g` the gradient and :math:`d` parameters,

    .. math:: \mathrm{Cov}\,\hat g = \tfrac1k\left(\lVert g\rVert^2 I + g g^\top\right) \text{ (Gaussian)}, \qquad
       \tfrac1k\left(\lVert g\rVert^2 I + g g^\top - 2\,\mathrm{diag}(g^2)\right) \text{ (signs)},

    in total :math:`(d + 1)\lVert g\rVert^2/k` and :math:`(d - 1)\lVert g\rVert^2/k`: signs are never worse.

    Cost: :math:`k` Jacobian-vector products, each about two evaluations, counted as one; the memory of an evaluation, and :math:`k`
    copies of the parameters.

    Not for problems where reverse mode fits in memory: that gives all :math:`d` derivatives, without noise, for about four
    evaluations.

    References
    ----------
    Baydin et al. (2022).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> gradient = ForwardGradient(lambda x: -jnp.sum(x**2), num_directions=2000, directions="signs")
    >>> estimate, _ = gradient.estimate(jax.random.key(0), jnp.array([1.0, -2.0]), None)
    >>> bool(jnp.all(jnp.abs(estimate.gradient - jnp.array([-2.0, 4.0])) < 0.5)), float(estimate.value), estimate.n_grad
    (True, -5.0, 2000)
    """

    objective: Objective
    num_directions: int = eqx.field(static=True)
    directions: str = eqx.field(static=True)

    references: ClassVar = ("baydin2022",)
    differentiates: ClassVar = True

    def __init__(
        self,
        objective: Ascended,
        num_directions: int = 1,
        *,
        directions: Literal["gaussian", "signs"] = "gaussian",
        takes_key: bool = False,
    ) -> None:
        self.objective = Objective(objective, takes_key=takes_key)
        self.num_directions = check.integer("num_directions", num_directions)
        self.directions = check.one_of("directions", directions, DIRECTIONS)

    def search(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Estimate:
        """Average the derivatives along ``num_directions`` directions."""
        directions, values, derivatives = self._derivatives(key, params, function)
        return Estimate(forward_gradient(derivatives, directions), values[0], n_grad=self.num_directions)

    def draws(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Draws | None:
        """Direction by direction; ``None`` for signs, which are not normal."""
        if self.directions != "gaussian":
            return None
        directions, values, derivatives = self._derivatives(key, params, function)
        return normal_draws(derivatives, directions, values, self.num_directions)

    def _derivatives(
        self, key: Key, params: PyTree, function: Callable[[PyTree], Array]
    ) -> tuple[PyTree, Array, Array]:
        """Directions, and the function's value and derivative along each."""
        draw = rng.normal_like if self.directions == "gaussian" else signs_like
        directions = draw(key, repeated(self.num_directions, params))
        values, derivatives = jax.vmap(lambda v: jax.jvp(function, (params,), (v,)))(directions)
        return directions, values, derivatives
