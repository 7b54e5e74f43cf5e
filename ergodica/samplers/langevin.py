"""Overdamped Langevin dynamics."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Key, Position, PyTree
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient


class LangevinState(NamedTuple):
    """A chain: its position, the state of its gradient estimator, and the steps taken (int32)."""

    position: Position
    gradient: Any
    count: Array


class LangevinInfo(NamedTuple):
    """What a step reports.

    Attributes
    ----------
    lp_minibatch : scalar
        The estimator's log density where the gradient was taken.
    step_size, temperature : scalar
        As used by this step.
    grad_norm : scalar
        Euclidean norm of the estimated gradient.
    n_grad : int32 scalar
        Gradient evaluations of single data that the step cost.
    diverging : bool
        Whether the new position is not finite.
    """

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    grad_norm: Array
    n_grad: Array
    diverging: Array


class SGLD(AbstractGradientKernel):
    r"""Stochastic-gradient Langevin dynamics.

    .. math:: \theta' = \theta + h\,\hat g(\theta) + \sqrt{2 h T}\,\xi, \qquad \xi \sim N(0, I)

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        Such as ``Minibatch(posterior, batch_size)`` or a control variate around it.
    step_size : float or schedule
        The step :math:`h`, a time; a function of the step count is evaluated at each step. Papers that write
        :math:`\theta + (\epsilon/2)\,\hat g + \sqrt{\epsilon}\,\xi` have :math:`\epsilon = 2h`: use `from_paper`.
    temperature : float or schedule
        :math:`T`: the law approaches :math:`\pi^{1/T}`. 0 gives stochastic gradient ascent.

    Raises
    ------
    ValueError, TypeError
        For a step size that is not positive, a negative temperature, or a ``gradient`` that is no estimator.

    Notes
    -----
    Cost: one call of the estimator a step. Stable while :math:`h\lambda_{\max} < 2`, with
    :math:`\lambda_{\max}` the largest curvature of the log posterior.

    The stationary law is biased. On a Gaussian target of precision :math:`\lambda` with gradient noise of variance
    :math:`s^2`, independent between steps, it has variance :math:`(2T + h s^2) / (\lambda (2 - h\lambda))` in place of
    :math:`T/\lambda`, and the exact mean. Shrink the step, or the noise (a control variate, reshuffled blocks), until
    `ergodica.diagnose` calls the temperature consistent; R-hat and the effective sample size do not see this bias.
    Not for targets with several separated modes or very different scales.

    References
    ----------
    Welling and Teh (2011), equation 4.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = SGLD(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> state = sampler.init(jax.random.key(0), jnp.zeros(2))
    >>> state, info = sampler.step(jax.random.key(1), state)
    >>> state.position.shape, round(float(info.step_size), 3)
    ((2,), 0.1)
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    temperature: Hyperparameter

    references: ClassVar = ("welling2011",)

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        *,
        temperature: Any = 1.0,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)

    @classmethod
    def from_paper(cls, gradient: AbstractGradientEstimator, epsilon: float, *, temperature: Any = 1.0) -> "SGLD":
        """Take the step of the half-step convention: ``step_size = epsilon / 2``."""
        return cls(gradient, check.positive("epsilon", epsilon) / 2, temperature=temperature)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> LangevinState:
        """Start a chain at ``position``."""
        position = check.position("position", position)
        return LangevinState(position, self.gradient.init(key, position, batch), jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: LangevinState, batch: Batch | None = None) -> tuple[LangevinState, LangevinInfo]:
        """Move by one gradient and one noise."""
        key_gradient, key_noise = jax.random.split(key)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        estimate, gradient_state = self.gradient.estimate(key_gradient, state.position, state.gradient, batch)
        noise = rng.normal_like(key_noise, state.position)
        position = langevin_step(state.position, estimate.gradient, noise, h, temperature)
        info = LangevinInfo(
            lp_minibatch=estimate.value,
            step_size=h,
            temperature=temperature,
            grad_norm=tree.norm(estimate.gradient),
            n_grad=jnp.asarray(estimate.n_grad, jnp.int32),
            diverging=~tree.all_finite(position),
        )
        return LangevinState(position, gradient_state, state.count + 1), info


def langevin_step(
    position: Position, gradient: PyTree, noise: PyTree, step_size: Array, temperature: Array
) -> Position:
    r"""Euler–Maruyama step :math:`\theta + h g + \sqrt{2 h T}\,\xi` (Welling and Teh 2011, equation 4, :math:`\epsilon = 2h`)."""
    moved = tree.axpy(step_size, gradient, position)
    return tree.axpy(jnp.sqrt(2 * step_size * temperature), noise, moved)
