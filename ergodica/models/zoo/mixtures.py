"""Mixtures of Gaussians: several modes, and every answer in closed form."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue, finite_float

_LOG_2PI = math.log(2 * math.pi)


class GaussianMixtureCube(AbstractTarget):
    r"""A Gaussian of covariance :math:`v I` at each corner of a cube, each of weight 1 (:math:`\log Z = D \log 2`).

    .. math:: \pi(x) = \sum_{c \in \{-a, a\}^D} N(x; c, v I) = \prod_{i=1}^D \left( N(x_i; -a, v) + N(x_i; a, v) \right)

    The mixture is a product over the coordinates, so that an evaluation takes D terms for :math:`2^D` modes.

    Parameters
    ----------
    dim : int
        D.
    location : float
        a.
    variance : float
        v. At 0.5 (as in the released code of the paper) the modes overlap; at :math:`v \ll a^2` they are islands.

    Raises
    ------
    ValueError, TypeError
        If an argument is not positive and finite.

    Notes
    -----
    Observables: ``mean``, the average over the coordinates (0); ``mean_square`` of the coordinates (:math:`a^2 + v`);
    ``all_positive``, whether x lies in the orthant of the all-positive corner (:math:`2^{-D}`); ``product``, :math:`x_1 x_2`
    (0; left out for D = 1). The last sees modes that were dropped where each coordinate alone still looks right.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024).

    Examples
    --------
    >>> import jax
    >>> target = gaussian_mixture_cube(6)
    >>> target.draws(jax.random.key(0), 3).shape, round(target.log_normaliser.value, 4)
    ((3, 6), 4.1589)
    """

    dim: int = eqx.field(static=True)
    location: float = eqx.field(static=True)
    variance: float = eqx.field(static=True)

    source: ClassVar[str] = "Vaitl, Winkler, Richter and Kessel (2024), section 5."
    licence: ClassVar[str] = "A formula; no data."
    references: ClassVar[tuple[str, ...]] = ("vaitl2024",)

    def __init__(self, dim: int, location: float = 1.0, variance: float = 0.5) -> None:
        self.dim = check.integer("dim", dim)
        self.location = finite_float("location", location, positive=True)
        self.variance = finite_float("variance", variance, positive=True)

    def log_density(self, x: Array) -> Array:
        """Sum over the coordinates of the log of two normal densities."""

        def log_normal(mean: float) -> Array:
            return -0.5 * (x - mean) ** 2 / self.variance

        terms = jnp.logaddexp(log_normal(-self.location), log_normal(self.location))
        return jnp.sum(terms) - 0.5 * self.dim * (_LOG_2PI + math.log(self.variance))

    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars at one point."""
        values = {
            "mean": jnp.mean(x),
            "mean_square": jnp.mean(x**2),
            "all_positive": jnp.all(x > 0).astype(x.dtype),
        }
        return values if self.dim == 1 else values | {"product": x[0] * x[1]}

    @property
    def log_normaliser(self) -> ReferenceValue:
        """D log 2."""
        return ReferenceValue(self.dim * math.log(2))

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Closed forms."""
        values = {"mean": 0.0, "mean_square": self.location**2 + self.variance, "all_positive": 0.5**self.dim}
        if self.dim > 1:
            values["product"] = 0.0
        return {name: ReferenceValue(value) for name, value in values.items()}

    def start(self, key: Key) -> Array:
        """Draw a point of the target."""
        return self._draws(key, 1)[0]

    @property
    def has_draws(self) -> bool:
        """Always."""
        return True

    def _draws(self, key: Key, num_draws: int) -> Array:
        key_corner, key_noise = jax.random.split(key)
        shape = (num_draws, self.dim)
        signs = jax.random.rademacher(key_corner, shape, jnp.result_type(float))
        return self.location * signs + math.sqrt(self.variance) * jax.random.normal(key_noise, shape)


def gaussian_mixture_cube(dim: int, location: float = 1.0, variance: float = 0.5) -> GaussianMixtureCube:
    """`GaussianMixtureCube`: a mode at each of the 2^D corners of a cube."""
    return GaussianMixtureCube(dim, location, variance)


class GaussianMixture(AbstractTarget):
    r"""Any mixture of K Gaussians.

    .. math:: \pi(x) = \sum_{k=1}^K w_k N(x; \mu_k, \Sigma_k)

    Parameters
    ----------
    means : array (K, D)
    covariances : array (K, D, D), or (D, D) for all
    weights : array (K,), optional
        Positive; 1/K each unless given. Their sum is the normaliser: they are used as they are.

    Raises
    ------
    ValueError, TypeError
        For shapes that do not fit, covariances that are not symmetric and positive definite, or weights that are not positive.

    Notes
    -----
    Observables: the coordinates ``x[i]`` and their squares ``x[i]^2``. Cost of an evaluation: :math:`K D^2`.

    Examples
    --------
    >>> import numpy as np
    >>> target = gaussian_mixture(np.array([[-2.0, 0.0], [2.0, 1.0]]), np.eye(2), np.array([0.25, 0.75]))
    >>> target.reference["x[0]"].value, target.reference["x[1]^2"].value
    (1.0, 1.75)
    """

    dim: int = eqx.field(static=True)
    means: np.ndarray
    factors: np.ndarray
    weights: np.ndarray

    source: ClassVar[str] = "A mixture of Gaussians."
    licence: ClassVar[str] = "A formula; no data."

    def __init__(self, means: Any, covariances: Any, weights: Any = None) -> None:
        self.means = _array("means", means, 2, "(K, D)")
        num, self.dim = self.means.shape
        covariances = np.asarray(covariances, np.float64)
        if covariances.shape not in ((self.dim, self.dim), (num, self.dim, self.dim)):
            raise ValueError(
                f"covariances must have shape {(num, self.dim, self.dim)} or {(self.dim, self.dim)}, as means have shape "
                f"{self.means.shape}; got {covariances.shape}."
            )
        if not np.allclose(covariances, np.swapaxes(covariances, -1, -2)):
            raise ValueError("covariances must be symmetric. Give (C + C.T) / 2 if they are so up to rounding.")
        try:
            factors = np.linalg.cholesky(covariances)
        except np.linalg.LinAlgError as error:
            raise ValueError("covariances must be positive definite; one has no Cholesky factor.") from error
        self.factors = np.broadcast_to(factors, (num, self.dim, self.dim))
        self.weights = np.full(num, 1 / num) if weights is None else _array("weights", weights, 1, "(K,)")
        if self.weights.shape != (num,) or not np.all(self.weights > 0):
            raise ValueError(f"weights must be {num} positive numbers, one a row of means; got {weights!r}.")

    def log_density(self, x: Array) -> Array:
        """Log of the sum of the weighted normal densities."""
        means, factors, weights = (jnp.asarray(a, x.dtype) for a in (self.means, self.factors, self.weights))
        scales = jnp.sum(jnp.log(jnp.diagonal(factors, 0, 1, 2)), axis=1)
        constant = jnp.log(weights) - 0.5 * self.dim * _LOG_2PI - scales

        def exponent(mean: Array, factor: Array) -> Array:
            return -0.5 * jnp.sum(jax.scipy.linalg.solve_triangular(factor, x - mean, lower=True) ** 2)

        return jax.nn.logsumexp(jax.vmap(exponent)(means, factors) + constant)

    def observables(self, x: Array) -> dict[str, Array]:
        """Coordinates and their squares."""
        return {f"x[{i}]": x[i] for i in range(self.dim)} | {f"x[{i}]^2": x[i] ** 2 for i in range(self.dim)}

    @property
    def log_normaliser(self) -> ReferenceValue:
        """Log of the sum of the weights."""
        return ReferenceValue(float(np.log(self.weights.sum())))

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Closed forms."""
        shares = self.weights / self.weights.sum()
        first = shares @ self.means
        second = shares @ (self.means**2 + np.sum(self.factors**2, axis=-1))
        return {f"x[{i}]": ReferenceValue(float(v)) for i, v in enumerate(first)} | {
            f"x[{i}]^2": ReferenceValue(float(v)) for i, v in enumerate(second)
        }

    def start(self, key: Key) -> Array:
        """Draw a point of the target."""
        return self._draws(key, 1)[0]

    @property
    def has_draws(self) -> bool:
        """Always."""
        return True

    def _draws(self, key: Key, num_draws: int) -> Array:
        key_component, key_noise = jax.random.split(key)
        dtype = jnp.result_type(float)
        which = jax.random.categorical(key_component, jnp.log(jnp.asarray(self.weights, dtype)), shape=(num_draws,))
        noise = jax.random.normal(key_noise, (num_draws, self.dim))
        means, factors = jnp.asarray(self.means, dtype), jnp.asarray(self.factors, dtype)
        return means[which] + jnp.einsum("nij,nj->ni", factors[which], noise)


def gaussian_mixture(
    means: Any, covariances: Any, weights: Sequence[float] | np.ndarray | None = None
) -> GaussianMixture:
    """`GaussianMixture` of any means, covariances and weights."""
    return GaussianMixture(means, covariances, weights)


def _array(name: str, value: Any, ndim: int, shape: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.ndim != ndim or array.size == 0 or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite numbers of shape {shape}; got shape {array.shape}.")
    return array
