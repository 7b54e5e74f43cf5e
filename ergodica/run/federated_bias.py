"""The bias of a sampler whose chains travel over clients, predicted before it runs."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.federated import AbstractFederatedGradient
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Key, Position, PyTree
from ergodica.run import bias
from ergodica.run.federated_escape import escape_barriers
from ergodica.run.federated_law import FederatedLaw, client_steps, federated_law

NUM_POINTS = 8
LOW_BARRIER = 10.0


@dataclasses.dataclass(frozen=True)
class PredictedFederation:
    r"""What `predict_federated` found.

    Attributes
    ----------
    names : list of str
        The coordinates, as in ``beta[2]``.
    inflation : array (D,)
        Posterior sd of each coordinate over all steps of the sampler, over the true one, less 1.
    shift : array (D,)
        Mean of each coordinate under the sampler less the true one, in true posterior sds.
    at_best : array (D,)
        The inflation that exact surrogates would give, for visits of any length: step and batches alone.
    one_step : array (D,)
        The inflation with the same surrogates and visits of one step.
    misfit : array (S,)
        For each client, by how much the mean of its gradients differs from the gradient of the posterior, as a mean square over
        draws of the Laplace approximation, relative to what it would be without surrogates: 0 is perfect, 1 is DSGLD.
    surrogate_error, gradient_size : array (S,)
        The :math:`\varepsilon_s^2` of the paper, the mean over the client's data of
        ``|grad log p(x_i) - grad log q_s / N_s|**2``, and the same without a surrogate. They contain the spread between the
        client's own data, which no surrogate takes away.
    barriers : array (S,)
        Height in nats of the barrier over which a chain can leave during a visit to each client, at most; ``inf`` where none was
        found (`ergodica.run.federated_escape.escape_barriers`), NaN where correlations were left out. Below about 10, long visits
        lose chains, whatever the other figures say.
    clients : tuple
        The clients' labels.
    local_steps : int array (S,)
    full : bool
        Whether correlations were taken into account.
    law : FederatedLaw
        Moments of the raveled position, less ``centre``; along a leading axis by coordinate where ``full`` is false.
    centre : pytree
    """

    names: list[str]
    inflation: np.ndarray
    shift: np.ndarray
    at_best: np.ndarray
    one_step: np.ndarray
    misfit: np.ndarray
    surrogate_error: np.ndarray
    gradient_size: np.ndarray
    barriers: np.ndarray
    clients: tuple
    local_steps: np.ndarray
    full: bool
    law: FederatedLaw
    centre: Position

    @property
    def largest(self) -> float:
        """The inflation farthest from 0."""
        return float(self.inflation[np.argmax(np.abs(self.inflation))])

    def __str__(self) -> str:
        worst, moved = int(np.argmax(np.abs(self.inflation))), int(np.argmax(np.abs(self.shift)))
        poorest = int(np.argmax(self.misfit))
        few, many = int(self.local_steps.min()), int(self.local_steps.max())
        steps = f"{few}" if few == many else f"{few} to {many}"
        lines = [
            f"With {steps} local steps the posterior sd will be {1 + self.inflation[worst]:.3g} times what it should be "
            f"({self.names[worst]}, the worst of {len(self.names)}): {1 + self.one_step[worst]:.3g} with one local step, "
            f"{1 + self.at_best[worst]:.3g} with exact surrogates.",
            "The mean will be right."
            if abs(self.shift[moved]) < 5e-4
            else f"The mean will be off by {self.shift[moved]:+.2g} posterior sd ({self.names[moved]}).",
            f"Of what sets the clients' gradients apart (mean square) surrogates leave {self.misfit.min():.2g} to "
            f"{self.misfit[poorest]:.2g}, most at client {self.clients[poorest]!r}.",
        ]
        if np.min(self.barriers) < LOW_BARRIER:
            lowest = int(np.argmin(self.barriers))
            lines.append(
                f"At client {self.clients[lowest]!r} a chain is kept by a barrier of {self.barriers[lowest]:.1f} nats at most, "
                "beyond which the density that it follows rises without end: long visits lose chains, which the figures above "
                "do not see. Make visits shorter, or the surrogates' tails closer to those of the likelihoods."
            )
        if not self.full:
            lines.append("Computed coordinate by coordinate: correlations of the posterior were left out.")
        return "\n".join(lines)


def predict_federated(
    key: Key,
    sampler: AbstractKernel,
    centre: Position | None = None,
    *,
    curvature: Literal["full", "diagonal"] = "full",
) -> PredictedFederation:
    r"""Predict mean and sd of a federated sampler's draws before it runs, and how good its surrogates are.

    Around a mode the log likelihood of each client is quadratic, so that a visit is an affine map, and mean and covariance over
    independent visits obey linear equations (`ergodica.run.federated_law.federated_law`). Gradient, curvature and the covariance of
    the gradient noise of each client are computed from its data and surrogate as the sampler has them; the steps are read
    off the inner kernel.

    Parameters
    ----------
    key : typed PRNG key
    sampler : Federated
        With independent visits, and an inner kernel of constant step and temperature whose steps are affine on a Gaussian: `SGLD`,
        `Splitting` and their presets.
    centre : pytree, optional
        A mode, in unconstrained space; found by `find_mode` unless given.
    curvature : {"full", "diagonal"}
        All of the Hessians, for at most 100 coordinates, or their diagonals, which leaves out the correlations.

    Returns
    -------
    PredictedFederation
        Its `str` is the answer in words.

    Raises
    ------
    ValueError, TypeError
        For a sampler that is not federated, permuted visits (whose law is another one), schedules, an inner kernel whose steps are
        not affine, an unstable chain, a centre that is no mode, or too many coordinates.

    Notes
    -----
    Exact for likelihoods that are quadratic, as far as the noise is the same everywhere: its covariance is the mean over 8 draws
    from the Laplace approximation of the posterior. Not for multimodal posteriors, nor for visits so long that a chain leaves
    the region in which its client's likelihood is quadratic: where that ends in no return, ``barriers`` says so.

    Cost: ``2D`` Hessian-vector products, 8 gradients and 121 likelihoods of each datum, and the mode if it must be found; then
    linear algebra in ``D * D`` unknowns, and the longest visit in products of ``S`` matrices. It needs all data in one place, or
    a client's gradient, curvature and noise from each.

    References
    ----------
    The law is that of random affine maps. Surrogate error: El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), lemma 2, where it
    is the maximum over positions.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> dsgld = erg.fsgld(posterior, client=[0, 0, 1, 1, 1, 1], step_size=0.01, local_steps=50, surrogates=None)
    >>> fsgld = erg.fsgld(posterior, client=[0, 0, 1, 1, 1, 1], step_size=0.01, local_steps=50)
    >>> [round(erg.predict_federated(jax.random.key(0), s).largest, 2) for s in (dsgld, fsgld)]
    [1.93, 0.02]
    """
    rng.check_key(key)
    kernel, gradient = _parts(sampler)
    key_mode, key_draws = jax.random.split(key)
    centre = bias.find_centre(key_mode, gradient.posterior, centre)
    diagonal = _diagonal(curvature, tree.size(centre))
    temperature = bias.temperature_of(kernel)
    share = np.asarray(gradient.probabilities, np.float64)
    drift, matrices = (np.asarray(x, np.float64) for x in _expand(gradient, centre, diagonal))
    total, pull = _positive(_mean(share, matrices)), _mean(share, drift)
    points, _ = bias.laplace_draws(key_draws, centre, total, temperature)
    points = jax.tree.map(lambda x: x[:NUM_POINTS], points)
    noise, error, size_of_gradient, means, own = (np.asarray(x, np.float64) for x in _look(gradient, points, diagonal))
    steps = np.broadcast_to(np.asarray(sampler.local_steps), share.shape)  # pyright: ignore[reportAttributeAccessIssue]
    ones = np.ones_like(steps)
    clients = client_steps(kernel, centre, matrices, drift, noise)
    same = [np.broadcast_to(x, like.shape) for x, like in ((total, matrices), (pull, drift))]
    alike = client_steps(kernel, centre, same[0], same[1], noise)
    law = federated_law(clients, _visits(share, steps), steps)
    variance, mean = (
        (1 / total, pull / total) if diagonal else (np.diag(np.linalg.inv(total)), np.linalg.solve(total, pull))
    )
    sd = np.sqrt(temperature * variance)
    return PredictedFederation(
        names=tree.coordinate_names(centre),
        inflation=_sd(law) / sd - 1,
        shift=(law.steps.mean.reshape(-1) - mean) / sd,
        at_best=_sd(federated_law(alike, share, ones)) / sd - 1,
        one_step=_sd(federated_law(clients, share, ones)) / sd - 1,
        misfit=_misfit(share, means, own),
        surrogate_error=error,
        gradient_size=size_of_gradient,
        barriers=np.full(share.shape, np.nan) if diagonal else escape_barriers(gradient, centre, total),
        clients=gradient.shards.names,
        local_steps=np.array(steps),
        full=not diagonal,
        law=law,
        centre=centre,
    )


def _parts(sampler: Any) -> tuple[AbstractKernel, AbstractFederatedGradient]:
    """The inner kernel and its gradient; raise where the law of the visits is not known."""
    gradient, kernel = getattr(sampler, "gradient", None), getattr(sampler, "kernel", None)
    if not isinstance(gradient, AbstractFederatedGradient) or not hasattr(sampler, "visits") or kernel is None:
        raise TypeError(f"sampler must be a Federated kernel, such as that of fsgld; got {type(sampler).__name__}.")
    if not sampler.visits.independent:
        raise ValueError(
            "sampler's visits must be independent: the law of permuted ones is not predicted. With schedule='independent' and the "
            "same probabilities the prediction errs on the wide side; or measure after the run (ergodica.diagnose)."
        )
    bias.check_constant(kernel)
    return kernel, gradient


def _diagonal(curvature: Any, size: int) -> bool:
    diagonal = check.one_of("curvature", curvature, ("full", "diagonal")) == "diagonal"
    if not diagonal and size > bias.MOST_COORDINATES:
        raise ValueError(
            f"curvature='full' is for at most {bias.MOST_COORDINATES} coordinates; there are {size}. Give curvature='diagonal', "
            "which leaves out the correlations."
        )
    return diagonal


def _mean(share: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.tensordot(share, values, 1)


def _visits(share: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return share / steps / np.sum(share / steps)


def _sd(law: FederatedLaw) -> np.ndarray:
    return np.sqrt(np.diagonal(law.steps.covariance, axis1=-2, axis2=-1)).reshape(-1)


def _misfit(share: np.ndarray, means: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Mean square of what sets each client's gradient apart (S,), relative to what it is without surrogates."""
    apart = means - _mean(share, means)
    alone = own / share[:, None, None] - own.sum(0)
    square = np.mean(np.sum(alone**2, -1), -1)
    return np.mean(np.sum(apart**2, -1), -1) / np.where(square > 0, square, 1)


def _positive(matrix: np.ndarray) -> np.ndarray:
    smallest = np.min(matrix if matrix.ndim == 1 else np.linalg.eigvalsh(matrix))
    if not smallest > 0:
        raise ValueError(
            f"centre must be a mode with positive curvature in every direction; the smallest curvature there is {smallest:.3g}. "
            "Give the position that erg.find_mode reaches, or check that the posterior is proper."
        )
    return matrix


@jax.jit(static_argnames="diagonal")
def _expand(gradient: AbstractFederatedGradient, centre: Position, diagonal: bool) -> tuple[Array, Array]:  # noqa: FBT001
    """Mean gradients (S, D) at the centre, and their negative Jacobians (S, D, D) or the diagonals of these (S, D)."""
    flat, unravel = ravel_pytree(centre)

    def of_client(client: Array) -> tuple[Array, Array]:
        def mean_gradient(theta: Array) -> Array:
            return ravel_pytree(jax.grad(gradient.mean_log_density)(unravel(theta), client))[0]

        def column(i: Array) -> Array:
            product = -jax.jvp(mean_gradient, (flat,), (jnp.zeros_like(flat).at[i].set(1),))[1]
            return product[i] if diagonal else product

        found = jax.lax.map(column, jnp.arange(flat.size))
        return mean_gradient(flat), found if diagonal else (found + found.T) / 2

    return jax.lax.map(of_client, jnp.arange(gradient.shards.num_clients, dtype=jnp.int32))


@jax.jit(static_argnames="diagonal")
def _look(gradient: AbstractFederatedGradient, points: PyTree, diagonal: bool) -> tuple[Array, ...]:  # noqa: FBT001
    """For each client the covariance of the noise, surrogate error and mean square of single gradients, over points.

    And at each point the mean of its gradients, and the gradient of its log likelihood (S, points, D).
    """

    def of_client(client: Array) -> tuple[Array, ...]:
        def at(point: Position) -> tuple[Array, ...]:
            mean, variances = gradient.shards.gradient_moments(point, client, diagonal=True)
            size, spread = gradient.shards.sizes[client].astype(mean.dtype), jnp.sum(variances)
            stand_in = tree.ravel(jax.grad(gradient.surrogate_log_density)(point, client)) / size
            noise = gradient.covariance(point, client, diagonal=diagonal)
            whole = tree.ravel(jax.grad(gradient.mean_log_density)(point, client))
            return noise, spread + jnp.sum((mean - stand_in) ** 2), spread + jnp.sum(mean**2), whole, size * mean

        noise, error, square, whole, own = jax.lax.map(at, points)
        return noise.mean(0), error.mean(), square.mean(), whole, own

    return jax.lax.map(of_client, jnp.arange(gradient.shards.num_clients, dtype=jnp.int32))
