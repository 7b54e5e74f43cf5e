"""Layers that mix coordinates linearly: their score rules are solves or the map itself, and log determinants do not depend on x."""

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.flow import AbstractLayer, constant
from ergodica.core.types import Key
from ergodica.models.flows.masks import invert, take


class Permutation(AbstractLayer):
    """Puts the coordinates in another order: ``y[i] = x[order[i]]``. The score is put in the same order; no parameters.

    Parameters
    ----------
    order : sequence of int
        A permutation of 0 … D - 1.

    Raises
    ------
    ValueError
        For anything else.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> Permutation((2, 0, 1)).forward(jnp.array([0.0, 1.0, 2.0]))[0].tolist()
    [2.0, 0.0, 1.0]
    """

    order: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, order: Sequence[int]) -> None:
        self.order = tuple(int(i) for i in np.asarray(order).ravel())
        if sorted(self.order) != list(range(len(self.order))) or not self.order:
            raise ValueError(f"order must hold each of 0 … D - 1 once; got {order!r}.")

    @classmethod
    def reverse(cls, dim: int) -> "Permutation":
        """The order turned round."""
        return cls(range(check.integer("dim", dim) - 1, -1, -1))

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Reorder."""
        return take(x, self.order), jnp.zeros((), x.dtype)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Put back."""
        return take(y, invert(self.order)), jnp.zeros((), y.dtype)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Reorder both."""
        return *self.forward(x), take(jax.lax.stop_gradient(score), self.order)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Put both back."""
        return *self.inverse(y), take(jax.lax.stop_gradient(score), invert(self.order))


class LinearLU(AbstractLayer):
    r"""An affine map whose matrix is kept as triangular factors.

    .. math:: y = L U x + b, \qquad \log|\det J| = \sum_i \log U_{ii}, \qquad s' = L^{-\top} U^{-\top} s

    with ones on the diagonal of L and a positive one in U. Put a `Permutation` before it for matrices that need pivots.

    Parameters
    ----------
    dim : int
        D. Starts at the identity.

    Attributes
    ----------
    factors : array (D, D)
        L below the diagonal, U above it, the logarithm of the diagonal of U on it.
    shift : array (D,)

    Notes
    -----
    Cost a point: two triangular products forward; two triangular solves for the inverse, and two for the score: :math:`O(D^2)`.

    References
    ----------
    Kingma and Dhariwal (2018), section 3.2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> LinearLU(3).forward(jnp.arange(3.0))[0].tolist()
    [0.0, 1.0, 2.0]
    """

    factors: Array
    shift: Array

    references: ClassVar[tuple[str, ...]] = ("kingma2018",)

    def __init__(self, dim: int) -> None:
        self.factors = jnp.zeros((check.integer("dim", dim), dim))
        self.shift = jnp.zeros(dim)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Multiply by U, by L, and shift."""
        lower, upper = self._triangles()
        return lower @ (upper @ x) + self.shift, self._log_det()

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Shift back and solve with L and U."""
        lower, upper = self._triangles()
        half = solve_triangular(lower, y - self.shift, lower=True, unit_diagonal=True)
        return solve_triangular(upper, half), -self._log_det()

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Multiply the point, solve for the score with the transposed factors."""
        lower, upper = constant(self)._triangles()
        half = solve_triangular(upper, jax.lax.stop_gradient(score), trans=1)
        score = solve_triangular(lower, half, lower=True, trans=1, unit_diagonal=True)
        y, log_det = self.forward(x)
        return y, jax.lax.stop_gradient(log_det), score

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Solve for the point, multiply the score with the transposed factors."""
        lower, upper = constant(self)._triangles()
        x, log_det = self.inverse(y)
        return x, jax.lax.stop_gradient(log_det), (jax.lax.stop_gradient(score) @ lower) @ upper

    def _triangles(self) -> tuple[Array, Array]:
        lower = jnp.tril(self.factors, -1) + jnp.eye(len(self.shift), dtype=self.factors.dtype)
        return lower, jnp.triu(self.factors, 1) + jnp.diag(jnp.exp(jnp.diagonal(self.factors)))

    def _log_det(self) -> Array:
        return jnp.sum(jnp.diagonal(self.factors))


class Householder(AbstractLayer):
    r"""A rotation or reflection, as a product of reflections in hyperplanes.

    .. math:: Q = H_n \cdots H_1, \qquad H_k = I - 2\,\frac{v_k v_k^\top}{v_k^\top v_k}, \qquad \log|\det Q| = 0, \qquad s' = Q s

    Parameters
    ----------
    key : key
        Draws the vectors at random.
    dim : int
        D.
    num_reflections : int, optional
        n; D of them reach every orthogonal matrix of determinant :math:`(-1)^D`. Two by default.

    Notes
    -----
    Does not start at the identity. Cost: n scalar products for the point, and n for the score.

    References
    ----------
    Tomczak and Welling (2016).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> y, _ = Householder(jax.random.key(0), 3).forward(jnp.array([3.0, 0.0, 4.0]))
    >>> round(float(jnp.linalg.norm(y)), 5)
    5.0
    """

    vectors: Array

    references: ClassVar[tuple[str, ...]] = ("tomczak2016",)

    def __init__(self, key: Key, dim: int, num_reflections: int = 2) -> None:
        rng.check_key(key)
        self.vectors = jax.random.normal(
            key, (check.integer("num_reflections", num_reflections), check.integer("dim", dim))
        )

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Reflect in turn."""
        return self._reflect(x, self.vectors), jnp.zeros((), x.dtype)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Reflect in the opposite turn."""
        return self._reflect(y, self.vectors[::-1]), jnp.zeros((), y.dtype)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Reflect both."""
        return *self.forward(x), constant(self).forward(jax.lax.stop_gradient(score))[0]

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Reflect both in the opposite turn."""
        return *self.inverse(y), constant(self).inverse(jax.lax.stop_gradient(score))[0]

    @staticmethod
    def _reflect(x: Array, vectors: Array) -> Array:
        for v in vectors:
            x = x - v * (2 * (v @ x) / (v @ v))
        return x
