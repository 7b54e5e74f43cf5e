"""Objectives that are functions of the particles' importance weights: the weights along plates, and bounds of their power mean."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.leave_one_out import leave_one_out_logsumexp
from ergodica.estimators.variational.facts import SiteError
from ergodica.estimators.variational.lanes import common_plates
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from ergodica.estimators.variational.particles import Run
from ergodica.estimators.variational.run import Estimators
from ergodica.estimators.variational.site import only_gradient
from ergodica.estimators.variational.sites.score import finite_baseline
from ergodica.estimators.variational.structure import GUIDE, Plate, Program, Structure


def doubly_reparameterised_weights(normalised: Array, power: Array | float) -> Array:
    r"""What the derivative of :math:`\log w_k` through the value counts, the parameters held.

    .. math:: (1 - \beta)\, \tilde w_k + \beta\, \tilde w_k^2, \qquad \tilde w_k = w_k^\beta \Big/ \sum_j w_j^\beta

    The bound's derivative is :math:`\sum_k \tilde w_k\, \mathrm d \log w_k`, and what flows past the value is
    :math:`-\tilde w_k \nabla \log q(z_k)`. By the reparameterisation of a score,
    :math:`\mathrm{E}\, g \nabla \log q = \mathrm{E}\, \partial_z g\, \partial_\phi z` with :math:`g = \tilde w_k`, whose
    derivative is :math:`\beta \tilde w_k (1 - \tilde w_k)\, \partial_z \log w_k`: subtract it from :math:`\tilde w_k`. At
    :math:`\beta = 1` it is the square of Tucker et al. (2019), equation 8; as :math:`\beta \to 0`, sticking the landing.
    """
    return (1 - power) * normalised + power * normalised**2


def weigh(weights: Array, x: Array) -> Array:
    """Product that is 0 where the weight is: a particle without weight may have an infinite log density."""
    return weights * jnp.where(weights == 0, 0, x)


class AbstractWeighted(AbstractObjective):
    """An objective over the particles' weights, for each element of the plates that all sites are inside of."""

    linear: ClassVar[bool] = False

    @abc.abstractmethod
    def power(self, dtype: Any) -> Array | float:
        """What the weights are raised to."""

    def check(self, program: Program, structure: Structure, estimators: Estimators) -> None:  # noqa: ARG002
        """Raise for plates that the weights would be wrong for. A single particle is not weighted."""
        common = {p.name for p in self.common(structure)}
        for term, plates in structure.plates.items():
            for plate in plates:
                if plate.subsampled and plate.name not in common and self.num_particles > 1:
                    raise ValueError(
                        f"Plate {plate.name!r} of {term} is subsampled and does not enclose every site of model and guide, so "
                        "that the logarithm of the weights cannot be scaled. Take the whole plate, or ELBO."
                    )

    def cost(self, run: Run, name: str) -> tuple[Array, Array | None]:
        """The bound if the particle takes the branch; that of the other particles alone."""
        powers, scale = self.weights(run)
        own = powers
        if name in run.lanes.branching:
            own = self.power(powers.dtype) * self._reduce(run, run.particles.terms, name)
        rest = leave_one_out_logsumexp(powers)
        cost = scale * (jnp.logaddexp(rest, own) - jnp.log(self.num_particles))
        if self.num_particles == 1:
            return cost, None
        return cost, jax.lax.stop_gradient(scale * finite_baseline(rest - jnp.log(self.num_particles - 1)))

    def weights(self, run: Run) -> tuple[Array, Any]:
        """Logarithms of the powers of the weights for each element of the common plates, and what their bound is scaled by."""
        log_weights = self._reduce(run, run.particles.terms)
        power = self.power(log_weights.dtype)
        return power * log_weights, plate_scale(self.common(run.structure)) / power

    def common(self, structure: Structure) -> list[Plate]:
        """Plates that enclose every site."""
        return enclosing_plates(structure)

    def _reduce(self, run: Run, terms: dict[str, Array], own: str | None = None) -> Array:
        """Sum terms to the common plates, without the plates' scale."""
        return reduce_terms(run, terms, self.common(run.structure), own)


class AbstractWeightedBound(AbstractWeighted):
    r"""The bound :math:`\frac1\beta \log \frac1K \sum_k w_k^\beta`, with the derivatives that flow through values and weights."""

    def check(self, program: Program, structure: Structure, estimators: Estimators) -> None:
        """Raise for plates and for doubly reparameterised sites that the estimate would be wrong for."""
        super().check(program, structure, estimators)
        if self.splits(estimators):
            check_doubly_reparameterised(type(self).__name__, structure, estimators)

    def splits(self, estimators: Estimators) -> bool:
        """Whether sites are doubly reparameterised."""
        return any(estimator.landing == "stick" for estimator in estimators.values())

    def combine(self, run: Run) -> Array:
        """Logarithm of the mean power; doubly reparameterised sites with weights of their own."""
        powers, scale = self.weights(run)
        bound = jax.nn.logsumexp(powers, axis=0) - jnp.log(self.num_particles)
        if not self.splits(run.estimators):
            return scale * jnp.sum(bound)
        power, normalised = self.power(powers.dtype), jax.lax.stop_gradient(jax.nn.softmax(powers, axis=0))
        stuck = {GUIDE.format(name) for name, e in run.estimators.items() if e.landing == "stick"}
        direct = {term: x for term, x in run.particles.terms.items() if term not in stuck}
        by_parameters = weigh(normalised, self._reduce(run, direct))
        by_values = weigh(doubly_reparameterised_weights(normalised, power), self._reduce(run, run.particles.held))
        gradient = plate_scale(self.common(run.structure)) * only_gradient(by_parameters + by_values)
        return jax.lax.stop_gradient(scale * jnp.sum(bound)) + gradient


def enclosing_plates(structure: Structure) -> list[Plate]:
    """Plates that every site of model and guide is inside of."""
    plates = list(structure.plates.values())
    common = list(plates[0]) if plates else []
    for other in plates[1:]:
        common = common_plates(common, other)
    return common


def reduce_terms(run: Run, terms: dict[str, Array], plates: list[Plate], own: str | None = None) -> Array:
    """Sum terms to some plates that enclose them all, without the plates' scale."""
    total = jnp.zeros((1,) * (run.lanes.lead + run.structure.rank))
    for term, x in terms.items():
        x = run.lanes.sum_to(run.lanes.on_branches(term, x, own), run.structure.plates[term], plates)
        total = total + x.astype(total.dtype)
    return total / plate_scale(plates)


def plate_scale(plates: list[Plate]) -> float:
    """How many elements each element of subsampled plates stands for."""
    scale = 1.0
    for plate in plates:
        scale *= plate.full_size / plate.size
    return scale


def check_doubly_reparameterised(objective: str, structure: Structure, estimators: Estimators) -> None:
    """Raise where the weights of doubly reparameterised sites would be wrong."""
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
                f"Reparam(stl=True) cannot be used at {', '.join(sorted(stuck))} under {objective}: the point mass {name!r} of "
                "the guide is placed by parameters, whose derivative must not be weighted twice. Use Reparam()."
            )
