"""Metropolis-corrected Langevin dynamics with minibatch gradients inside, and all the data once a trajectory."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Key, Position, PyTree
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient, coordinatewise
from ergodica.samplers.letters import drift
from ergodica.samplers.schemes import thermal_momentum


class AMAGOLDState(NamedTuple):
    """A chain: its position, the log density of all the data there, the (empty) state of its estimator, and the steps taken."""

    position: Position
    log_density: Array
    gradient: Any
    count: Array


class AMAGOLDInfo(NamedTuple):
    """What a step reports: as `LangevinInfo`, with ``acceptance_rate``.

    Attributes
    ----------
    lp_minibatch : scalar
        The log density of all the data at the new position.
    acceptance_rate : scalar
        Probability with which the end of the trajectory was accepted.
    grad_norm : scalar
        Of the last gradient of the trajectory.
    diverging : bool
        Whether the trajectory left the finite numbers; it is then rejected.
    """

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    acceptance_rate: Array
    grad_norm: Array
    n_grad: Array
    diverging: Array


class _Path(NamedTuple):
    """A trajectory under way; ``work`` is what the estimated forces have done so far."""

    position: Position
    momentum: PyTree
    work: Array
    grad_norm: Array
    n_grad: Array


class AMAGOLD(AbstractGradientKernel):
    r"""Amortised Metropolis adjustment: exact, with one pass over the data for many minibatch steps.

    From a fresh momentum, ``num_steps`` times: half a drift, a kick with friction by the implicit midpoint rule, half a drift,

    .. math::

        p' = \frac{(1 - \gamma h / 2)\,p + h\,\hat g(\theta) + \sqrt{2 \gamma h T}\,M^{1/2}\xi}{1 + \gamma h / 2}, \qquad
        W \leftarrow W + \tfrac{h}{2}\,\hat g(\theta) \cdot M^{-1}(p + p')

    and then the end of the trajectory is accepted with probability
    :math:`\min\left(1, \exp\left([\log\pi(\theta^*) - \log\pi(\theta) - W] / T\right)\right)`.

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        Without memory: ``Minibatch(posterior, batch_size, scheme="uniform")`` or a control variate around it. It may be biased.
    step_size : float or schedule
        :math:`h`, a time.
    num_steps : int
        Minibatch gradients a trajectory.
    friction : float
        :math:`\gamma`, one over a time.
    mass : float or pytree
        :math:`M`: a scalar, or diagonal entries in the structure of the position.
    temperature : float or schedule
        :math:`T`: the law is :math:`\pi^{1/T}`, exactly.

    Raises
    ------
    ValueError, TypeError
        For an estimator with a memory (reshuffled blocks, SVRG, SAGA), a posterior whose data are streamed, a batch that is handed
        over, or hyper-parameters out of range.

    Notes
    -----
    Cost: ``num_steps`` calls of the estimator and the log likelihood of all ``N`` data, counted as ``N`` gradients. The posterior
    is left invariant at every step size, whatever the noise of the gradient: friction and noise are such that the probability of
    the reversed trajectory is known. Gradient noise shows in the acceptance rate instead: with noise of variance :math:`s^2`,
    summed over the coordinates, it is about :math:`\mathrm{erfc}(\sigma / \sqrt 8)` for :math:`\sigma^2 = h^2 s^2 L / (T M)` and
    :math:`L` steps in many dimensions. Not for large data with plain minibatches, where the rate is 0 unless the step is tiny: use
    a control variate. Sums over very many data want double precision, since differences of them decide.

    References
    ----------
    Zhang, Cooper and De Sa (2020), Algorithm 1, whose :math:`\beta` is :math:`\gamma / 2`. Here the momentum is drawn anew for each
    trajectory.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(2.0))
    >>> sampler = AMAGOLD(erg.estimators.Minibatch(posterior, 2, scheme="uniform"), step_size=0.1, num_steps=5)
    >>> state, info = sampler.step(jax.random.key(1), sampler.init(jax.random.key(0), jnp.array(2.0)))
    >>> sampler.exact, int(info.n_grad)
    (True, 16)
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    num_steps: Array
    friction: Array
    mass: PyTree
    temperature: Hyperparameter

    references: ClassVar = ("zhang2020",)

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        num_steps: int = 10,
        friction: Any = 1.0,
        *,
        mass: PyTree = 1.0,
        temperature: Any = 1.0,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.num_steps = jnp.asarray(check.integer("num_steps", num_steps), jnp.int32)
        self.friction = check.positive("friction", friction, allow_zero=True)
        self.mass = jax.tree.map(lambda m: check.positive("mass", m), mass)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)

    @property
    def exact(self) -> bool:
        """Whether the posterior is left invariant: it is."""
        return True

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> AMAGOLDState:
        """Start a chain at ``position``."""
        position = check.position("position", position)
        coordinatewise("mass", self.mass, position)
        if self.posterior is None:
            raise ValueError("gradient must hold a posterior, whose log density decides; this estimator holds none.")
        gradient_state = self.gradient.init(key, position, batch)
        if jax.tree.leaves(gradient_state):
            raise ValueError(
                f"gradient must have no memory, or trajectories cannot be reversed; got {type(self.gradient).__name__} with a "
                "state. Use Minibatch(..., scheme='uniform'), or a ControlVariate around it."
            )
        return AMAGOLDState(position, self.posterior.log_density(position), gradient_state, jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: AMAGOLDState, batch: Batch | None = None) -> tuple[AMAGOLDState, AMAGOLDInfo]:
        """Run a trajectory and accept its end or not."""
        if batch is not None:
            raise ValueError("AMAGOLD draws its batches and sums over all the data: batch= cannot be handed over.")
        key_path, key_accept = jax.random.split(key)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        path = self._trajectory(key_path, state, h, temperature)
        log_density = self.posterior.log_density(path.position)
        gain = log_density - state.log_density - path.work.astype(log_density.dtype)
        rate = acceptance_rate(gain, temperature)
        accepted = jax.random.uniform(key_accept, (), rate.dtype) < rate
        position, kept = tree.select(accepted, (path.position, log_density), (state.position, state.log_density))
        info = AMAGOLDInfo(
            lp_minibatch=kept,
            step_size=h,
            temperature=temperature,
            acceptance_rate=rate,
            grad_norm=path.grad_norm,
            n_grad=path.n_grad + jnp.asarray(self.posterior.num_data, jnp.int32),
            diverging=~tree.all_finite((path.position, log_density)),
        )
        return AMAGOLDState(position, kept, state.gradient, state.count + 1), info

    def _trajectory(self, key: Key, state: AMAGOLDState, h: Array, temperature: Array) -> _Path:
        """Move from a fresh momentum by as many minibatch steps as a trajectory has."""
        key_momentum, key_steps = jax.random.split(key)
        mass = coordinatewise("mass", self.mass, state.position)

        def one(i: Array, path: _Path) -> _Path:
            key_gradient, key_noise = jax.random.split(jax.random.fold_in(key_steps, i))
            position = drift(path.position, path.momentum, mass, h / 2)
            estimate, _ = self.gradient.estimate(key_gradient, position, state.gradient)
            noise = rng.normal_like(key_noise, position)
            momentum, work = midpoint_kick(path.momentum, estimate.gradient, noise, mass, h, self.friction, temperature)
            return _Path(
                drift(position, momentum, mass, h / 2),
                momentum,
                path.work + work.astype(path.work.dtype),
                tree.norm(estimate.gradient),
                path.n_grad + jnp.asarray(estimate.n_grad, jnp.int32),
            )

        momentum = thermal_momentum(rng.normal_like(key_momentum, state.position), mass, temperature)
        start = _Path(
            state.position, momentum, jnp.zeros(()), jnp.zeros_like(tree.norm(momentum)), jnp.zeros((), jnp.int32)
        )
        return jax.lax.fori_loop(0, self.num_steps, one, start)


def midpoint_kick(
    momentum: PyTree,
    gradient: PyTree,
    noise: PyTree,
    mass: PyTree,
    time: Array,
    friction: Array,
    temperature: Array,
) -> tuple[PyTree, Array]:
    r"""Kick with friction and noise by the implicit midpoint rule, and the work done (Zhang, Cooper and De Sa 2020, Algorithm 1).

    .. math:: p' - p = h g - \tfrac{\gamma h}{2}(p + p') + \sqrt{2\gamma h T}\,M^{1/2}\xi, \qquad
        w = \tfrac h2\, g \cdot M^{-1}(p + p')

    The reversed kick :math:`-p' \to -p` at the same place has :math:`\exp([K(p') - K(p) - w] / T)` times the density, with the
    kinetic energy :math:`K = \frac12 p^T M^{-1} p`.
    """
    half = friction * time / 2
    spread = jnp.sqrt(2 * friction * time * temperature)

    def kicked(p: Array, g: Array, xi: Array, m: Array) -> Array:
        b = tree.cast_like(half, p)
        return ((1 - b) * p + tree.cast_like(time, p) * g + tree.cast_like(spread, p) * jnp.sqrt(m) * xi) / (1 + b)

    after = jax.tree.map(kicked, momentum, gradient, noise, mass)
    mean_velocity = jax.tree.map(lambda p, q, m: (p + q) / (2 * m), momentum, after, mass)
    work = tree.dot(gradient, mean_velocity)
    return after, tree.cast_like(time, work) * work


def acceptance_rate(gain: Array, temperature: Array) -> Array:
    r"""Metropolis probability :math:`\min(1, e^{\text{gain}/T})`, its limit at :math:`T = 0`; 0 where the gain is NaN."""
    T = tree.cast_like(temperature, gain)
    rate = jnp.where(T > 0, jnp.exp(jnp.minimum(gain / jnp.where(T > 0, T, 1), 0)), (gain >= 0).astype(gain.dtype))
    return jnp.where(jnp.isnan(gain), 0, rate)
