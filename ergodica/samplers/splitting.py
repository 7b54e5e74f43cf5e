"""Splitting integrators of underdamped Langevin dynamics, written as strings of letters."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.letters import drift, euler_friction, free_flow, friction_and_noise, kick

MOVES = frozenset("AU")
NOISY = frozenset("OUE")
LETTERS = frozenset("ABOUE")


class Force(NamedTuple):
    """A gradient estimate that a later kick at the same point reuses."""

    gradient: PyTree
    value: Array


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


class Splitting(AbstractKernel):
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

    Raises
    ------
    ValueError, TypeError
        For letters unknown or missing, a position that never moves, or hyper-parameters out of range.

    Notes
    -----
    Cost: one call of the estimator for each distinct point at which a kick is given (one a step for BAOA, BAOAB, OBABO,
    ABOBA and UBU). Stable while :math:`h^2\lambda_{\max} / M < 4` for the schemes in A, B and O.

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
    ) -> None:
        self.scheme = check_scheme(scheme)
        self.gradient = check.instance(
            "gradient", gradient, AbstractGradientEstimator, "such as Minibatch(posterior, batch_size)"
        )
        self.step_size = hyperparameter("step_size", step_size)
        self.friction = check.positive("friction", friction, allow_zero=True)
        self.mass = jax.tree.map(lambda m: check.positive("mass", m), mass)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.reuse_gradient = bool(reuse_gradient)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> SplittingState:
        """Start a chain at ``position``, with a momentum from its own law."""
        key_gradient, key_first, key_momentum = jax.random.split(key, 3)
        position = check.position("position", position)
        temperature = value_at(self.temperature, jnp.zeros((), jnp.int32))
        momentum = jax.tree.map(
            lambda m, xi: jnp.sqrt(m * tree.cast_like(temperature, xi)) * xi,
            self._masses(position),
            rng.normal_like(key_momentum, position),
        )
        gradient_state, force = self.gradient.init(key_gradient, position, batch), None
        if self._carries_force:
            estimate, gradient_state = self.gradient.estimate(key_first, position, gradient_state, batch)
            force = Force(estimate.gradient, estimate.value)
        return SplittingState(position, momentum, gradient_state, force, jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: SplittingState, batch: Batch | None = None) -> tuple[SplittingState, SplittingInfo]:
        """Apply the letters of the scheme from left to right."""
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        theta, p, gradient_state, force = state.position, state.momentum, state.gradient, state.force
        mass, n_grad = self._masses(theta), jnp.zeros((), jnp.int32)
        for letter, key_letter in zip(self.scheme, jax.random.split(key, len(self.scheme)), strict=True):
            t = h / self.scheme.count(letter)
            if letter == "B":
                if force is None:
                    estimate, gradient_state = self.gradient.estimate(key_letter, theta, gradient_state, batch)
                    force, n_grad = Force(estimate.gradient, estimate.value), n_grad + estimate.n_grad
                p, latest = kick(p, force.gradient, t), force
            else:
                theta, p = self._flow(letter, key_letter, theta, p, mass, t, temperature)
            if letter in MOVES or not self.reuse_gradient:
                force = None
        info = SplittingInfo(
            lp_minibatch=latest.value,
            step_size=h,
            temperature=temperature,
            kinetic_temperature=kinetic_temperature(p, mass),
            grad_norm=tree.norm(latest.gradient),
            n_grad=jnp.asarray(n_grad, jnp.int32),
            diverging=~tree.all_finite(theta),
        )
        return SplittingState(theta, p, gradient_state, force if self._carries_force else None, state.count + 1), info

    def probe(self, key: Key, state: SplittingState) -> Estimate | None:
        """Estimate the gradient at the chain's position, independently of the chain."""
        return self.gradient.probe(key, state.position, state.gradient)

    @property
    def posterior(self) -> Any:
        """The posterior that the gradient estimator holds."""
        return self.gradient.posterior

    @property
    def exact_gradient(self) -> bool:
        """Whether the gradient carries no noise (the law may be biased by the step all the same)."""
        return self.gradient.exact

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
        before, after = self.scheme.split("B")[0], self.scheme.split("B")[-1]
        return self.reuse_gradient and not MOVES & set(before + after)

    def _masses(self, position: Position) -> PyTree:
        """Give the diagonal of the mass in the structure and dtypes of the position."""
        if jax.tree.structure(self.mass) == jax.tree.structure(position):
            return jax.tree.map(lambda m, x: tree.cast_like(m, x), self.mass, position)
        if jax.tree_util.all_leaves([self.mass]) and jnp.ndim(self.mass) == 0:
            return jax.tree.map(lambda x: tree.cast_like(self.mass, x), position)
        raise ValueError(
            f"mass must be a scalar or have the structure of the position, {jax.tree.structure(position)}; "
            f"got {jax.tree.structure(self.mass)}."
        )


def check_scheme(scheme: str) -> str:
    """Return a scheme in capitals; raise unless its letters make a sampler."""
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a string of letters such as 'BAOAB'; got {scheme!r}.")
    scheme = scheme.upper()
    unknown = sorted(set(scheme) - LETTERS)
    if unknown:
        raise ValueError(f"scheme {scheme!r} has the unknown letters {unknown}; the letters are A, B, O, U and E.")
    for needed, why in (
        (MOVES, "A or U, or the position never moves"),
        (set("B"), "B, or it never sees the target"),
        (NOISY, "O, U or E, or there is no noise"),
    ):
        if not needed & set(scheme):
            raise ValueError(f"scheme {scheme!r} needs {why}; 'BAOAB' is a good default.")
    return scheme


def kinetic_temperature(momentum: PyTree, mass: PyTree) -> Array:
    r"""Mean of :math:`p_i^2 / m_i`: the temperature that the momenta show."""
    return tree.dot(momentum, jax.tree.map(lambda p, m: p / m, momentum, mass)) / tree.size(momentum)


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
