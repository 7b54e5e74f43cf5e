"""RELAX: the score function, with a control variate that is any function of the relaxed noise, and is learned."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.baselines import plate_shape
from ergodica.estimators.variational.sites.rebar import (
    check_path_of_cost,
    controlled_score,
    draw_perturbed,
    relaxation_parameters,
    relaxed_cost,
)
from ergodica.estimators.variational.sites.relaxation import BITS, check_relaxable, log_mass


class RELAX(AbstractSiteEstimator):
    r"""RELAX: score function less a control variate of any form, which descends the estimate's variance.

    .. math::

        \hat g = \left( f(D) - c_\psi(\tilde z) \right) \nabla \log q(D) + \nabla c_\psi(z) - \nabla c_\psi(\tilde z), \qquad
        c_\psi(z) = \eta f(\text{softmax}(z / \tau)) + r_\psi(z)

    with :math:`z = \log\pi + g`, :math:`D` the one-hot vector of its largest entry, and :math:`\tilde z` the same value as a
    function of the probabilities *given* :math:`D`. At bits and one-hot vectors ``Multinomial(1, probs=…)``.

    Parameters
    ----------
    apply : callable
        :math:`r`: ``apply(psi, z, *args, **kwargs)``, with :math:`z` of one particle and the arguments of model and guide. For bits
        :math:`z` has the site's shape, and is the bit's logit and logistic noise, above 0 where the bit is 1; for one-hot vectors
        it is the log probabilities and Gumbel noise, largest at the entry that is 1. Returns a scalar, or an array over the site's
        plates, of which each entry may depend on that element's :math:`z` alone.
    initial : pytree or callable
        Where :math:`\psi` starts, or ``initial(key, *args, **kwargs)``.
    relaxed_cost : bool
        Whether the relaxed cost is part of the control variate, as in `ergodica.estimators.REBAR`, with :math:`\log\tau` and
        :math:`\eta` learned too. Without it the program is never run at a relaxed value.
    temperature, strength : float
        Where :math:`\tau` and :math:`\eta` start.

    Raises
    ------
    SiteError
        At any other law; at ``Categorical``, whose value is an index; with the relaxed cost, in plates that a term downstream is
        outside of.
    ValueError
        If ``apply`` returns another shape.

    Notes
    -----
    Unbiased for every :math:`\psi`. What is learned is declared by ``loss.guide(model, guide)`` and trained by SVI's optimiser
    along with the rest, by the gradient of :math:`-\tfrac12 \|\hat g\|^2` with respect to the site's logits, for each particle,
    from the same particles; the guide's own gradient does not see that. If ``apply`` returns an array over plates and mixes
    their elements, gradients are wrong.

    The paper draws :math:`\tilde z` given :math:`D` afresh; here it has the value of :math:`z`, as REBAR may couple
    them, which leaves the mean as it is.

    Cost: one run of the program a particle; ``apply`` once, and its second derivative along one direction. With the relaxed cost
    also that of a tuned REBAR.

    When not to use it: for few steps, since what is not yet learned adds noise; beside `ergodica.estimators.LeaveOneOut` with as
    many runs. A network that starts at zero does no harm.

    References
    ----------
    Grathwohl, Choi, Wu, Roeder and Duvenaud (2018), section 3.

    Examples
    --------
    >>> import jax.numpy as jnp, ergodica as erg
    >>> def network(psi, z, x):
    ...     return psi["scale"] * jnp.sum(jnp.tanh(z * psi["slope"]))
    >>> estimator = erg.estimators.RELAX(network, {"scale": jnp.zeros(()), "slope": jnp.ones(3)})
    >>> loss = erg.estimators.ELBO(num_particles=2, sites={"z": estimator})
    """

    apply: Callable = eqx.field(static=True)
    initial: Any
    relaxed_cost: bool = eqx.field(static=True)
    temperature: Array
    strength: Array

    references: ClassVar = ("grathwohl2018", "tucker2017")

    def __init__(
        self,
        apply: Callable,
        initial: PyTree | Callable,
        *,
        relaxed_cost: bool = True,
        temperature: float = 0.5,
        strength: float = 1.0,
    ) -> None:
        self.apply = check.function("apply", apply)
        self.initial = initial
        self.relaxed_cost = relaxed_cost
        self.temperature = check.positive("temperature", temperature)
        self.strength = check.positive("strength", strength, allow_zero=True)

    def check(self, site: Site, context: Context) -> None:
        """Raise where the value has no relaxed noise, or elements share relaxed costs across a plate."""
        check_relaxable(self, site, context)
        if self.relaxed_cost:
            check_path_of_cost(self, site, context)

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """One at the relaxed value, if its cost is a part of the control variate."""
        return int(self.relaxed_cost)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Take the hard draw."""
        return draw_perturbed(self, key, fn, site)

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:  # noqa: ARG002
        """Log probability, continued linearly off the support."""
        return log_mass(fn, value)

    def parameters(self, key: Key, site: Site, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Those of the function, and of the relaxed cost."""
        psi = self.initial(key, *args, **kwargs) if callable(self.initial) else self.initial
        return {"psi": psi} | (relaxation_parameters(self.temperature, self.strength) if self.relaxed_cost else {})

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times the difference, the derivatives along both paths, and what lowers the variance."""

        def control(z: Array) -> tuple[Array, ...]:
            free = self._free_form(site, downstream, z)
            return (free, *relaxed_cost(site, downstream, downstream.params)(z)) if self.relaxed_cost else (free,)

        main, learning = controlled_score(site, downstream, control, learns=True)
        return main + learning

    def _free_form(self, site: Site, downstream: Downstream, z: Array) -> Array:
        """The user's function (K, A, …) of every particle's noise (K, A, …, batch …, event …, entries)."""
        entries = z.shape[-1:]
        if site.distribution in BITS:
            z, entries = z[..., 1] - z[..., 0], ()
        own = site.batch_shape + site.event_shape[: len(site.event_shape) - len(site.element_shape)] + entries
        lead = z.shape[: z.ndim - len(own)]

        def apply(z: Array) -> Array:
            return jnp.asarray(self.apply(downstream.params["psi"], z, *downstream.args, **(downstream.kwargs or {})))

        c = jax.vmap(apply)(z.reshape(math.prod(lead), *own))
        shape, allowed = c.shape[1:], plate_shape(site, subsampled=True)
        if shape not in ((), allowed):
            raise ValueError(
                f"apply of RELAX at site {site.name!r} must return a scalar, or shape {allowed} of the site's plates, for z of "
                f"shape {own}; got {shape}."
            )
        return c.reshape(lead + (1,) * (len(site.batch_shape) - len(shape)) + shape).astype(downstream.cost.dtype)
