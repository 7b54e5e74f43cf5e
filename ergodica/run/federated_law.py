r"""The stationary law of a chain that travels over clients, on a Gaussian posterior with Gaussian surrogates.

At client :math:`s` a step is affine, :math:`z' = F_s z + b_s + \text{noise of covariance } Q_s`; a visit of :math:`\tau_s` steps is
affine too, and mean and covariance over independent visits obey linear equations. Nothing is simulated.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Position
from ergodica.run import linear_law

_DENSE = 1600
_ITERATIONS = 2000


class ClientSteps(NamedTuple):
    """One step at each client; arrays may have more axes behind the first, one law each.

    Attributes
    ----------
    transition : array (S, ..., Z, Z)
    drift : array (S, ..., Z)
    added : array (S, ..., Z, Z)
        Covariance of what a step adds.
    select : array (..., D, Z) or None
        Takes the position out of ``z``; ``None`` where it is all of it.
    """

    transition: Any
    drift: Any
    added: Any
    select: Any = None


class Moments(NamedTuple):
    """Mean (..., Z) and covariance (..., Z, Z)."""

    mean: Any
    covariance: Any


class FederatedLaw(NamedTuple):
    """Stationary moments of the position: over all steps, and where visits end."""

    steps: Moments
    visits: Moments


def federated_law(clients: ClientSteps, visit_probabilities: Any, local_steps: Any) -> FederatedLaw:
    r"""Stationary mean and covariance of a chain that visits independent clients.

    .. math::

        \mu = \sum_s p_s (A_s \mu + B_s), \qquad
        C = \sum_s p_s \left[ A_s C A_s^T + W_s + d_s d_s^T \right], \quad d_s = A_s \mu + B_s - \mu

    with :math:`A_s = F_s^{\tau_s}`, :math:`B_s = \sum_{i<\tau_s} F_s^i b_s` and :math:`W_s = \sum_{i<\tau_s} F_s^i Q_s F_s^{iT}`.

    Parameters
    ----------
    clients : ClientSteps
    visit_probabilities : array (S,)
        :math:`p_s`.
    local_steps : int or int array (S,)
        :math:`\tau_s`.

    Returns
    -------
    FederatedLaw

    Raises
    ------
    ValueError
        If there is no stationary covariance: the steps are too large.

    Notes
    -----
    Cost: twice the longest visit in products of ``S`` matrices, and one linear system in :math:`Z^2` unknowns.
    """
    transition, drift, added = (np.asarray(x, np.float64) for x in clients[:3])
    p = np.asarray(visit_probabilities, np.float64)
    steps = np.broadcast_to(np.asarray(local_steps), p.shape)
    power, constant, noise = _visits(transition, drift, added, steps)
    size = transition.shape[-1]
    with np.errstate(all="ignore"):
        mean = np.linalg.solve(np.eye(size) - _average(p, power), _average(p, constant)[..., None])[..., 0]
        away = _apply(power, mean) + constant - mean
        covariance = _solve(p, power, _average(p, noise + _outer(away)))
    _check_stable(covariance, mean)
    end = Moments(mean, covariance)
    found = FederatedLaw(_over_steps(transition, drift, added, p, steps, end), end)
    return found if clients.select is None else FederatedLaw(*(_selected(m, clients.select) for m in found))


def client_steps(kernel: AbstractKernel, position: Position, curvature: Any, drift: Any, noise: Any) -> ClientSteps:
    r"""Read one step of an inner kernel off its own ``step``, at clients of gradients :math:`b_s - P_s \theta + \zeta`.

    Parameters
    ----------
    kernel : AbstractKernel
        Such as `SGLD`; its gradient is replaced.
    position : pytree
        Of the structure of a position; its values do not matter.
    curvature : array (S, D, D) or (S, D)
        :math:`P_s`, or their diagonals: then each coordinate is taken by itself, along a second axis of the result.
    drift : array (S, D)
        :math:`b_s`.
    noise : array, of the shape of ``curvature``
        Covariance of :math:`\zeta`.
    """
    curvature, drift, noise = (np.asarray(x, np.float64) for x in (curvature, drift, noise))
    alone = curvature.ndim == 2
    if alone:
        steps = [linear_law.affine_steps(kernel, P) for P in curvature]
    else:
        steps = [linear_law.affine_step(kernel, position, P) for P in curvature]
    drift, noise = (drift[..., None], noise[..., None, None]) if alone else (drift, noise)
    transition, loading = (np.stack([getattr(s, name) for s in steps]) for name in ("transition", "loading"))
    calls = np.moveaxis(np.stack([s.noise_loading for s in steps]), -2, 0)
    of_gradients = np.sum([_around(call, noise) for call in calls], axis=0)
    own = loading @ np.swapaxes(loading, -1, -2)
    return ClientSteps(transition, _apply(calls.sum(0), drift), own + of_gradients, steps[0].select)


def _selected(moments: Moments, select: np.ndarray) -> Moments:
    return Moments(_apply(select, moments.mean), _around(select, moments.covariance))


def _apply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (matrix @ vector[..., None])[..., 0]


def _around(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ b @ np.swapaxes(a, -1, -2)


def _outer(x: np.ndarray) -> np.ndarray:
    return x[..., :, None] * x[..., None, :]


def _average(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.tensordot(p, values, 1)


def _visits(
    transition: np.ndarray, drift: np.ndarray, added: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a visit to each client does."""
    power = np.broadcast_to(np.eye(transition.shape[-1]), transition.shape).copy()
    constant, noise = np.zeros_like(drift), np.zeros_like(added)
    for j in range(steps.max()):
        on = steps > j
        power[on] = transition[on] @ power[on]
        constant[on] = _apply(transition[on], constant[on]) + drift[on]
        noise[on] = _around(transition[on], noise[on]) + added[on]
    return power, constant, noise


def _over_steps(
    transition: np.ndarray, drift: np.ndarray, added: np.ndarray, p: np.ndarray, steps: np.ndarray, start: Moments
) -> Moments:
    """Average the law over the steps of the visits, each of which starts where one has ended."""
    mean = np.broadcast_to(start.mean, drift.shape).copy()
    covariance = np.broadcast_to(start.covariance, added.shape).copy()
    weight = p / (p @ steps)
    first, second = np.zeros_like(start.mean), np.zeros_like(start.covariance)
    for j in range(steps.max()):
        on = steps > j
        mean[on] = _apply(transition[on], mean[on]) + drift[on]
        covariance[on] = _around(transition[on], covariance[on]) + added[on]
        first = first + _average(weight[on], mean[on] - start.mean)
        second = second + _average(weight[on], covariance[on] + _outer(mean[on] - start.mean))
    return Moments(start.mean + first, second - _outer(first))


def _solve(p: np.ndarray, power: np.ndarray, added: np.ndarray) -> np.ndarray:
    r"""Solve :math:`C = \sum_s p_s A_s C A_s^T + Q`."""
    size = power.shape[-1]
    if size**2 <= _DENSE:
        squares = np.einsum("s,s...ij,s...kl->...ikjl", p, power, power).reshape(*power.shape[1:-2], size**2, size**2)
        flat = added.reshape(*added.shape[:-2], size**2, 1)
        return np.linalg.solve(np.eye(size**2) - squares, flat).reshape(added.shape)

    def residual(flat: np.ndarray) -> np.ndarray:
        C = flat.reshape(size, size)
        return (C - _average(p, _around(power, C))).ravel()

    operator = LinearOperator((size**2, size**2), matvec=residual, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    found, code = gmres(operator, added.ravel(), rtol=1e-10, atol=0.0, restart=100, maxiter=_ITERATIONS)
    if code:
        raise ValueError(
            "The covariance over visits was not found: the steps are at the edge of stability; take smaller ones."
        )
    return found.reshape(size, size)


def _check_stable(covariance: np.ndarray, mean: np.ndarray) -> None:
    """Raise unless the covariance is one; beyond stability the equation has solutions, but no positive one."""
    finite = np.all(np.isfinite(covariance)) and np.all(np.isfinite(mean))
    values = np.linalg.eigvalsh((covariance + np.swapaxes(covariance, -1, -2)) / 2) if finite else np.full(1, -np.inf)
    if np.any(values[..., 0] < -1e-9 * np.abs(values[..., -1])):
        raise ValueError(
            "sampler's step_size must be smaller: over visits the chain is unstable, and has no stationary law. Where the inner "
            "kernel by itself is stable, a surrogate far from its client's likelihood or shorter visits are to be thought of."
        )
