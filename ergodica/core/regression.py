r"""Ridge regression on functions of mean zero, and what it takes away from a mean without a bias (arrays in, arrays out).

With controls :math:`H` (n, q) whose mean under the law of the draws is zero, and functions :math:`F` (n, m) of the same draws,
:math:`\frac1n \sum_k (F_k - B^\top H_k)` has the mean of :math:`F` for every fixed :math:`B`. A :math:`B` that is fitted to the
same draws depends on :math:`H_k`, and biases it. One that is fitted to the *other* draws does not, and the linear algebra of
all those fits is that of a single one. NumPy's arrays or JAX's.
"""

from typing import NamedTuple

from ergodica.core.stein import AnyArray

_LONELY = 64
"""In units of rounding: how little of a draw's leverage may be missing where no other draw has any of a control."""


class Decomposition(NamedTuple):
    """Singular value decomposition of centred controls; singular values that are mere rounding are zero.

    Attributes
    ----------
    mean : array (q,)
        Mean of the controls over the draws.
    left : array (n, r)
    singular : array (r,)
    right : array (r, q)
    """

    mean: AnyArray
    left: AnyArray
    singular: AnyArray
    right: AnyArray


def decompose(controls: AnyArray) -> Decomposition:
    """Decompose controls (n, q), at a cost of n q times the smaller of both."""
    xp = controls.__array_namespace__()
    mean = xp.mean(controls, axis=0)
    left, singular, right = xp.linalg.svd(controls - mean[None, :], full_matrices=False)
    rounding = max(controls.shape) * float(xp.finfo(controls.dtype).eps) * xp.max(singular)
    return Decomposition(mean, left, xp.where(singular > rounding, singular, 0.0), right)


def shrinkage(singular: AnyArray, ridge: AnyArray | float) -> AnyArray:
    r""":math:`s^2 / (s^2 + \lambda)`, zero in directions without spread."""
    xp = singular.__array_namespace__()
    return xp.where(singular > 0, singular**2 / xp.where(singular > 0, singular**2 + ridge, 1.0), 0.0)


def ridge_inverse(singular: AnyArray, ridge: AnyArray | float) -> AnyArray:
    r""":math:`s / (s^2 + \lambda)`, zero in directions without spread.

    The coefficients (q, m) of :math:`\min_{a, B} \|F - 1 a^\top - H B\|^2 + \lambda \|B\|^2` are ``right.T`` times this times
    ``left.T @ F``; with :math:`\lambda = 0` and more controls than draws, those of least norm.
    """
    xp = singular.__array_namespace__()
    return shrinkage(singular, ridge) / xp.where(singular > 0, singular, 1.0)


def transfer_weights(parts: Decomposition, ridge: AnyArray | float, mean: AnyArray) -> AnyArray:
    r"""Weights :math:`w` (n,) with :math:`w^\top F = \bar h^\top B`, for the coefficients :math:`B` fitted to :math:`F`.

    Parameters
    ----------
    parts : Decomposition
        Of the controls at the draws that are fitted to.
    ridge : scalar
    mean : array (q,)
        :math:`\bar h`, a mean of controls; at other draws, if no bias is to come in.
    """
    return parts.left @ (ridge_inverse(parts.singular, ridge) * (parts.right @ mean))


def leave_one_out_weights(parts: Decomposition, ridge: AnyArray | float) -> AnyArray:
    r"""Weights :math:`\omega` (n,) of the estimate that fits coefficients to all draws but the one they are used at.

    .. math::

        \omega^\top F = \frac1n \sum_k \left( F_k - B_{-k}^\top H_k \right), \qquad
        B_{-k} = \arg\min_{B} \min_a \sum_{j \ne k} \|F_j - a - B^\top H_j\|^2 + \lambda \|B\|^2

    With :math:`e` the residuals of the fit to all draws, :math:`M_k = (\tilde H^\top \tilde H + \lambda)^{-1} \tilde H_k` for the
    centred controls :math:`\tilde H`, and :math:`\ell_k = \frac1n + \tilde H_k^\top M_k`, the Sherman--Morrison formula gives
    :math:`B_{-k} = B - M_k e_k^\top / (1 - \ell_k)`, so that all the fits cost what one costs, however many
    functions there are. Where a draw alone has something of a control, :math:`\ell_k = 1`; the least-norm fit to the others is then
    :math:`B - M_k M_k^\top B / \|M_k\|^2`. The weights sum to 1.

    Parameters
    ----------
    parts : Decomposition
        Of the controls.
    ridge : scalar
        Must not be chosen by looking at the draws. Above 0 if there are no more than q + 1 draws.

    References
    ----------
    Leave-one-out residuals: Allen (1974); control functionals fitted to other draws: Oates, Girolami and Chopin (2017).
    """
    xp, n = parts.left.__array_namespace__(), parts.left.shape[0]
    shrink = shrinkage(parts.singular, ridge)
    leverage = xp.sum(parts.left**2 * shrink[None, :], axis=1)
    of_mean = transfer_weights(parts, ridge, parts.mean)
    rest = 1 - 1 / n - leverage
    alone = rest <= _LONELY * float(xp.finfo(leverage.dtype).eps)
    pull = xp.where(alone, 0.0, (leverage + of_mean) / xp.where(alone, 1.0, rest))
    residual = pull - xp.mean(pull) - parts.left @ (shrink * (parts.left.T @ pull))
    squares = ridge_inverse(parts.singular, ridge) ** 2
    length = xp.sum(parts.left**2 * squares[None, :], axis=1)
    dropped = xp.where(alone, (leverage + of_mean) / xp.where(alone, length, 1.0), 0.0)
    return 1 / n - of_mean + (residual + parts.left @ (squares * (parts.left.T @ dropped))) / n


def pooled_moments(controls: AnyArray, f: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Centred products, summed over entries, draw by draw: (n, R, R) of the controls, (n, R) of controls and function.

    Parameters
    ----------
    controls : array (n, R, E)
        R controls of the shape of the function.
    f : array (n, E)
        A function with E entries, all of which get the same R coefficients.
    """
    xp = f.__array_namespace__()
    moved = controls - xp.mean(controls, axis=0)[None]
    of_f = f - xp.mean(f, axis=0)[None]
    return xp.einsum("kre,kse->krs", moved, moved), xp.einsum("kre,ke->kr", moved, of_f)


def pooled_leave_one_out(gram: AnyArray, cross: AnyArray, ridge: AnyArray | float) -> AnyArray:
    r"""Coefficients (n, R), the same for all entries of a function, fitted to all draws but each.

    .. math::

        \beta_{-k} = \left( \sum_j S_j - \tfrac{n}{n-1} S_k + \lambda \right)^{-1}
        \left( \sum_j c_j - \tfrac{n}{n-1} c_k \right)

    which centres by the means without draw :math:`k`.

    Parameters
    ----------
    gram, cross : array (n, R, R), (n, R)
        :math:`S_k, c_k` of `pooled_moments`.
    ridge : scalar
        :math:`\lambda`.
    """
    xp, n = cross.__array_namespace__(), cross.shape[0]
    share = n / (n - 1)
    return solve_moments(xp.sum(gram, axis=0)[None] - share * gram, xp.sum(cross, axis=0)[None] - share * cross, ridge)


def solve_moments(gram: AnyArray, cross: AnyArray, ridge: AnyArray | float) -> AnyArray:
    """Coefficients (..., R) of least norm from the moments (..., R, R) and (..., R)."""
    xp, size = cross.__array_namespace__(), cross.shape[-1]
    if size == 1:
        variance = gram[..., 0] + ridge
        return xp.where(variance > 0, cross / xp.where(variance > 0, variance, 1.0), 0.0)
    eye = xp.eye(size, dtype=cross.dtype).reshape((1,) * (gram.ndim - 2) + (size, size))
    return (xp.linalg.pinv(gram + ridge * eye, hermitian=True) @ cross[..., None])[..., 0]
