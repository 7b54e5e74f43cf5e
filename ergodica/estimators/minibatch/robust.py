"""Gradients that single data, or single groups of data, cannot carry away.

All of these are biased: what they estimate is not the gradient of the log posterior, and a sampler that uses them samples
another law. `ergodica.compare_gradients` measures by how much the gradient is off.
"""

import abc
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch.likelihood import LogLikelihood, add_prior, of_each_datum, squared_norm
from ergodica.estimators.minibatch.subsample import Minibatch, MinibatchState, as_batch

RULES = ("median", "trimmed_mean", "geometric_median")
_SMALLEST_DISTANCE = 1e-6


class AbstractRobustGradient(AbstractGradientEstimator):
    """A gradient made from the batches of a `Minibatch` by another rule than the sum over their rows."""

    minibatch: eqx.AbstractVar[Minibatch]

    @abc.abstractmethod
    def at(self, params: PyTree, batch: Batch) -> Estimate:
        """Estimate value and gradient from a given batch."""

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> MinibatchState:
        """Open the first epoch."""
        return self.minibatch.init(key, params, batch)

    def draw(self, key: Key, state: MinibatchState) -> tuple[Batch, MinibatchState]:
        """Draw the next batch."""
        return self.minibatch.draw(key, state)

    def estimate(
        self, key: Key, params: PyTree, state: MinibatchState, batch: Batch | None = None
    ) -> tuple[Estimate, MinibatchState]:
        """Estimate the gradient at ``params`` from the next batch, or from the one given."""
        if batch is not None:
            batch = as_batch(batch)
        else:
            batch, state = self.draw(key, state)
        return self.at(params, batch), state

    def probe(self, key: Key, params: PyTree, state: MinibatchState) -> Estimate | None:  # noqa: ARG002
        """Estimate from a batch that is independent of the epoch, with the same bias; ``None`` where the data are streamed."""
        if self.posterior.data is None:
            return None
        return self.at(params, self.minibatch.independent_batch(key))

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is approximated."""
        return self.minibatch.target


class Clipped(AbstractRobustGradient):
    r"""Minibatch gradient in which no datum counts with more than a given norm. Biased.

    .. math::

        \hat g(\theta) = \nabla\log p(\theta)
            + N \sum_{i \in B} w_i \min\!\left(1, \frac{C}{\lVert\nabla\ell_i(\theta)\rVert}\right) \nabla\ell_i(\theta)

    Parameters
    ----------
    gradient : Minibatch
        Of any scheme.
    max_norm : float
        :math:`C`, in the units of one datum's gradient.

    Raises
    ------
    ValueError, TypeError
        If the norm is not positive.

    Notes
    -----
    The bias does not shrink with larger batches: even all the data give :math:`\sum_i \min(1, C/\lVert g_i\rVert) g_i`. It is zero
    where no gradient is longer than ``C``. Data with rare large gradients (outliers under a light-tailed likelihood) are
    held back, and the draws move away from them. The value is that of the minibatch, which the clipped gradient is in
    general not the gradient of.

    Probes carry the same bias, so the configurational temperature of a run does not see it: compare the estimator
    with `ergodica.compare_gradients`, at several points. A likelihood with heavier tails is the honest way to
    hold outliers back.

    Cost: ``n`` gradients a call, taken one by one: memory of ``n`` times the parameters.

    References
    ----------
    Abadi et al. (2016), Algorithm 1, without its noise.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: x * t, jnp.array([1.0, 2.0, 9.0]), initial=jnp.array(0.0))
    >>> gradient = Clipped(erg.estimators.Minibatch(posterior, scheme="full"), max_norm=2.0)
    >>> estimate, _ = gradient.estimate(jax.random.key(0), jnp.array(0.0), gradient.init(jax.random.key(1), jnp.array(0.0)))
    >>> round(float(estimate.gradient), 3)  # 1 + 2 + 2 in place of 1 + 2 + 9
    5.0
    """

    minibatch: Minibatch
    max_norm: Array

    references: ClassVar = ("abadi2016",)

    def __init__(self, gradient: Minibatch, max_norm: float) -> None:
        self.minibatch = check.instance("gradient", gradient, Minibatch, "such as Minibatch(posterior, batch_size)")
        self.max_norm = check.positive("max_norm", max_norm)

    def at(self, params: PyTree, batch: Batch) -> Estimate:
        """Estimate value and gradient from a given batch."""
        each = of_each_datum(self.posterior, params, batch.data)
        kept = clipping_factors(each.gradient, self.max_norm)
        dtype = each.value.dtype
        weight = float(self.posterior.num_data) * batch.weight.astype(dtype)
        gradient = jax.tree.map(
            lambda g: jnp.tensordot((weight * kept.astype(dtype)).astype(g.dtype), g, axes=1), each.gradient
        )
        return add_prior(self.posterior, params, LogLikelihood(weight @ each.value, gradient), n_grad=weight.shape[0])


class RobustAggregate(AbstractRobustGradient):
    r"""Minibatch gradient in which groups of rows vote: median, trimmed mean or geometric median. Biased.

    .. math::

        \hat g(\theta) = \nabla\log p(\theta) + N W\, \operatorname{rule}(m_1, …, m_G), \qquad
        m_j = \frac{\sum_{i \in B_j} w_i \nabla\ell_i(\theta)}{\sum_{i \in B_j} w_i}, \quad W = \sum_{i \in B} w_i

    where the batch ``B`` is cut into ``G`` groups of adjacent rows, of equal size give or take one row.

    Parameters
    ----------
    gradient : Minibatch
        Of any scheme. With ``scheme="full"`` the groups are contiguous parts of the data: the gradients of blocks or of owners.
    num_groups : int
        :math:`G`, at least 2 and at most half of the rows of a batch.
    rule : {"median", "trimmed_mean", "geometric_median"}
        ``"median"`` and ``"trimmed_mean"`` look at each coordinate by itself; `geometric_median` at all of them.
    trim : int, optional
        For ``"trimmed_mean"``: how many groups to leave out at either end, at least 1 and less than half of them.
    num_iterations : int
        For ``"geometric_median"``: iterations of Weiszfeld's algorithm, a fixed number.

    Raises
    ------
    ValueError, TypeError
        For numbers out of range, an unknown rule, or batches with fewer than two rows a group.

    Notes
    -----
    The median of group means is not their mean where their law is skewed: the bias falls with the size of the groups, as
    they approach a normal law, but not with their number. Fewer than half of the groups can be replaced by anything without
    carrying the estimate away (the trimmed mean stands ``trim`` of them). On clean data the price is variance too: the median of
    many groups has up to :math:`\pi/2` times that of the mean. The value is that of the minibatch.

    Probes carry the same bias, so the configurational temperature of a run does not see it: compare the estimator with
    `ergodica.compare_gradients`, at several points.

    Cost: as many gradients as the batch has rows, and a sort of ``G`` numbers for each coordinate (median and trimmed
    mean) or ``num_iterations`` passes over ``G`` gradients.

    References
    ----------
    Yin, Chen, Ramchandran and Bartlett (2018) for the median and the trimmed mean; Pillutla, Kakade and Harchaoui (2022) for the
    geometric median by a smoothed Weiszfeld algorithm.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> x = jnp.array([1.0, 1.0, 2.0, 2.0, 90.0, 90.0])
    >>> posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: x * t, x, initial=jnp.array(0.0))
    >>> gradient = RobustAggregate(erg.estimators.Minibatch(posterior, scheme="full"), num_groups=3)
    >>> estimate, _ = gradient.estimate(jax.random.key(0), jnp.array(0.0), gradient.init(jax.random.key(1), jnp.array(0.0)))
    >>> round(float(estimate.gradient), 3)  # 6 times the median of 1, 2 and 90
    12.0
    """

    minibatch: Minibatch
    num_groups: int = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    trim: int | None = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)

    references: ClassVar = ("yin2018", "pillutla2022")

    def __init__(
        self,
        gradient: Minibatch,
        num_groups: int,
        rule: Literal["median", "trimmed_mean", "geometric_median"] = "median",
        *,
        trim: int | None = None,
        num_iterations: int = 32,
    ) -> None:
        self.minibatch = check.instance("gradient", gradient, Minibatch, "such as Minibatch(posterior, batch_size)")
        self.num_groups = check.integer("num_groups", num_groups, least=2)
        self.rule = check.one_of("rule", rule, RULES)
        if (rule == "trimmed_mean") != (trim is not None):
            raise ValueError(f"trim belongs to rule='trimmed_mean', which needs it; got rule={rule!r} and trim={trim}.")
        if trim is not None:
            trim = check.integer("trim", trim, most=(num_groups - 1) // 2, hint=f"There are {num_groups} groups.")
        self.trim = trim
        self.num_iterations = check.integer("num_iterations", num_iterations)

    def at(self, params: PyTree, batch: Batch) -> Estimate:
        """Estimate value and gradient from a given batch."""
        parts = [
            jax.vmap(self._mean_of_group, in_axes=(None, 0))(params, groups)
            for groups in into_groups(batch, self.num_groups)
        ]
        mass, means = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        n, total = float(self.posterior.num_data), jnp.sum(mass)
        gradient = tree.scale(self._aggregate(means.gradient), n * total)
        likelihood = LogLikelihood(n * jnp.dot(mass, means.value), gradient)
        return add_prior(self.posterior, params, likelihood, n_grad=batch.weight.shape[0])

    def _mean_of_group(self, params: PyTree, group: Batch) -> tuple[Array, LogLikelihood]:
        """Sum of the weights of a group, and its mean log likelihood a datum."""

        def mean(theta: PyTree) -> tuple[Array, Array]:
            values = self.posterior.log_likelihood(theta, group.data)
            weight = group.weight.astype(values.dtype)
            mass = jnp.sum(weight)
            return jnp.dot(weight, values) / mass, mass

        (value, mass), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        return mass, LogLikelihood(value, gradient)

    def _aggregate(self, gradients: PyTree) -> PyTree:
        if self.rule == "geometric_median":
            return geometric_median(gradients, self.num_iterations)
        # a median is the mean of the middle one, or the middle two
        return trimmed_mean(gradients, (self.num_groups - 1) // 2 if self.trim is None else self.trim)


def clipping_factors(gradients: PyTree, max_norm: Array) -> Array:
    r""":math:`\min(1, C / \lVert g_i \rVert)` for gradients with a leading axis (n,) (Abadi et al. 2016, Algorithm 1)."""
    norms = jnp.sqrt(squared_norm(gradients))
    return jnp.minimum(1, max_norm.astype(norms.dtype) / norms)


def into_groups(batch: Batch, num_groups: int) -> list[Batch]:
    """Cut a batch into groups of adjacent rows: those with one row more, then the others, stacked along a new first axis."""
    length = batch.weight.shape[0]
    if length < 2 * num_groups:
        raise ValueError(
            f"num_groups must be at most half of the rows of a batch, or a group may hold none that counts; got "
            f"{num_groups} groups for batches of {length} rows."
        )
    short, num_long = divmod(length, num_groups)
    split = num_long * (short + 1)

    def stack(begin: int, end: int, size: int) -> Batch:
        return jax.tree.map(lambda x: x[begin:end].reshape(-1, size, *x.shape[1:]), batch)

    parts = [stack(0, split, short + 1)] if num_long else []
    return [*parts, stack(split, length, short)]


def trimmed_mean(gradients: PyTree, trim: int) -> PyTree:
    """Mean over the leading axis without the ``trim`` smallest and largest entries of each coordinate (Yin et al. 2018)."""
    return jax.tree.map(lambda x: jnp.mean(jnp.sort(x, axis=0)[trim : x.shape[0] - trim], axis=0), gradients)


def geometric_median(gradients: PyTree, num_iterations: int) -> PyTree:
    r"""Point with the least sum of distances to the entries of the leading axis, by Weiszfeld's algorithm.

    .. math:: z \leftarrow \frac{\sum_j m_j / d_j}{\sum_j 1 / d_j}, \qquad d_j = \max(\lVert m_j - z\rVert, \nu)

    from the mean, with :math:`\nu` a millionth of the root mean square distance from it (Pillutla et al. 2022).
    """

    def distances(centre: PyTree) -> Array:
        return jnp.sqrt(squared_norm(jax.tree.map(lambda x, c: x - c[None], gradients, centre)))

    def weighted_mean(weight: Array) -> PyTree:
        share = weight / jnp.sum(weight)
        return jax.tree.map(lambda x: jnp.tensordot(share.astype(x.dtype), x, axes=1), gradients)

    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), gradients)
    spread = distances(mean)
    smallest = jnp.maximum(_SMALLEST_DISTANCE * jnp.sqrt(jnp.mean(spread**2)), jnp.finfo(spread.dtype).tiny)

    def iterate(_: int, centre: PyTree) -> PyTree:
        return weighted_mean(smallest / jnp.maximum(distances(centre), smallest))

    return jax.lax.fori_loop(0, num_iterations, iterate, mean)
