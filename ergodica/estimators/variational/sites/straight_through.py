"""Straight-through estimators: hard draws, and derivatives as if they were probabilities."""

from typing import ClassVar

import jax
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.estimators.variational.sites.relaxation import AbstractRelaxation, draw_one_hot, with_derivative


def straight_through(log_probs: Array, one_hot: Array, slope: Array | float = 1.0) -> Array:
    r"""A one-hot vector :math:`D` with the derivatives of :math:`\text{softmax}(s \log\pi)` (Bengio et al. 2013).

    .. math:: \hat g = s\,J(\pi_s)^\top \partial f / \partial D, \qquad J(\pi) = \text{diag}\,\pi - \pi\pi^\top
    """
    return with_derivative(one_hot, jax.nn.softmax(slope * log_probs, axis=-1))


class StraightThrough(AbstractRelaxation):
    r"""Straight-through: a hard draw, whose derivative is taken to be that of its probabilities.

    .. math:: \hat g = J(\pi)^\top\, \partial f / \partial D, \qquad J(\pi) = \text{diag}\,\pi - \pi\pi^\top

    with respect to the logits, at bits and at one-hot vectors ``Multinomial(1, probs=…)``.

    Parameters
    ----------
    slope : float
        Derivatives are those of a sigmoid (softmax) of this slope: of :math:`\sigma(s\,\text{logit})`. 1 is the plain
        estimator; slope annealing starts there and raises it from epoch to epoch, with a new loss each time (a number, so that
        a compiled step that takes the loss as an argument is not traced again).

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index, it says how to write a one-hot vector.

    Notes
    -----
    **Biased**, unless the cost is linear in the value. For a bit and :math:`f = (b - c)^2` the mean is
    :math:`2 p q (p - c)` where the derivative is :math:`p q (1 - 2c)`: a bias of :math:`p q (2p - 1)`. The program must use
    the value in arithmetic: an index or a comparison cuts the derivative (an index by a float is an error of JAX's). Densities are
    continued as `ergodica.estimators.variational.sites.relaxation` says; the objective's value is right.

    Cost: one run of the program and its derivative.

    When not to use it: where `ergodica.estimators.Enumerate` or `ergodica.estimators.LeaveOneOut` can be afforded;
    `ergodica.estimators.ReinMax` costs the same, and is exact for quadratic costs.

    References
    ----------
    Bengio, Léonard and Courville (2013), section 4; slope annealing: Chung, Ahn and Bengio (2017), section 2.3.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ergodica as erg
    >>> estimate = erg.estimators.expectation_gradient(
    ...     jax.random.key(0), jnp.array(0.3), lambda p: dist.Bernoulli(probs=p), lambda b: 2.0 * b,
    ...     erg.estimators.StraightThrough(),
    ... )
    >>> print(f"{estimate.gradient:.3f}")
    2.000
    """

    slope: Array

    references: ClassVar = ("bengio2013", "chung2017")

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = check.positive("slope", slope)

    def relax(self, key: Key, log_probs: Array) -> Array:
        """Draw, with the derivatives of the probabilities."""
        return straight_through(log_probs, draw_one_hot(key, log_probs), self.slope.astype(log_probs.dtype))
