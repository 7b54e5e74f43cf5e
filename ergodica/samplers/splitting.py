"""Splitting integrators of underdamped Langevin dynamics, written as strings of letters."""

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
from ergodica.samplers.letters import drift, euler_friction, free_flow, friction_and_noise
from ergodica.samplers.schemes import (
    Force,
    apply_letters,
    carries_force,
    check_scheme,
    kinetic_temperature,
    thermal_momentum,
)

LETTERS = frozenset("ABOUE")


class SplittingState(NamedTuple):
    """A chain: position, momentum, estimator state, and what a kick can reuse.

    Attributes
    ----------
    position, momentum : pytree
    gradient : pytree
        State of the gradient estimator.
    force : Force or None
        The estimate at ``position``, where the first kick of the next step will reuse it.
    count : int32 scalar
        Steps taken.
    """

    position: Position
    momentum: PyTree
    gradient: Any
    force: Force | None
    count: Array


class SplittingInfo(NamedTuple):
    """What a step reports: as `LangevinInfo`, with ``kinetic_temperature``, :math:`p^T M^{-1} p / D` at its end."""

    lp_minibatch: Array
    step_size: Array
    temperature: Array
    kinetic_temperature: Array
    grad_norm: Array
    n_grad: Array
    diverging: Array


class Splitting(AbstractGradientKernel):
    r"""Underdamped Langevin dynamics by composition of exactly solvable parts.

    .. math:: d\theta = M^{-1} p\,dt, \qquad dp = \nabla\log\pi(\theta)\,dt - \gamma p\,dt + \sqrt{2\gamma T}\,M^{1/2} dW

    ===== ==========================================================================================
    A     drift: :math:`\theta \leftarrow \theta + t M^{-1} p`
    B     kick: :math:`p \leftarrow p + t\,\hat g(\theta)`
    O     friction and noise, exactly: :math:`p \leftarrow e^{-\gamma t} p + \sqrt{T(1 - e^{-2\gamma t})}\,M^{1/2}\xi`
    U     A and O together, exactly: the Langevin flow without force
    E     O by one Euler–Maruyama step (only for `SGHMC` as printed)
    ===== ==========================================================================================

    Parameters
    ----------
    scheme : str
        Letters from left to right, such as ``"BAOAB"``. A letter that occurs ``m`` times advances ``step_size / m``
        each time.
    gradient : AbstractGradientEstimator
    step_size : float or schedule
        :math:`h`, a time.
    friction : float
        :math:`\gamma`, one over a time.
    mass : float or pytree
        :math:`M`: a scalar, or diagonal entries in the structure of the position.
    temperature : float or schedule
        :math:`T`, in every letter.
    reuse_gradient : bool
        Kicks at the same point share one gradient: a closing kick and the opening one of the next step, or two with
        only friction between them. ``False`` draws a gradient a kick.
    one_batch : bool
        One batch serves all kicks of a step, and nothing is carried into the next: a palindrome such as BAOAB is then
        symmetric in time for each batch. For ``Minibatch(..., scheme="symmetric")``; needs an estimator with a method
        ``draw`` (`Minibatch`, `ControlVariate`).

    Raises
    ------
    ValueError, TypeError
        For letters unknown or missing, a position that never moves, hyper-parameters out of range, or an estimator that cannot
        draw one batch for a step.

    Notes
    -----
    Cost: one call of the estimator for each distinct point at which a kick is given (one a step for BAOA, BAOAB, OBABO,
    ABOBA and UBU; two for BAOAB and OBABO with ``one_batch``). Stable while :math:`h^2\lambda_{\max} / M < 4` for the schemes
    in A, B and O.

    Gradient noise of variance :math:`s^2`, independent between steps, adds about :math:`h s^2 / (2\gamma)` to the
    temperature, whatever the scheme. Without it BAOA, BAOAB and ABOBA sample Gaussian positions exactly, and the others
    have an error of order :math:`h^2`. With reshuffled blocks the noise contributes at order :math:`h^2` too. Not for
    friction near zero with noisy gradients: the noise is then not dissipated.

    References
    ----------
    Leimkuhler and Matthews (2013); Bussi and Parrinello (2007) for OBABO; Alamo and Sanz-Serna (2016) for UBU.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = Splitting("BAOAB", erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1, friction=1.0)
    >>> state = sampler.init(jax.random.key(0), jnp.zeros(2))
    >>> state, info = sampler.step(jax.random.key(1), state)
    >>> state.position.shape
    (2,)
    """

    scheme: str = eqx.field(static=True)
    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    friction: Array
    mass: PyTree
    temperature: Hyperparameter
    reuse_gradient: bool = eqx.field(static=True)
    one_batch: bool = eqx.field(static=True)

    references: ClassVar = ("leimkuhler2013",)

    def __init__(
        self,
        scheme: str,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        friction: Any = 1.0,
        *,
        mass: PyTree = 1.0,
        temperature: Any = 1.0,
        reuse_gradient: bool = True,
        one_batch: bool = False,
    ) -> None:
        self.scheme = check_scheme(scheme, LETTERS)
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.friction = check.positive("friction", friction, allow_zero=True)
        self.mass = jax.tree.map(lambda m: check.positive("mass", m), mass)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.reuse_gradient = bool(reuse_gradient)
        self.one_batch = bool(one_batch)
        if self.one_batch and not callable(getattr(gradient, "draw", None)):
            raise TypeError(
                "one_batch needs an estimator that draws a batch for a whole step, a Minibatch or a ControlVariate; got "
                f"{type(gradient).__name__}, which has no method draw."
            )

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> SplittingState:
        """Start a chain at ``position``, with a momentum from its own law."""
        key_gradient, key_first, key_momentum = jax.random.split(key, 3)
        position = check.position("position", position)
        temperature = value_at(self.temperature, jnp.zeros((), jnp.int32))
        noise = rng.normal_like(key_momentum, position)
        momentum = thermal_momentum(noise, coordinatewise("mass", self.mass, position), temperature)
        gradient_state, force = self.gradient.init(key_gradient, position, batch), None
        if self._carries_force:
            estimate, gradient_state = self.gradient.estimate(key_first, position, gradient_state, batch)
            force = Force(estimate.gradient, estimate.value)
        return SplittingState(position, momentum, gradient_state, force, jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: SplittingState, batch: Batch | None = None) -> tuple[SplittingState, SplittingInfo]:
        """Apply the letters of the scheme from left to right."""
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        mass = coordinatewise("mass", self.mass, state.position)
        if self.one_batch:
            key, key_batch = jax.random.split(key)
            batch, gradient_state = self._draw(key_batch, state.gradient, batch)
            state = state._replace(gradient=gradient_state)

        def flow(letter: str, key: Key, state: SplittingState, t: Array) -> SplittingState:
            moved = self._flow(letter, key, state.position, state.momentum, mass, t, temperature)
            return state._replace(position=moved[0], momentum=moved[1])

        estimate = functools.partial(self._estimate, batch)
        state, latest, n_grad = apply_letters(self.scheme, key, state, h, estimate, flow, reuse=self.reuse_gradient)
        info = SplittingInfo(
            lp_minibatch=latest.value,
            step_size=h,
            temperature=temperature,
            kinetic_temperature=kinetic_temperature(state.momentum, mass),
            grad_norm=tree.norm(latest.gradient),
            n_grad=n_grad,
            diverging=~tree.all_finite(state.position),
        )
        return state._replace(force=state.force if self._carries_force else None, count=state.count + 1), info

    def _draw(self, key: Key, state: Any, batch: Batch | None) -> tuple[Batch | None, Any]:
        """Draw the batch of a step, unless it was handed over or there are no data to draw from."""
        if batch is not None or (self.posterior is not None and self.posterior.num_data == 0):
            return batch, state
        return self.gradient.draw(key, state)  # pyright: ignore[reportAttributeAccessIssue]

    def _estimate(self, batch: Batch | None, key: Key, theta: Position, state: Any) -> tuple[Estimate, Any]:
        return self.gradient.estimate(key, theta, state, batch)

    def _flow(
        self, letter: str, key: Key, theta: Position, p: PyTree, mass: PyTree, t: Array, temperature: Array
    ) -> tuple[Position, PyTree]:
        """Apply a letter that does not see the target."""
        if letter == "A":
            return drift(theta, p, mass, t), p
        if letter == "U":
            return free_flow(theta, p, mass, rng.normal_like(key, (theta, p)), t, self.friction, temperature)
        flow = friction_and_noise if letter == "O" else euler_friction
        return theta, flow(p, mass, rng.normal_like(key, p), t, self.friction, temperature)

    @property
    def _carries_force(self) -> bool:
        """Whether the first kick of a step stands where the last one of the step before stood."""
        return self.reuse_gradient and not self.one_batch and carries_force(self.scheme)


def BAOA(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("BAOA", …)``: one kick a step; BAOAB with its kicks joined, with the same positions in law."""
    return Splitting("BAOA", gradient, step_size, friction, **options)


def BAOAB(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("BAOAB", …)`` (Leimkuhler and Matthews 2013): the default among splittings."""
    return Splitting("BAOAB", gradient, step_size, friction, **options)


def OBABO(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("OBABO", …)`` (Bussi and Parrinello 2007)."""
    return Splitting("OBABO", gradient, step_size, friction, **options)


def ABOBA(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("ABOBA", …)``: the gradient is taken at the midpoint."""
    return Splitting("ABOBA", gradient, step_size, friction, **options)


def UBU(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("UBU", …)`` (Alamo and Sanz-Serna 2016): weak and strong order 2 with one gradient a step."""
    return Splitting("UBU", gradient, step_size, friction, **options)


def LieTrotter(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    """Make ``Splitting("BABO", …)``: a leapfrog step, then exact friction (Franzese et al. 2022); OBABO in law."""
    return Splitting("BABO", gradient, step_size, friction, **options)


def SGHMC(gradient: AbstractGradientEstimator, step_size: Any, friction: Any = 1.0, **options: Any) -> Splitting:
    r"""Make ``Splitting("AEB", …)``: SGHMC as printed by Chen, Fox and Guestrin (2014), Algorithm 2.

    The gradient is taken at the *new* position and friction is one Euler step; their :math:`C` is :math:`\gamma M`, and no
    noise estimate :math:`\hat B` is subtracted. Stationary order 2 without gradient noise, where the variant with the
    gradient at the old position has order 1. `BAOAB` costs the same and is more accurate.
    """
    return Splitting("AEB", gradient, step_size, friction, **options)
