r"""Functions whose mean under a law is zero (arrays in, arrays out; NumPy's or JAX's).

For a density :math:`\pi` on :math:`\mathbb R^D` with score :math:`s = \nabla\log\pi`, and :math:`u` that does not grow too fast,
:math:`\mathrm{E}_\pi[\Delta u + \nabla u \cdot s] = 0` (the Langevin--Stein identity). The normalising constant is not needed.
For a law on vectors of discrete coordinates, a step of the Gibbs sampler leaves all means as they are (the Gibbs--Stein identity).
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

type AnyArray = Any
"""An array of NumPy's or of JAX's; what comes back is of the same kind."""

DEGREES = (1, 2)


def num_controls(num_parameters: int, degree: int) -> int:
    """How many functions `polynomial_controls` makes: D, or D + D(D+1)/2."""
    return num_parameters if degree == 1 else num_parameters + num_parameters * (num_parameters + 1) // 2


def polynomial_controls(x: AnyArray, score: AnyArray, degree: int) -> AnyArray:
    r"""Langevin--Stein operator on the monomials up to a degree.

    .. math::

        u = x_i:\; s_i, \qquad u = x_i^2:\; 2 + 2 x_i s_i, \qquad u = x_i x_j:\; x_i s_j + x_j s_i

    Parameters
    ----------
    x, score : array (n, D)
    degree : {1, 2}

    Returns
    -------
    array (n, p)
        The linear ones first, then the pairs :math:`i \le j` in the order of ``numpy.triu_indices``.

    References
    ----------
    Assaraf and Caffarel (1999); Mira, Solgi and Imparato (2013), section 2.
    """
    if degree == 1:
        return score
    xp, dim = x.__array_namespace__(), x.shape[-1]
    pairs = [(i, j) for i in range(dim) for j in range(i, dim)]
    first, second = xp.asarray([i for i, _ in pairs]), xp.asarray([j for _, j in pairs])
    constant = xp.asarray([2.0 if i == j else 0.0 for i, j in pairs], dtype=x.dtype)
    quadratic = x[:, first] * score[:, second] + x[:, second] * score[:, first] + constant[None, :]
    return xp.concatenate([score, quadratic], axis=-1)


def stein_kernel(x: AnyArray, score_x: AnyArray, y: AnyArray, score_y: AnyArray, scale: float = 1.0) -> AnyArray:
    r"""Langevin--Stein kernel on the inverse multiquadric :math:`k = b^\beta`, :math:`b = c^2 + |x-y|^2`, :math:`\beta = -1/2`.

    .. math::

        k_0 = s_x \cdot s_y\, b^\beta + 2\beta b^{\beta-1} (x-y)\cdot(s_y - s_x) - 2\beta D b^{\beta-1}
              - 4\beta(\beta-1) b^{\beta-2} |x-y|^2

    Its mean over either argument is zero.

    Parameters
    ----------
    x, score_x : array (n, D)
    y, score_y : array (m, D)
    scale : float
        :math:`c`, in the units of ``x``.

    Returns
    -------
    array (n, m)

    References
    ----------
    Gorham and Mackey (2017), section 4; Oates, Girolami and Chopin (2017), equation 5.
    """
    beta, dim = -0.5, x.shape[-1]
    inner = x @ y.T
    squares = (x**2).sum(-1)[:, None] + (y**2).sum(-1)[None, :] - 2 * inner
    squares = x.__array_namespace__().maximum(squares, 0.0)
    # (x - y)·(s_y - s_x)
    cross = x @ score_y.T - (x * score_x).sum(-1)[:, None] - (y * score_y).sum(-1)[None, :] + score_x @ y.T
    b = scale**2 + squares
    return (
        (score_x @ score_y.T) * b**beta
        + 2 * beta * b ** (beta - 1) * (cross - dim)
        - 4 * beta * (beta - 1) * b ** (beta - 2) * squares
    )


def diagonal_controls(x: AnyArray, score: AnyArray, degree: int) -> AnyArray:
    r"""The controls of each coordinate by itself, :math:`s_d` and :math:`1 + x_d s_d`: (n, degree, D)."""
    xp = x.__array_namespace__()
    return xp.stack([score, 1 + x * score][:degree], axis=1)


def vector_controls(function: Callable[[Array], Array], x: Array, score: Array) -> Array:
    r"""Stein's operator on vector fields that have a single component, :math:`h_{md} = \varphi_m s_d + \partial_d \varphi_m`.

    For a standard normal, :math:`-h_{md} = x_d \varphi_m(x) - \partial_d \varphi_m(x)`. With
    :math:`\varphi = 1` it is the score.

    Parameters
    ----------
    function : callable
        :math:`\varphi`: from a point (D,) to values (M,), bounded by a polynomial where the law has the tails of a normal.
    x, score : array (n, D)

    Returns
    -------
    array (n, M, D)

    Notes
    -----
    Cost: :math:`\varphi` and its Jacobian at every point.

    References
    ----------
    Oates, Girolami and Chopin (2017), equation 2.
    """
    values, slopes = jax.vmap(function)(x), jax.vmap(jax.jacrev(function))(x)
    return values[:, :, None] * score[:, None, :] + slopes


def gibbs_stein_terms(at_draw: AnyArray, at_values: AnyArray, conditional: AnyArray) -> AnyArray:
    r"""Terms of the Gibbs--Stein operator: what resampling a coordinate changes in the mean. Their means are zero, one by one.

    .. math:: (\mathcal A_i h)(x) = \sum_a q(x_i = a \mid x_{-i})\, h(x_{-i}, a) - h(x)

    Parameters
    ----------
    at_draw : array (...)
        :math:`h(x)`.
    at_values : array (..., D, A)
        :math:`h` with coordinate :math:`i` set to value :math:`a`.
    conditional : array (..., D, A)
        :math:`q(x_i = a \mid x_{-i})`. Any law, dependent coordinates too.

    Returns
    -------
    array (..., D)

    References
    ----------
    Shi et al. (2022), section 3.
    """
    return (conditional * at_values).sum(-1) - at_draw[..., None]


def gibbs_stein_flips(at_draw: AnyArray, at_flips: AnyArray, flip: AnyArray) -> AnyArray:
    r"""`gibbs_stein_terms` of bits, from their changes alone.

    .. math:: (\mathcal A_i h)(x) = q(\lnot x_i \mid x_{-i}) \left[ h(x^{\lnot i}) - h(x) \right]

    Parameters
    ----------
    at_draw : array (..., D) or (..., 1)
        :math:`h(x)`.
    at_flips : array (..., D)
        :math:`h` with bit :math:`i` changed.
    flip : array (..., D)
        Conditional probability of the other value of each bit; for independent bits that of `flip_probability`.
    """
    return flip * (at_flips - at_draw)


def flip_probability(bits: AnyArray, p: AnyArray) -> AnyArray:
    r"""Probability :math:`q(\lnot x_i)` of the other value of independent bits with probabilities ``p``."""
    return bits + p - 2 * bits * p
