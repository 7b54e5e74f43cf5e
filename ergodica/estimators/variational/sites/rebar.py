"""REBAR: the score function, with the relaxed cost as a control variate."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.gumbel_softmax import nearest_one_hot
from ergodica.estimators.variational.sites.relaxation import (
    as_value,
    check_relaxable,
    log_mass,
    log_probabilities,
    over_elements,
)
from ergodica.estimators.variational.sites.reparam import other_than_reparam


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


def draw_perturbed(estimator: AbstractSiteEstimator, key: Key, fn: Distribution, site: Site) -> Draw:
    """Draw hard values from Gumbel noise, and record log probabilities and noise."""
    log_probs = log_probabilities(estimator, fn, site)
    gumbel = jax.random.gumbel(key, log_probs.shape, log_probs.dtype)
    one_hot, _, _ = perturbed_two_ways(jax.lax.stop_gradient(log_probs), gumbel)
    return Draw(as_value(site, one_hot), (log_probs, gumbel))


def controlled_score(
    site: Site, downstream: Downstream, control: Callable[[Array], tuple[Array, ...]], *, learns: bool
) -> tuple[Array, Array]:
    r"""Surrogate of the score function with a control variate :math:`c(z)`, and one by which the control variate learns.

    .. math::

        \hat g = \left( f(D) - c(\tilde z) \right) \nabla \log q(D) + \nabla c(z) - \nabla c(\tilde z)

    with respect to the logits, where :math:`z` and :math:`\tilde z` are those of `perturbed_two_ways`, of one value. The gradient
    of the second is that of :math:`-\tfrac12 \|\hat g\|^2` by what ``control`` depends on, everything else held: since the
    mean of :math:`\hat g` does not depend on it, that descends the variance (Grathwohl et al. 2018, section 3; Tucker et al. 2017,
    section 3). 0 unless ``learns``. ``control`` returns arrays that :math:`c` is the sum of: a number for all elements of a
    plate beside one for each.
    """
    log_probs, gumbel = downstream.record
    held = jax.lax.stop_gradient(log_probs)
    one_hot, z, _ = perturbed_two_ways(held, gumbel)
    parts, pull = jax.vjp(control, z)
    (slope,) = pull(jax.tree.map(jnp.ones_like, parts))
    c = sum(parts[1:], parts[0])

    def paths(log_probs: Array) -> Array:
        _, free, given = perturbed_two_ways(log_probs, gumbel)
        return free - given

    score = score_surrogate(downstream.log_prob, downstream.cost - c)
    main = jnp.sum(score) + jnp.sum(jax.lax.stop_gradient(slope) * paths(log_probs))
    if not learns:
        return main, jnp.zeros_like(main)
    signal = over_elements(jax.lax.stop_gradient(downstream.cost) - c, z)
    (by_path,) = jax.vjp(lambda logits: paths(jax.nn.log_softmax(logits, axis=-1)), held)[1](slope)
    by_logits = signal * (one_hot - jnp.exp(held)) + by_path
    return main, -0.5 * jnp.sum(as_value(site, by_logits) ** 2)


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
    tuned : bool
        Learn both from these values on, :math:`\log\tau` and :math:`\eta` by the gradient of
        :math:`-\tfrac12 \|\hat g\|^2` with respect to the site's logits, from the same particles. They are declared by
        ``loss.guide(model, guide)``, and SVI's optimiser trains them with the rest.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index; in plates that a term downstream is outside of.

    Notes
    -----
    Unbiased for every temperature and strength, and so while they are learned: the tuning has a gradient for them alone, and that
    of the guide is what it is at fixed ones. The square is taken for each particle and element, by the logits: what the guide
    makes of logits does not enter. The program must take relaxed values: an index by one is an error of JAX's, and a
    comparison makes the control variate useless, but not wrong. Densities at relaxed values are continued linearly
    (`ergodica.estimators.variational.sites.relaxation`); the objective sees the hard draw alone.

    Cost: two runs of the program a particle, and the derivative of one; tuned, the second derivative along one direction too, which
    laws with implicit reparameterisation downstream do not have.

    When not to use it: against a few particles of `ergodica.estimators.LeaveOneOut` at the same cost it wins only where the
    relaxed cost follows the cost closely; tuning finds a strength near 0 where it does not. Compare them by
    `ergodica.compare_gradients`.

    References
    ----------
    Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), section 3 and equation 9.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=2, sites={"z": erg.estimators.REBAR(0.5)})
    """

    temperature: Array
    strength: Array
    tuned: bool = eqx.field(static=True)

    references: ClassVar = ("tucker2017",)

    def __init__(self, temperature: float = 0.5, strength: float = 1.0, *, tuned: bool = False) -> None:
        self.temperature = check.positive("temperature", temperature)
        self.strength = check.positive("strength", strength, allow_zero=True)
        self.tuned = tuned

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value cannot be relaxed, or elements share costs across a plate."""
        check_relaxable(self, site, context)
        check_path_of_cost(self, site, context)

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """One, at the relaxed value."""
        return 1

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Take the hard draw."""
        return draw_perturbed(self, key, fn, site)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def parameters(self, key: Key, site: Site, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Where temperature and strength start, if they are tuned."""
        return relaxation_parameters(self.temperature, self.strength) if self.tuned else None

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times the difference, the derivatives along both paths, and the tuning."""
        settings = downstream.params if self.tuned else relaxation_parameters(self.temperature, self.strength)
        relaxed = relaxed_cost(site, downstream, settings)
        main, learning = controlled_score(site, downstream, relaxed, learns=self.tuned)
        return main + learning


def relaxation_parameters(temperature: Array, strength: Array) -> dict[str, Array]:
    """Temperature and strength on the scales that they are learned on."""
    return {"log_temperature": jnp.log(temperature), "strength": strength}


def relaxed_cost(site: Site, downstream: Downstream, settings: dict[str, Array]) -> Callable[[Array], tuple[Array]]:
    r"""The function :math:`\eta f(\text{softmax}(z / \tau))` of perturbed log probabilities."""

    def cost(z: Array) -> tuple[Array]:
        assert downstream.cost_of is not None
        y = jax.nn.softmax(z / jnp.exp(settings["log_temperature"]).astype(z.dtype), axis=-1)
        c = downstream.cost_of(as_value(site, y))
        return (settings["strength"].astype(c.dtype) * c,)

    return cost


def check_path_of_cost(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise where the derivative of elements' costs through the value would count a term more than once."""
    outside = sorted(p.name for p in site.plates if p.name not in site.shared_plates)
    if outside:
        raise site.refuse(
            estimator,
            f"terms downstream are outside of plate {', '.join(outside)}, and would be counted once for each element",
            other_than_reparam(site, context),
        )
