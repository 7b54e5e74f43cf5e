r"""Functions whose mean under a density is zero, from its score alone (arrays in, arrays out; NumPy's or JAX's).

For a density :math:`\pi` on :math:`\mathbb R^D` with score :math:`s = \nabla\log\pi`, and :math:`u` that does not grow too fast,
:math:`\mathrm{E}_\pi[\Delta u + \nabla u \cdot s] = 0` (the Langevin--Stein identity). The normalising constant is not needed.
"""

from typing import Any

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
