r"""Fits of functions of mean zero to a function of draws, for `ergodica.diagnostics.control_variate_expectation`.

Each is fitted on some draws and evaluated on others: what it takes away there has mean zero whatever was fitted.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ergodica.core.regression import decompose, ridge_inverse, shrinkage
from ergodica.core.stein import polynomial_controls, stein_kernel

type Control = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From points and scores (n, D) to values (n, q) of mean zero, one for each of the functions."""

_RIDGES = np.concatenate([[0.0], np.logspace(-14, 2, 33)])
"""Relative to the largest squared singular value."""


class Whitening(NamedTuple):
    """An affine change to coordinates of mean zero and unit covariance."""

    mean: np.ndarray
    root: np.ndarray

    def points(self, x: np.ndarray) -> np.ndarray:
        """New coordinates of points (n, D)."""
        return np.linalg.solve(self.root, (x - self.mean).T).T

    def scores(self, scores: np.ndarray) -> np.ndarray:
        """Scores (n, D) by the new coordinates."""
        return scores @ self.root


def whitening(x: np.ndarray) -> Whitening:
    """From the mean and covariance of draws (n, D); from their standard deviations where the covariance is singular."""
    mean, covariance = x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))
    scales = np.sqrt(np.diag(covariance))
    scales[scales == 0] = 1.0
    correlation = covariance / np.outer(scales, scales)
    if np.linalg.matrix_rank(correlation, tol=1e-8) < len(mean):
        return Whitening(mean, np.diag(scales))
    return Whitening(mean, scales[:, None] * np.linalg.cholesky(correlation))


def fit_polynomial(x: np.ndarray, scores: np.ndarray, f: np.ndarray, degree: int) -> Control:
    """Least squares on `ergodica.core.stein.polynomial_controls` with an intercept and a ridge.

    The ridge is that of the smallest generalised cross-validation score, zero among the candidates where there are more draws
    than controls. Points, scores (n, D); functions (n, q). Cost: a singular value decomposition of (n, p).
    """
    change = whitening(x)
    controls = polynomial_controls(change.points(x), change.scores(scores), degree)
    coefficients = ridge_regression(controls, f)

    def control(x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return polynomial_controls(change.points(x), change.scores(scores), degree) @ coefficients

    return control


def ridge_regression(controls: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Coefficients (p, q) of ``f`` (n, q) on controls (n, p) beside an intercept, each with the ridge of the least GCV score."""
    n, parts = len(controls), decompose(controls)
    largest, rank = parts.singular.max(initial=0.0), np.count_nonzero(parts.singular)
    centred = f - f.mean(axis=0)
    projected = parts.left.T @ centred * (parts.singular > 0)[:, None]
    outside = np.maximum(np.sum(centred**2, axis=0) - np.sum(projected**2, axis=0), 0.0)
    ridges = _RIDGES if rank < n - 1 else _RIDGES[1:]
    best, scores = np.zeros_like(projected), np.full(f.shape[1], np.inf)
    for ridge in ridges * (largest or 1.0) ** 2:
        shrink = shrinkage(parts.singular, ridge)
        freedom = n - 1 - shrink.sum()
        score = (outside + np.sum(((1 - shrink)[:, None] * projected) ** 2, axis=0)) / freedom**2
        better = score < scores
        scores = np.where(better, score, scores)
        best = np.where(better, ridge_inverse(parts.singular, ridge)[:, None] * projected, best)
    return parts.right.T @ best


def fit_kernel(x: np.ndarray, scores: np.ndarray, f: np.ndarray, degree: int | None) -> Control:
    r"""Control functional: ridge regression by the Stein kernel, with polynomials of a degree unpenalised (``None``: none).

    The kernel's scale is the median distance of the whitened draws; the ridge has the least generalised cross-validation score.
    Cost: an eigendecomposition of (n, n).
    """
    change = whitening(x)
    points, slopes = change.points(x), change.scores(scores)
    scale = median_distance(points)
    kernel = stein_kernel(points, slopes, points, slopes, scale)
    free = np.ones((len(x), 1))
    if degree is not None:
        free = np.concatenate([free, polynomial_controls(points, slopes, degree)], axis=1)
    weights, linear = kernel_regression(kernel, free, f)

    def control(x: np.ndarray, scores: np.ndarray) -> np.ndarray:
        new, new_slopes = change.points(x), change.scores(scores)
        value = stein_kernel(new, new_slopes, points, slopes, scale) @ weights
        if degree is not None:
            value = value + polynomial_controls(new, new_slopes, degree) @ linear[1:]
        return value

    return control


def kernel_regression(kernel: np.ndarray, free: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (n, q) of a kernel and coefficients (p, q) of unpenalised columns, with the ridge of the least GCV score.

    In the complement of the columns the problem is a ridge regression, diagonal in the kernel's eigenvectors there.
    """
    n, p = free.shape
    if p >= n:
        raise ValueError(f"{p - 1} polynomials need more than {p} draws in each fold's training set; got {n}.")
    q, r = np.linalg.qr(free, mode="complete")
    inside, complement = q[:, :p], q[:, p:]
    values, vectors = np.linalg.eigh(complement.T @ kernel @ complement)
    values = np.maximum(values, 0.0)
    projected = vectors.T @ complement.T @ f
    best, scores = np.zeros_like(projected), np.full(f.shape[1], np.inf)
    for ridge in _RIDGES[1:] * values.max(initial=1e-300):
        shrink = ridge / (values + ridge)
        score = np.sum((shrink[:, None] * projected) ** 2, axis=0) / shrink.sum() ** 2
        better = score < scores
        scores = np.where(better, score, scores)
        best = np.where(better, projected / (values + ridge)[:, None], best)
    weights = complement @ vectors @ best
    linear = np.linalg.lstsq(r[:p], inside.T @ (f - kernel @ weights), rcond=None)[0]
    return weights, linear


def median_distance(points: np.ndarray, limit: int = 500) -> float:
    """Median distance between different points, of evenly spaced ones if there are many."""
    some = points[:: max(1, len(points) // limit)]
    squares = np.sum((some[:, None, :] - some[None, :, :]) ** 2, axis=-1)
    positive = squares[squares > 0]
    return float(np.sqrt(np.median(positive))) if len(positive) else 1.0
