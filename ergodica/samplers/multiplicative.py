"""Langevin dynamics for parameters that keep their sign, by multiplication."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Key, Position, PyTree
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient
from ergodica.samplers.langevin import LangevinInfo, LangevinState


class MultiplicativeLangevin(AbstractGradientKernel):
    r"""SGLD in :math:`\log|x|`: every coordinate keeps its sign, exactly.

    .. math:: x' = x \circ \exp\left( h\,(T + x \circ \hat g(x)) + \sqrt{2 h T}\,\xi \right)

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        Of a log density in :math:`x` itself, on the positive numbers or on any orthant. No Jacobian belongs into it: the term
        :math:`T` is the Jacobian.
    step_size : float or schedule
        :math:`h`, a squared relative change: :math:`\sqrt{2h}` is the size of a typical move of :math:`\log|x|`.
    temperature : float or schedule
        :math:`T`: the law approaches :math:`\pi^{1/T}`.
    allow_sign_changes : bool
        Take the Euler–Maruyama step of the same dynamics in :math:`x`,
        :math:`x' = x \circ (1 + h\,(2T + x \circ \hat g) + \sqrt{2hT}\,\xi)`, which crosses 0 sooner or later and then samples
        another orthant. For comparison with work that does so.

    Raises
    ------
    ValueError, TypeError
        For a start with a coordinate at 0, which could never leave it, or hyper-parameters out of range.

    Notes
    -----
    Cost: one call of the estimator a step. If :math:`\log x` is Gaussian with mean :math:`m` and variance :math:`\sigma^2`, the
    law of :math:`\log x` is Gaussian with mean :math:`m` and variance :math:`\sigma^2 / (1 - h / (2\sigma^2))` at :math:`T = 1`
    and with the full gradient. A coordinate that underflows to 0 is reported as diverging.

    Positive sites of NumPyro models are sampled on the log scale already, so that any sampler moves them like this: it is
    for log densities in plain JAX, or networks whose weights keep the signs of their neurons. Not for coordinates whose sign
    is unknown, or densities that do not vanish at 0, where the chain creeps along the boundary.

    References
    ----------
    The Lamperti transform of geometric Brownian motion, as in exponentiated gradients; Welling and Teh (2011) for the step.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda x: jnp.sum(jnp.log(jnp.abs(x)) - jnp.abs(x)), initial=jnp.array([1.0, -1.0]))
    >>> sampler = MultiplicativeLangevin(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=100, num_warmup=100)
    >>> dt.posterior["position"].values.min((0, 1)) > 0, dt.posterior["position"].values.max((0, 1)) > 0
    (array([ True, False]), array([ True, False]))
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    temperature: Hyperparameter
    allow_sign_changes: bool = eqx.field(static=True)

    references: ClassVar = ("welling2011",)

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        *,
        temperature: Any = 1.0,
        allow_sign_changes: bool = False,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.allow_sign_changes = bool(allow_sign_changes)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> LangevinState:
        """Start a chain at ``position``, none of whose coordinates may be 0."""
        position = check.position("position", position)
        for name, leaf in tree.named_leaves(position).items():
            if check.is_concrete(leaf) and np.any(np.asarray(leaf) == 0):
                raise ValueError(
                    f"{name} must have no coordinate at 0, which multiplication cannot leave; got {np.asarray(leaf)}. Start "
                    "inside the orthant."
                )
        return LangevinState(position, self.gradient.init(key, position, batch), jnp.zeros((), jnp.int32))

    def step(self, key: Key, state: LangevinState, batch: Batch | None = None) -> tuple[LangevinState, LangevinInfo]:
        """Multiply by one gradient and one noise."""
        key_gradient, key_noise = jax.random.split(key)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        estimate, gradient_state = self.gradient.estimate(key_gradient, state.position, state.gradient, batch)
        noise = rng.normal_like(key_noise, state.position)
        move = ambient_step if self.allow_sign_changes else multiplicative_step
        position = move(state.position, estimate.gradient, noise, h, temperature)
        at_zero = jnp.any(jnp.stack([jnp.any(x == 0) for x in jax.tree.leaves(position)]))
        info = LangevinInfo(
            lp_minibatch=estimate.value,
            step_size=h,
            temperature=temperature,
            grad_norm=tree.norm(estimate.gradient),
            n_grad=jnp.asarray(estimate.n_grad, jnp.int32),
            diverging=~tree.all_finite(position) | at_zero,
        )
        return LangevinState(position, gradient_state, state.count + 1), info


def multiplicative_step(
    position: Position, gradient: PyTree, noise: PyTree, step_size: Array, temperature: Array
) -> Position:
    r"""Step :math:`x \exp(h (T + x g) + \sqrt{2 h T}\,\xi)`: Euler–Maruyama for :math:`y = \log|x|`.

    The density of :math:`y` is :math:`\pi(x)\,|x|`, whose logarithm has the derivative :math:`1 + x g`; at temperature
    :math:`T` the target is :math:`\pi^{1/T} |x|`.
    """

    def move(x: Array, g: Array, xi: Array) -> Array:
        h, T = tree.cast_like(step_size, x), tree.cast_like(temperature, x)
        return x * jnp.exp(h * (T + x * g) + jnp.sqrt(2 * h * T) * xi)

    return jax.tree.map(move, position, gradient, noise)


def ambient_step(position: Position, gradient: PyTree, noise: PyTree, step_size: Array, temperature: Array) -> Position:
    r"""Step :math:`x (1 + h (2T + x g) + \sqrt{2 h T}\,\xi)`: Euler–Maruyama in :math:`x`; the other :math:`T` is Itô's."""

    def move(x: Array, g: Array, xi: Array) -> Array:
        h, T = tree.cast_like(step_size, x), tree.cast_like(temperature, x)
        return x * (1 + h * (2 * T + x * g) + jnp.sqrt(2 * h * T) * xi)

    return jax.tree.map(move, position, gradient, noise)
