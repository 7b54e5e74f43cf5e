"""Points along one optimisation, at which all gradient estimators are compared."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Key, PyTree

LABELS = ("start", "middle", "optimum")
_WINDOWS = 50
_LAST = 10


class Points(list):
    """A list of positions with ``labels``, which `ergodica.compare_gradients` takes over."""

    def __init__(self, positions: list[PyTree], labels: tuple[str, ...]) -> None:
        super().__init__(positions)
        self.labels = labels


def training_points(
    key: Key,
    estimator: AbstractGradientEstimator,
    params: PyTree,
    *,
    num_steps: int = 1000,
    learning_rate: float = 0.02,
    optimiser: Any = None,
) -> Points:
    """Climb once, and give the start, the middle of the ascent, and the optimum, so that all estimators see the same points.

    Which estimator is the best depends on where: sticking the landing, for one, pays near the optimum only.

    Parameters
    ----------
    key : typed PRNG key
    estimator : AbstractGradientEstimator
        The one that leads. Which of them does not matter, but that it is the same for all.
    params : pytree
        Where to start.
    num_steps : int
    learning_rate : float
        Of Adam.
    optimiser : optax.GradientTransformation, optional
        Instead of Adam; it descends the negative gradient, as optax's do.

    Returns
    -------
    Points
        A list of three positions, with ``labels`` "start", "middle" and "optimum". The middle is the first step at which the
        objective (running mean over a fiftieth of the steps) has made half of its way; the optimum is the mean position of the
        last tenth.

    Raises
    ------
    ValueError
        Where the objective is not higher at the end, or became NaN.

    Notes
    -----
    Cost: at most ``2 * num_steps`` estimates. The second run repeats the first up to the middle, so that positions need not be
    kept.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(9.0), initial=jnp.array(0.0))
    >>> gradient = erg.estimators.Minibatch(posterior, 3)
    >>> points = erg.diagnostics.training_points(jax.random.key(0), gradient, jnp.array(0.0), learning_rate=0.1)
    >>> points.labels
    ('start', 'middle', 'optimum')
    >>> print(f"{points[2]:.1f}")
    3.6
    """
    rng.check_key(key)
    check.instance("estimator", estimator, AbstractGradientEstimator, "such as Minibatch(posterior, 100)")
    params = check.position("params", params)
    check.integer("num_steps", num_steps, least=_WINDOWS)
    check.positive("learning_rate", learning_rate)
    if optimiser is None:
        import optax

        optimiser = optax.adam(learning_rate)
    values, _, optimum = _climb(estimator, optimiser, key, params, num_steps, jnp.asarray(num_steps, jnp.int32))
    width = num_steps // _WINDOWS
    smooth = np.convolve(np.asarray(values, np.float64), np.ones(width) / width, mode="valid")
    if not smooth[-1] > smooth[0]:
        raise ValueError(
            f"The objective went from {smooth[0]:.4g} to {smooth[-1]:.4g} in {num_steps} steps, which is no ascent. Take a smaller "
            "learning_rate, more steps, or an estimator with less noise."
        )
    middle = int(np.argmax(smooth >= (smooth[0] + smooth[-1]) / 2)) + width // 2
    _, half_way, _ = _climb(estimator, optimiser, key, params, num_steps, jnp.asarray(middle, jnp.int32))
    return Points([params, half_way, optimum], LABELS)


@eqx.filter_jit
def _climb(
    estimator: AbstractGradientEstimator, optimiser: Any, key: Key, params: PyTree, num_steps: int, stop: Array
) -> tuple[Array, PyTree, PyTree]:
    """Take ``stop`` steps; give the values (num_steps,), the position, and its mean over the last tenth of ``num_steps``."""
    key_init, key_run = jax.random.split(key)
    last = num_steps // _LAST

    def step(i: Array, carry: tuple) -> tuple:
        params, state, moments, values, total = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key_run, i), params, state)
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes its int32 count
            updates, moments = optimiser.update(tree.scale(estimate.gradient, -1.0), moments, params)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        counts = (i >= num_steps - last).astype(jnp.result_type(float))
        return (
            params,
            state,
            moments,
            values.at[i].set(estimate.value.astype(values.dtype)),
            tree.axpy(counts, params, total),
        )

    carry = (
        params,
        estimator.init(key_init, params),
        optimiser.init(params),
        jnp.zeros(num_steps),
        tree.scale(params, 0.0),
    )
    params, _, _, values, total = jax.lax.fori_loop(0, stop, step, carry)
    return values, params, tree.scale(total, 1.0 / last)
