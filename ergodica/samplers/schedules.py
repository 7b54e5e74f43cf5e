"""Step sizes and temperatures that change over a run: functions of the step count, for any sampler.

Any function of the step count will do, and so do optax's schedules. Those made here hold their numbers as arrays, so that
another value does not compile again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check


class Cycle(NamedTuple):
    """A step size and a temperature that belong together.

    Attributes
    ----------
    step_size, temperature : function of the step count
    """

    step_size: jax.tree_util.Partial
    temperature: jax.tree_util.Partial


def cyclical(step_size: float, cycle_length: int, *, exploration: float = 0.8, temperature: float = 1.0) -> Cycle:
    r"""Make the schedule of cyclical SG-MCMC: large steps to explore, small ones to sample, again and again.

    .. math:: h_k = \frac{h_0}{2}\left[\cos\left(\pi r_k\right) + 1\right], \qquad r_k = \frac{k \bmod C}{C}, \qquad
        T_k = \begin{cases} 0 & r_k < \beta \\ T & \text{otherwise} \end{cases}

    Parameters
    ----------
    step_size : float
        :math:`h_0`, with which each cycle begins.
    cycle_length : int
        :math:`C`, in steps.
    exploration : float
        :math:`\beta`, the share of a cycle that explores as an optimiser, without noise; from 0 to below 1. With 0 all of the
        cycle is sampling.
    temperature : float
        :math:`T` of the sampling phase.

    Returns
    -------
    Cycle

    Raises
    ------
    ValueError, TypeError
        For numbers out of range.

    Notes
    -----
    Draws of the exploration phase are not samples. `ergodica.diagnostics.weighted_mean` leaves them out, and weighs the
    others by their steps. For several modes or basins, of which a chain finds one a cycle; how often it finds which is not what
    the posterior says, so the weights of the modes are not to be trusted. `ergodica.diagnose` has no verdict on the temperature
    of such a run, which has not one. Where the posterior has one mode, a constant step does better.

    References
    ----------
    Zhang, Li, Zhang, Chen and Wilson, Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning (ICLR 2020), equation 1.

    Examples
    --------
    >>> cycle = cyclical(0.1, cycle_length=100, exploration=0.5)
    >>> [round(float(cycle.step_size(jnp.asarray(k))), 3) for k in (0, 50, 99, 100)]
    [0.1, 0.05, 0.0, 0.1]
    >>> [float(cycle.temperature(jnp.asarray(k))) for k in (0, 49, 50, 100)]
    [0.0, 0.0, 1.0, 0.0]
    """
    h, T = check.positive("step_size", step_size), check.positive("temperature", temperature)
    share = check.positive("exploration", exploration, allow_zero=True)
    if check.is_concrete(share) and not share < 1:
        raise ValueError(f"exploration must be below 1, or nothing is ever sampled; got {exploration!r}.")
    length = jnp.asarray(check.integer("cycle_length", cycle_length), jnp.int32)
    return Cycle(
        jax.tree_util.Partial(cosine_cycle, h, length), jax.tree_util.Partial(cold_then_warm, T, length, share)
    )


def polynomial(step_size: float, delay: float, power: float = 1 / 3) -> jax.tree_util.Partial:
    r"""Make a decreasing step, :math:`h_k = h_0\,(1 + k/b)^{-\alpha}`.

    Parameters
    ----------
    step_size : float
        :math:`h_0`.
    delay : float
        :math:`b`, in steps: after about so many the step has begun to fall.
    power : float
        :math:`\alpha`; 1/3 gives the fastest convergence of averages, and from above 1/2 to 1 the classical conditions hold.

    Returns
    -------
    function of the step count

    Raises
    ------
    ValueError, TypeError
        For numbers that are not positive.

    Notes
    -----
    Draws under a decreasing step stand for less and less time: average them by `ergodica.diagnostics.weighted_mean`.

    References
    ----------
    Welling and Teh (2011), whose :math:`a (b + t)^{-\gamma}` has :math:`a = h_0 b^{\gamma}`; Teh, Thiery and Vollmer,
    Consistency and Fluctuations for Stochastic Gradient Langevin Dynamics (JMLR 2016), for the power.

    Examples
    --------
    >>> float(polynomial(0.1, delay=7, power=1.0)(jnp.asarray(7)))
    0.05000000074505806
    """
    numbers = (check.positive("step_size", step_size), check.positive("delay", delay), check.positive("power", power))
    return jax.tree_util.Partial(polynomial_decay, *numbers)


def cosine_cycle(step_size: Array, length: Array, count: Array) -> Array:
    """Step of a cycle: from the largest down to almost 0."""
    return step_size / 2 * (jnp.cos(jnp.pi * _place(length, count, step_size.dtype)) + 1)


def cold_then_warm(temperature: Array, length: Array, share: Array, count: Array) -> Array:
    """Temperature of a cycle: 0 for a share of it, then as given."""
    return jnp.where(_place(length, count, share.dtype) < share, 0, temperature)


def _place(length: Array, count: Array, dtype: jnp.dtype) -> Array:
    """Where in its cycle a step is, from 0 to below 1."""
    return (count.astype(length.dtype) % length).astype(dtype) / length.astype(dtype)


def polynomial_decay(step_size: Array, delay: Array, power: Array, count: Array) -> Array:
    """Step of `polynomial`."""
    return step_size * (1 + count.astype(step_size.dtype) / delay) ** -power
