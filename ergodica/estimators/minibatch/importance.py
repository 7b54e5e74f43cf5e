"""Rows drawn with unequal probabilities, and the probabilities that suit a target."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, PyTree
from ergodica.estimators.minibatch.likelihood import of_each_datum, squared_norm

_ROWS_AT_ONCE = 1024
_RANGE = 2**32


class Proposal(eqx.Module):
    """How rows are drawn.

    A row is drawn by 32 random bits: row ``i`` has those from ``edges[i - 1]`` up to ``edges[i]``. Whole numbers, since the
    cumulative sum of a million probabilities in single precision would misstate each by several per cent.

    Attributes
    ----------
    edges : uint32 array (N - 1,)
    weight : array (N,)
        ``1 / (N p)``, for the probability that the edges give.
    """

    edges: Array
    weight: Array

    references: ClassVar = ("putcha2023",)


def make_proposal(probabilities: Any, num_data: int) -> Proposal:
    """Round probabilities to multiples of 2⁻³² and weight each row by what it then has, so that no bias comes of rounding."""
    p = np.asarray(probabilities, np.float64)
    if p.shape != (num_data,):
        raise ValueError(f"probabilities must have one entry a datum, of shape ({num_data},); got {p.shape}.")
    if not np.all(np.isfinite(p)) or np.any(p < 0) or abs(p.sum() - 1) > 1e-3:
        raise ValueError(
            f"probabilities must be finite, not negative and have the sum 1; got entries from {p.min()} to {p.max()} "
            f"with the sum {p.sum()}."
        )
    cumulative = np.cumsum(p / p.sum())
    edges = np.rint(np.minimum(cumulative, 1.0) * _RANGE)
    edges[-1] = _RANGE
    width = np.diff(edges, prepend=0.0)
    if np.any(width == 0):
        raise ValueError(
            f"probabilities must be at least {1 / _RANGE:.2g}, or the estimate is biased; got {p.min():.2g} for row "
            f"{int(np.argmin(width))}. Mix them with uniform ones, as importance_probabilities does."
        )
    weight = _RANGE / (num_data * width)
    return Proposal(jnp.asarray(edges[:-1].astype(np.uint32)), jnp.asarray(weight, jnp.result_type(float)))


def draw_rows(key: Key, proposal: Proposal, batch_size: int) -> tuple[Array, Array]:
    """Draw row indices (n,), with replacement, and their weights ``1 / (n N p)`` (n,)."""
    bits = jax.random.bits(key, (batch_size,), jnp.uint32)
    rows = jnp.searchsorted(proposal.edges, bits, side="right").astype(jnp.int32)
    return rows, proposal.weight[rows] / batch_size


def importance_probabilities(
    posterior: Posterior, position: PyTree, *, centre: PyTree | None = None, floor: float = 0.1
) -> Array:
    r"""Probabilities in proportion to the gradients of the data, mixed with uniform ones.

    .. math:: p_i = (1 - f)\,\frac{a_i}{\sum_j a_j} + \frac{f}{N},
        \qquad a_i = \lVert\nabla\ell_i(\theta)\rVert \text{ or } \lVert\nabla\ell_i(\theta) - \nabla\ell_i(c)\rVert

    Parameters
    ----------
    posterior : Posterior
        With its data.
    position : pytree
        Where the chain will be: the mode or, better, some posterior standard deviations from it.
    centre : pytree, optional
        The centre of the control variate that will be wrapped around the minibatch: its noise comes from differences of
        gradients, and so do the probabilities then. Must differ from ``position``.
    floor : float
        The uniform part :math:`f`, above 0 and at most 1. It bounds the weights by :math:`1/(n f)`, so that the mean square of
        the likelihood's estimate is nowhere more than :math:`1/f` times what it is with uniform rows.

    Returns
    -------
    array (N,)

    Raises
    ------
    ValueError, TypeError
        If the posterior holds no data, the floor is out of range, the centre is the position, or all the gradients are zero or
        one is not finite.

    Notes
    -----
    With ``floor`` near 0 these probabilities give the least total variance at ``position`` that rows drawn independently can
    have (Cauchy–Schwarz): :math:`\left[(\sum_i a_i)^2 - \lVert\sum_i g_i\rVert^2\right]/n` in place of
    :math:`\left[N \sum_i a_i^2 - \lVert\sum_i g_i\rVert^2\right]/n`. The gain is large where a few data have gradients far
    above the rest (rare events, outliers), and none where all norms are alike. It holds near ``position`` only.

    Cost: ``N`` gradients, taken one by one; twice that with a centre.

    References
    ----------
    Putcha, Nemeth and Fearnhead (2023).

    Examples
    --------
    >>> import jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: x * t, jnp.array([1.0, -1.0, 8.0]), initial=jnp.array(0.0))
    >>> p = importance_probabilities(posterior, jnp.array(0.0), floor=0.3)
    >>> [round(float(x), 2) for x in p]
    [0.17, 0.17, 0.66]
    """
    if posterior.data is None:
        raise ValueError("importance_probabilities needs all the data; the posterior holds none.")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be above 0 and at most 1; got {floor!r}.")
    position = check.position("position", position)
    if centre is not None:
        centre = check.position("centre", centre)
        check.same_structure("centre", centre, "position", position)
        if all(np.array_equal(c, x) for c, x in zip(jax.tree.leaves(centre), jax.tree.leaves(position), strict=True)):
            raise ValueError(
                "centre must differ from position: at the centre a control variate has no noise to reduce."
            )
    norms = np.asarray(_norms(posterior, position, centre), np.float64)
    if not np.all(np.isfinite(norms)) or not norms.sum() > 0:
        raise ValueError(
            f"The gradients of the data must be finite and not all zero; got norms from {norms.min()} to {norms.max()}. "
            "Choose another position."
        )
    p = (1 - floor) * norms / norms.sum() + floor / posterior.num_data
    return jnp.asarray(p, jnp.result_type(float))


@jax.jit
def _norms(posterior: Posterior, position: PyTree, centre: PyTree | None) -> Array:
    """Norm of each datum's gradient, or of its difference to that at the centre, (N,)."""

    def of_one(row: PyTree) -> Array:
        rows = jax.tree.map(lambda x: x[None], row)
        gradient = of_each_datum(posterior, position, rows).gradient
        if centre is not None:
            gradient = tree.subtract(gradient, of_each_datum(posterior, centre, rows).gradient)
        return jnp.sqrt(squared_norm(gradient))[0]

    return jax.lax.map(of_one, posterior.data, batch_size=_ROWS_AT_ONCE)
