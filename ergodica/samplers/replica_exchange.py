"""Langevin chains at several temperatures that exchange their positions."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.adaptation import adapted_mean, check_adaptation
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient
from ergodica.samplers.langevin import langevin_step


class ReplicaState(NamedTuple):
    """Chains at all temperatures.

    Attributes
    ----------
    position, gradient : pytree
        The coldest replica, which is the one that is sampled, and the state of its gradient estimator.
    hot, hot_gradient : pytree
        The same of the others, from cold to hot, along a leading axis.
    noise : array (num_replicas - 1,)
        Running mean of the measured variance of the estimated differences of log density between neighbours.
    count : int32 scalar
        Steps taken.
    """

    position: Position
    hot: PyTree
    gradient: Any
    hot_gradient: Any
    noise: Array
    count: Array


class ReplicaInfo(NamedTuple):
    """What a step reports: as `LangevinInfo` for the coldest replica; ``n_grad`` and ``diverging`` are about all of them.

    Attributes
    ----------
    swap_rate : scalar
        Probability of a swap between neighbours, mean over the pairs.
    swap_penalty : scalar
        What the noise of the energies takes off the logarithm of that probability, mean over the pairs: above about 1 few
        swaps are left.
    """

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    grad_norm: Array
    swap_rate: Array
    swap_penalty: Array
    n_grad: Array
    diverging: Array


class ReplicaExchange(AbstractGradientKernel):
    r"""Replica exchange SGLD: hot chains cross barriers, and swaps hand their finds down to the cold one.

    At each step neighbours (the even pairs and the odd ones in turn) swap positions with probability

    .. math:: \min\left(1, \exp\left( \delta\,\hat\Delta - \tfrac12 \delta^2 \hat s^2 \right)\right), \qquad
        \delta = \frac{1}{T_i} - \frac{1}{T_{i+1}}, \qquad
        \hat\Delta \approx \log\pi(\theta_{i+1}) - \log\pi(\theta_i)

    and then every replica makes a step of `SGLD` at its temperature out of :math:`T\,(1, r_1, r_2, \dots)`.

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        One that gives probes: they estimate :math:`\hat\Delta`, with one batch for all replicas, so that most noise cancels.
    step_size : float or schedule
        :math:`h`, of all replicas.
    ladder : sequence of float
        :math:`r_1 < r_2 < \dots`, all above 1: the temperatures of the hot replicas, relative to the cold one.
    temperature : float or schedule
        :math:`T` of the cold replica. At 0 nothing is swapped.
    num_adapt : int or None
        Steps after which the measured variance :math:`\hat s^2` of :math:`\hat\Delta` is frozen; ``None``: never.
    decay : float
        Of its running mean, below 1.
    variance_correction : bool
        ``False`` leaves the term :math:`\frac12 \delta^2 \hat s^2` out; the cold replica is then too hot.

    Raises
    ------
    ValueError, TypeError
        For a ladder that does not rise from above 1, an estimator without probes, or numbers out of range.

    Notes
    -----
    Cost: two calls of the estimator a replica and step, the second a probe. A swap leaves the joint law of the replicas
    invariant if :math:`\hat\Delta` is normal with variance :math:`\hat s^2` (the penalty method). The variance is measured from
    the difference between the step's own estimate and the probe, and averaged over the chain, so this holds approximately where
    it depends on the positions. The moves have the bias of `SGLD`. Where ``swap_penalty`` is large use larger batches, a control
    variate or a denser ladder. Not for a posterior with one mode, where the replicas cost and do not help.

    References
    ----------
    Deng, Feng, Gao, Liang and Lin (2020); the penalty: Ceperley and Dewing (1999).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: jnp.logaddexp(-2 * (t - 2) ** 2, -2 * (t + 2) ** 2), initial=jnp.array(2.0))
    >>> sampler = ReplicaExchange(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.05, ladder=(3.0, 9.0))
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=500, num_warmup=500, thin=10)
    >>> bool((dt.posterior["position"].min("draw") < -1).all())  # every chain found the other mode
    True
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    ladder: Array
    temperature: Hyperparameter
    num_adapt: Array | None
    decay: Array
    variance_correction: Array

    references: ClassVar = ("ceperley1999", "deng2020")

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        ladder: Any,
        *,
        temperature: Any = 1.0,
        num_adapt: int | None = 1000,
        decay: Any = 0.99,
        variance_correction: bool = True,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.ladder = check.positive("ladder", ladder)
        if self.ladder.ndim != 1 or self.ladder.size == 0:
            raise ValueError(f"ladder must be a sequence of temperatures such as (2.0, 4.0); got {ladder!r}.")
        if check.is_concrete(self.ladder) and not np.all(np.diff(np.asarray(self.ladder), prepend=1.0) > 0):
            raise ValueError(f"ladder must rise from above 1, relative to the cold replica; got {ladder!r}.")
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.num_adapt, self.decay = check_adaptation(num_adapt, decay)
        self.variance_correction = jnp.asarray(bool(variance_correction))

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> ReplicaState:
        """Start all replicas at ``position``."""
        key_gradient, key_probe = jax.random.split(key)
        position = check.position("position", position)
        gradient_state = self.gradient.init(key_gradient, position, batch)
        self._energy(key_probe, position, gradient_state)
        num_hot = self.ladder.size
        hot = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_hot, *x.shape)), (position, gradient_state))
        noise = jnp.zeros(num_hot, self.ladder.dtype)
        return ReplicaState(position, hot[0], gradient_state, hot[1], noise, jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: ReplicaState, batch: Batch | None = None) -> tuple[ReplicaState, ReplicaInfo]:
        """Swap neighbours, then move every replica."""
        key_gradient, key_probe, key_swap, key_noise = jax.random.split(key, 4)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        temperatures = temperature * jnp.concatenate([jnp.ones(1, self.ladder.dtype), self.ladder])
        position, gradient_state = _joined(state.position, state.hot), _joined(state.gradient, state.hot_gradient)
        # one key, so one batch, for all replicas: the noise of differences between them cancels
        estimate = jax.vmap(self.gradient.estimate, in_axes=(None, 0, 0, None))
        found, gradient_state = estimate(key_gradient, position, gradient_state, batch)
        probe = jax.vmap(self._energy, in_axes=(None, 0, 0))(key_probe, position, gradient_state)
        noise, variance = self._measure(state, jnp.diff(found.value), jnp.diff(probe.value))
        penalty = jnp.where(self.variance_correction, swap_penalty(variance, temperatures), 0)
        rate = swap_probability(jnp.diff(probe.value).astype(penalty.dtype), penalty, temperatures)
        order = _order_after(rate, jax.random.uniform(key_swap, rate.shape, rate.dtype), state.count)
        position, gradient = jax.tree.map(lambda x: x[order], (position, found.gradient))
        move = jax.vmap(langevin_step, in_axes=(0, 0, 0, None, 0))
        position = move(position, gradient, rng.normal_like(key_noise, position), h, temperatures)
        info = ReplicaInfo(
            lp_minibatch=found.value[order[0]],
            step_size=h,
            temperature=temperature,
            grad_norm=tree.norm(jax.tree.map(lambda g: g[0], gradient)),
            swap_rate=jnp.mean(rate),
            swap_penalty=jnp.mean(penalty),
            n_grad=jnp.sum(found.n_grad + probe.n_grad, dtype=jnp.int32),
            diverging=~tree.all_finite(position),
        )
        return ReplicaState(*_parted(position), *_parted(gradient_state), noise, state.count + 1), info

    def _energy(self, key: Key, position: Position, gradient_state: Any) -> Estimate:
        """Estimate the log density independently of the chain."""
        probe = self.gradient.probe(key, position, gradient_state)
        if probe is None:
            raise ValueError(
                "Replicas are compared by independent probes, and the estimator gives none (it holds no data, or has none). "
                "Make the posterior with its data."
            )
        return probe

    def _measure(self, state: ReplicaState, own: Array, probed: Array) -> tuple[Array, Array]:
        """Take two independent estimates of the same differences into the running mean of their variance."""
        found = ((own - probed) ** 2 / 2).astype(state.noise.dtype)
        return adapted_mean(state.noise, found, state.count + 1, self.decay, self.num_adapt)


def swap_penalty(variance: Array, temperatures: Array) -> Array:
    r"""Penalty :math:`\frac12 \delta^2 s^2` of a swap whose energy difference carries noise of variance :math:`s^2`.

    Ceperley and Dewing (1999); 0 where a temperature is 0.
    """
    return _coldness_gap(temperatures) ** 2 * variance / 2


def swap_probability(difference: Array, penalty: Array, temperatures: Array) -> Array:
    r"""Probability :math:`\min(1, e^{\delta\Delta - \text{penalty}})` that neighbours swap, for :math:`\Delta` of each pair.

    0 where a temperature is 0 or the difference is not a number.
    """
    gap = _coldness_gap(temperatures)
    rate = jnp.exp(jnp.minimum(gap * difference - penalty, 0))
    return jnp.where((gap > 0) & ~jnp.isnan(rate), rate, 0)


def _coldness_gap(temperatures: Array) -> Array:
    """1 / T_i - 1 / T_{i+1} of the pairs, 0 at temperature 0."""
    warm = temperatures > 0
    coldness = 1 / jnp.where(warm, temperatures, 1)
    return jnp.where(warm[:-1], coldness[:-1] - coldness[1:], 0)


def _order_after(rate: Array, uniform: Array, count: Array) -> Array:
    """Which replica's position each temperature gets; the pairs tried are those of the parity of the step."""
    pair = jnp.arange(rate.size, dtype=jnp.int32)
    swapped = ((pair % 2 == count % 2) & (uniform < rate)).astype(jnp.int32)
    return jnp.arange(rate.size + 1, dtype=jnp.int32) + jnp.pad(swapped, (0, 1)) - jnp.pad(swapped, (1, 0))


def _joined(cold: PyTree, hot: PyTree) -> PyTree:
    """Stack the coldest replica on the others."""
    return jax.tree.map(lambda c, h: jnp.concatenate([c[None], h]), cold, hot)


def _parted(replicas: PyTree) -> tuple[PyTree, PyTree]:
    """Take the coldest replica off the others."""
    return jax.tree.map(lambda x: x[0], replicas), jax.tree.map(lambda x: x[1:], replicas)
