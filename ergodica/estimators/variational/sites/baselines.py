"""Baselines of the score function: constants, moving averages, networks."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Downstream, Site


class AbstractBaseline(eqx.Module):
    """What is expected of the cost before the site is drawn; it must not depend on the particle's own draw."""

    @abc.abstractmethod
    def at(self, site: Site, downstream: Downstream) -> Array:
        """The baseline, to be broadcast against the cost."""

    def parameters(self, key: Key, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Initial value of what is learned."""
        return None

    def init(self, site: Site) -> PyTree:  # noqa: ARG002
        """Initial value of what is remembered."""
        return None

    def update(self, site: Site, downstream: Downstream) -> PyTree:  # noqa: ARG002
        """What is remembered for the next step."""
        return downstream.state

    def fit(self, site: Site, downstream: Downstream) -> Array | None:  # noqa: ARG002
        """Something whose gradient trains the baseline's own parameters."""
        return None


class Constant(AbstractBaseline):
    """A number."""

    value: Array

    def at(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """The number."""
        return self.value.astype(downstream.cost.dtype)


class MovingAverage(AbstractBaseline):
    r"""Average of past costs, with exponentially decaying weights.

    .. math:: m \leftarrow \beta m + (1 - \beta)\,\bar C, \qquad b = m / (1 - \beta^t)

    One average for each element of the site's plates (one for all where a plate is subsampled, since its elements change).

    Parameters
    ----------
    decay : float
        :math:`\beta`, above 0 and below 1.

    Notes
    -----
    Of steps before, so that every step is unbiased. It must be kept from step to step: wrap the guide by
    ``loss.guide(model, guide)``. Under a stationary cost it is near the mean of the cost; where parameters move fast it lags.

    References
    ----------
    Mnih and Gregor (2014), section 2.3.

    Examples
    --------
    >>> import ergodica as erg
    >>> estimator = erg.estimators.Score(baseline=erg.estimators.MovingAverage(0.9))
    """

    decay: Array

    references: ClassVar = ("mnih2014",)

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = check.positive("decay", decay)
        if check.is_concrete(self.decay) and not float(self.decay) < 1:
            raise ValueError(f"decay must be above 0 and below 1; got {decay!r}.")

    def init(self, site: Site) -> PyTree:
        """Nothing seen yet."""
        return {"mean": jnp.zeros(plate_shape(site)), "weight": jnp.zeros(())}

    def at(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """The average so far; 0 at the first step."""
        mean, weight = downstream.state["mean"], downstream.state["weight"]
        b = jnp.where(weight > 0, mean / jnp.where(weight > 0, weight, 1), 0)
        return _align(b, downstream.cost).astype(downstream.cost.dtype)

    def update(self, site: Site, downstream: Downstream) -> PyTree:  # noqa: ARG002
        """Take in this step's cost."""
        mean, weight = downstream.state["mean"], downstream.state["weight"]
        cost = downstream.cost[:, 0]
        plates = len(mean.shape)
        now = jnp.mean(cost.reshape(-1, *cost.shape[cost.ndim - plates :]), axis=0)
        if plates == 0:
            now = jnp.mean(cost)
        decay = self.decay.astype(mean.dtype)
        now = jnp.broadcast_to(now, mean.shape).astype(mean.dtype)
        return {"mean": decay * mean + (1 - decay) * now, "weight": decay * weight + (1 - decay)}


class Network(AbstractBaseline):
    r"""A function of the program's arguments, fitted to the costs by least squares.

    .. math:: b = b_\psi(x), \qquad \psi \text{ ascends } -\tfrac12 \sum (C - b_\psi(x))^2

    Parameters
    ----------
    apply : callable
        ``apply(psi, *args, **kwargs)`` with the arguments of model and guide; returns the expected cost, a scalar or an
        array over the site's plates.
    initial : pytree or callable
        Where :math:`\psi` starts, or ``initial(key, *args, **kwargs)``.

    Notes
    -----
    The parameters are declared in the guide by ``loss.guide(model, guide)`` and trained by SVI's optimiser along with the rest; the
    guide's own gradient does not see the fit. Cost: one forward and one backward pass of the network.

    References
    ----------
    Mnih and Gregor (2014), equation 8.

    Examples
    --------
    >>> import jax.numpy as jnp, ergodica as erg
    >>> network = erg.estimators.Network(lambda psi, x: psi["a"] + x @ psi["b"], {"a": jnp.zeros(()), "b": jnp.zeros(3)})
    >>> estimator = erg.estimators.Score(baseline=network)
    """

    apply: Callable = eqx.field(static=True)
    initial: Any

    references: ClassVar = ("mnih2014",)

    def __init__(self, apply: Callable, initial: PyTree | Callable) -> None:
        self.apply = check.function("apply", apply)
        self.initial = initial

    def parameters(self, key: Key, *args: Any, **kwargs: Any) -> PyTree:
        """Initial parameters of the network."""
        return self.initial(key, *args, **kwargs) if callable(self.initial) else self.initial

    def at(self, site: Site, downstream: Downstream) -> Array:
        """The network at the program's arguments."""
        b = jnp.asarray(self.apply(downstream.params, *downstream.args, **(downstream.kwargs or {})))
        allowed = plate_shape(site, subsampled=True)
        if b.shape not in ((), allowed):
            raise ValueError(
                f"apply of the Network at site {site.name!r} must return a scalar, or shape {allowed} of the site's "
                f"plates; got {b.shape}."
            )
        return _align(b, downstream.cost).astype(downstream.cost.dtype)

    def fit(self, site: Site, downstream: Downstream) -> Array:
        """Least squares."""
        residual = jax.lax.stop_gradient(downstream.cost) - self.at(site, downstream)
        return -0.5 * residual**2


def plate_shape(site: Site, *, subsampled: bool = False) -> tuple[int, ...]:
    """Sizes of the site's plates at their dimensions (1 between them); () where an element's identity changes."""
    if any(p.subsampled for p in site.plates) and not subsampled:
        return ()
    rank = max((-p.dim for p in site.plates), default=0)
    sizes = {p.dim: p.size for p in site.plates}
    return tuple(sizes.get(d, 1) for d in range(-rank, 0))


def _align(b: Array, cost: Array) -> Array:
    return b.reshape((1,) * (cost.ndim - b.ndim) + b.shape)
