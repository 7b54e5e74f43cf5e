"""Gradients of what a policy earns, from samples and their rewards."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.policy.advantages import AbstractAdvantage, ExpectedReward


class Law(Protocol):
    """What a policy returns, such as a NumPyro distribution: samples and their log probabilities."""

    def sample(self, key: Key, sample_shape: tuple[int, ...]) -> Any:
        """Samples (*sample_shape, …)."""
        ...

    def log_prob(self, value: Any) -> Array:
        """Log probabilities (*sample_shape, …)."""
        ...


class PolicyGradient(AbstractGradientEstimator):
    r"""Score-function gradient of the expected reward, or the best of k, of a policy.

    .. math:: \hat g = \frac1B \sum_{b=1}^B \sum_{i=1}^n s_{ib}\, \nabla_\theta \log p_\theta(y_{ib}), \qquad y_{ib} \sim p_\theta

    with the weights :math:`s` of an `AbstractAdvantage`, and B the size of the batch of the policy's law, such as questions.

    Parameters
    ----------
    policy : callable
        ``policy(params)``: a NumPyro distribution, or anything with ``sample(key, (n,))`` and ``log_prob(samples)``.
    reward : callable
        ``reward(samples)``, of the shape (n, …) of the log probabilities. Need not be differentiable.
    num_samples : int
        n, for each element of the batch.
    advantage : AbstractAdvantage
        `ExpectedReward`, `MaxAtK` or `BetaNormalised`.

    Raises
    ------
    ValueError, TypeError
        For too few samples, rewards of another shape, or another kind of advantage.

    Notes
    -----
    Unbiased for `ExpectedReward` and `MaxAtK`: the gradient of the mean over the batch of what they estimate. The estimate's
    ``value`` is that mean.

    Cost: n rewards and log probabilities for each element of the batch, and one derivative of the latter.

    Not where the reward is differentiable and the samples can be reparameterised, or their outcomes can be enumerated: see
    `expectation_gradient`.

    References
    ----------
    Leave-one-out baselines: Kool, van Hoof and Welling (2019). The best of k: Walder and Karkhanis (2025). Beta normalisation:
    Xiao, Zhang and Cao (2025).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from ergodica.estimators import MaxAtK
    >>> def policy(logits):  # two questions, three answers
    ...     return dist.Categorical(logits=logits)
    >>> right = jnp.array([2, 0])
    >>> gradient = PolicyGradient(policy, lambda y: (y == right[None]).astype(float), 64, MaxAtK(4))
    >>> logits = jnp.zeros((2, 3))
    >>> estimate, _ = gradient.estimate(jax.random.key(0), logits, gradient.init(jax.random.key(1), logits))
    >>> bool(jnp.all(estimate.gradient[jnp.arange(2), right] > 0)), estimate.n_grad
    (True, 128)
    """

    policy: Callable
    reward: Callable
    advantage: AbstractAdvantage
    num_samples: int = eqx.field(static=True)

    references: ClassVar = ("kool2019", "walder2025", "xiao2025")

    def __init__(
        self,
        policy: Callable[[PyTree], Law],
        reward: Callable[[Any], Array],
        num_samples: int,
        advantage: AbstractAdvantage | None = None,
    ) -> None:
        self.policy = as_partial(check.function("policy", policy))
        self.reward = as_partial(check.function("reward", reward))
        chosen = ExpectedReward() if advantage is None else advantage
        self.advantage = check.instance("advantage", chosen, AbstractAdvantage, "such as MaxAtK(4)")
        hint = f"{type(chosen).__name__} needs as many."
        self.num_samples = check.integer("num_samples", num_samples, least=chosen.least, hint=hint)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> None:
        """Start; there is no state."""

    def estimate(self, key: Key, params: PyTree, state: None, batch: Batch | None = None) -> tuple[Estimate, None]:
        """Sample the policy, and weight the scores of the samples."""
        if batch is not None:
            raise ValueError("PolicyGradient takes no batch that is handed over; let the policy hold its questions.")
        samples = jax.lax.stop_gradient(self.policy(params).sample(key, (self.num_samples,)))
        rewards = jax.lax.stop_gradient(self._checked(self.reward(samples)))

        def surrogate(params: PyTree) -> Array:
            scores = self.policy(params).log_prob(samples)
            self._check_scores(scores, rewards)
            return jnp.sum(weights.astype(scores.dtype) * scores)

        weights = self.advantage.weights(rewards) * (self.num_samples / rewards.size)
        gradient = jax.grad(surrogate)(params)
        return Estimate(gradient, jnp.mean(self.advantage.value(rewards)), n_grad=rewards.size), state

    def probe(self, key: Key, params: PyTree, state: None) -> Estimate:
        """Estimate from other samples."""
        return self.estimate(key, params, state)[0]

    def _checked(self, rewards: Any) -> Array:
        rewards = jnp.asarray(rewards)
        if not jnp.issubdtype(rewards.dtype, jnp.floating):
            raise TypeError(
                f"reward must return floating point; got dtype {rewards.dtype}. Cast it with .astype(float)."
            )
        if rewards.ndim == 0 or rewards.shape[0] != self.num_samples:
            raise ValueError(
                f"reward must return one value a sample, with the leading axis {self.num_samples}; got shape {rewards.shape}."
            )
        self.advantage.check_shape(rewards.shape)
        return jax.lax.convert_element_type(rewards, rewards.dtype)

    def _check_scores(self, scores: Array, rewards: Array) -> None:
        if scores.shape != rewards.shape:
            raise ValueError(
                f"reward must return the shape of the log probabilities, {scores.shape}; got {rewards.shape}. Axes of one "
                "sample belong to its event, as in Normal(...).to_event(1)."
            )
