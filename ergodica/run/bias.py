"""The bias of a sampler, predicted before it runs."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ergodica.core import check, rng, tree
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position, PyTree
from ergodica.run import curvature as curvatures
from ergodica.run import linear_law

MOST_COORDINATES = 100
PROBES_A_POINT = 256


@dataclasses.dataclass(frozen=True)
class PredictedBias:
    """What `predict_bias` found.

    Attributes
    ----------
    names : list of str
        The coordinates, as in ``beta[2]``.
    inflation : array (D,)
        Posterior sd of each coordinate under the sampler, over the true one, less 1: 0.1 is 10% too wide.
    without_noise : array (D,)
        The same with exact gradients: what the step alone does.
    independent : array (D,)
        The same if successive gradients were independent; equal to ``inflation`` unless batches are reshuffled.
    num_blocks : int or None
        Blocks an epoch, where batches are reshuffled.
    full : bool
        Whether correlations were taken into account.
    """

    names: list[str]
    inflation: np.ndarray
    without_noise: np.ndarray
    independent: np.ndarray
    num_blocks: int | None
    full: bool

    @property
    def largest(self) -> float:
        """The inflation farthest from 0."""
        return float(self.inflation[np.argmax(np.abs(self.inflation))])

    def __str__(self) -> str:
        worst = int(np.argmax(np.abs(self.inflation)))
        verb = "inflated" if self.largest >= 0 else "deflated"
        coordinates = f", the worst of {len(self.names)} coordinates" if len(self.names) > 1 else ""
        lines = [
            f"With this step and batch the posterior sd will be {verb} by about {abs(self.largest):.2%} "
            f"({self.names[worst]}{coordinates}); {self.without_noise[worst]:+.2%} of it from the step alone."
        ]
        if self.num_blocks is not None:
            lines.append(
                f"Batches are {self.num_blocks} reshuffled blocks; independent batches would give {self.independent[worst]:+.2%}."
            )
        if not self.full:
            lines.append("Computed coordinate by coordinate: correlations of the posterior were left out.")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Curvature and noise around a centre: matrices (D, D), or diagonals (D,)."""

    centre: Position
    curvature: np.ndarray
    noise: np.ndarray
    num_blocks: int | None

    @property
    def full(self) -> bool:
        """Whether these are matrices."""
        return self.curvature.ndim == 2


def predict_bias(
    key: Key,
    sampler: AbstractKernel,
    centre: Position | None = None,
    *,
    curvature: Literal["full", "diagonal"] | Any = "full",
    noise: Any = None,
) -> PredictedBias:
    r"""Predict by how much a sampler will inflate the posterior's sd, before it runs.

    Around a mode the log density is quadratic, a step is affine, and the covariance of its stationary law obeys a linear
    equation, for SGLD

    .. math:: \Sigma = (I - h\Lambda)\,\Sigma\,(I - h\Lambda)^T + 2hT I + h^2 S

    with :math:`\Lambda` the curvature at the mode and :math:`S` the covariance of the noise of one gradient. For any other kernel
    with affine steps the matrices are read off its own ``step``. Under ``scheme="blocks"`` the equation is that of an epoch, whose
    noise is drawn without replacement (`ergodica.run.linear_law.stationary_covariance`), and the covariance is the average over
    the steps of an epoch.

    Parameters
    ----------
    key : typed PRNG key
    sampler : AbstractKernel
        With a constant step size and temperature: `SGLD`, `Splitting` and their presets.
    centre : pytree, optional
        A mode, in unconstrained space; found by `find_mode` unless given.
    curvature : {"full", "diagonal"} or array
        The negative Hessian at the centre: all of it, for at most 100 coordinates; its diagonal, which leaves out the correlations;
        or a matrix (D, D) or diagonal (D,) that is known.
    noise : array, optional
        Covariance (D, D), or variances (D,), of the noise of one gradient. Unless given it is the mean over 16 draws from
        the Laplace approximation, of 256 probe gradients each: a standard error of about 2% in each direction.

    Returns
    -------
    PredictedBias
        Its `str` is the answer in words.

    Raises
    ------
    ValueError, TypeError
        For schedules, a kernel whose steps are not affine, an unstable step, a centre that is no mode, an order of
        batches whose law is unknown, or too many coordinates for a full matrix.

    Notes
    -----
    Cost: ``D`` Hessian-vector products over all the data, 4,096 gradient estimates, and the mode if it must be found. The
    covariance takes :math:`O(\log K)` products of matrices of a few times ``D`` rows.

    The posterior is taken as Gaussian and the noise as one covariance everywhere. Not for multimodal or heavy-tailed
    posteriors, nor where few data a parameter make the noise change over the bulk. For samplers that adapt, measure
    the bias after the run (`ergodica.diagnose`).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> bias = predict_bias(jax.random.key(0), sampler, jnp.zeros(2))
    >>> round(bias.largest, 4), round((2 / (2 - 0.1)) ** 0.5 - 1, 4)
    (0.026, 0.026)
    """
    check_constant(sampler)
    around = look_around(key, sampler, centre, curvature=curvature, noise=noise)
    return bias_at(sampler, around)


def bias_at(sampler: AbstractKernel, around: Surroundings) -> PredictedBias:
    """Predict the bias where curvature and noise are known."""
    if around.full:
        step = linear_law.affine_step(sampler, around.centre, jnp.asarray(around.curvature))
        noise, exact = around.noise, np.diag(np.linalg.inv(around.curvature))
    else:
        step = linear_law.affine_steps(sampler, around.curvature, masses(sampler, around.centre))
        noise, exact = around.noise[:, None, None], 1 / around.curvature

    def inflation(noise: np.ndarray, num_blocks: int | None) -> np.ndarray:
        covariance = linear_law.stationary_covariance(step, noise, num_blocks)
        variance = np.diag(covariance) if around.full else covariance[:, 0, 0]
        return np.sqrt(variance / (temperature_of(sampler) * exact)) - 1

    independent = inflation(noise, None)
    return PredictedBias(
        names=tree.coordinate_names(around.centre),
        inflation=independent if around.num_blocks is None else inflation(noise, around.num_blocks),
        without_noise=inflation(0 * noise, None),
        independent=independent,
        num_blocks=around.num_blocks,
        full=around.full,
    )


def look_around(
    key: Key, sampler: AbstractKernel, centre: Position | None, *, curvature: Any = "full", noise: Any = None
) -> Surroundings:
    """Find the mode, the curvature and the gradient noise that a prediction needs."""
    rng.check_key(key)
    key_mode, key_draws, key_noise, key_check = jax.random.split(key, 4)
    gradient, posterior = linear_law.gradient_of(sampler), sampler.posterior
    centre = find_centre(key_mode, posterior, centre)
    matrix = _curvature(posterior, centre, curvature)
    num_blocks = curvatures.num_blocks(gradient)
    if noise is not None:
        return Surroundings(centre, matrix, _given_noise(noise, matrix), num_blocks)
    points, elsewhere = laplace_draws(key_draws, centre, matrix, temperature_of(sampler))
    diagonal = matrix.ndim == 1
    noise = curvatures.noise_covariance(key_noise, gradient, points, elsewhere, PROBES_A_POINT, diagonal=diagonal)
    if num_blocks is not None:
        curvatures.check_cancels(key_check, gradient, centre, noise, num_blocks)
    return Surroundings(centre, matrix, noise, num_blocks)


def check_constant(sampler: AbstractKernel) -> None:
    """Raise where a hyper-parameter is a schedule, or no target is left."""
    if hasattr(sampler, "visits"):
        raise ValueError(
            f"The chains of sampler, {type(sampler).__name__}, travel over clients; ergodica.predict_federated predicts their law."
        )
    for name in ("step_size", "temperature"):
        value = getattr(sampler, name, None)
        if callable(value):
            raise ValueError(
                f"sampler's {name} must be a number: under a schedule there is no stationary law. Give the value of a phase."
            )
    if temperature_of(sampler) <= 0:
        raise ValueError(
            "sampler's temperature must be above 0; at 0 it is an optimiser, and there is no posterior sd."
        )


def temperature_of(sampler: Any) -> float:
    """The temperature of a kernel, 1 for those without."""
    return float(getattr(sampler, "temperature", 1.0))


def masses(sampler: Any, centre: Position) -> np.ndarray:
    """The mass of each coordinate, 1 for kernels without."""
    mass = getattr(sampler, "mass", 1.0)
    if jax.tree.structure(mass) == jax.tree.structure(centre):
        spread = jax.tree.map(lambda m, x: np.broadcast_to(np.asarray(m, np.float64), np.shape(x)), mass, centre)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(spread)])
    return np.full(tree.size(centre), np.asarray(mass, np.float64))


def find_centre(key: Key, posterior: Any, centre: Position | None) -> Position:
    """Check a centre, or look for a mode."""
    if centre is not None:
        return check.position("centre", centre)
    if not isinstance(posterior, Posterior):
        raise ValueError("centre must be given, a mode: the sampler holds no posterior in which to look for one.")
    from ergodica.run.mode import find_mode

    return find_mode(key, posterior, progress=False).position


def _curvature(posterior: Any, centre: Position, curvature: Any) -> np.ndarray:
    """The negative Hessian or its diagonal, computed or given; raise where it is not positive definite."""
    size = tree.size(centre)
    if isinstance(curvature, str):
        check.one_of("curvature", curvature, ("full", "diagonal"))
        if curvature == "full" and size > MOST_COORDINATES:
            raise ValueError(
                f"curvature='full' is for at most {MOST_COORDINATES} coordinates; there are {size}. Give curvature='diagonal', "
                "which leaves out the correlations, or the matrix itself."
            )
        if not isinstance(posterior, Posterior) or (posterior.data is None and posterior.num_data):
            raise ValueError(
                "curvature must be given, as an array: the sampler's posterior is missing or holds no data."
            )
        compute = curvatures.hessian if curvature == "full" else curvatures.hessian_diagonal
        matrix = np.asarray(compute(posterior, centre), np.float64)
    else:
        matrix = np.asarray(curvature, np.float64)
        if matrix.shape not in ((size,), (size, size)):
            raise ValueError(f"curvature must have shape ({size},) or ({size}, {size}); got {matrix.shape}.")
    smallest = np.min(matrix if matrix.ndim == 1 else np.linalg.eigvalsh(matrix))
    if not smallest > 0:
        raise ValueError(
            f"centre must be a mode with positive curvature in every direction; the smallest curvature there is {smallest:.3g}. "
            "Give the position that erg.find_mode reaches, or check that the posterior is proper."
        )
    return matrix


def _given_noise(noise: Any, curvature: np.ndarray) -> np.ndarray:
    noise = np.asarray(noise, np.float64)
    if noise.shape != curvature.shape:
        raise ValueError(f"noise must have the shape of the curvature, {curvature.shape}; got {noise.shape}.")
    return noise


def laplace_draws(key: Key, centre: Position, curvature: np.ndarray, temperature: float) -> tuple[PyTree, PyTree]:
    """Two independent sets of draws from the Gaussian at the mode."""
    flat = tree.ravel(centre)
    shape = (2 * curvatures.NUM_POINTS, flat.size)
    normals = np.asarray(jax.random.normal(key, shape), np.float64)
    steps = normals / np.sqrt(curvature) if curvature.ndim == 1 else _whiten_back(curvature, normals)
    raveled = flat[None] + jnp.asarray(np.sqrt(temperature) * steps, flat.dtype)
    draws = jax.vmap(ravel_pytree(centre)[1])(raveled)
    half = curvatures.NUM_POINTS
    return jax.tree.map(lambda x: x[:half], draws), jax.tree.map(lambda x: x[half:], draws)


def _whiten_back(curvature: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Rows of covariance ``curvature^-1`` from rows of independent normals."""
    return np.linalg.solve(np.linalg.cholesky(curvature).T, normals.T).T
