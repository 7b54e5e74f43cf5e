"""What estimators are told: of a site before anything is drawn, and of the particles after."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import distributions as dist

from ergodica.core import check
from ergodica.core.types import PyTree

ONE_HOT = ("MultinomialProbs", "MultinomialLogits")

type Distribution = Any
"""A `numpyro.distributions.Distribution`."""


class SiteError(ValueError):
    """An estimator cannot be right at a site: says which site, why, and what can be used instead."""


class Plate(NamedTuple):
    """A plate around a site: its name, its dimension (negative), how many of its ``full_size`` elements are in the program."""

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def subsampled(self) -> bool:
        """Whether the program holds a random part of the plate."""
        return self.size != self.full_size


@dataclasses.dataclass(frozen=True)
class Site:
    """What is known of a latent sample site of a guide before anything is drawn.

    Attributes
    ----------
    name, distribution : str
        The site, and the name of the distribution's class.
    batch_shape, event_shape, element_shape : tuple of int
        The last is the event shape without reinterpreted batch dimensions (``to_event``): that of one element.
    discrete, reparameterised, delta : bool
        What NumPyro says of the distribution: its support, its ``has_rsample``, and whether it is a point mass.
    plates : tuple of Plate
    support_size : int or None
        Number of values of *one* element, if they can be listed.
    upstream : frozenset of str
        Latent sites that the site's distribution depends on.
    terms : tuple of str
        Terms of the objective that depend on the value, such as ``"log p(x)"`` and ``"-log q(z)"``.
    shared_plates : frozenset of str
        Plates of the site that all these terms are inside of. Along them the objective falls into independent parts, and
        what is done to the elements is done to all of them at once.
    in_scan, in_model : bool
        Whether it sits inside a NumPyro ``scan``; whether the model has it, or it is marked auxiliary.
    implicit : bool
        Whether it is a mixture whose distribution function can be differentiated, for want of a reparameterisation.
    """

    name: str
    distribution: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    element_shape: tuple[int, ...]
    discrete: bool
    reparameterised: bool
    delta: bool
    plates: tuple[Plate, ...]
    support_size: int | None
    upstream: frozenset[str]
    terms: tuple[str, ...]
    shared_plates: frozenset[str]
    in_scan: bool = False
    in_model: bool = True
    implicit: bool = False

    def refuse(self, estimator: Any, reason: str, alternatives: str) -> SiteError:
        """Make the error that says that an estimator cannot be right here."""
        return SiteError(
            f"{type(estimator).__name__} cannot be used at site {self.name!r} ({self.distribution}): {reason}. "
            f"Use {alternatives}."
        )

    @property
    def joint_shape(self) -> tuple[int, ...]:
        """Shape of the elements that terms depend on jointly: batch (1 along shared plates), and what ``to_event`` reinterprets."""
        shared = {p.dim for p in self.plates if p.name in self.shared_plates}
        rank = len(self.batch_shape)
        batch = tuple(1 if i - rank in shared else n for i, n in enumerate(self.batch_shape))
        return batch + self.event_shape[: len(self.event_shape) - len(self.element_shape)]

    @property
    def num_joint(self) -> int:
        """How many elements terms depend on jointly."""
        return math.prod(self.joint_shape)


class Context(NamedTuple):
    """What an estimator may need to know of the objective to see whether it is right there.

    ``linear`` says that the objective is a mean over particles (the ELBO) and no function of all of them (IWELBO).
    """

    objective: str
    num_particles: int
    linear: bool


class Draw(NamedTuple):
    """A value for a site, and a record of what the surrogate will need (arrays that begin with the site's batch shape)."""

    value: Array
    record: PyTree = None


class Downstream(NamedTuple):
    """What became of the particles at a site. Axes: particles ``K`` first, the site's own branches ``A`` second.

    Further axes are those of the program: branches of other sites that this one depends on, then the batch dimensions
    aligned to the right, with size 1 wherever the site has no plate. Work elementwise on them.

    Attributes
    ----------
    cost : array (K, A, …)
        What the objective gets from the terms downstream of the site if particle ``k`` takes branch ``a``, all else equal:
        the particle's own sum of terms where the objective is a mean over particles, the whole bound where it is not. Branches
        of other sites are averaged. Differentiable; stop its gradient unless the estimator needs it.
    others : array (K, 1, …) or None
        What the other particles lead one to expect of it: independent of particle ``k``. ``None`` if there is one particle.
    log_prob : array (K, A, …)
        Log probability of the value, neither scaled nor masked, summed over what is no plate; differentiable in the parameters.
    record : pytree
        What `draw` recorded, arrays (K, A, …, batch …, extra …).
    log_weights : array (K, 1, …) or None
        Log importance weights, where the objective is a function of them (IWELBO).
    scale : array or float
        What the objective's bound is multiplied by, where it has one (IWELBO with subsampled plates).
    cost_of : callable
        ``cost_of(value)``: ``cost`` at other values (K, A, batch …, event …) of the site, with the same random numbers everywhere
        else; of a value, not of the parameters, which are held. It runs the program again; say so in ``num_reruns``.
    params : pytree or None
        What `parameters` declared, at its present value.
    state : pytree or None
        What `init` declared, as it was left by the step before.
    args, kwargs
        The arguments of model and guide.
    """

    cost: Array
    others: Array | None
    log_prob: Array
    record: PyTree = None
    log_weights: Array | None = None
    scale: Any = 1.0
    cost_of: Callable[[Array], Array] | None = None
    params: PyTree = None
    state: PyTree = None
    args: tuple = ()
    kwargs: dict | None = None


def base(fn: Distribution) -> Distribution:
    """The distribution inside of expansions, masks and reinterpreted dimensions."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn


def unmasked(fn: Distribution) -> Distribution:
    """The distribution that a value is drawn from, without its mask."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_one_trial(law: Distribution) -> bool:
    """Whether a multinomial law is known to have one trial: its values are one-hot vectors."""
    count = law.total_count
    return check.is_concrete(count) and bool(np.all(np.asarray(count) == 1))


def list_support(fn: Distribution) -> Array | None:
    """All values of one element of a discrete site (A, element shape), or ``None`` where they cannot be listed."""
    law = base(fn)
    if type(law).__name__ in ONE_HOT:
        return jnp.eye(law.event_shape[0], dtype=int) if is_one_trial(law) else None
    try:
        support = law.enumerate_support(expand=False)
        return support.reshape(support.shape[0], *law.event_shape)
    except (NotImplementedError, TypeError, ValueError):  # unbounded, or a size that is no constant
        return None
