"""The importance-weighted bound."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.estimators.variational.facts import SiteError
from ergodica.estimators.variational.lanes import common_plates
from ergodica.estimators.variational.objective import AbstractObjective
from ergodica.estimators.variational.particles import Run
from ergodica.estimators.variational.run import Estimators
from ergodica.estimators.variational.score import leave_one_out_logsumexp
from ergodica.estimators.variational.site import only_gradient
from ergodica.estimators.variational.structure import GUIDE, Plate, Structure


class IWELBO(AbstractObjective):
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
    linear: ClassVar = False

    def check(self, structure: Structure, estimators: Estimators) -> None:
        """Raise for plates and for doubly reparameterised sites that the estimate would be wrong for."""
        common = {p.name for p in self.common(structure)}
        for term, plates in structure.plates.items():
            for plate in plates:
                if plate.subsampled and plate.name not in common:
                    raise ValueError(
                        f"Plate {plate.name!r} of {term} is subsampled and does not enclose every site of model and guide, so "
                        "that the logarithm of the weights cannot be scaled. Take the whole plate, or ELBO."
                    )
        if self.splits(estimators):
            check_doubly_reparameterised(structure, estimators)

    def splits(self, estimators: Estimators) -> bool:
        """Whether sites are doubly reparameterised."""
        return any(estimator.landing == "stick" for estimator in estimators.values())

    def combine(self, run: Run) -> Array:
        """Logarithm of the mean weight; doubly reparameterised sites with the squares of the weights."""
        log_weights, scale = self.weights(run)
        bound = jax.nn.logsumexp(log_weights, axis=0) - jnp.log(self.num_particles)
        if not self.splits(run.estimators):
            return scale * jnp.sum(bound)
        normalised = jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))
        stuck = {GUIDE.format(name) for name, e in run.estimators.items() if e.landing == "stick"}
        direct = {term: x for term, x in run.particles.terms.items() if term not in stuck}
        by_parameters = normalised * self._reduce(run, direct)
        by_values = normalised**2 * self._reduce(run, run.particles.held)
        return scale * (jax.lax.stop_gradient(jnp.sum(bound)) + only_gradient(by_parameters + by_values))

    def cost(self, run: Run, name: str) -> tuple[Array, Array | None]:
        """The bound if the particle takes the branch; that of the other particles alone."""
        log_weights, scale = self.weights(run)
        own = log_weights if name not in run.lanes.branching else self._reduce(run, run.particles.terms, name)
        rest = leave_one_out_logsumexp(log_weights)
        cost = scale * (jnp.logaddexp(rest, own) - jnp.log(self.num_particles))
        if self.num_particles == 1:
            return cost, None
        return cost, jax.lax.stop_gradient(scale * (rest - jnp.log(self.num_particles - 1)))

    def weights(self, run: Run) -> tuple[Array, Any]:
        """Log weights for each element of the common plates, without their scale; and that scale."""
        return self._reduce(run, run.particles.terms), _scale(self.common(run.structure))

    def common(self, structure: Structure) -> list[Plate]:
        """Plates that enclose every site."""
        plates = list(structure.plates.values())
        common = list(plates[0]) if plates else []
        for other in plates[1:]:
            common = common_plates(common, other)
        return common

    def _reduce(self, run: Run, terms: dict[str, Array], own: str | None = None) -> Array:
        """Sum terms to the common plates."""
        common, lanes = self.common(run.structure), run.lanes
        total = jnp.zeros((1,) * (lanes.lead + run.structure.rank))
        for term, x in terms.items():
            x = lanes.sum_to(lanes.on_branches(term, x, own), run.structure.plates[term], common)
            total = total + x.astype(total.dtype)
        return total / _scale(common)


def _scale(plates: list[Plate]) -> float:
    scale = 1.0
    for plate in plates:
        scale *= plate.full_size / plate.size
    return scale


def check_doubly_reparameterised(structure: Structure, estimators: Estimators) -> None:
    """Raise where squared weights would be wrong."""
    stuck = {name for name, estimator in estimators.items() if estimator.landing == "stick"}
    for name, site in structure.sites.items():
        estimator = estimators[name]
        if estimator.landing == "stop" and stuck & site.upstream:
            raise site.refuse(
                estimator,
                f"its law depends on {', '.join(sorted(stuck & site.upstream))}, which is doubly reparameterised (stl=True)",
                "Reparam() without stl there",
            )
        if estimator.landing == "keep" and not site.delta:
            raise site.refuse(
                estimator,
                f"{', '.join(sorted(stuck))} is doubly reparameterised (stl=True) and this site is not, while weights are squared "
                "for both or for none",
                "the same stl at all reparameterised sites",
            )
        if site.delta and site.name in structure.moved_by_parameters:
            raise SiteError(
                f"Reparam(stl=True) cannot be used at {', '.join(sorted(stuck))} under IWELBO: the point mass {name!r} of the "
                "guide is placed by parameters, whose derivative must not be weighted twice. Use Reparam()."
            )
