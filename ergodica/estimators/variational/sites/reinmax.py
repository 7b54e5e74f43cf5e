"""ReinMax: straight-through of second order."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.estimators.variational.sites.relaxation import AbstractRelaxation, draw_one_hot, with_derivative


def reinmax(log_probs: Array, one_hot: Array, temperature: Array | float = 1.0) -> Array:
    r"""A one-hot vector :math:`D` with ReinMax's derivatives (Liu et al. 2023, algorithm 2).

    .. math::

        \hat g = \left( 2 J(\pi_D) - \tfrac12 J(\pi) \right)^\top \partial f / \partial D, \qquad
        \pi_D = \tfrac12 (\pi_\tau + D), \quad J(\pi) = \text{diag}\,\pi - \pi\pi^\top
    """
    held = jax.lax.stop_gradient(log_probs)
    middle = 0.5 * (jax.nn.softmax(held / temperature, axis=-1) + jax.lax.stop_gradient(one_hot))
    at_middle = jax.nn.softmax(jnp.log(middle) + (log_probs - held), axis=-1)
    return with_derivative(one_hot, 2 * at_middle - 0.5 * jax.nn.softmax(log_probs, axis=-1))


class ReinMax(AbstractRelaxation):
    r"""ReinMax: a hard draw, with derivatives of second order (Heun's rule where straight-through is Euler's).

    .. math::

        \hat g = \left( 2 J(\pi_D) - \tfrac12 J(\pi) \right)^\top \partial f / \partial D, \qquad
        \pi_D = \tfrac12 (\pi_\tau + D), \quad J(\pi) = \text{diag}\,\pi - \pi\pi^\top

    with respect to the logits, at bits and at one-hot vectors ``Multinomial(1, probs=…)``.

    Parameters
    ----------
    temperature : float
        :math:`\tau` of :math:`\pi_\tau = \text{softmax}(\text{logits}/\tau)`, 1 or above: above, noise is traded for bias.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index, it says how to write a one-hot vector.

    Notes
    -----
    With temperature 1 unbiased if the cost is quadratic in the value, whatever its gradient; **biased** otherwise: for a bit
    the mean is :math:`p q\,(f'(0) + f'(1)) / 2`, the trapezoidal rule, where the derivative is :math:`p q\,(f(1) - f(0))`. The
    program must use the value in arithmetic: an index or a comparison cuts the derivative. Densities are continued as
    `ergodica.estimators.variational.sites.relaxation` says; the objective's value is right.

    Cost: one run of the program and its derivative.

    When not to use it: where bias matters, since nothing shows it from within; compare with `ergodica.estimators.LeaveOneOut` by
    `ergodica.compare_gradients`.

    References
    ----------
    Liu, Dong, Liu, Yu and Gao (2023), section 3 and algorithm 2.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=1, sites={"z": erg.estimators.ReinMax()})
    """

    temperature: Array

    references: ClassVar = ("liu2023",)

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = check.positive("temperature", temperature)
        if check.is_concrete(self.temperature) and float(self.temperature) < 1:
            raise ValueError(f"temperature must be 1 or above, where it adds bias for less noise; got {temperature!r}.")

    def relax(self, key: Key, log_probs: Array) -> Array:
        """Draw, with ReinMax's derivatives."""
        return reinmax(log_probs, draw_one_hot(key, log_probs), self.temperature.astype(log_probs.dtype))
