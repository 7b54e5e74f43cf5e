r"""What a server can tell of a result without the data: whether a step's own law allows it.

At client :math:`s` a visit of an affine kernel is :math:`z \mapsto A_s z + B_s + N(0, W_s)`, with :math:`A_s, B_s, W_s` from the
clients' surrogates (`ergodica.run.federated_law`). A result that is too far from :math:`A_s z + B_s`, measured by
:math:`W_s`, was not made by that law.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ergodica.core import check
from ergodica.run.federated_law import ClientSteps


class SurrogateError(ValueError):
    """Surrogate parameters that no honest client sends."""


class VisitLaws(NamedTuple):
    """Affine laws after so many steps of a visit, along the first axis, at each client, along the second.

    Attributes
    ----------
    transition : array (K, S, Z, Z)
    drift : array (K, S, Z)
    added : array (K, S, Z, Z)
    """

    transition: np.ndarray
    drift: np.ndarray
    added: np.ndarray


def visit_laws(clients: ClientSteps, after: Any) -> VisitLaws:
    r"""Laws after ``after`` (K,) steps, in rising order: :math:`F^k`, :math:`\sum_{i<k} F^i b`, :math:`\sum_{i<k} F^i Q F^{iT}`."""
    transition, drift, added = (np.asarray(x, np.float64) for x in (clients.transition, clients.drift, clients.added))
    after = np.asarray(after)
    power = np.broadcast_to(np.eye(transition.shape[-1]), transition.shape)
    constant, noise, found = np.zeros_like(drift), np.zeros_like(added), []
    for step in range(1, int(after.max()) + 1):
        power = transition @ power
        constant = (transition @ constant[..., None])[..., 0] + drift
        noise = transition @ noise @ np.swapaxes(transition, -1, -2) + added
        if step in after:
            found.append((power, constant, noise))
    return VisitLaws(*(np.stack(leaves) for leaves in zip(*found, strict=True)))


class DisplacementBound:
    r"""Refuse results that a visit's own law does not allow.

    The end :math:`z_\tau` of a visit, and each position :math:`\theta_j` stored on the way, is refused if

    .. math:: r^T W^{-1} r > \kappa^2\, \chi^2_{d,\,1 - \alpha / n}, \qquad r = z - (A_s z_0 + B_s),

    for any of the blocks of :math:`z` (position, and momentum where there is one), with :math:`d` the size of the block and
    :math:`n` the number of comparisons in a visit.

    Parameters
    ----------
    clients : ClientSteps
        One step at each client, from its surrogate (`ergodica.run.federated_law.client_steps`).
    local_steps : int array (S,)
        Steps of a visit.
    stride : int
        Steps from one stored position to the next.
    size : int
        Number of parameters :math:`D`; a step's state is the position alone, or position and momentum.
    false_rejection : float
        :math:`\alpha`, probability with which an honest visit is refused, at most, if the law holds.
    slack : float
        :math:`\kappa \ge 1`, how many times larger displacements may be, for clients whose likelihoods are not quite their
        surrogates.

    Raises
    ------
    ValueError
        For laws of a kernel that carries more than position and momentum.

    Notes
    -----
    By the union bound an honest visit is refused with probability at most ``false_rejection``, if surrogates are exact, gradient
    noise is Gaussian with the covariance that was reported, and the prior is Gaussian. Refusing cuts these tails off the law,
    which changes second moments by about :math:`\alpha \chi^2` of their size: 3e-5 for one in a million. With surrogates that are
    not exact, an honest client's mean is off by :math:`B_s - B_s^{true}`, and ``slack`` must cover it.

    What it does not do: a hostile client can put the chain anywhere inside the ellipsoid at each of its visits. With one
    hostile client of ``S``, visited with probability :math:`p`, and :math:`A` the same everywhere, pushing in one direction
    moves the mean of where visits end by :math:`p\,(I - A)^{-1} W^{1/2} u\, \kappa \chi` (`ergodica.run.admission.reach`). A push
    that is always in one direction shows in ``push``, the mean of the whitened :math:`r` over a client's visits, whose standard
    deviation is :math:`1/\sqrt{\text{visits}}` where all is honest and exact.

    Cost: ``Z * Z`` multiplications a stored position, and ``K * S * Z * Z`` numbers of memory for ``K`` of them in a visit.
    """

    def __init__(
        self,
        clients: ClientSteps,
        local_steps: Any,
        stride: int,
        size: int,
        *,
        false_rejection: float = 1e-6,
        slack: float = 1.0,
    ) -> None:
        self.size = check.integer("size", size)
        steps = np.asarray(local_steps)
        self.counts = steps // check.integer("stride", stride)
        full = np.shape(clients.transition)[-1]
        if full not in (size, 2 * size):
            raise ValueError(
                f"clients must be steps of a state of {size} or {2 * size} numbers, position and momentum; got {full}. A kernel "
                "that carries its last gradient (BAOAB, OBABO) has no bound: take SGLD, or a scheme such as LieTrotter."
            )
        self.blocks = [slice(0, size)] + [slice(size, full)] * (full > size)
        self.laws = visit_laws(clients, stride * np.arange(1, self.counts.max() + 1))
        alpha = float(check.positive("false_rejection", false_rejection))
        self.slack = float(check.positive("slack", slack))
        self.radius = self.slack * np.sqrt(stats.chi2.isf(alpha / (self.counts + len(self.blocks) - 1), size))
        self.roots = np.stack([_roots(self.laws.added[..., b, b]) for b in self.blocks])
        self.push, self.visits = np.zeros((len(steps), size)), np.zeros(len(steps), np.int64)

    def residuals(self, client: int, start: np.ndarray, positions: np.ndarray, end: np.ndarray) -> np.ndarray:
        r"""Whitened :math:`r` of the stored positions (n, D), and of the momentum at the end where there is one."""
        count = self.counts[client]
        mean = self.laws.transition[:count, client] @ start + self.laws.drift[:count, client]
        found = [_solve(self.roots[0, :count, client], positions - mean[:, self.blocks[0]])]
        if len(self.blocks) > 1:
            away = end[self.blocks[1]] - mean[-1, self.blocks[1]]
            found.append(_solve(self.roots[1, count - 1, client], away)[None])
        return np.concatenate(found)

    def verdict(self, client: int, start: np.ndarray, positions: np.ndarray, end: np.ndarray) -> str | None:
        """Say what is wrong with a visit; ``None`` where nothing is.

        Parameters
        ----------
        client : int
        start, end : array (Z,)
            State before and after.
        positions : array (n, D)
            The stored ones; the last is the end's.
        """
        distance = np.linalg.norm(self.residuals(client, start, positions, end), axis=-1)
        worst = int(np.argmax(distance))
        if not distance[worst] <= self.radius[client]:
            what = f"stored position {worst}" if worst < len(positions) else "the momentum"
            return f"{what} is {distance[worst]:.3g} from its mean, whitened; {self.radius[client]:.3g} are allowed"
        return None

    def admit(self, client: int, start: np.ndarray, positions: np.ndarray, end: np.ndarray) -> None:
        """Count an accepted visit in the running mean ``push`` of its client."""
        last = self.residuals(client, start, positions, end)[self.counts[client] - 1]
        self.visits[client] += 1
        self.push[client] += (last - self.push[client]) / self.visits[client]

    def reach(self, client: int, probability: float) -> float:
        """How far one hostile client can move the mean, in posterior standard deviations (see `reach`)."""
        last = self.counts[client] - 1
        law = self.laws.transition[last, client], self.laws.added[last, client]
        block = self.blocks[0]
        return reach(law[0][block, block], law[1][block, block], float(self.radius[client]), probability)


def reach(transition: np.ndarray, added: np.ndarray, radius: float, probability: float) -> float:
    r"""Largest shift of the stationary mean that a hostile client can bring about within a bound.

    .. math:: \max_{\lVert u \rVert = 1} \left\lVert C^{-1/2}\, p\,(I - A)^{-1} W^{1/2} u\, \rho \right\rVert,
        \qquad C = A C A^T + W

    in standard deviations of the honest law :math:`C` of where visits end, for a kernel without momentum and surrogates that
    make :math:`A` and :math:`W` the same at all clients.

    Parameters
    ----------
    transition, added : array (D, D)
        :math:`A` and :math:`W` of a visit.
    radius : float
        :math:`\rho`, the whitened displacement that is let through.
    probability : float
        :math:`p`, with which the hostile client is visited.
    """
    from scipy.linalg import solve_discrete_lyapunov

    honest = solve_discrete_lyapunov(transition, added)
    push = np.linalg.solve(np.eye(len(added)) - transition, np.linalg.cholesky(added))
    return float(probability * radius * np.linalg.norm(np.linalg.solve(np.linalg.cholesky(honest), push), 2))


def check_surrogate(
    linear: Any, precision: Any, noise: Any, size: int, *, largest: float = np.inf, largest_noise: float = np.inf
) -> None:
    r"""Raise unless a client's surrogate is one: finite, symmetric and positive definite, and not beyond what is allowed.

    Parameters
    ----------
    linear : array (D,)
        Gradient at the centre.
    precision : array (D, D) or (D,)
        A matrix, or its diagonal.
    noise : array, of the shape of ``precision``
        Covariance of the gradients of a batch; positive semi-definite.
    size : int
        :math:`D`.
    largest, largest_noise : float
        Largest eigenvalue allowed of ``precision`` and of ``noise``: an honest client of ``N`` rows, each with at most curvature
        ``c``, has ``N * c``. Without them a hostile client can claim data of any weight.

    Raises
    ------
    SurrogateError
        It says what is wrong.
    """
    linear, precision, noise = (np.asarray(x) for x in (linear, precision, noise))
    if linear.shape != (size,) or precision.shape not in ((size,), (size, size)) or noise.shape != precision.shape:
        raise SurrogateError(
            f"A surrogate has shapes ({size},), ({size}, {size}) and ({size}, {size}), or diagonals; got {linear.shape}, "
            f"{precision.shape} and {noise.shape}."
        )
    if not all(np.issubdtype(x.dtype, np.floating) and np.all(np.isfinite(x)) for x in (linear, precision, noise)):
        raise SurrogateError(
            "A surrogate must be of finite floating-point numbers; got NaN, infinity, or another dtype."
        )
    for name, matrix, limit in (("precision", precision, largest), ("noise", noise, largest_noise)):
        matrix = matrix.astype(np.float64)
        if matrix.ndim == 2 and not np.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6 * np.abs(matrix).max()):
            raise SurrogateError(f"A surrogate's {name} must be symmetric.")
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2) if matrix.ndim == 2 else np.sort(matrix)
        least = values[0] if name == "precision" else values[0] + 1e-5 * np.abs(values[-1])
        if not (least > 0 or (name == "noise" and least >= 0)):
            raise SurrogateError(
                f"A surrogate's {name} must be positive definite; its least eigenvalue is {values[0]:.3g}."
            )
        if values[-1] > limit:
            raise SurrogateError(
                f"A surrogate's {name} has an eigenvalue {values[-1]:.3g}; {limit:.3g} is the largest allowed."
            )


def _roots(covariance: np.ndarray) -> np.ndarray:
    return np.linalg.cholesky(covariance)


def _solve(root: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.linalg.solve(root, x[..., None])[..., 0]
