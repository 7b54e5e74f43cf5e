"""What each sample of a policy is weighted by: for the expected reward, the best of k, or rewards normalised by a Beta law."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check

_LARGEST_INVERSE = 1e6


def leave_one_out_weights(rewards: Array) -> Array:
    r"""Weights :math:`s_i` for the expected reward, each reward against the mean of the others (Kool et al. 2019).

    .. math:: s_i = \frac1n\Big(r_i - \frac{1}{n-1}\sum_{j \ne i} r_j\Big)

    Parameters
    ----------
    rewards : array (n, …)

    Notes
    -----
    Against the mean of *all* rewards the gradient would be too short by a factor :math:`1 - 1/n`.
    """
    return (rewards - jnp.mean(rewards, axis=0, keepdims=True)) / (rewards.shape[0] - 1)


def max_at_k(rewards: Array, k: int) -> Array:
    r"""Unbiased estimate of the expected best of ``k`` samples, from ``n`` of them (Chen et al. 2021 for rewards 0 and 1).

    .. math:: \binom nk^{-1} \sum_{i=1}^n \binom{i-1}{k-1} r_{(i)}

    with the rewards in increasing order: the mean over all subsets of size ``k``.

    Parameters
    ----------
    rewards : array (n, …)
    k : int
    """
    share, _ = _subset_shares(rewards.shape[0], k)
    return jnp.tensordot(jnp.asarray(share, rewards.dtype), jnp.sort(rewards, axis=0), axes=1)


def max_at_k_weights(rewards: Array, k: int, *, leave_one_out: bool = True) -> Array:
    r"""Weights :math:`s_i` such that :math:`\sum_i s_i \nabla\log p(y_i)` estimates the gradient of the expected best of ``k``.

    .. math::

        s_{(i)} &= \binom nk^{-1}\Big[\binom{i-1}{k-1} r_{(i)} + \sum_{j>i}\binom{j-2}{k-2} r_{(j)}\Big] \\
        s_{(i)} &= \binom nk^{-1}\Big[\binom{i-1}{k-1} r_{(i)} - \sum_{j<i}\binom{j-1}{k-2} r_{(j)}\Big]
            \quad\text{(leave one out)}

    with the rewards in increasing order. The first averages the best of each subset that holds the sample; the second, what
    the sample adds to the best of the others in the subset.

    Parameters
    ----------
    rewards : array (n, …)
    k : int
        At most n; at least 2 to leave one out.
    leave_one_out : bool

    References
    ----------
    Walder and Karkhanis (2025).
    """
    n = rewards.shape[0]
    share, pairs = _subset_shares(n, k)
    # others[i, j]: by how much the j-th smallest reward counts for the i-th
    others = -np.tril(np.broadcast_to(pairs, (n, n)), -1) if leave_one_out else _larger(n, k)
    matrix = jnp.asarray(np.diag(share) + others, rewards.dtype)
    order = jnp.argsort(rewards, axis=0)
    weights = jnp.tensordot(matrix, jnp.take_along_axis(rewards, order, axis=0), axes=1)
    return jnp.take_along_axis(weights, jnp.argsort(order, axis=0), axis=0)


def _subset_shares(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares C(i-1, k-1) / C(n, k) and C(i-1, k-2) / C(n, k) for i = 1, …, n, from exact integers."""
    total = math.comb(n, k)
    share = [math.comb(i, k - 1) / total for i in range(n)]
    pairs = [math.comb(i, k - 2) / total if k >= 2 else 0.0 for i in range(n)]
    return np.array(share), np.array(pairs)


def _larger(n: int, k: int) -> np.ndarray:
    """Shares C(j-2, k-2) / C(n, k) of the rewards above the i-th (n, n)."""
    total = math.comb(n, k)
    pairs = [math.comb(j - 1, k - 2) / total if j >= 1 and k >= 2 else 0.0 for j in range(n)]
    return np.triu(np.broadcast_to(np.array(pairs), (n, n)), 1)


def beta_normalised(rewards: Array, alpha: Array, beta: Array) -> Array:
    r"""Rewards minus their mean, over the density of a Beta law at the mean (Xiao, Zhang and Cao 2025).

    .. math:: A_i = \frac{r_i - p}{\mathrm{Beta}(p; \alpha, \beta)}, \qquad p = \frac1n\sum_i r_i

    :math:`\alpha = \beta = 1` leaves the difference as it is; :math:`\alpha = \beta = 3/2` divides by a multiple of
    :math:`\sqrt{p(1-p)}`, the standard deviation of rewards 0 and 1, as GRPO does.

    Parameters
    ----------
    rewards : array (n, …)
        In [0, 1].
    alpha, beta : scalar arrays
        At least 1.

    Notes
    -----
    The inverse of the density is cut at 1e6, which matters at p = 0 and 1 alone, where the difference is 0.
    """
    p = jnp.mean(rewards, axis=0)
    density = jax.scipy.stats.beta.pdf(p, alpha.astype(p.dtype), beta.astype(p.dtype))
    inverse = 1 / jnp.maximum(density, jnp.asarray(1 / _LARGEST_INVERSE, p.dtype))
    return (rewards - p[None]) * inverse[None]


def matched_beta(rates: Array, max_concentration: float = 1e3) -> tuple[Array, Array]:
    r"""Parameters for `beta_normalised` from the mean rewards of many questions, by the method of moments.

    .. math:: \alpha = \max(1, 1 + a/3), \quad \beta = \max(1, 1 + b/3), \qquad
       (a, b) = \Big(\frac{m(1-m)}{v} - 1\Big)(m, 1 - m)

    with mean m and variance v of the rates.

    Parameters
    ----------
    rates : array (…)
        In [0, 1].
    max_concentration : float
        Bound for a + b, which is infinite where all rates are the same.
    """
    m, v = jnp.mean(rates), jnp.var(rates)
    top = jnp.asarray(max_concentration, rates.dtype)
    spread = m * (1 - m)
    concentration = jnp.where(v * (top + 1) > spread, spread / jnp.where(v > 0, v, 1) - 1, top)
    concentration = jnp.where(spread > 0, jnp.maximum(concentration, 0), 0)
    return 1 + concentration * m / 3, 1 + concentration * (1 - m) / 3


class AbstractAdvantage(eqx.Module):
    """What `PolicyGradient` weights the score of each sample by."""

    @abc.abstractmethod
    def weights(self, rewards: Array) -> Array:
        """Weights (n, …) of the samples, from their rewards (n, …)."""

    @abc.abstractmethod
    def value(self, rewards: Array) -> Array:
        """Estimate of what is ascended (…)."""

    @property
    @abc.abstractmethod
    def least(self) -> int:
        """How many samples it needs."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise where rewards (n, …) of this shape do not do."""


class ExpectedReward(AbstractAdvantage):
    """The expected reward, with the mean of the other samples as a baseline: unbiased.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> ExpectedReward().weights(jnp.array([0.0, 0.0, 3.0])).tolist()
    [-0.5, -0.5, 1.0]
    """

    def weights(self, rewards: Array) -> Array:
        """Each reward against the mean of the others, over n."""
        return leave_one_out_weights(rewards)

    def value(self, rewards: Array) -> Array:
        """Mean reward."""
        return jnp.mean(rewards, axis=0)

    @property
    def least(self) -> int:
        """Two samples."""
        return 2


class MaxAtK(AbstractAdvantage):
    """The expected best of ``k`` samples, which for rewards 0 and 1 is pass@k: unbiased.

    Parameters
    ----------
    k : int
        At least 2; the expected reward, k = 1, is `ExpectedReward`.
    leave_one_out : bool
        Whether a sample is credited with what it adds to the best of others only. It has no bias either way.

    References
    ----------
    Walder and Karkhanis (2025).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> rewards = jnp.array([0.0, 1.0, 0.0, 0.0])
    >>> MaxAtK(2).value(rewards).item(), MaxAtK(2).weights(rewards).tolist()
    (0.5, [0.0, 0.5, 0.0, 0.0])
    """

    k: int = eqx.field(static=True)
    leave_one_out: bool = eqx.field(static=True)

    def __init__(self, k: int, *, leave_one_out: bool = True) -> None:
        self.k = check.integer("k", k, least=2, hint="For k=1 use ExpectedReward().")
        self.leave_one_out = bool(leave_one_out)

    def weights(self, rewards: Array) -> Array:
        """Credit of each sample for the best of k."""
        return max_at_k_weights(rewards, self.k, leave_one_out=self.leave_one_out)

    def value(self, rewards: Array) -> Array:
        """Mean over all subsets of the best."""
        return max_at_k(rewards, self.k)

    @property
    def least(self) -> int:
        """At least k samples."""
        return self.k


class BetaNormalised(AbstractAdvantage):
    """Rewards against their mean, over a Beta density that follows the batch (BNPO): biased.

    Each question of the batch has its own mean; the Beta law is matched to the means of all questions.

    Parameters
    ----------
    max_concentration : float
        Bound for the matched law, needed where the questions hardly differ.

    Notes
    -----
    The baseline includes the sample itself, and the normaliser depends on all of them: what is ascended is no expectation of the
    reward. Questions are reweighted by how likely their mean is under the law; rewards must be in [0, 1].

    References
    ----------
    Xiao, Zhang and Cao (2025).
    """

    max_concentration: float = eqx.field(static=True)

    def __init__(self, max_concentration: float = 1e3) -> None:
        check.positive("max_concentration", max_concentration)
        self.max_concentration = float(max_concentration)

    def weights(self, rewards: Array) -> Array:
        """Normalised rewards over n."""
        alpha, beta = matched_beta(jnp.mean(rewards, axis=0), self.max_concentration)
        return beta_normalised(rewards, alpha, beta) / rewards.shape[0]

    def value(self, rewards: Array) -> Array:
        """Mean reward."""
        return jnp.mean(rewards, axis=0)

    @property
    def least(self) -> int:
        """Two samples."""
        return 2

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless there are several questions to match the law to."""
        if math.prod(shape[1:]) < 2:
            raise ValueError(
                f"BetaNormalised matches a law to the mean rewards of several questions; got rewards of shape {shape}. "
                "Give the policy a batch of questions, or use ExpectedReward()."
            )
