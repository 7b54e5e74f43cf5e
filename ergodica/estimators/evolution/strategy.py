"""Evolution strategies: the gradient of an objective smoothed by a Gaussian, from evaluations alone."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.types import Draws, Estimate, Key, PyTree
from ergodica.estimators.evolution.objective import (
    AbstractBlackBox,
    Ascended,
    Objective,
    normal_draws,
    repeated,
    weighted_sum,
)

type Shaping = Literal["rank"] | None
SHAPINGS = ("rank", None)


def centred_ranks(fitness: Array) -> Array:
    r"""Ranks of the entries, spread evenly over [-1/2, 1/2]; ties share the mean of their ranks (Salimans et al. 2017).

    Parameters
    ----------
    fitness : array (n,)
        :math:`n \ge 2`.
    """
    below = jnp.sum(fitness[:, None] > fitness[None, :], axis=1)
    equal = jnp.sum(fitness[:, None] == fitness[None, :], axis=1)
    ranks = below.astype(fitness.dtype) + (equal.astype(fitness.dtype) - 1) / 2
    return ranks / (fitness.shape[0] - 1) - 0.5


def antithetic_weights(plus: Array, minus: Array, sigma: Array, shaping: Shaping = None) -> Array:
    r"""Weights :math:`w_i` of the perturbations in :math:`\hat g = \sum_i w_i \varepsilon_i`, from mirrored pairs.

    .. math:: w_i = \frac{u(\theta + \sigma\varepsilon_i) - u(\theta - \sigma\varepsilon_i)}{2\sigma n}

    with :math:`u` the objective, or its centred rank among all ``2 n`` evaluations.

    Parameters
    ----------
    plus, minus : array (n,)
        The objective at :math:`\theta \pm \sigma\varepsilon_i`.
    sigma : scalar array
    shaping : {"rank", None}
    """
    n = plus.shape[0]
    if shaping == "rank":
        ranks = centred_ranks(jnp.concatenate([plus, minus]))
        plus, minus = ranks[:n], ranks[n:]
    return (plus - minus) / (2 * n * tree.cast_like(sigma, plus))


def single_weights(fitness: Array, sigma: Array, shaping: Shaping = None) -> Array:
    r"""Weights :math:`w_i` of the perturbations in :math:`\hat g = \sum_i w_i \varepsilon_i`, without mirrored pairs.

    .. math:: w_i = \frac{1}{\sigma n}\Big(u_i - \frac{1}{n-1}\sum_{j \ne i} u_j\Big) = \frac{u_i - \bar u}{\sigma (n - 1)}

    The baseline leaves out the evaluation itself, so that it brings no bias.

    Parameters
    ----------
    fitness : array (n,)
        The objective at :math:`\theta + \sigma\varepsilon_i`.
    sigma : scalar array
    shaping : {"rank", None}
    """
    utility = centred_ranks(fitness) if shaping == "rank" else fitness
    return (utility - jnp.mean(utility)) / ((fitness.shape[0] - 1) * tree.cast_like(sigma, utility))


class EvolutionStrategy(AbstractBlackBox):
    r"""Gradient of the objective smoothed by a Gaussian, from evaluations at random points.

    .. math:: \nabla_\theta \mathrm{E} f(\theta + \sigma\varepsilon) \approx \frac{1}{2\sigma n} \sum_{i=1}^n
       \big(f(\theta + \sigma\varepsilon_i) - f(\theta - \sigma\varepsilon_i)\big)\,\varepsilon_i,
       \qquad \varepsilon_i \sim N(0, I)

    Parameters
    ----------
    objective : callable, Posterior or Minibatch
        What is ascended: ``objective(params) -> scalar``, which need not be continuous; or a posterior's log density.
    sigma : float
        Standard deviation of the perturbations, in units of the parameters.
    num_pairs : int
        :math:`n`. With ``antithetic=False``, ``2 * num_pairs`` independent points are taken, for the same cost.
    antithetic : bool
        Whether points come in mirrored pairs. Without, each is held against the mean of the others.
    shaping : {"rank", None}
        With ``"rank"``, centred ranks in [-1/2, 1/2] take the place of the objective.
    takes_key : bool
        Whether the objective is ``objective(params, key)``. All points share the key.

    Raises
    ------
    ValueError, TypeError
        For an objective of another kind, one that returns no scalar, or numbers out of range.

    Notes
    -----
    Unbiased for the gradient of the *smoothed* objective, and so biased for that of the objective: by nothing on
    quadratics, by :math:`3 a_j \sigma^2` on :math:`\sum_j a_j\theta_j^3`. On a quadratic with gradient :math:`g`, the covariance
    of mirrored pairs is :math:`(\lVert g\rVert^2 I + g g^\top)/n`, that of `ForwardGradient`. Without pairs, ``m = 2 n`` points
    have :math:`(\lVert g\rVert^2 I + g g^\top)/(m - 1)` on a *linear* function, about half as much for the same cost, and
    curvature adds to it.

    Ranks do not change under increasing transformations of the objective, and no outlier carries the step away. What they
    estimate is no gradient of the objective, though: neither its length nor, in general, its direction. No sampler should
    use them.

    Cost: ``2 * num_pairs`` evaluations; memory for as many copies of the parameters.

    Not where derivatives can be had and the function is smooth at the scale of ``sigma``.

    References
    ----------
    Salimans et al. (2017); mirrored pairs and smoothing: Nesterov and Spokoiny (2017).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> steps = EvolutionStrategy(lambda x: jnp.sum(jnp.floor(x)), sigma=1.0, num_pairs=4000)  # no derivative anywhere
    >>> estimate, _ = steps.estimate(jax.random.key(0), jnp.array([0.2]), None)
    >>> bool(abs(estimate.gradient[0] - 1.0) < 0.1), estimate.n_grad
    (True, 8000)
    """

    objective: Objective
    sigma: Array
    num_pairs: int = eqx.field(static=True)
    antithetic: bool = eqx.field(static=True)
    shaping: Shaping = eqx.field(static=True)

    references: ClassVar = ("salimans2017", "nesterov2017")

    def __init__(
        self,
        objective: Ascended,
        sigma: float,
        num_pairs: int = 1,
        *,
        antithetic: bool = True,
        shaping: Shaping = None,
        takes_key: bool = False,
    ) -> None:
        self.objective = Objective(objective, takes_key=takes_key)
        self.sigma = check.positive("sigma", sigma)
        self.num_pairs = check.integer("num_pairs", num_pairs)
        self.antithetic = bool(antithetic)
        self.shaping = check_shaping(shaping)

    def search(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Estimate:
        """Evaluate at ``2 * num_pairs`` points around the parameters."""
        noise, plus, minus = self._evaluate(key, params, function)
        if minus is not None:
            weights, value = antithetic_weights(plus, minus, self.sigma, self.shaping), jnp.mean(plus + minus) / 2
        else:
            weights, value = single_weights(plus, self.sigma, self.shaping), jnp.mean(plus)
        return Estimate(weighted_sum(weights, noise), value, n_grad=2 * self.num_pairs)

    def draws(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Draws | None:
        """Pair by pair, or point by point without a baseline; ``None`` for ranks, which each point has among the others."""
        if self.shaping is not None:
            return None
        noise, plus, minus = self._evaluate(key, params, function)
        sigma = tree.cast_like(self.sigma, plus)
        weights, value = (plus / sigma, plus) if minus is None else ((plus - minus) / (2 * sigma), (plus + minus) / 2)
        return normal_draws(weights, noise, value, 2 * self.num_pairs)

    def _evaluate(
        self, key: Key, params: PyTree, function: Callable[[PyTree], Array]
    ) -> tuple[PyTree, Array, Array | None]:
        """Noise, and the function at the points on either side of the parameters (one side without pairs)."""
        points = self.num_pairs if self.antithetic else 2 * self.num_pairs
        noise = rng.normal_like(key, repeated(points, params))

        def on_side(sigma: Array) -> Array:
            return jax.vmap(lambda v: function(tree.axpy(sigma, v, params)))(noise)

        return noise, on_side(self.sigma), on_side(-self.sigma) if self.antithetic else None


def check_shaping(shaping: Shaping) -> Shaping:
    """Return a known shaping."""
    if shaping not in SHAPINGS:
        raise ValueError(f"shaping must be 'rank' or None; got {shaping!r}.")
    return shaping
