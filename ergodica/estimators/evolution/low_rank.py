"""Evolution strategies whose perturbations of matrices have low rank (EGGROLL)."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.types import Estimate, Key, PyTree
from ergodica.estimators.evolution.objective import AbstractBlackBox, Ascended, Objective, repeated
from ergodica.estimators.evolution.strategy import Shaping, antithetic_weights, check_shaping


class Factors(eqx.Module):
    r"""Factors of perturbations :math:`E = A B^\top / \sqrt r` of an (m, n) matrix.

    Attributes
    ----------
    left : array (…, m, r)
    right : array (…, n, r)
    """

    left: Array
    right: Array


class PerturbedMatrix(eqx.Module):
    r"""A matrix :math:`W + s\,A B^\top` that is multiplied without being formed.

    Stands in for ``W`` in ``x @ W``, ``W @ x`` and ``W.T``; `dense` forms it.

    Attributes
    ----------
    matrix : array (m, n)
    left : array (m, r)
    right : array (n, r)
    factor : scalar array
        :math:`s`, which is :math:`\pm\sigma/\sqrt r`.
    """

    matrix: Array
    left: Array
    right: Array
    factor: Array

    def __matmul__(self, x: Array) -> Array:
        return self.matrix @ x + self.factor * (self.left @ (self.right.T @ x))

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.matrix + self.factor * ((x @ self.left) @ self.right.T)

    @property
    def T(self) -> "PerturbedMatrix":
        """The transpose."""
        return PerturbedMatrix(self.matrix.T, self.right, self.left, self.factor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (m, n)."""
        return self.matrix.shape

    def dense(self) -> Array:
        """Form the matrix (m, n)."""
        return self.matrix + self.factor * (self.left @ self.right.T)


def sum_of_products(weights: Array, factors: Factors) -> Array:
    r"""Sum :math:`\sum_i w_i A_i B_i^\top / \sqrt r` (m, n), no term of which is formed.

    Parameters
    ----------
    weights : array (k,)
    factors : Factors
        Leading axis (k,).
    """
    left, right = factors.left, factors.right
    scale = (weights.astype(left.dtype) / jnp.sqrt(jnp.asarray(left.shape[-1], left.dtype)))[:, None, None]
    return jnp.einsum("kmr,knr->mn", scale * left, right)


class LowRankEvolution(AbstractBlackBox):
    r"""Evolution strategy whose perturbation of each matrix is a product of two thin ones (EGGROLL).

    .. math:: \hat g = \frac{1}{2\sigma k}\sum_{i=1}^k \big(f(W + \sigma E_i) - f(W - \sigma E_i)\big) E_i,
       \qquad E_i = A_i B_i^\top/\sqrt r

    with :math:`A_i` (m, r) and :math:`B_i` (n, r) standard normal. Leaves of the parameters that are no matrices get the full
    Gaussian perturbation of `EvolutionStrategy`.

    Parameters
    ----------
    objective : callable, Posterior or Minibatch
        What is ascended.
    sigma : float
        Standard deviation of each entry of the perturbations, in units of the parameters.
    num_pairs : int
        :math:`k`.
    rank : int
        :math:`r`.
    factored : bool
        Whether the objective gets each matrix as a `PerturbedMatrix`, which is multiplied without being formed. The objective
        must then use matrices by ``x @ W``, ``W @ x`` or ``W.T`` alone.
    shaping : {"rank", None}
        With ``"rank"``, centred ranks take the place of the objective, as in `EvolutionStrategy`.
    takes_key : bool
        Whether the objective is ``objective(params, key)``. All points share the key.

    Raises
    ------
    ValueError, TypeError
        For an objective of another kind, one that returns no scalar, or numbers out of range.

    Notes
    -----
    Entries of :math:`E` are uncorrelated with variance 1, but not Gaussian for finite :math:`r`. The estimate is exact in the
    mean on quadratics, for every rank. Elsewhere it is biased to order :math:`\sigma^2`, and is not the gradient of a Gaussian
    smoothing, since :math:`E` is not the score of its own law: on :math:`\sum_{ij} a_{ij} W_{ij}^3` the bias is
    :math:`(3 + 6/r)\, a_{ij} \sigma^2`, three times that of `EvolutionStrategy` at rank 1. On a quadratic with gradient
    :math:`G`, the total variance of a pair is

    .. math:: \lVert G\rVert^2 \left(m n + 1 + \frac{2(m + n + 1)}{r}\right),

    against :math:`\lVert G\rVert^2(m n + 1)` at full rank: for large matrices rank 1 costs next to nothing.

    Cost: ``2 * num_pairs`` evaluations. Memory with ``factored=True``: ``num_pairs * rank * (m + n)`` numbers instead of
    ``num_pairs * m * n``.

    Not for vectors and scalars, where it is `EvolutionStrategy`.

    References
    ----------
    Sarkar et al. (2025).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> search = LowRankEvolution(lambda w: -jnp.sum((x @ w) ** 2), sigma=0.1, num_pairs=8, factored=True)
    >>> estimate, _ = search.estimate(jax.random.key(0), jnp.ones((3, 4)), None)
    >>> estimate.gradient.shape, estimate.n_grad
    ((3, 4), 16)
    """

    objective: Objective
    sigma: Array
    num_pairs: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    factored: bool = eqx.field(static=True)
    shaping: Shaping = eqx.field(static=True)

    references: ClassVar = ("sarkar2025", "salimans2017")

    def __init__(
        self,
        objective: Ascended,
        sigma: float,
        num_pairs: int = 1,
        rank: int = 1,
        *,
        factored: bool = False,
        shaping: Shaping = None,
        takes_key: bool = False,
    ) -> None:
        self.objective = Objective(objective, takes_key=takes_key)
        self.sigma = check.positive("sigma", sigma)
        self.num_pairs = check.integer("num_pairs", num_pairs)
        self.rank = check.integer("rank", rank)
        self.factored = bool(factored)
        self.shaping = check_shaping(shaping)

    def search(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Estimate:
        """Evaluate at ``num_pairs`` mirrored pairs of perturbed parameters."""
        shapes = jax.tree.map(lambda x: self._factor_shapes(x), params)
        noise = rng.normal_like(key, shapes)
        plus = jax.vmap(lambda v: function(self._perturbed(params, v, self.sigma)))(noise)
        minus = jax.vmap(lambda v: function(self._perturbed(params, v, -self.sigma)))(noise)
        weights = antithetic_weights(plus, minus, self.sigma, self.shaping)

        def summed(v: Any) -> Array:
            return (
                sum_of_products(weights, v) if isinstance(v, Factors) else jnp.tensordot(weights.astype(v.dtype), v, 1)
            )

        gradient = jax.tree.map(summed, noise, is_leaf=_is_factors)
        return Estimate(gradient, jnp.mean(plus + minus) / 2, n_grad=2 * self.num_pairs)

    def _factor_shapes(self, leaf: Array) -> Any:
        if jnp.ndim(leaf) != 2:
            return repeated(self.num_pairs, leaf)
        m, n = leaf.shape
        sides = [jax.ShapeDtypeStruct((self.num_pairs, side, self.rank), leaf.dtype) for side in (m, n)]
        return Factors(*sides)  # pyright: ignore[reportArgumentType]

    def _perturbed(self, params: PyTree, noise: PyTree, sigma: Array) -> PyTree:
        """Parameters moved along one perturbation."""

        def move(v: Any, x: Array) -> Any:
            if not isinstance(v, Factors):
                return tree.axpy(sigma, v, x)
            factor = tree.cast_like(sigma, x) / jnp.sqrt(jnp.asarray(self.rank, x.dtype))
            moved = PerturbedMatrix(x, v.left, v.right, factor)
            return moved if self.factored else moved.dense()

        return jax.tree.map(move, noise, params, is_leaf=_is_factors)


def _is_factors(x: Any) -> bool:
    return isinstance(x, Factors)
