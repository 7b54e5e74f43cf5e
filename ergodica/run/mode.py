"""The search for a mode: a centre for control variates, a start for chains."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.result import Result
from ergodica.core.types import Estimate, Key, Position
from ergodica.run.fit import fit
from ergodica.run.progress import Progress


class Mode(NamedTuple):
    """Where a search ended.

    Attributes
    ----------
    position : pytree
        The best point found.
    value : float
        Log density there (for Adam on minibatches, of the last estimate).
    grad_norm : float
        Norm of the gradient there.
    num_steps : int
        Steps taken.
    converged : bool
        Whether the gradient fell below the tolerance; never claimed for minibatches.
    """

    position: Position
    value: float
    grad_norm: float
    num_steps: int
    converged: bool


def find_mode(
    key: Key,
    posterior: Posterior,
    *,
    initial: Position | None = None,
    method: Literal["lbfgs", "adam"] = "lbfgs",
    gradient: AbstractGradientEstimator | None = None,
    num_steps: int | None = None,
    learning_rate: float = 0.05,
    tolerance: float = 1e-3,
    progress: bool = True,
) -> Mode:
    """Climb to a mode of a posterior, in unconstrained space.

    Parameters
    ----------
    key : typed PRNG key
        For the start, and for the minibatches of Adam.
    posterior : Posterior
    initial : pytree, optional
        Where to start; the posterior's own start unless given.
    method : {"lbfgs", "adam"}
        L-BFGS with all the data, or Adam with a cosine decay of the learning rate to zero.
    gradient : AbstractGradientEstimator, optional
        For Adam only: a minibatch estimator, where all the data at each step are too much.
    num_steps : int, optional
        At most so many; 500 for L-BFGS, 5000 for Adam.
    learning_rate : float
        Of Adam, at the start, in units of the parameters.
    tolerance : float
        L-BFGS stops when the norm of the gradient, over the square root of the number of data, falls below it.
    progress : bool
        Show a bar where the error stream is a terminal.

    Returns
    -------
    Mode

    Raises
    ------
    ValueError
        For an unknown method, a gradient with L-BFGS, or a search that ran into NaN.

    Notes
    -----
    Cost: one or a few passes over the data a step for L-BFGS; one batch a step for Adam. The end of Adam's path on
    minibatches is within the noise of a mode, which is all that a control variate needs.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum((t - 2.0) ** 2), initial=jnp.zeros(2))
    >>> mode = find_mode(jax.random.key(0), posterior)
    >>> mode.converged, [round(float(x), 3) for x in mode.position]
    (True, [2.0, 2.0])
    """
    rng.check_key(key)
    check.one_of("method", method, ("lbfgs", "adam"))
    if method == "lbfgs" and gradient is not None:
        raise ValueError("L-BFGS needs exact gradients; give method='adam' with gradient=.")
    num_steps = check.integer("num_steps", num_steps or {"lbfgs": 500, "adam": 5000}[method])
    key_start, key_climb = jax.random.split(key)
    start = posterior.start(key_start) if initial is None else initial
    start = check.position("initial", start)
    if posterior.initial is not None:
        check.same_structure("initial", start, "a position", posterior.shape())
    if method == "lbfgs":
        return _lbfgs(posterior, start, num_steps, float(check.positive("tolerance", tolerance)), show=progress)
    rate = float(check.positive("learning_rate", learning_rate))
    return _adam(key_climb, gradient or _Full(posterior), start, num_steps, rate, show=progress)


class _Full(AbstractGradientEstimator):
    """The gradient with all the data."""

    target: Posterior

    def init(self, key: Key, params: Any, batch: Any = None) -> None:  # noqa: ARG002
        return None

    def estimate(self, key: Key, params: Any, state: Any, batch: Any = None) -> tuple[Any, None]:  # noqa: ARG002
        value, gradient = jax.value_and_grad(self.target.log_density)(params)
        return Estimate(gradient, value, n_grad=self.target.num_data), None


_LBFGS_AT_ONCE = 10


def _lbfgs(posterior: Posterior, start: Position, num_steps: int, tolerance: float, *, show: bool) -> Mode:
    optimiser = optax.lbfgs()
    scale = max(1, posterior.num_data) ** 0.5

    @jax.jit
    def climb(posterior: Posterior, params: Position, state: Any) -> tuple[Position, Any, Array, Array]:
        def loss(theta: Position) -> Array:
            return -posterior.log_density(theta)

        value_and_grad = optax.value_and_grad_from_state(loss)

        def one(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            value, gradient = value_and_grad(params, state=state)
            # in double precision Optax adds its int32 count to int64 indices
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimiser.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(one, (params, state), length=_LBFGS_AT_ONCE)
        value, gradient = jax.value_and_grad(loss)(params)
        return params, state, -value, tree.norm(gradient)

    params, state, done = start, optimiser.init(start), 0
    with Progress(num_steps, enabled=show) as bar:
        while True:
            params, state, value, norm = climb(posterior, params, state)
            done += _LBFGS_AT_ONCE
            _check_finite(value, norm, done)
            bar.update(done, "L-BFGS", f"log density {float(value):.4g}, gradient {float(norm):.2g}")
            converged = float(norm) / scale < tolerance
            if converged or done >= num_steps:
                return Mode(params, float(value), float(norm), done, converged)


def _adam(
    key: Key, gradient: AbstractGradientEstimator, start: Position, num_steps: int, learning_rate: float, *, show: bool
) -> Mode:
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    done = fit(key, gradient, start, num_steps=num_steps, optimiser=optimiser, progress=show, throw=False)
    if done.result is Result.INTERRUPTED:
        raise KeyboardInterrupt
    value, norm = (float(np.asarray(done.history[f"steps/{name}"])[-1]) for name in ("value", "grad_norm"))
    _check_finite(value, norm if done.result is Result.SUCCESSFUL else jnp.nan, done.history.attrs["num_steps"])
    return Mode(done.params, value, norm, num_steps, converged=False)


def _check_finite(value: Array | float, norm: Array | float, done: int) -> None:
    if not (jnp.isfinite(value) and jnp.isfinite(norm)):
        raise ValueError(
            f"The search ran into NaN or infinity within {done} steps (log density {float(value)}). Give another initial=, or "
            "a smaller learning_rate with method='adam'."
        )
