"""A splitting of weak order four, for studies of convergence and for gradients without noise."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient, coordinatewise
from ergodica.samplers.letters import free_flow, kick
from ergodica.samplers.schemes import Force, kinetic_temperature, thermal_momentum
from ergodica.samplers.splitting import SplittingInfo, SplittingState


class ForceGradient(AbstractGradientKernel):
    r"""Underdamped Langevin dynamics of weak order 4, by positive times and one kick along the gradient of the force.

    .. math:: B(h/6)\; U(h/2)\; \tilde B(2h/3)\; U(h/2)\; B(h/6), \qquad
        \tilde B(t):\; p \leftarrow p + t \left[ g + \tfrac{h^2}{24}\, \nabla g\, M^{-1} g \right]

    with the letters of `Splitting`: U is the exact Langevin flow without force, B a kick by :math:`g = \nabla\log\pi`.

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        Best without noise, ``Minibatch(posterior, scheme="full")``. Its ``estimate`` is differentiated once.
    step_size : float or schedule
        :math:`h`, a time.
    friction : float
        :math:`\gamma`, one over a time.
    mass : float or pytree
        :math:`M`: a scalar, or diagonal entries in the structure of the position.
    temperature : float or schedule
        :math:`T`.

    Raises
    ------
    ValueError, TypeError
        For hyper-parameters out of range.

    Notes
    -----
    Cost: two calls of the estimator a step (the closing kick is shared with the opening one of the next step), and one
    Hessian-vector product, counted as a third.

    Splittings with positive times have order 2 at most, unless a commutator is added. With :math:`V = g \cdot \partial_p` and
    the generator :math:`L_U` of the free flow, friction and noise drop out of
    :math:`[V, [L_U, V]] = 2\,(\nabla g\,M^{-1} g) \cdot \partial_p`, so the coefficients of the fourth-order scheme for Hamiltonian
    dynamics hold for Langevin dynamics too. Observables have an error of order :math:`h^4`, in finite time and in the stationary
    law. Gradient noise that is independent between steps brings back order 1, and reshuffled blocks order 2, as for any
    splitting: there `BAOAB` is as accurate and costs a third.

    References
    ----------
    Chin (1997), scheme A, with the free Langevin flow in place of the drift.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = ForceGradient(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.5)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=10, num_warmup=10)
    >>> dt.posterior["position"].shape
    (4, 10, 2)
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    friction: Array
    mass: PyTree
    temperature: Hyperparameter

    references: ClassVar = ("chin1997",)

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        friction: Any = 1.0,
        *,
        mass: PyTree = 1.0,
        temperature: Any = 1.0,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.friction = check.positive("friction", friction, allow_zero=True)
        self.mass = jax.tree.map(lambda m: check.positive("mass", m), mass)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> SplittingState:
        """Start a chain at ``position``, with a momentum from its own law."""
        key_gradient, key_first, key_momentum = jax.random.split(key, 3)
        position = check.position("position", position)
        temperature = value_at(self.temperature, jnp.zeros((), jnp.int32))
        mass = coordinatewise("mass", self.mass, position)
        momentum = thermal_momentum(rng.normal_like(key_momentum, position), mass, temperature)
        gradient_state = self.gradient.init(key_gradient, position, batch)
        estimate, gradient_state = self.gradient.estimate(key_first, position, gradient_state, batch)
        force = Force(estimate.gradient, estimate.value)
        return SplittingState(position, momentum, gradient_state, force, jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: SplittingState, batch: Batch | None = None) -> tuple[SplittingState, SplittingInfo]:
        """Kick, flow, kick along the gradient of the force too, flow, kick."""
        key_first, key_middle, key_second, key_last = jax.random.split(key, 4)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        mass = coordinatewise("mass", self.mass, state.position)

        def flow(key: Key, theta: Position, p: PyTree) -> tuple[Position, PyTree]:
            return free_flow(theta, p, mass, rng.normal_like(key, (theta, p)), h / 2, self.friction, temperature)

        assert state.force is not None  # `init` and each step leave one
        theta, p = flow(key_first, state.position, kick(state.momentum, state.force.gradient, h / 6))
        middle, curvature, gradient_state = self._with_curvature(key_middle, theta, state.gradient, mass, batch)
        p = kick(p, corrected_force(middle.gradient, curvature, h), 2 * h / 3)
        theta, p = flow(key_second, theta, p)
        last, gradient_state = self.gradient.estimate(key_last, theta, gradient_state, batch)
        p = kick(p, last.gradient, h / 6)
        info = SplittingInfo(
            lp_minibatch=last.value,
            step_size=h,
            temperature=temperature,
            kinetic_temperature=kinetic_temperature(p, mass),
            grad_norm=tree.norm(last.gradient),
            n_grad=jnp.asarray(2 * middle.n_grad + last.n_grad, jnp.int32),
            diverging=~tree.all_finite(theta),
        )
        return SplittingState(theta, p, gradient_state, Force(last.gradient, last.value), state.count + 1), info

    def _with_curvature(
        self, key: Key, theta: Position, state: Any, mass: PyTree, batch: Batch | None
    ) -> tuple[Estimate, PyTree, Any]:
        r"""Estimate the gradient and :math:`\nabla g\,M^{-1} g`, from one batch."""

        def of(theta: Position) -> tuple[PyTree, tuple[Estimate, Any]]:
            estimate, after = self.gradient.estimate(key, theta, state, batch)
            return estimate.gradient, (estimate, after)

        gradient, derivative, (estimate, after) = jax.linearize(of, theta, has_aux=True)
        return estimate, derivative(jax.tree.map(jnp.divide, gradient, mass)), after


def corrected_force(gradient: PyTree, curvature: PyTree, step_size: Array) -> PyTree:
    r"""Force of the middle kick, :math:`g + \frac{h^2}{24} \nabla g\,M^{-1} g` (Chin 1997, scheme A)."""
    return tree.axpy(step_size**2 / 24, curvature, gradient)
