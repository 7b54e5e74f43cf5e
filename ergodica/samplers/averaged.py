"""Averages over a chain that are kept while it runs, so that no draw need be stored."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree


class CovarianceMatrix(NamedTuple):
    """Covariances of all pairs of coordinates (D, D), in the order of the leaves."""

    matrix: Array


class RunningMoments(NamedTuple):
    """Mean and covariance of what has been seen so far.

    Attributes
    ----------
    count : int32 scalar
        How many iterates are in.
    mean : pytree
    residue : pytree
        What rounding has taken from ``mean`` (compensated summation): a mean far from zero stays right in single precision.
    covariance : pytree, CovarianceMatrix or None
        Mean squared deviation from the mean, entry by entry, or with all cross terms.
    """

    count: Array
    mean: PyTree
    residue: PyTree
    covariance: Any


class AveragedState(NamedTuple):
    """A chain of the inner kernel, and its averages; ``position`` is the inner chain's.

    Attributes
    ----------
    inner : NamedTuple
        State of the kernel that moves.
    step : int32 scalar
        Steps taken.
    moments : RunningMoments
    """

    inner: Any
    step: Array
    moments: RunningMoments

    @property
    def position(self) -> Position:
        """Where the chain is."""
        return self.inner.position


class Averaged(AbstractKernel):
    r"""A kernel that also averages its iterates, without storing them.

    .. math:: \bar\theta_n = \bar\theta_{n-1} + \frac{\theta_{t_n} - \bar\theta_{n-1}}{n}, \qquad
        t_n = \text{start} + n \cdot \text{stride}

    Parameters
    ----------
    kernel : AbstractKernel
        What moves the chain; its draws and infos are unchanged.
    start : int
        Steps before averaging begins. Under `ergodica.sample` the steps of the warm-up count too: with
        ``start=num_warmup`` and ``stride=thin`` the average is that of the stored draws.
    stride : int
        Every how many steps an iterate is taken in.
    covariance : {"diagonal", "full", None}
        Whether variances, the whole covariance matrix, or neither is kept beside the mean.
    of : callable, optional
        ``of(position) -> pytree`` of floating point arrays: what to average in place of the position. The position is
        unconstrained; ``jax.tree_util.Partial(ergodica.Posterior.constrain, posterior)`` averages what is reported.

    Raises
    ------
    ValueError, TypeError
        For a kernel, a number or a kind of covariance that is none.

    Notes
    -----
    The averages are in ``state.moments``, and in the group ``summary`` of what `ergodica.sample` returns: ``count``,
    ``summary/mean`` and ``summary/variance`` by name of the leaf, or the matrix ``covariance`` over the coordinates. Each is
    per chain; they are divided by the count, without a correction for correlation between iterates.

    Cost: that of the inner kernel, and O(D) operations a step (O(D²) for ``"full"``); memory of two further positions, three
    with variances. Averages of ``K`` iterates of an SGLD chain on a Gaussian have the variance

    .. math:: \frac{V}{K}\left[\frac{1+\rho}{1-\rho} - \frac{2\rho\,(1-\rho^K)}{K(1-\rho)^2}\right],
        \qquad \rho = 1 - h\lambda

    with :math:`V` the stationary variance. Averaging removes noise, not bias: a covariance inflated by gradient noise stays
    so. Under a decreasing step every iterate counts the same here, however short the time that it stands for. Not for
    positions whose mean means nothing, such as those of a chain that visits symmetric modes or of network weights from
    several chains.

    References
    ----------
    Welford (1962) for the recursion; Polyak and Juditsky (1992) for averages of stochastic approximation.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> inner = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> dt = erg.sample(jax.random.key(0), Averaged(inner, start=100), num_samples=2, num_warmup=100, thin=500)
    >>> dt["summary"]["count"].values, dt["summary/mean"]["position"].shape
    (array([1000, 1000, 1000, 1000], dtype=int32), (4, 2))
    """

    kernel: AbstractKernel
    start: Array
    stride: Array
    covariance: str | None = eqx.field(static=True)
    of: Any

    references: ClassVar = ("polyak1992", "welford1962")

    def __init__(
        self,
        kernel: AbstractKernel,
        *,
        start: int = 0,
        stride: int = 1,
        covariance: Literal["diagonal", "full"] | None = "diagonal",
        of: Callable[[Position], PyTree] | None = None,
    ) -> None:
        self.kernel = check.instance("kernel", kernel, AbstractKernel, "such as SGLD(gradient, step_size)")
        self.start = jnp.asarray(check.integer("start", start, least=0), jnp.int32)
        self.stride = jnp.asarray(check.integer("stride", stride), jnp.int32)
        self.covariance = (
            covariance if covariance is None else check.one_of("covariance", covariance, ("diagonal", "full"))
        )
        self.of = None if of is None else as_partial(check.function("of", of))

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> AveragedState:
        """Start a chain at ``position``; nothing is averaged yet."""
        inner = self.kernel.init(key, position, batch)
        zero = jax.tree.map(jnp.zeros_like, check.position("of(position)", self._statistic(inner.position)))
        moments = RunningMoments(jnp.zeros((), jnp.int32), zero, zero, self._no_covariance(zero))
        return AveragedState(inner, jnp.zeros((), jnp.int32), moments)

    def step(self, key: Key, state: AveragedState, batch: Batch | None = None) -> tuple[AveragedState, Any]:
        """Move by the inner kernel, then take the iterate in if it is its turn."""
        inner, info = self.kernel.step(key, state.inner, batch)
        step = state.step + 1
        elapsed = step - self.start
        included = (elapsed > 0) & (elapsed % self.stride == 0)
        moments = with_iterate(state.moments, self._statistic(inner.position))
        return AveragedState(inner, step, tree.select(included, moments, state.moments)), info

    def summary(self, state: AveragedState) -> dict[str, Any]:
        """Give count, mean and covariance of the chain; NaN where nothing was averaged."""
        count, found = state.moments.count, (state.moments.mean, state.moments.covariance)
        nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), found)
        mean, covariance = tree.select(count == 0, nothing, found)
        summary = {"count": count, "mean": tree.named_leaves(mean)}
        if self.covariance == "diagonal":
            summary["variance"] = tree.named_leaves(covariance)
        elif self.covariance == "full":
            summary["covariance"] = covariance.matrix
        return summary

    def probe(self, key: Key, state: AveragedState) -> Estimate | None:
        """Estimate the gradient at the chain's position, as the inner kernel does."""
        return self.kernel.probe(key, state.inner)

    @property
    def posterior(self) -> Any:
        """The posterior that the inner kernel samples."""
        return self.kernel.posterior

    @property
    def exact(self) -> bool:
        """Whether the inner kernel leaves the posterior invariant."""
        return self.kernel.exact

    @property
    def exact_gradient(self) -> bool:
        """Whether the inner kernel's probe carries no noise."""
        return self.kernel.exact_gradient

    @property
    def batch_source(self) -> Any:
        """As for the inner kernel."""
        return self.kernel.batch_source

    @property
    def n_grad_unit(self) -> int:
        """As for the inner kernel."""
        return self.kernel.n_grad_unit

    def _statistic(self, position: Position) -> PyTree:
        return position if self.of is None else self.of(position)

    def _no_covariance(self, zero: PyTree) -> Any:
        if self.covariance == "full":
            flat = tree.ravel(zero)
            return CovarianceMatrix(jnp.zeros((flat.size, flat.size), flat.dtype))
        return zero if self.covariance == "diagonal" else None


def with_iterate(moments: RunningMoments, x: PyTree) -> RunningMoments:
    r"""Take one more iterate into the moments (Welford 1962, divided by the count).

    .. math:: \bar x_n = \bar x_{n-1} + \frac{\delta}{n}, \qquad
        C_n = C_{n-1} + \frac{\delta\,(x - \bar x_n)^T - C_{n-1}}{n}, \qquad \delta = x - \bar x_{n-1}

    The mean is summed with compensation (Kahan 1965). The covariance is kept divided, so that rounding ends its growth at
    the right value and not below it. Its kind, a tree of variances or a matrix, is read off ``moments``.
    """
    count = moments.count + 1
    share = 1 / count.astype(jnp.result_type(float))
    before = tree.subtract(x, moments.mean)
    increment = tree.subtract(tree.scale(before, share), moments.residue)
    mean = tree.add(moments.mean, increment)
    residue = tree.subtract(tree.subtract(mean, moments.mean), increment)
    after = tree.subtract(x, mean)
    if isinstance(moments.covariance, CovarianceMatrix):
        product: Any = CovarianceMatrix(jnp.outer(tree.ravel(before), tree.ravel(after)))
    else:
        product = None if moments.covariance is None else jax.tree.map(jnp.multiply, before, after)
    change = tree.subtract(product, moments.covariance)
    return RunningMoments(count, mean, residue, tree.axpy(share, change, moments.covariance))
