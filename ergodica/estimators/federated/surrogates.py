r"""What stands for a client's likelihood at the others: exponential families, one member a client.

With :math:`\log q_s(\theta) = \eta_s \cdot T(\theta)` up to a constant, the product of all is the member with parameter
:math:`\sum_s \eta_s`: whatever the number of clients, it is evaluated once.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.shards import Shards
from ergodica.core.types import Position, PyTree


class AbstractSurrogates(eqx.Module):
    """Natural parameters of all clients, and their sum.

    Attributes
    ----------
    natural : pytree
        With the clients along the leading axis of every leaf.
    total : pytree
        The sum over all clients, without that axis. A client needs this and its own part, and nothing of any other.
    """

    natural: eqx.AbstractVar[PyTree]
    total: eqx.AbstractVar[PyTree]

    @abc.abstractmethod
    def evaluate(self, natural: PyTree, params: PyTree) -> tuple[Array, PyTree]:
        """Log density and its gradient at natural parameters without the leading axis; linear in these."""

    def of(self, client: Array | int) -> PyTree:
        """Natural parameters of one client."""
        return jax.tree.map(lambda x: jnp.take(x, client, axis=0, mode="clip"), self.natural)

    def conducive(self, params: PyTree, client: Array, share: Array) -> tuple[Array, PyTree]:
        r"""Value and gradient of :math:`\log q - \frac{1}{f_s} \log q_s`, by one evaluation.

        El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), section 3.1; its mean over clients drawn with :math:`f` is 0.
        """
        combined = jax.tree.map(lambda t, x: t - x / tree.cast_like(share, x), self.total, self.of(client))
        return self.evaluate(combined, params)

    def only(self, client: int) -> "AbstractSurrogates":
        """Keep the parameters of one client and the sum over all: what one client is sent."""
        return eqx.tree_at(lambda s: s.natural, self, jax.tree.map(lambda x: x[client : client + 1], self.natural))

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return jax.tree.leaves(self.natural)[0].shape[0]


class Natural(NamedTuple):
    r"""Of Gaussians about a centre :math:`c`: :math:`\log q(\theta) = b \cdot x - \frac12 x^T P x` with :math:`x = \theta - c`.

    Attributes
    ----------
    linear : array (..., D)
        :math:`b`, the gradient at the centre.
    precision : array (..., D) or (..., D, D)
        :math:`P`, its diagonal, or, where there is a basis, the diagonal part.
    core : array (..., r, r) or None
        Of ``basis @ core @ basis.T``, to be added.
    """

    linear: Array
    precision: Array
    core: Array | None = None


class GaussianSurrogates(AbstractSurrogates):
    r"""Gaussian surrogates :math:`q_s = N(m_s, P_s^{-1})`.

    Parameters
    ----------
    mean : pytree
        The means, with the clients along the leading axis of every leaf.
    precision : pytree or array (S, D, D)
        Precisions of the coordinates in the structure of ``mean``, or matrices in the order of the raveled position.
    centre : pytree, optional
        A position near the posterior about which the parameters are kept; it matters for rounding alone. The weighted mean unless
        given.

    Attributes
    ----------
    basis : array (D, r) or None
        Common to all clients, for precisions that are diagonal plus low rank (`low_rank`): sums stay of that form.

    Raises
    ------
    ValueError, TypeError
        For means and precisions that do not fit each other, or that are not finite.

    Notes
    -----
    Surrogates are of the likelihoods alone. A share of the prior, :math:`p(\theta)^{f_s}` with the probabilities of the
    `Conducive` gradient, may be in them too and cancels; see `laplace_surrogates`. Precisions need not be positive definite:
    they correct drifts, and are never sampled from. Cost of an evaluation: :math:`O(D)`, :math:`O(D^2)` for matrices,
    :math:`O(rD)` for low rank.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), section 3.2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = GaussianSurrogates(mean=jnp.array([0.0, 3.0]), precision=jnp.array([2.0, 1.0]))
    >>> float(q.centre), [float(g) for g in (q.conducive(q.centre, jnp.array(s), jnp.array(0.5))[1] for s in (0, 1))]
    (1.0, [4.0, -4.0])
    """

    centre: Position
    natural: Natural
    total: Natural
    basis: Array | None

    def __init__(self, mean: PyTree, precision: Any, *, centre: Position | None = None) -> None:
        means, precisions = _stacked("mean", mean), _precisions(precision, mean)
        if centre is None:
            flat = _weighted_mean(means, precisions)
            centre = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x[0], float), mean))[1](
                jnp.asarray(flat, jnp.result_type(float))
            )
        away = means - _flat(centre)
        linear = np.einsum("sde,se->sd", precisions, away) if precisions.ndim == 3 else precisions * away
        self._set(centre, linear, precisions)

    @classmethod
    def expansion(cls, centre: Position, gradient: Any, precision: Any) -> "GaussianSurrogates":
        """Make surrogates from gradients (S, D) and negative Hessians (S, D, D) or their diagonals (S, D) at one position."""
        self = object.__new__(cls)
        self._set(check.position("centre", centre), np.asarray(gradient, np.float64), np.asarray(precision, np.float64))
        return self

    def _set(self, centre: Position, linear: np.ndarray, precision: np.ndarray) -> None:
        if not (np.all(np.isfinite(linear)) and np.all(np.isfinite(precision))):
            raise ValueError("Means and precisions of surrogates must be finite; got NaN or infinity.")
        put = object.__setattr__
        put(self, "centre", centre)
        put(self, "basis", None)
        put(self, "natural", Natural(_float(linear), _float(precision)))
        put(self, "total", Natural(_float(linear.sum(0)), _float(precision.sum(0))))

    def low_rank(self, rank: int) -> "GaussianSurrogates":
        r"""Keep of each precision matrix its diagonal, and the part in the ``rank`` leading directions of their sum.

        .. math:: P_s \approx \operatorname{diag}(d_s) + U M_s U^T, \qquad M_s = U^T (P_s - \operatorname{diag} P_s)\, U

        :math:`d_s` is such that the diagonal of :math:`P_s` is kept. With one basis for all, the sum over clients has the same
        form. The matrices themselves are needed once, here.
        """
        full = np.asarray(self.natural.precision, np.float64)
        if full.ndim != 3:
            raise ValueError("low_rank needs precision matrices; these are diagonal already.")
        rank = check.integer("rank", rank, most=full.shape[-1])
        diagonal = np.einsum("sdd->sd", full)
        rest = full - np.eye(full.shape[-1]) * diagonal[:, None]
        values, vectors = np.linalg.eigh(rest.sum(0))
        basis = vectors[:, np.argsort(-np.abs(values))[:rank]]
        core = np.einsum("dr,sde,eq->srq", basis, rest, basis)
        diagonal = diagonal - np.einsum("dr,srq,dq->sd", basis, core, basis)
        natural = Natural(self.natural.linear, _float(diagonal), _float(core))
        total = Natural(self.total.linear, _float(diagonal.sum(0)), _float(core.sum(0)))
        return eqx.tree_at(
            lambda q: (q.natural, q.total, q.basis),
            self,
            (natural, total, _float(basis)),
            is_leaf=lambda x: x is None,
        )

    def evaluate(self, natural: Natural, params: PyTree) -> tuple[Array, PyTree]:
        """Log density and gradient of one Gaussian, or of a combination of them."""
        flat, unravel = ravel_pytree(params)
        away = flat - ravel_pytree(self.centre)[0].astype(flat.dtype)
        linear, precision, core = jax.tree.map(lambda x: x.astype(flat.dtype), natural)
        pull = precision @ away if precision.ndim == 2 else precision * away
        if core is not None:
            basis = self.basis.astype(flat.dtype)  # pyright: ignore[reportOptionalMemberAccess]
            pull = pull + basis @ (core @ (basis.T @ away))
        gradient = linear - pull
        return jnp.sum(away * (linear + gradient)) / 2, unravel(gradient)


class ExponentialSurrogates(AbstractSurrogates):
    r"""Surrogates of any exponential family, :math:`\log q_s(\theta) = \eta_s \cdot T(\theta)`.

    Parameters
    ----------
    statistic : callable
        ``statistic(position) -> array (K,)``: :math:`T`.
    natural : array (S, K)
        :math:`\eta_s`.

    Notes
    -----
    Exact where a likelihood is a member itself: for counts :math:`y_i` with rate :math:`e^\theta`, the statistic is
    :math:`(\theta, e^\theta)` and :math:`\eta_s = (\sum_i y_i, -N_s)`; `from_data` adds such terms up. Cost: one value and
    gradient of ``statistic``.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), section 3.2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = ExponentialSurrogates(lambda t: jnp.stack([t, jnp.exp(t)]), jnp.array([[7.0, -2.0], [3.0, -2.0]]))
    >>> value, gradient = q.evaluate(q.total, jnp.array(0.0))
    >>> float(value), float(gradient)
    (-4.0, 6.0)
    """

    statistic: Callable
    natural: Array
    total: Array

    def __init__(self, statistic: Callable[[PyTree], Array], natural: Any) -> None:
        check.function("statistic", statistic)
        self.statistic = statistic if isinstance(statistic, jax.tree_util.Partial) else jax.tree_util.Partial(statistic)
        natural = np.asarray(natural, np.float64)
        if natural.ndim != 2 or not np.all(np.isfinite(natural)):
            raise ValueError(f"natural must be finite, of shape (clients, K); got shape {natural.shape}.")
        self.natural, self.total = _float(natural), _float(natural.sum(0))

    @classmethod
    def from_data(
        cls, shards: Shards, statistic: Callable[[PyTree], Array], of_rows: Callable[[PyTree], Array]
    ) -> "ExponentialSurrogates":
        """Add up ``of_rows(rows) -> (n, K)``, what each datum contributes to the natural parameters, client by client."""
        terms = np.asarray(of_rows(shards.rows), np.float64)
        return cls(statistic, np.add.reduceat(terms, np.asarray(shards.offsets), axis=0))

    def evaluate(self, natural: Array, params: PyTree) -> tuple[Array, PyTree]:
        """Log density and gradient at natural parameters (K,)."""

        def log_density(params: PyTree) -> Array:
            statistic = self.statistic(params)
            return jnp.sum(natural.astype(statistic.dtype) * statistic)

        return jax.value_and_grad(log_density)(params)


def _float(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.result_type(float))


def _flat(position: Position) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(position)])


def _stacked(name: str, values: PyTree) -> np.ndarray:
    """Ravel what lies behind the axis of the clients: (S, D)."""
    count = check.leading_length(name, values)
    return np.concatenate([np.asarray(x, np.float64).reshape(count, -1) for x in jax.tree.leaves(values)], axis=1)


def _precisions(precision: Any, mean: PyTree) -> np.ndarray:
    count, size = _stacked("mean", mean).shape
    if jax.tree.structure(precision) == jax.tree.structure(mean) and all(
        jnp.shape(p) == jnp.shape(m) for p, m in zip(jax.tree.leaves(precision), jax.tree.leaves(mean), strict=True)
    ):
        return _stacked("precision", precision)
    if jax.tree_util.all_leaves([precision]) and jnp.shape(precision) == (count, size, size):
        return np.asarray(precision, np.float64)
    raise ValueError(
        f"precision must have the structure and shapes of mean, or be matrices of shape ({count}, {size}, {size}); got "
        f"{jax.tree.map(jnp.shape, precision)}."
    )


def _weighted_mean(means: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """The mode of the product of all, or the plain mean where that is none."""
    if precisions.ndim == 3:
        total, linear = precisions.sum(0), np.einsum("sde,se->d", precisions, means)
        proper = np.linalg.eigvalsh((total + total.T) / 2).min() > 0
        return np.linalg.solve(total, linear) if proper else means.mean(0)
    total = precisions.sum(0)
    plain = means.mean(0)
    return np.where(total > 0, (precisions * means).sum(0) / np.where(total > 0, total, 1), plain)
