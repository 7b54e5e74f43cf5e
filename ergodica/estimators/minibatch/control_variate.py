"""Control variates around a fixed centre."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.minibatch.likelihood import LogLikelihood
from ergodica.estimators.minibatch.subsample import Minibatch, MinibatchState, as_batch

_CHUNK = 4096


class ControlVariate(AbstractGradientEstimator):
    r"""Minibatch gradient corrected by what the same rows say at a centre.

    .. math::

        \hat g(\theta) = \nabla\log p(\theta) + \sum_{i=1}^N \nabla\ell_i(c)
            + N \sum_{i \in B} w_i \left[ \nabla\ell_i(\theta) - \nabla\ell_i(c) \right]

    Parameters
    ----------
    gradient : Minibatch
        The estimator to correct, of any scheme.
    centre : pytree
        A position near the bulk of the posterior, best a mode (see `ergodica.find_mode`).

    Raises
    ------
    ValueError
        If the centre does not have the structure of a position.

    Notes
    -----
    Unbiased wherever the centre is; the variance falls with the square of the distance to it, and for a likelihood that
    is quadratic in the position with equal curvatures it is zero. Cost: all ``N`` gradients once, at construction, and
    then two gradients for each row of a batch. Far from the centre (a posterior with several modes, a chain still in
    its transient) the variance can exceed that of the plain minibatch: compare them with `ergodica.compare_gradients`.

    References
    ----------
    Baker, Fearnhead, Fox and Nemeth (2019), equation 5.
    """

    minibatch: Minibatch
    centre: PyTree
    full_gradient: PyTree
    full_value: Array

    references: ClassVar = ("baker2019",)

    def __init__(self, gradient: Minibatch, centre: PyTree) -> None:
        self.minibatch = check_holds_data(gradient, "A control variate needs all the data once")
        self.centre = check_centre(gradient, centre)
        self.full_value, self.full_gradient = full_likelihood_gradient(gradient.target, self.centre)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> MinibatchState:
        """Open the first epoch."""
        return self.minibatch.init(key, params, batch)

    def draw(self, key: Key, state: MinibatchState) -> tuple[Batch, MinibatchState]:
        """Draw the next batch."""
        return self.minibatch.draw(key, state)

    def at(self, params: PyTree, batch: Batch) -> Estimate:
        """Estimate value and gradient from a given batch."""
        full = LogLikelihood(self.full_value, self.full_gradient)
        return corrected_estimate(self.minibatch, params, batch, self.centre, full)

    def estimate(
        self, key: Key, params: PyTree, state: MinibatchState, batch: Batch | None = None
    ) -> tuple[Estimate, MinibatchState]:
        """Estimate the gradient at ``params`` from the next batch, or from the one given."""
        if batch is not None:
            batch = as_batch(batch)
        else:
            batch, state = self.minibatch.draw(key, state)
        return self.at(params, batch), state

    def probe(self, key: Key, params: PyTree, state: MinibatchState) -> Estimate:  # noqa: ARG002
        """Estimate from a batch that is independent of the epoch."""
        return self.at(params, self.minibatch.independent_batch(key))

    @property
    def posterior(self) -> Posterior:
        """The posterior whose gradient is estimated."""
        return self.minibatch.target

    @property
    def exact(self) -> bool:
        """Whether all data are used at each call."""
        return self.minibatch.exact


def corrected_estimate(
    minibatch: Minibatch, params: PyTree, batch: Batch, centre: PyTree, full: LogLikelihood
) -> Estimate:
    """Estimate at ``params`` from a batch, corrected by what the batch says at the centre, where ``full`` is known."""
    estimate = minibatch.at(params, batch)
    at_centre = LogLikelihood(*jax.value_and_grad(minibatch.log_likelihood)(centre, batch))
    gradient = jax.tree.map(lambda g, f, c: g + (f - c), estimate.gradient, full.gradient, at_centre.gradient)
    value = estimate.value + (full.value - at_centre.value).astype(estimate.value.dtype)
    return Estimate(gradient, value, n_grad=2 * estimate.n_grad)


def check_holds_data(gradient: Minibatch, why: str) -> Minibatch:
    """Return a Minibatch whose posterior holds its data; raise, saying why they are needed."""
    if not isinstance(gradient, Minibatch):
        raise TypeError(f"gradient must be a Minibatch; got {type(gradient).__name__}.")
    if gradient.target.data is None:
        raise ValueError(f"{why}; the posterior of this Minibatch holds none.")
    return gradient


def check_centre(gradient: Minibatch, centre: PyTree) -> PyTree:
    """Return a centre as arrays; raise unless it is a position of the posterior."""
    centre = check.position("centre", centre)
    if gradient.target.initial is not None:
        check.same_structure("centre", centre, "a position", gradient.target.shape())
    return centre


@jax.jit
def full_likelihood_gradient(posterior: Posterior, position: PyTree) -> tuple[Array, PyTree]:
    """Sum value and gradient of the log likelihood over all the data, some thousand rows at a time."""

    def of_rows(rows: PyTree) -> tuple[Array, PyTree]:
        return jax.value_and_grad(lambda theta: jnp.sum(posterior.log_likelihood(theta, rows)))(position)

    n = posterior.num_data
    num_chunks, rest = divmod(n, _CHUNK)
    body = jax.tree.map(lambda x: x[: n - rest].reshape(num_chunks, _CHUNK, *x.shape[1:]), posterior.data)

    def add_chunk(total: tuple, rows: PyTree) -> tuple[tuple, None]:
        return tree.add(total, of_rows(rows)), None

    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_rows, jax.tree.map(lambda x: x[:1], posterior.data))
    )
    total, _ = jax.lax.scan(add_chunk, zero, body)
    if rest:
        total = tree.add(total, of_rows(jax.tree.map(lambda x: x[n - rest :], posterior.data)))
    return total
