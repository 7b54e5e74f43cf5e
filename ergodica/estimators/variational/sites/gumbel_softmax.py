"""Gumbel-Softmax: relaxed draws, and its straight-through form."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.estimators.variational.facts import Distribution
from ergodica.estimators.variational.sites.relaxation import AbstractRelaxation, log_density, log_mass, with_derivative


def gumbel_softmax(log_probs: Array, gumbel: Array, temperature: Array | float) -> Array:
    r"""Relaxed one-hot vector, :math:`y = \text{softmax}((\log\pi + g)/\tau)` (Jang et al. 2017, equation 2)."""
    return jax.nn.softmax((log_probs + gumbel) / temperature, axis=-1)


def nearest_one_hot(y: Array) -> Array:
    """One-hot vector of the largest entry: a draw from the law itself."""
    return jax.nn.one_hot(jnp.argmax(y, axis=-1), y.shape[-1], dtype=y.dtype)


def log_relaxed_density(log_probs: Array, y: Array, temperature: Array | float) -> Array:
    r"""Log density of the relaxed law on the simplex (Maddison et al. 2017, equation 10; Jang et al. 2017, equation 6).

    .. math::

        \log \Gamma(A) + (A - 1)\log\tau - A \log \textstyle\sum_k \pi_k y_k^{-\tau} + \sum_k (\log \pi_k - (\tau + 1) \log y_k)
    """
    num, log_y = log_probs.shape[-1], jnp.log(y)
    constant = gammaln(jnp.asarray(num, y.dtype)) + (num - 1) * jnp.log(temperature)
    tilted = jax.nn.logsumexp(log_probs - temperature * log_y, axis=-1)
    return constant - num * tilted + jnp.sum(log_probs - (temperature + 1) * log_y, axis=-1)


class GumbelSoftmax(AbstractRelaxation):
    r"""Gumbel-Softmax (Concrete) relaxation of a bit or a one-hot vector ``Multinomial(1, probs=…)``.

    .. math:: y = \text{softmax}\left( (\log\pi + g) / \tau \right), \qquad g_k = -\log(-\log u_k)

    Model and guide both see :math:`y`, and derivatives flow through it. With ``straight_through`` they see the one-hot vector of
    its largest entry, which is an exact draw, with the derivatives of :math:`y`.

    Parameters
    ----------
    temperature : float
        :math:`\tau`. Lower is nearer to the discrete law, and noisier; for annealing make a new loss with another number.
    straight_through : bool
        Hard values, relaxed derivatives.
    density : {"mass", "relaxed"}
        Log probability of the relaxed value, in guide and model alike. ``"mass"``: the law's own, continued linearly,
        :math:`\sum_k y_k \log\pi_k`; the objective is then no bound. ``"relaxed"``: the density of :math:`y`, at the same
        temperature in both; the objective is then the bound of a relaxed model, estimated without bias.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index, it says how to write a one-hot vector.
    ValueError
        For ``straight_through`` with the relaxed density, which hard values do not have.

    Notes
    -----
    **Biased** for the discrete model's gradient, and the bias is not monotone in the temperature: for a bit with
    :math:`p = .3` and :math:`f = (b - .49)^2`, whose derivative by the logit is .0042, it is -.008, -.027, -.027 and -.017 at
    :math:`\tau` = .1, .5, 1 and 2, and of the straight-through form -.011, -.041, -.048 and -.040. The program must use the value
    in arithmetic: an index or a comparison cuts derivatives (an index by a float is an error of JAX's). With the relaxed density,
    values that round to 0 or 1 are taken as the nearest inside; in single precision they occur for bits at temperatures below .5.

    Cost: one run of the program and its derivative.

    When not to use it: where `ergodica.estimators.Enumerate` or `ergodica.estimators.LeaveOneOut` can be afforded. A bias shows
    in nothing but a comparison: `ergodica.compare_gradients`.

    References
    ----------
    Jang, Gu and Poole (2017), sections 2 and 2.2; Maddison, Mnih and Teh (2017), section 3.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=4, sites={"z": erg.estimators.GumbelSoftmax(0.5)})
    """

    temperature: Array
    straight_through: bool = eqx.field(static=True)
    density: Literal["mass", "relaxed"] = eqx.field(static=True)

    references: ClassVar = ("jang2017", "maddison2017")

    def __init__(
        self, temperature: float, *, straight_through: bool = False, density: Literal["mass", "relaxed"] = "mass"
    ) -> None:
        self.temperature = check.positive("temperature", temperature)
        self.straight_through = straight_through
        check.one_of("density", density, ("mass", "relaxed"))
        self.density = density
        if straight_through and density == "relaxed":
            raise ValueError(
                "density='relaxed' is the density of relaxed values, which straight_through=True replaces by hard ones; "
                "use density='mass'."
            )

    def relax(self, key: Key, log_probs: Array) -> Array:
        """Draw the relaxed vector, and harden it if asked to."""
        gumbel = jax.random.gumbel(key, log_probs.shape, log_probs.dtype)
        y = gumbel_softmax(log_probs, gumbel, self.temperature.astype(log_probs.dtype))
        return with_derivative(nearest_one_hot(y), y) if self.straight_through else y

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability continued linearly, or the relaxed density."""
        if self.density == "mass":
            return log_mass(fn, value)
        temperature = self.temperature.astype(value.dtype)
        inside = jnp.clip(value, jnp.finfo(value.dtype).tiny, 1 - jnp.finfo(value.dtype).epsneg)
        return log_density(fn, inside, lambda log_probs, y: log_relaxed_density(log_probs, y, temperature))
