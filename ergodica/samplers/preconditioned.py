"""Langevin dynamics with a diagonal preconditioner learnt from the gradients."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.schedule import Hyperparameter, hyperparameter, value_at
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree
from ergodica.samplers.adaptation import adapted_mean, check_adaptation, total_weight
from ergodica.samplers.gradient_kernel import AbstractGradientKernel, check_gradient
from ergodica.samplers.langevin import LangevinInfo


class PreconditionedState(NamedTuple):
    """A chain: as `LangevinState`, with ``second_moment``, the running mean of the squared gradient by coordinate."""

    position: Position
    second_moment: PyTree
    gradient: Any
    count: Array


class PreconditionedSGLD(AbstractGradientKernel):
    r"""SGLD with the diagonal preconditioner of RMSprop (pSGLD), frozen after adaptation.

    .. math::

        \theta' = \theta + h\,G\,\hat g(\theta) + \sqrt{2 h T\,G}\,\xi, \qquad
        G = \frac{1}{\epsilon + \sqrt{\hat V}}, \qquad V \leftarrow \alpha V + (1 - \alpha)\,\hat g^2, \qquad
        \hat V = \frac{V}{1 - \alpha^k}

    with :math:`k` the number of gradients in :math:`V`.

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        Such as ``Minibatch(posterior, batch_size)``.
    step_size : float or schedule
        :math:`h`. The step of a coordinate is :math:`h G`: gradients are those of the whole log density, and so :math:`h` is
        of the size of a typical move, not of its square over a curvature.
    num_adapt : int or None
        Steps after which :math:`V` is frozen; at most the warm-up of the run, so that all draws are of one kernel. ``None``
        adapts for ever, as published.
    temperature : float or schedule
        :math:`T`.
    decay : float
        :math:`\alpha`, below 1.
    damping : float
        :math:`\epsilon`, in units of the gradient: bounds :math:`G` where gradients vanish.
    drift_correction : bool
        Add :math:`h T\,\Gamma`, :math:`\Gamma_i = \partial G_i / \partial\theta_i`, only with ``num_adapt=None``. Taken through the
        last gradient alone, for which the diagonal of the Hessian is estimated by one Rademacher probe (Hutchinson).

    Raises
    ------
    ValueError, TypeError
        For hyper-parameters out of range, or a drift correction for a preconditioner that is going to be frozen, where it is 0.

    Notes
    -----
    Cost: one call of the estimator a step, and a Hessian-vector product with the drift correction. Frozen, the kernel is SGLD
    in the variable :math:`G^{-1/2}\theta`: on a Gaussian target of precision :math:`\Lambda` with gradient noise of covariance
    :math:`S`, independent between steps, the mean is exact and the covariance solves

    .. math:: \Sigma = (I - h G \Lambda)\,\Sigma\,(I - h G \Lambda)^T + 2 h T G + h^2 G S G

    While it adapts, its law is another one: :math:`G` depends on the gradient that it multiplies, and on the positions before.
    The correction removes part of that bias, of order :math:`1 - \alpha`. Not for strongly correlated coordinates, which no
    diagonal helps, and not where gradient noise dominates: :math:`V` then measures the noise and not the curvature.

    References
    ----------
    Li, Chen, Carlson and Carin (2016), Algorithm 1, whose step is :math:`2h` and whose gradients are means over the data.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> scales = jnp.array([1.0, 100.0])
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum((t / scales) ** 2), initial=scales)
    >>> sampler = PreconditionedSGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1, num_adapt=500)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=10, num_warmup=500)
    >>> dt.posterior["position"].shape
    (4, 10, 2)
    """

    gradient: AbstractGradientEstimator
    step_size: Hyperparameter
    num_adapt: Array | None
    temperature: Hyperparameter
    decay: Array
    damping: Array
    drift_correction: bool = eqx.field(static=True)

    references: ClassVar = ("li2016",)

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        step_size: Any,
        num_adapt: int | None = 1000,
        *,
        temperature: Any = 1.0,
        decay: Any = 0.99,
        damping: Any = 1e-5,
        drift_correction: bool = False,
    ) -> None:
        self.gradient = check_gradient(gradient)
        self.step_size = hyperparameter("step_size", step_size)
        self.num_adapt, self.decay = check_adaptation(num_adapt, decay)
        self.temperature = hyperparameter("temperature", temperature, allow_zero=True)
        self.damping = check.positive("damping", damping)
        self.drift_correction = bool(drift_correction)
        if self.drift_correction and num_adapt is not None:
            raise ValueError(
                "drift_correction is for a preconditioner that adapts for ever; give num_adapt=None, or leave it out: a "
                f"preconditioner frozen after num_adapt={num_adapt} steps needs none."
            )

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> PreconditionedState:
        """Start a chain at ``position``; the first gradient makes the first preconditioner."""
        position = check.position("position", position)
        zero = jax.tree.map(jnp.zeros_like, position)
        return PreconditionedState(position, zero, self.gradient.init(key, position, batch), jnp.zeros((), jnp.int32))

    def step(
        self, key: Key, state: PreconditionedState, batch: Batch | None = None
    ) -> tuple[PreconditionedState, LangevinInfo]:
        """Move by one gradient and one noise, scaled by what the gradients were."""
        key_gradient, key_noise, key_probe = jax.random.split(key, 3)
        h, temperature = value_at(self.step_size, state.count), value_at(self.temperature, state.count)
        estimate, gradient_state, curvature = self._estimate(key_gradient, key_probe, state, batch)
        squares = jax.tree.map(jnp.square, estimate.gradient)
        moment, debiased = adapted_mean(state.second_moment, squares, state.count + 1, self.decay, self.num_adapt)
        scale = rmsprop(debiased, self.damping)
        noise = rng.normal_like(key_noise, state.position)
        position = preconditioned_step(state.position, estimate.gradient, noise, scale, h, temperature)
        if curvature is not None:
            share = (1 - self.decay) / total_weight(self.decay, state.count + 1)
            drift = preconditioner_drift(debiased, estimate.gradient, curvature, self.damping, share)
            position = tree.axpy(h * temperature, drift, position)
        info = LangevinInfo(
            lp_minibatch=estimate.value,
            step_size=h,
            temperature=temperature,
            grad_norm=tree.norm(estimate.gradient),
            n_grad=jnp.asarray(estimate.n_grad, jnp.int32),
            diverging=~tree.all_finite((position, moment)),  # an infinite moment would stop the chain
        )
        return PreconditionedState(position, moment, gradient_state, state.count + 1), info

    def _estimate(
        self, key: Key, key_probe: Key, state: PreconditionedState, batch: Batch | None
    ) -> tuple[Estimate, Any, PyTree | None]:
        """Estimate the gradient, and where it is asked for the diagonal of its Jacobian."""
        if not self.drift_correction:
            return *self.gradient.estimate(key, state.position, state.gradient, batch), None

        def of(theta: Position) -> tuple[PyTree, tuple[Estimate, Any]]:
            estimate, gradient_state = self.gradient.estimate(key, theta, state.gradient, batch)
            return estimate.gradient, (estimate, gradient_state)

        signs = jax.tree.map(jnp.sign, rng.normal_like(key_probe, state.position))
        _, along, (estimate, gradient_state) = jax.jvp(of, (state.position,), (signs,), has_aux=True)
        return estimate, gradient_state, jax.tree.map(jnp.multiply, signs, along)


def rmsprop(second_moment: PyTree, damping: Array) -> PyTree:
    r"""Diagonal preconditioner :math:`1 / (\epsilon + \sqrt V)` (Li et al. 2016, equation 4)."""
    return jax.tree.map(lambda v: 1 / (tree.cast_like(damping, v) + jnp.sqrt(v)), second_moment)


def preconditioned_step(
    position: Position, gradient: PyTree, noise: PyTree, scale: PyTree, step_size: Array, temperature: Array
) -> Position:
    r"""Euler–Maruyama step :math:`\theta + h G g + \sqrt{2 h T G}\,\xi` for a diagonal :math:`G` (Li et al. 2016, equation 6)."""

    def move(x: Array, g: Array, xi: Array, G: Array) -> Array:
        h, spread = tree.cast_like(step_size, x), tree.cast_like(jnp.sqrt(2 * step_size * temperature), x)
        return x + h * G * g + spread * jnp.sqrt(G) * xi

    return jax.tree.map(move, position, gradient, noise, scale)


def preconditioner_drift(
    second_moment: PyTree, gradient: PyTree, curvature: PyTree, damping: Array, share: Array
) -> PyTree:
    r"""Derivative of each :math:`G_i` with respect to :math:`\theta_i` through the last gradient.

    .. math:: \Gamma_i = -G_i^2\,\frac{w\,g_i\,\partial_i g_i}{\sqrt{V_i}}

    with :math:`w` the weight of the last squared gradient in :math:`V`, and ``curvature`` the diagonal :math:`\partial_i g_i`.
    Where all gradients were 0 it is taken as 0.
    """

    def of(v: Array, g: Array, c: Array) -> Array:
        root = jnp.sqrt(jnp.where(v > 0, v, 1))
        G = 1 / (tree.cast_like(damping, v) + root)
        return jnp.where(v > 0, -(G**2) * tree.cast_like(share, v) * g * c / root, 0)

    return jax.tree.map(of, second_moment, gradient, curvature)
