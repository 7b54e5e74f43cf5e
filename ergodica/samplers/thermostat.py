"""Underdamped Langevin dynamics whose friction adapts until the momenta show the right temperature."""

import functools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient, coordinatewise
from ergodica.samplers.letters import drift, euler_thermostat, thermostatted_friction
from ergodica.samplers.schemes import (
    Force,
    apply_letters,
    carries_force,
    check_scheme,
    kinetic_temperature,
    thermal_momentum,
)

LETTERS = frozenset("ABDOE")


class ThermostatState(NamedTuple):
    r"""A chain: as `SplittingState`, with ``thermostat``, the friction :math:`\xi` of now (scalar)."""

    position: Position
    momentum: PyTree
    thermostat: Array
    gradient: Any
    force: Force | None
    count: Array


class ThermostatInfo(NamedTuple):
    r"""What a step reports: as `SplittingInfo`, with ``thermostat``, the friction :math:`\xi` at its end."""

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    kinetic_temperature: Array
    thermostat: Array
    grad_norm: Array
    n_grad: Array
    diverging: Array


class Thermostat(AbstractGradientKernel):
    r"""Langevin dynamics with adaptive friction :math:`\xi`, which takes up gradient noise of unknown size.

    .. math:: d\theta = M^{-1} p\,dt, \qquad dp = \nabla\log\pi(\theta)\,dt - \xi p\,dt + \sqrt{2\gamma T}\,M^{1/2} dW, \qquad
        d\xi = \frac{1}{\mu}\left(\frac{p^T M^{-1} p}{D} - T\right) dt

    ===== ==========================================================================================
    A     drift: :math:`\theta \leftarrow \theta + t M^{-1} p`
    B     kick: :math:`p \leftarrow p + t\,\hat g(\theta)`
    O     friction and noise at fixed :math:`\xi`, exactly
    E     O by one Euler–Maruyama step (only for `SGNHT` as printed)
    D     thermostat: :math:`\xi \leftarrow \xi + t\,(p^T M^{-1} p / D - T) / \mu`
    ===== ==========================================================================================

    Parameters
    ----------
    scheme : str
        Letters from left to right; a letter that occurs ``m`` times advances ``step_size / m`` each time. The presets are
        `BADODAB`, the better one, and `SGNHT`.
    gradient : AbstractGradientEstimator
        Such as ``Minibatch(posterior, batch_size)``.
    step_size : float or schedule
        :math:`h`, a time.
    friction : float
        :math:`\gamma`, one over a time: what the injected noise asks for, and where :math:`\xi` starts.
    mass : float or pytree
        :math:`M`: a scalar, or diagonal entries in the structure of the position.
    temperature : float or schedule
        :math:`T`.
    thermal_mass : float
        :math:`\mu`, a temperature times a time squared. A large one makes :math:`\xi` slow, and constant in the end.

    Raises
    ------
    ValueError, TypeError
        For letters unknown or missing, or hyper-parameters out of range.

    Notes
    -----
    Cost: one call of the estimator a step. On average over the steps the temperature that the letter D sees is :math:`T`,
    exactly and for every step size, since :math:`\xi` is stationary. Gradient noise of variance :math:`s^2`, the same in all
    coordinates and independent between steps, is taken up by the friction: under `BADODAB`
    :math:`E\,\xi = \gamma + h s^2 / (2 T M) + O(h^2)`, and the variance of the position has an error of order :math:`h^2`
    where that of a splitting with fixed friction has order :math:`h`. With reshuffled blocks the noise, and so
    :math:`E\,\xi - \gamma`, is less.

    One number cannot absorb noise that differs between coordinates: where it does, the average temperature is right and
    that of each coordinate is not; see the coordinates in `ergodica.diagnose`. :math:`\xi` fluctuates with variance about
    :math:`T / (\mu D)`, so with few parameters choose :math:`\mu` large. Not for temperature 0: friction then grows without
    end.

    References
    ----------
    Ding, Fang, Babbush, Chen, Skeel and Neven (2014); Leimkuhler and Shang (2016).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = Thermostat("BADODAB", erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> state = sampler.init(jax.random.key(0), jnp.zeros(2))
    >>> float(state.thermostat)
    1.0
    """

    scheme: str = eqx.field(static=True)
    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    friction: Array
    mass: PyTree
    temperature: Hyperparameter
    thermal_mass: Array

    references: ClassVar = ("ding2014", "leimkuhler2016")

    def __init__(
        self,
        scheme: str,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        friction: Any = 1.0,
        *,
        mass: PyTree = 1.0,
        temperature: Any = 1.0,
        thermal_mass: Any = 1.0,
    ) -> None:
        self.scheme = check_scheme(scheme, LETTERS)
        if "D" not in self.scheme:
            raise ValueError(f"scheme {scheme!r} needs D, or its friction never adapts; Splitting has fixed friction.")
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.friction = check.positive("friction", friction, allow_zero=True)
        self.mass = jax.tree.map(lambda m: check.positive("mass", m), mass)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.thermal_mass = check.positive("thermal_mass", thermal_mass)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> ThermostatState:
        """Start a chain at ``position``, with a momentum from its own law and the friction of the injected noise."""
        key_gradient, key_first, key_momentum = jax.random.split(key, 3)
        position = check.position("position", position)
        temperature = value_at(self.temperature, jnp.zeros((), jnp.int32))
        noise = rng.normal_like(key_momentum, position)
        momentum = thermal_momentum(noise, coordinatewise("mass", self.mass, position), temperature)
        gradient_state, force = self.gradient.init(key_gradient, position, batch), None
        if carries_force(self.scheme):
            estimate, gradient_state = self.gradient.estimate(key_first, position, gradient_state, batch)
            force = Force(estimate.gradient, estimate.value)
        return ThermostatState(position, momentum, self.friction, gradient_state, force, jnp.zeros((), jnp.int32))

    def step(
        self, key: Key, state: ThermostatState, batch: Batch | None = None
    ) -> tuple[ThermostatState, ThermostatInfo]:
        """Apply the letters of the scheme from left to right."""
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        mass = coordinatewise("mass", self.mass, state.position)
        flow = functools.partial(self._flow, mass, temperature)

        def estimate(key: Key, theta: Position, gradient_state: Any) -> tuple[Estimate, Any]:
            return self.gradient.estimate(key, theta, gradient_state, batch)

        state, latest, n_grad = apply_letters(self.scheme, key, state, h, estimate, flow, reuse=True)
        info = ThermostatInfo(
            lp_minibatch=latest.value,
            step_size=h,
            temperature=temperature,
            kinetic_temperature=kinetic_temperature(state.momentum, mass),
            thermostat=state.thermostat,
            grad_norm=tree.norm(latest.gradient),
            n_grad=n_grad,
            diverging=~tree.all_finite(state.position),
        )
        return state._replace(force=state.force if carries_force(self.scheme) else None, count=state.count + 1), info

    def _flow(
        self, mass: PyTree, temperature: Array, letter: str, key: Key, state: ThermostatState, t: Array
    ) -> ThermostatState:
        """Apply a letter that does not see the target."""
        if letter == "A":
            return state._replace(position=drift(state.position, state.momentum, mass, t))
        if letter == "D":
            seen = kinetic_temperature(state.momentum, mass)
            return state._replace(thermostat=adapt(state.thermostat, seen, t, temperature, self.thermal_mass))
        flow = thermostatted_friction if letter == "O" else euler_thermostat
        noise = rng.normal_like(key, state.momentum)
        return state._replace(
            momentum=flow(state.momentum, mass, noise, t, state.thermostat, self.friction, temperature)
        )


def adapt(thermostat: Array, seen: Array, time: Array, temperature: Array, thermal_mass: Array) -> Array:
    r"""D: :math:`\xi + t\,(p^T M^{-1} p / D - T) / \mu` from the temperature that the momenta show (Ding et al. 2014)."""
    return thermostat + time * (seen.astype(thermostat.dtype) - temperature) / thermal_mass


def SGNHT(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Thermostat:
    r"""Make ``Thermostat("EBAD", …)``: the stochastic-gradient Nosé–Hoover thermostat as printed by Ding et al. (2014).

    Their :math:`A` is :math:`\gamma T`. One Euler step of friction; `BADODAB` costs the same and is more accurate.
    """
    return Thermostat("EBAD", gradient, step_size, friction, **options)


def BADODAB(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Thermostat:
    """Make ``Thermostat("BADODAB", …)`` (Leimkuhler and Shang 2016): symmetric, with exact friction."""
    return Thermostat("BADODAB", gradient, step_size, friction, **options)
