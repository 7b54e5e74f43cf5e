"""REBAR: the score function, with the relaxed cost as a control variate."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.gumbel_softmax import nearest_one_hot
from ergodica.estimators.variational.relaxation import BITS, check_relaxable, log_mass, log_probabilities
from ergodica.estimators.variational.reparam import other_than_reparam
from ergodica.estimators.variational.site import AbstractSiteEstimator, only_gradient, score_surrogate


def perturbed_two_ways(log_probs: Array, gumbel: Array) -> tuple[Array, Array, Array]:
    r"""One-hot draw :math:`D`, :math:`z = \log\pi + g`, and :math:`\tilde z` of the same value given :math:`D`.

    .. math:: \tilde z_i = -\log E_i, \qquad \tilde z_j = -\log(E_j / \pi_j + E_i)

    for the largest entry :math:`i`, with exponential :math:`E` that are independent of :math:`D`, read off :math:`z`. As functions
    of :math:`\pi` at fixed noise the two differ, and so do their derivatives (Tucker et al. 2017, appendix B).
    """
    z = log_probs + gumbel
    held, held_z = jax.lax.stop_gradient((log_probs, z))
    one_hot = nearest_one_hot(held_z)
    largest = jnp.max(held_z, axis=-1, keepdims=True)
    log_e = held - held_z + jnp.log1p(-jnp.exp(held_z - largest))  # of E_j; -inf at the largest
    return one_hot, z, -jnp.logaddexp(log_e - log_probs, -largest)


class REBAR(AbstractSiteEstimator):
    r"""REBAR: score function less a control variate from the relaxed cost, whose mean is put back by reparameterisation.

    .. math::

        \hat g = \left( f(D) - \eta f(y) \right) \nabla \log q(D) + \eta \nabla f(y(z)) - \eta \nabla f(y(\tilde z)), \qquad
        y(z) = \text{softmax}(z / \tau)

    with :math:`z = \log\pi + g`, :math:`D` the one-hot vector of its largest entry, and :math:`\tilde z` the same value as a
    function of the probabilities *given* :math:`D`. At bits and one-hot vectors ``Multinomial(1, probs=…)``.

    Parameters
    ----------
    temperature : float
        :math:`\tau` of the relaxed cost.
    strength : float
        :math:`\eta`; 0 is the plain score function, 1 takes the relaxed cost at its word.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index; in plates that a term downstream is outside of.

    Notes
    -----
    Unbiased for every temperature and strength, which are held fixed: the paper tunes both by the gradient of the variance, and
    RELAX learns the relaxed cost itself; neither is done here. The program must take relaxed values: an index by one is an error of
    JAX's, and a comparison makes the control variate useless, but not wrong. Densities at relaxed values are continued linearly
    (`ergodica.estimators.variational.relaxation`); the objective sees the hard draw alone.

    Cost: three runs of the program a particle, and the derivative of two.

    When not to use it: against a few particles of `ergodica.estimators.LeaveOneOut` at the same cost it wins only where the
    relaxed cost follows the cost closely. Compare them by `ergodica.compare_gradients`.

    References
    ----------
    Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), equation 9 and section 3.1.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=2, sites={"z": erg.estimators.REBAR(0.5)})
    """

    temperature: Array
    strength: Array

    references: ClassVar = ("tucker2017",)

    def __init__(self, temperature: float = 0.5, strength: float = 1.0) -> None:
        self.temperature = check.positive("temperature", temperature)
        self.strength = check.positive("strength", strength, allow_zero=True)

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value cannot be relaxed, or elements share costs across a plate."""
        check_relaxable(self, site, context)
        check_path_of_cost(self, site, context)

    def num_branches(self, site: Site) -> int:  # noqa: ARG002
        """The draw, and the relaxed value with two derivatives."""
        return 3

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Take the hard draw, or the relaxed value as a function of either kind of noise."""
        log_probs = log_probabilities(self, fn, site)
        gumbel = jax.random.gumbel(key, log_probs.shape, log_probs.dtype)
        one_hot, *perturbed = perturbed_two_ways(log_probs, gumbel)
        free, given = (jax.nn.softmax(z / self.temperature.astype(z.dtype), axis=-1) for z in perturbed)
        value = jnp.stack([one_hot, free, given])[branch]
        return Draw(value[..., 1] if site.distribution in BITS else value)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Score times the difference; and the derivatives through the two relaxed values, everything else cancelling."""
        hard, free, given = (downstream.cost[:, i] for i in range(3))
        strength = self.strength.astype(hard.dtype)
        score = score_surrogate(downstream.log_prob[:, 0], hard - strength * free)
        return jnp.sum(score) + only_gradient(strength * (free - given))


def check_path_of_cost(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise where the derivative of elements' costs through the value would count a term more than once."""
    outside = sorted(p.name for p in site.plates if p.name not in site.shared_plates)
    if outside:
        raise site.refuse(
            estimator,
            f"terms downstream are outside of plate {', '.join(outside)}, and would be counted once for each element",
            other_than_reparam(site, context),
        )
