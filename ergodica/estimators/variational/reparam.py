"""Reparameterisation: derivatives through the value."""

from typing import ClassVar, Literal

import equinox as eqx
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator


class Reparam(AbstractSiteEstimator):
    r"""Reparameterisation gradient, with or without sticking the landing.

    .. math::

        \nabla_\theta \mathrm{E}_{q_\theta} f(z) = \mathrm{E}_\varepsilon\, \nabla_z f(z)\, \partial_\theta z, \qquad
        z = T_\theta(\varepsilon)

    With ``stl=True`` the site's own :math:`-\log q_\theta(z)` is differentiated through :math:`z` alone, the parameters held:
    what is left out, :math:`\nabla_\theta \log q_\theta(z)` at fixed :math:`z`, has mean zero. Under
    `ergodica.estimators.IWELBO` it is the doubly reparameterised gradient, with squared weights.

    Parameters
    ----------
    stl : bool
        Stick the landing.

    Raises
    ------
    SiteError
        At a site that NumPyro cannot reparameterise (discrete, mixtures, von Mises, Wishart …), where derivatives through
        the value would be wrong without a sign of it.

    Notes
    -----
    Where JAX differentiates a sampler implicitly (gamma, beta, Dirichlet, Student's t and what is made of them), this is
    implicit reparameterisation.

    Cost: one run of the program and its derivative. ``stl`` adds the guide's densities once more.

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
        if site.reparameterised:
            return
        kind = "its values are discrete" if site.discrete else "NumPyro has no reparameterisation of it"
        raise site.refuse(
            self, f"{kind}, so derivatives through the value are wrong", other_than_reparam(site, context)
        )

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw | None:  # noqa: ARG002
        """Leave the draw to NumPyro, with derivatives through it."""
        return None


def other_than_reparam(site: Site, context: Context) -> str:
    """Name estimators that need no reparameterisation."""
    names = ["LeaveOneOut() with num_particles of at least 2" if context.linear else "VIMCO() or LeaveOneOut()"]
    if context.linear and site.support_size is not None:
        names.append("Enumerate()")
    return ", ".join([*names, "or Score(baseline=…)"])
