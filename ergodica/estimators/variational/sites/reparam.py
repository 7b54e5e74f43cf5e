"""Reparameterisation: derivatives through the value."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.implicit import LAWS, implicit_value


class Reparam(AbstractSiteEstimator):
    r"""Reparameterisation gradient, explicit or implicit, with or without sticking the landing.

    .. math::

        \nabla_\theta \mathrm{E}_{q_\theta} f(z) = \mathrm{E}_\varepsilon\, \nabla_z f(z)\, \partial_\theta z, \qquad
        z = T_\theta(\varepsilon)

    With ``stl=True`` the site's own :math:`-\log q_\theta(z)` is differentiated through :math:`z` alone, the parameters held:
    what is left out, :math:`\nabla_\theta \log q_\theta(z)` at fixed :math:`z`, has mean zero, unless the support moves with the
    parameters, as that of ``Uniform(0, theta)`` does (not checked). Under `ergodica.estimators.IWELBO` it is the doubly
    reparameterised gradient, with squared weights.

    Parameters
    ----------
    stl : bool
        Stick the landing.

    Raises
    ------
    SiteError
        At a site that can be reparameterised neither way (discrete, von Mises, Wishart, mixtures of correlated normals …), where
        derivatives through the value would be wrong without a sign of it.

    Notes
    -----
    Where JAX differentiates a sampler implicitly (gamma, beta, Dirichlet, Student's t and what is made of them), this is
    implicit reparameterisation. So it is at *mixtures*: the draw is NumPyro's, and with its distribution function :math:`F`

    .. math:: \partial_\theta z = -\frac{\partial_\theta F(z; \theta)}{q_\theta(z)}

    by weights and components alike. The components are beta, Cauchy, exponential, gamma, Gumbel, half-Cauchy, half-normal, Laplace,
    logistic, normal, Student's t and Weibull laws and monotone transformations of them (log-normal …), one family or several; for
    vectors, components with independent elements (``to_event``), which are taken one after the other, each given those before.
    Such derivatives are right to first order only.

    Cost: one run of the program and its derivative. ``stl`` adds the guide's densities once more; a mixture adds densities and
    distribution functions of all components, in sequence over the elements of a vector.

    With ``stl`` the gradient's noise vanishes where the guide is exact. Far from there it can be *larger* than without: for
    a guide much too narrow, several times. It is therefore nobody's default here. The objective must be differentiable in the
    value: a comparison or an index in the model cuts derivatives, and nothing can see that.

    References
    ----------
    Kingma and Welling (2014); Roeder, Wu and Duvenaud (2017), equation 7; Tucker et al. (2019); Figurnov, Mohamed and Mnih (2018).

    Examples
    --------
    >>> import ergodica as erg
    >>> erg.estimators.ELBO(num_particles=4, sites={"w": erg.estimators.Reparam(stl=True)}).num_particles
    4
    """

    stl: bool = eqx.field(static=True, default=False)

    references: ClassVar = ("kingma2014", "roeder2017", "figurnov2018")
    entropy: ClassVar = "keep"

    @property
    def landing(self) -> Literal["keep", "stop", "stick"]:
        """Stick the landing, if it was asked for."""
        return "stick" if self.stl else "keep"

    def check(self, site: Site, context: Context) -> None:
        """Raise where derivatives through the value would be wrong."""
        if site.reparameterised or (site.implicit and not site.in_scan):
            return
        kind = "its values are discrete" if site.discrete else "NumPyro has no reparameterisation of it"
        if site.implicit:
            kind += " and it is inside a scan, where its value cannot be taken hold of"
        elif site.distribution.startswith("Mixture"):
            kind += (
                f" and its components are not all of single, independent elements with a known law ({', '.join(LAWS)})"
            )
        raise site.refuse(
            self, f"{kind}, so derivatives through the value are wrong", other_than_reparam(site, context)
        )

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw | None:  # noqa: ARG002
        """Leave the draw to NumPyro, with derivatives through it; give mixtures their implicit ones."""
        if not site.implicit:
            return None
        return Draw(implicit_value(fn, jax.lax.stop_gradient(fn(rng_key=key))))


def other_than_reparam(site: Site, context: Context) -> str:
    """Name estimators that need no reparameterisation."""
    names = ["LeaveOneOut() with num_particles of at least 2" if context.linear else "VIMCO() or LeaveOneOut()"]
    if context.linear and site.support_size is not None:
        names.append("Enumerate()")
    return ", ".join([*names, "or Score(baseline=…)"])
