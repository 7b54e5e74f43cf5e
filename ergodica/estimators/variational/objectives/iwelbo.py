"""The importance-weighted bound."""

from typing import Any, ClassVar

from ergodica.estimators.variational.objectives.weighted import AbstractWeightedBound


class IWELBO(AbstractWeightedBound):
    r"""Importance-weighted bound, with unbiased gradients for continuous, discrete and mixed guides.

    .. math:: \mathcal L_K = \mathrm{E} \log \frac1K \sum_{k=1}^K w_k, \qquad w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    Plates that all sites of model and guide are inside of have a bound for each element, which is tighter.

    Parameters
    ----------
    num_particles : int
        :math:`K`: it is part of the objective.
    sites, vectorize_particles
        As for `ergodica.estimators.ELBO`. By rule, sites that NumPyro cannot reparameterise get `VIMCO`. ``Reparam(stl=True)``
        is the doubly reparameterised gradient (DReG).

    Raises
    ------
    SiteError
        Where an estimator cannot be right at a site: enumeration; doubly reparameterised sites upstream of score-function sites.
    ValueError
        For subsampled plates that do not enclose every site.

    Notes
    -----
    For score-function sites the signal is the whole bound, less a baseline without the particle, and the weights' own
    derivative :math:`-\tilde w_k \nabla \log q` is kept: without the former the gradient can have the wrong sign.

    With ``Reparam()`` the signal-to-noise ratio of the guide's gradient falls as :math:`1/\sqrt K`; with ``stl=True`` it does not.

    Cost: ``num_particles`` runs of model and guide and their derivative; ``stl=True`` runs both once more.

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016); Mnih and Rezende (2016); Tucker, Lawson, Gu and Maddison (2019), equation 8.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.IWELBO(num_particles=8, sites={"w": erg.estimators.Reparam(stl=True)})
    """

    references: ClassVar = ("burda2016", "mnih2016", "tucker2019")

    def power(self, dtype: Any) -> float:  # noqa: ARG002
        """The weights themselves."""
        return 1.0
