"""Surrogates from expansions of the clients' log likelihoods."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.shards import Shards
from ergodica.core.types import Key, Position, PyTree
from ergodica.estimators.federated.conducive import client_probabilities
from ergodica.estimators.federated.surrogates import GaussianSurrogates

_STEPS = 200


def laplace_surrogates(
    shards: Shards,
    centre: Literal["mode", "local"] | Position = "mode",
    *,
    covariance: Literal["full", "diagonal"] | int = "full",
    probabilities: Any = "sizes",
    prior_share: bool = True,
    damping: float | None = None,
    key: Key | None = None,
) -> GaussianSurrogates:
    r"""Gaussian surrogates from gradients and curvatures of the clients' log likelihoods.

    .. math:: \log q_s(\theta) = b_s \cdot (\theta - c_s) - \tfrac12 (\theta - c_s)^T P_s (\theta - c_s), \qquad
        b_s = \nabla\ell_s(c_s), \quad P_s = -\nabla^2 \ell_s(c_s), \quad
        \ell_s = \log p(x_s \mid \theta) + f_s \log p(\theta)

    Parameters
    ----------
    shards : Shards
    centre : {"mode", "local"} or pytree
        Where to expand: for all clients at a mode of the posterior, found here; for each at the mode of its own :math:`\ell_s`,
        which is Laplace's approximation; or for all at a given position.
    covariance : {"full", "diagonal"} or int
        Precision matrices, their diagonals, or diagonals plus a low rank common to all clients (`GaussianSurrogates.low_rank`).
    probabilities : {"sizes", "uniform"} or array (S,)
        :math:`f_s`, as for the `Conducive` gradient.
    prior_share : bool
        Whether :math:`f_s \log p(\theta)` is part of :math:`\ell_s`.
    damping : float, optional
        Eigenvalues of each precision (entries, for diagonals) below this are raised to it. 0 with ``centre="local"`` and none
        otherwise, unless given.
    key : typed PRNG key, optional
        For the start of the search for modes; a fixed key unless given.

    Raises
    ------
    ValueError, TypeError
        For options that are none, or a search that ends at NaN.

    Notes
    -----
    *Local likelihoods may be improper*: separable classes, weights that a client's data do not inform. With its share of the
    prior (a Gaussian one stays Gaussian) each :math:`\ell_s` is bounded and has a mode, and nothing is lost: with
    :math:`q_s = p(x_s \mid \theta)\, p(\theta)^{f_s}` the conducive gradient's mean is 0 as ever, and at every client the
    gradient is that of the posterior, since :math:`\log p + \sum_r f_r \log p - \log p = \log p`. Shares that are not in
    proportion to :math:`f_s` would not cancel.

    *One centre or many.* What matters is that the gradients of :math:`q_s` are right where the chain will be. An expansion at
    the posterior's mode is, to second order; a client's own mode may be many posterior standard deviations away. It needs the
    mode, found with the data of all, once. ``"local"`` needs one message from each client and no knowledge of the others.

    Where the likelihood is quadratic (linear regression with known noise) the surrogates are exact, whatever the centre.

    Cost: ``D`` Hessian-vector products over all the data, and the search. Memory: ``D * D`` numbers a client unless
    ``"diagonal"``. Not for likelihoods that are far from quadratic over the posterior: see `ergodica.predict_federated`.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), supplement F.2.

    Examples
    --------
    >>> import jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> q = laplace_surrogates(erg.Shards(posterior, [0, 0, 1, 1, 1, 1]), prior_share=False)
    >>> q.natural.precision.ravel().tolist()
    [2.0, 4.0]
    """
    check.instance("shards", shards, Shards, "such as Shards(posterior, client)")
    kind = check_covariance(covariance)
    share = jnp.asarray(client_probabilities(shards, probabilities) * bool(prior_share), jnp.result_type(float))
    key = jax.random.key(0) if key is None else key
    local = isinstance(centre, str) and check.one_of("centre", centre, ("mode", "local")) == "local"
    if local:
        points = _local_modes(shards, shards.posterior.start(key), share)
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(points)):
            raise ValueError("The search for a client's mode ran into NaN; give centre='mode', or a position.")
    else:
        centre = _mode(key, shards) if isinstance(centre, str) else check.position("centre", centre)
        points = jax.tree.map(lambda x: jnp.broadcast_to(x, (shards.num_clients, *x.shape)), centre)
    gradient, precision = (np.asarray(x, np.float64) for x in _expand(shards, points, share, kind == "diagonal"))
    damping = 0.0 if damping is None and local else damping
    if damping is not None:
        precision = _damped(precision, float(check.positive("damping", damping, allow_zero=True)))
    at_one = GaussianSurrogates.expansion
    found = _from_own_centres(points, gradient, precision) if local else at_one(centre, gradient, precision)
    return found.low_rank(kind) if isinstance(kind, int) else found


def check_covariance(covariance: Any) -> str | int:
    """Return a kind of covariance: full, diagonal, or a rank."""
    if isinstance(covariance, str):
        return check.one_of("covariance", covariance, ("full", "diagonal"))
    return check.integer("covariance", covariance, hint="Or 'full' or 'diagonal'.")


def client_log_density(shards: Shards, params: PyTree, client: Array, share: Array) -> Array:
    r"""Evaluate :math:`\log p(x_s \mid \theta) + f_s \log p(\theta)` (scalar)."""
    prior = shards.posterior.log_prior(params)
    own = shards.log_likelihood(params, client, shards.whole(client))
    return own.astype(prior.dtype) + tree.cast_like(share, prior) * prior


@jax.jit(static_argnames="diagonal")
def _expand(shards: Shards, points: PyTree, share: Array, diagonal: bool) -> tuple[Array, Array]:  # noqa: FBT001
    """Gradients (S, D) and negative Hessians (S, D, D), or their diagonals (S, D)."""

    def of_client(arguments: tuple) -> tuple[Array, Array]:
        client, point, share = arguments
        flat, unravel = ravel_pytree(point)

        def gradient(theta: Array) -> Array:
            return ravel_pytree(jax.grad(client_log_density, 1)(shards, unravel(theta), client, share))[0]

        def column(i: Array) -> Array:
            unit = jnp.zeros_like(flat).at[i].set(1)
            product = -jax.jvp(gradient, (flat,), (unit,))[1]
            return product[i] if diagonal else product

        found = jax.lax.map(column, jnp.arange(flat.size))
        return gradient(flat), found if diagonal else (found + found.T) / 2

    return jax.lax.map(of_client, (jnp.arange(shards.num_clients, dtype=jnp.int32), points, share))


def _damped(precision: np.ndarray, least: float) -> np.ndarray:
    if precision.ndim == 2:
        return np.maximum(precision, least)
    values, vectors = np.linalg.eigh(precision)
    return np.einsum("sde,se,sfe->sdf", vectors, np.maximum(values, least), vectors)


def _from_own_centres(points: PyTree, gradient: np.ndarray, precision: np.ndarray) -> GaussianSurrogates:
    """Surrogates that are expanded at points of their own; what is left of the gradients there is kept."""
    means = GaussianSurrogates(points, jnp.asarray(precision) if precision.ndim == 3 else _like(points, precision))
    linear = np.asarray(means.natural.linear, np.float64) + gradient
    return GaussianSurrogates.expansion(means.centre, linear, precision)


def _like(points: PyTree, rows: np.ndarray) -> PyTree:
    """Rows (S, D) in the structure of positions along a leading axis."""
    unravel = ravel_pytree(jax.tree.map(lambda x: x[0], points))[1]
    return jax.vmap(unravel)(jnp.asarray(rows, ravel_pytree(points)[0].dtype))


def _mode(key: Key, shards: Shards) -> Position:
    from ergodica.run.mode import find_mode

    return find_mode(key, shards.posterior, progress=False).position


@jax.jit
def _local_modes(shards: Shards, start: Position, share: Array) -> PyTree:
    """Climb to a mode of each client's log density, by L-BFGS."""
    import optax

    optimiser = optax.lbfgs()

    def climb(arguments: tuple) -> Position:
        client, share = arguments

        def loss(theta: Position) -> Array:
            return -client_log_density(shards, theta, client, share)

        value_and_grad = optax.value_and_grad_from_state(loss)

        def one(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            value, gradient = value_and_grad(params, state=state)
            # in double precision Optax adds its int32 count to int64 indices
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimiser.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(one, (start, optimiser.init(start)), length=_STEPS)
        return params

    return jax.lax.map(climb, (jnp.arange(shards.num_clients, dtype=jnp.int32), share))
