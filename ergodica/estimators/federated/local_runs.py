"""Surrogates from short runs of the clients on their own data."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.shards import Shards
from ergodica.core.types import Key, Position, PyTree
from ergodica.estimators.federated.conducive import client_probabilities
from ergodica.estimators.federated.fit import check_covariance
from ergodica.estimators.federated.surrogates import GaussianSurrogates
from ergodica.samplers.averaged import CovarianceMatrix, RunningMoments, with_iterate
from ergodica.samplers.langevin import langevin_step


def moment_surrogates(
    key: Key,
    shards: Shards,
    step_size: Any,
    *,
    num_samples: int = 3000,
    num_warmup: int = 1000,
    thin: int = 1,
    batch_size: int | None = None,
    covariance: Literal["full", "diagonal"] | int = "full",
    probabilities: Any = "sizes",
    prior_share: bool = True,
    initial: Position | None = None,
    correct_step: bool = True,
) -> GaussianSurrogates:
    r"""Gaussian surrogates with the mean and covariance of SGLD on each client's own data.

    Parameters
    ----------
    key : typed PRNG key
    shards : Shards
    step_size : float or array (S,)
        :math:`h` of the local runs. A client's own curvature is about :math:`f_s` times that of the posterior, so that the
        sampler's step over :math:`f_s` is as stable as the sampler.
    num_samples, num_warmup, thin : int
        Iterates whose moments are taken, steps before, and steps an iterate.
    batch_size : int, optional
        Rows a gradient; all of the client's unless given.
    covariance : {"full", "diagonal"} or int
        As in `laplace_surrogates`. ``"diagonal"`` takes one over the variances.
    probabilities, prior_share
        As in `laplace_surrogates`: the runs are on :math:`p(x_s \mid \theta)\,p(\theta)^{f_s}`.
    initial : pytree, optional
        Where the runs start; the posterior's start unless given.
    correct_step : bool
        Whether to take what the step and the gradient noise of the local runs add to the variance off again.

    Raises
    ------
    ValueError, TypeError
        For numbers out of range, a run that became non-finite, and too few iterates for a full covariance.

    Notes
    -----
    SGLD of step :math:`h` with gradient noise of covariance :math:`S` on a Gaussian of precision :math:`P` has the covariance that
    solves :math:`P\Sigma + \Sigma P - h P \Sigma P = 2I + hS`. The correction inverts this for :math:`P`
    (`corrected_precision`), with :math:`S` computed from the gradients of the client's data at its mean. Uncorrected precisions
    are too small, by a factor of :math:`1 - h\lambda/2` without noise; that hardly matters with one step a visit, and multiplies
    the variance with many.

    What is left is the error of moments from few independent draws: a relative standard error of about
    :math:`\sqrt{2/n}` of a variance with :math:`n \approx` ``num_samples * thin`` :math:`h\lambda` effective ones, which are
    fewest in the direction of the least curvature :math:`\lambda`. `laplace_surrogates` has no such error. This needs no second
    derivatives, and sees the bulk of a law rather than one point.

    Cost: ``num_warmup + thin * num_samples`` gradients a client, of ``batch_size`` rows or as many as the largest shard has.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), section 3.2, without the correction.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> shards = erg.Shards(posterior, [0, 0, 0, 1, 1, 1])
    >>> q = moment_surrogates(jax.random.key(0), shards, 0.2, num_samples=20_000, prior_share=False)
    >>> [round(float(p)) for p in q.natural.precision.ravel()]
    [3, 3]
    """
    rng.check_key(key)
    check.instance("shards", shards, Shards, "such as Shards(posterior, client)")
    kind = check_covariance(covariance)
    sizes = [check.integer(name, value) for name, value in (("num_samples", num_samples), ("thin", thin))]
    num_warmup = check.integer("num_warmup", num_warmup, least=0)
    batch_size = None if batch_size is None else check.integer("batch_size", batch_size)
    key_start, key_run = jax.random.split(key)
    start = shards.posterior.start(key_start) if initial is None else check.position("initial", initial)
    if kind != "diagonal" and num_samples <= tree.size(start):
        raise ValueError(
            f"num_samples must be above the number of coordinates, {tree.size(start)}, for a covariance with all its entries; got "
            f"{num_samples}. Take more, or covariance='diagonal'."
        )
    count = shards.num_clients
    h = jnp.broadcast_to(check.positive("step_size", step_size), (count,))
    share = jnp.asarray(client_probabilities(shards, probabilities) * bool(prior_share), jnp.result_type(float))
    settings = (*sizes, num_warmup, batch_size, kind == "diagonal")
    mean, spread, noise = _run(shards, start, h, share, key_run, *settings)
    if not bool(tree.all_finite((mean, spread))):
        raise ValueError("A local run became non-finite; give a smaller step_size.")
    noise = np.asarray(noise, np.float64) if correct_step else np.zeros_like(np.asarray(noise, np.float64))
    step = np.asarray(h, np.float64) * bool(correct_step)
    precision = [
        corrected_precision(np.asarray(c, np.float64), s, g) for c, s, g in zip(spread, step, noise, strict=True)
    ]
    found = GaussianSurrogates.expansion(*_about_a_centre(mean, np.stack(precision)))
    return found.low_rank(kind) if isinstance(kind, int) else found


def corrected_precision(covariance: np.ndarray, step_size: float, noise: np.ndarray) -> np.ndarray:
    r"""Precision of the Gaussian that SGLD samples with a given covariance.

    .. math::

        P\Sigma + \Sigma P - h P \Sigma P = 2I + hS \quad\Rightarrow\quad
        \Sigma^{1/2} P\, \Sigma^{1/2} = \frac1h \left[ \Sigma - R^{1/2} \right], \qquad
        R = \Sigma^2 - h\,\Sigma^{1/2} (2I + hS)\, \Sigma^{1/2}

    by completing the square; the root of the stable branch :math:`hP < I`.

    Parameters
    ----------
    covariance : array (D, D) or (D,)
        :math:`\Sigma`, or variances, each by itself.
    step_size : float
        :math:`h`; 0 gives the inverse of the covariance.
    noise : array (D, D) or (D,)
        :math:`S`.
    """
    h = float(step_size)
    if covariance.ndim == 1:
        inside = covariance**2 - h * covariance * (2 + h * noise)
        _check_root(np.min(inside), covariance.max() ** 2)
        root = np.sqrt(np.maximum(inside, 0))
        # (Sigma - root) / h without cancellation
        return (2 + h * noise) / (covariance + root)
    if h == 0:
        return np.linalg.inv(covariance)
    values, vectors = np.linalg.eigh(covariance)
    half, inverse_half = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    inside = covariance @ covariance - h * half @ (2 * np.eye(len(values)) + h * noise) @ half
    squares, directions = np.linalg.eigh((inside + inside.T) / 2)
    _check_root(squares.min(), values.max() ** 2)
    root = (directions * np.sqrt(np.maximum(squares, 0))) @ directions.T
    precision = inverse_half @ ((covariance - root) / h) @ inverse_half
    return (precision + precision.T) / 2


def _check_root(smallest: float, scale: float) -> None:
    if smallest < -1e-6 * scale:
        raise ValueError(
            "The local run's covariance is smaller than any that its step and gradient noise can have (too few draws, or a step "
            "beyond h * curvature = 1). Take a smaller step_size, more draws or larger batches, or correct_step=False."
        )


def _about_a_centre(means: PyTree, precision: np.ndarray) -> tuple[Position, np.ndarray, np.ndarray]:
    """Give centre, gradients there and precisions of Gaussians by mean and precision."""
    rows = np.stack(
        [np.asarray(tree.ravel(jax.tree.map(lambda x, i=i: x[i], means)), np.float64) for i in range(len(precision))]
    )
    full = precision.ndim == 3
    total = precision.sum(0)
    linear = np.einsum("sde,se->sd", precision, rows) if full else precision * rows
    centre = np.linalg.solve(total, linear.sum(0)) if full else linear.sum(0) / total
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], means))
    centre = jnp.asarray(centre, flat.dtype)
    away = rows - np.asarray(centre, np.float64)
    return unravel(centre), np.einsum("sde,se->sd", precision, away) if full else precision * away, precision


@jax.jit(static_argnames=("num_samples", "thin", "num_warmup", "batch_size", "diagonal"))
def _run(
    shards: Shards,
    start: Position,
    step_size: Array,
    share: Array,
    key: Key,
    num_samples: int,
    thin: int,
    num_warmup: int,
    batch_size: int | None,
    diagonal: bool,  # noqa: FBT001
) -> tuple[PyTree, Array, Array]:
    """Means, covariances (S, D, D) or variances (S, D), and the same of the gradient noise at the means."""

    def gradient(theta: Position, client: Array, share: Array, key: Key) -> PyTree:
        batch = shards.whole(client) if batch_size is None else shards.draw(key, client, batch_size)

        def log_density(theta: Position) -> Array:
            prior = shards.posterior.log_prior(theta)
            return tree.cast_like(share, prior) * prior + shards.log_likelihood(theta, client, batch).astype(
                prior.dtype
            )

        return jax.grad(log_density)(theta)

    def of_client(client: Array, h: Array, share: Array) -> tuple[PyTree, Array, Array]:
        key_client = jax.random.fold_in(key, client)

        def step(i: Array, theta: Position) -> Position:
            key_rows, key_noise = jax.random.split(jax.random.fold_in(key_client, i))
            noise = rng.normal_like(key_noise, theta)
            return langevin_step(theta, gradient(theta, client, share, key_rows), noise, h, jnp.ones((), h.dtype))

        def iterate(j: Array, carry: tuple) -> tuple:
            theta, moments = carry
            first = num_warmup + thin * j
            theta = jax.lax.fori_loop(first, first + thin, step, theta)
            return theta, with_iterate(moments, theta)

        theta = jax.lax.fori_loop(0, num_warmup, step, start)
        zero = jax.tree.map(jnp.zeros_like, start)
        size = tree.size(start)
        blank = zero if diagonal else CovarianceMatrix(jnp.zeros((size, size), tree.ravel(start).dtype))
        moments = RunningMoments(jnp.zeros((), jnp.int32), zero, zero, blank)
        _, moments = jax.lax.fori_loop(0, num_samples, iterate, (theta, moments))
        _, noise = shards.gradient_moments(moments.mean, client, diagonal=diagonal)
        weight = shards.sizes[client].astype(noise.dtype)
        noise = noise * (0 if batch_size is None else weight * weight / jnp.asarray(batch_size, noise.dtype))
        spread = tree.ravel(moments.covariance)
        return moments.mean, spread if diagonal else spread.reshape(size, size), noise

    clients = jnp.arange(shards.num_clients, dtype=jnp.int32)
    return jax.vmap(of_client)(clients, step_size, share)
