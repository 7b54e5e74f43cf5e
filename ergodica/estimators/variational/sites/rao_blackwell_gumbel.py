"""The straight-through Gumbel-Softmax estimator, averaged over the noise given the hard draw."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.estimators.variational.sites.gumbel_softmax import gumbel_softmax
from ergodica.estimators.variational.sites.relaxation import AbstractRelaxation, draw_one_hot, with_derivative


def gumbels_given_argmax(gumbel: Array, log_probs: Array, one_hot: Array) -> Array:
    r"""Gumbel variables given which of :math:`\log\pi_k + g_k` is the largest, from free ones (Paulus et al. 2021, equation 6).

    With :math:`E_k = e^{-g_k}`, exponential, the largest sum is :math:`-\log E_i`, since :math:`\sum_k \pi_k = 1`, and the others
    are :math:`-\log(E_j / \pi_j + E_i)`.
    """
    largest = jnp.sum(jnp.where(one_hot > 0, gumbel, 0), axis=-1, keepdims=True)
    others = -jnp.logaddexp(-gumbel - log_probs, -largest)
    return jnp.where(one_hot > 0, largest, others) - log_probs


class RaoBlackwellGumbel(AbstractRelaxation):
    r"""Rao–Blackwellised straight-through Gumbel-Softmax.

    .. math::

        \hat g = \frac{1}{M} \sum_{m=1}^M \left( \frac{\partial}{\partial\,\text{logits}}\,
            \text{softmax}\left( (\log\pi + g_m) / \tau \right) \right)^\top \frac{\partial f}{\partial D},
        \qquad g_m \sim p(g \mid D)

    The hard draw :math:`D` is made once, and the Gumbel noise many times given it: the same mean as
    ``GumbelSoftmax(temperature, straight_through=True)``, with no more variance and no more runs of the program.

    Parameters
    ----------
    temperature : float
        :math:`\tau`.
    num_samples : int
        :math:`M`, 100 unless given.

    Raises
    ------
    SiteError
        At laws other than Bernoulli and one-hot vectors ``Multinomial(1, probs=…)``.

    Notes
    -----
    **Biased** as the straight-through form is. What is left for large :math:`M` is the noise of the hard draw. The program must use
    the value in arithmetic: an index or a comparison cuts the derivative. Densities are continued as
    `ergodica.estimators.variational.sites.relaxation` says; the objective's value is right.

    Cost: one run of the program and its derivative, and M softmaxes of the site's own size.

    When not to use it: as for `ergodica.estimators.GumbelSoftmax`; at temperatures of 1 or more the noise that is taken away is
    small beside that of the draw.

    References
    ----------
    Paulus, Maddison and Krause (2021), section 3.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=1, sites={"z": erg.estimators.RaoBlackwellGumbel(0.5)})
    """

    temperature: Array
    num_samples: int = eqx.field(static=True)

    references: ClassVar = ("paulus2021",)

    def __init__(self, temperature: float, num_samples: int = 100) -> None:
        self.temperature = check.positive("temperature", temperature)
        self.num_samples = check.integer("num_samples", num_samples)

    def relax(self, key: Key, log_probs: Array) -> Array:
        """Draw, with the mean derivative of relaxed draws that have this largest entry."""
        key_draw, key_noise = jax.random.split(key)
        one_hot, held = draw_one_hot(key_draw, log_probs), jax.lax.stop_gradient(log_probs)
        free = jax.random.gumbel(key_noise, (self.num_samples, *held.shape), held.dtype)
        gumbels = gumbels_given_argmax(free, held[None], one_hot[None])
        y = gumbel_softmax(log_probs[None], gumbels, self.temperature.astype(held.dtype))
        return with_derivative(one_hot, jnp.mean(y, axis=0))
