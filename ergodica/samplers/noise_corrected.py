"""Langevin dynamics that injects less noise where the gradient brings its own."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.adaptation import adapted_mean, check_adaptation
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient, coordinatewise


class NoiseCorrectedState(NamedTuple):
    """A chain: as `LangevinState`, with ``noise``, the running mean of the measured variance (``None`` where it is given)."""

    position: Position
    noise: PyTree
    gradient: Any
    count: Array


class NoiseCorrectedInfo(NamedTuple):
    """What a step reports: as `LangevinInfo`, with ``noise_exceeds``.

    Attributes
    ----------
    noise_exceeds : bool
        Whether in some coordinate the gradient brings more noise than the step should have: none is injected there, and the
        law is too wide all the same. Use a smaller step or a larger batch.
    """

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    grad_norm: Array
    noise_exceeds: Array
    n_grad: Array
    diverging: Array


class NoiseCorrectedSGLD(AbstractGradientKernel):
    r"""SGLD that subtracts the variance of the gradient noise from that of the injected noise, by coordinate.

    .. math::

        \theta' = \theta + h\,\hat g(\theta) + \sqrt{\max(0,\; 2 h T - h^2 \hat s^2)}\;\xi

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        With independent noise at each call: ``Minibatch(posterior, batch_size, scheme="uniform")``, or a control variate
        around it.
    step_size : float or schedule
        :math:`h`, a time.
    noise : float or pytree, optional
        The variance :math:`\hat s^2` of one gradient: one for all coordinates, or in the structure of the position. Left out, it is
        measured while the chain runs, from the difference of the gradient and an independent probe.
    num_adapt : int or None
        Where it is measured, the steps after which it is frozen; ``None``: never.
    temperature : float or schedule
        :math:`T`.
    decay : float
        Of the running mean of the measured variances, below 1.

    Raises
    ------
    ValueError, TypeError
        For an estimator that reshuffles, one without probes where the noise is to be measured, or numbers out of range.

    Notes
    -----
    Cost: one call of the estimator a step; a second one (a probe) at every step where the noise is measured, also after it is
    frozen. To save it, give the ``noise`` that a first run has found.

    On a Gaussian target of precision :math:`\lambda`, with gradient noise of variance :math:`s^2` independent between steps and
    an unbiased :math:`\hat s^2` below :math:`2T/h`, the variance is that of full gradients,
    :math:`2T / (\lambda(2 - h\lambda))`. Off the diagonal the noise is not corrected, and noise that changes with the position is
    corrected on average.

    Reshuffled blocks are refused. Their noise cancels over an epoch, so that subtracting the variance of one gradient takes away
    far too much: a variance of 0.54 in place of 1 on a Gaussian with 100 blocks.

    References
    ----------
    Ahn, Korattikara and Welling (2012); Vollmer, Zygalakis and Teh (2016), section 5 (modified SGLD).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(2.0))
    >>> gradient = erg.estimators.Minibatch(posterior, 2, scheme="uniform")
    >>> sampler = NoiseCorrectedSGLD(gradient, step_size=0.01)
    >>> state, info = sampler.step(jax.random.key(1), sampler.init(jax.random.key(0), jnp.array(2.0)))
    >>> bool(info.noise_exceeds), int(info.n_grad)
    (False, 4)
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    noise: PyTree
    num_adapt: Array | None
    temperature: Hyperparameter
    decay: Array

    references: ClassVar = ("ahn2012", "vollmer2016")

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        noise: Any = None,
        *,
        num_adapt: int | None = 1000,
        temperature: Any = 1.0,
        decay: Any = 0.99,
    ) -> None:
        self.gradient = check_gradient(gradient)
        if gradient.reshuffles:
            raise ValueError(
                "gradient must have independent noise at each call; got one that visits reshuffled blocks, whose noise cancels "
                "over an epoch and would be over-corrected. Use Minibatch(..., scheme='uniform'), or plain SGLD with blocks."
            )
        self.step_size = hyperparameter("step_size", step_size)
        self.noise = jax.tree.map(lambda s: check.positive("noise", s, allow_zero=True), noise)
        self.num_adapt, self.decay = check_adaptation(num_adapt, decay)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> NoiseCorrectedState:
        """Start a chain at ``position``."""
        key_gradient, key_probe = jax.random.split(key)
        position = check.position("position", position)
        gradient_state, measured = self.gradient.init(key_gradient, position, batch), None
        if self.noise is None:
            self._probe_for_noise(key_probe, position, gradient_state)
            measured = jax.tree.map(jnp.zeros_like, position)
        else:
            coordinatewise("noise", self.noise, position)
        return NoiseCorrectedState(position, measured, gradient_state, jnp.zeros((), jnp.int32))

    def step(
        self, key: Key, state: NoiseCorrectedState, batch: Batch | None = None
    ) -> tuple[NoiseCorrectedState, NoiseCorrectedInfo]:
        """Move by one gradient and as much noise as is still missing."""
        key_gradient, key_noise, key_probe = jax.random.split(key, 3)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        estimate, gradient_state = self.gradient.estimate(key_gradient, state.position, state.gradient, batch)
        measured, variance, cost = self._variance(key_probe, state, estimate)
        noise = rng.normal_like(key_noise, state.position)
        position = corrected_step(state.position, estimate.gradient, noise, variance, h, temperature)
        info = NoiseCorrectedInfo(
            lp_minibatch=estimate.value,
            step_size=h,
            temperature=temperature,
            grad_norm=tree.norm(estimate.gradient),
            noise_exceeds=noise_exceeds(variance, h, temperature),
            n_grad=jnp.asarray(estimate.n_grad, jnp.int32) + jnp.asarray(cost, jnp.int32),
            diverging=~tree.all_finite(position),
        )
        return NoiseCorrectedState(position, measured, gradient_state, state.count + 1), info

    def _variance(self, key: Key, state: NoiseCorrectedState, estimate: Estimate) -> tuple[PyTree, PyTree, Any]:
        """Give what is kept of the measured variance, the variance to subtract, and what the probe cost."""
        if self.noise is not None:
            return None, coordinatewise("noise", self.noise, state.position), 0
        probe = self._probe_for_noise(key, state.position, state.gradient)
        found = jax.tree.map(lambda a, b: (a - b) ** 2 / 2, estimate.gradient, probe.gradient)
        kept, mean = adapted_mean(state.noise, found, state.count + 1, self.decay, self.num_adapt)
        return kept, mean, probe.n_grad

    def _probe_for_noise(self, key: Key, position: Position, gradient_state: Any) -> Estimate:
        probe = self.gradient.probe(key, position, gradient_state)
        if probe is None:
            raise ValueError(
                "The variance of the gradient cannot be measured, since the estimator gives no independent probe (it holds no "
                "data, or has none). Give noise=, the variance of one gradient."
            )
        return probe


def corrected_step(
    position: Position, gradient: PyTree, noise: PyTree, variance: PyTree, step_size: Array, temperature: Array
) -> Position:
    r"""Euler–Maruyama step :math:`\theta + h g + \sqrt{\max(0, 2 h T - h^2 s^2)}\,\xi` (Vollmer, Zygalakis and Teh 2016)."""

    def move(x: Array, g: Array, xi: Array, s2: Array) -> Array:
        h, injected = tree.cast_like(step_size, x), tree.cast_like(2 * step_size * temperature, x)
        return x + h * g + jnp.sqrt(jnp.maximum(injected - h**2 * s2, 0)) * xi

    return jax.tree.map(move, position, gradient, noise, variance)


def noise_exceeds(variance: PyTree, step_size: Array, temperature: Array) -> Array:
    r"""Whether :math:`h^2 s^2 > 2 h T` in some coordinate."""
    flags = [
        jnp.any(s2 * tree.cast_like(step_size, s2) > tree.cast_like(2 * temperature, s2))
        for s2 in jax.tree.leaves(variance)
    ]
    return jnp.any(jnp.stack(flags))
