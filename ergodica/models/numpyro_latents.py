"""Latent sites of a NumPyro model, sorted: global, summed out datum by datum, or local to the data."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ergodica.models.numpyro_trace import Record, support_of_one

MOST_COMBINATIONS = 4096
"""Of values that the enumerated sites of one datum may take together; the likelihood of a row is evaluated at each."""


@dataclass(frozen=True)
class EnumeratedSite:
    """A discrete latent site inside the data plate, to be summed out.

    Attributes
    ----------
    name : str
    axis : int
        Of the value, counted from the right: where the data run.
    support_size : int
    num_elements : int
        Discrete variables that one datum has here: more than one under an inner plate or ``to_event``.
    """

    name: str
    axis: int
    support_size: int
    num_elements: int

    @property
    def num_combinations(self) -> int:
        """How many values the site can take for one datum."""
        return self.support_size**self.num_elements

    def value(self, law: Any, shape: tuple[int, ...], combination: Array) -> Array:
        """Give all data the value with this number."""
        support = support_of_one(law)
        digits = combination // self.support_size ** jnp.arange(self.num_elements) % self.support_size
        of_one_datum = support[digits].reshape(*_without(shape, self.axis))
        return jnp.broadcast_to(jnp.expand_dims(of_one_datum, len(shape) + self.axis), shape)


@dataclass(frozen=True)
class LocalSite:
    """A continuous latent site inside the data plate.

    Attributes
    ----------
    name : str
    axis : int
        Of the unconstrained value, counted from the left: where the data run.
    shape : tuple of int
        Of the unconstrained value of one datum.
    """

    name: str
    axis: int
    shape: tuple[int, ...]


def num_combinations(sites: tuple[EnumeratedSite, ...]) -> int:
    """How many values the sites can take together for one datum."""
    return math.prod(site.num_combinations for site in sites)


def enumerated_site(site: Record, axes: list[int], where: str) -> EnumeratedSite:
    """Describe a discrete latent site whose log probability grows with the data along ``axes``; raise if it cannot be summed."""
    if not site.enumerated:
        raise ValueError(
            f"The discrete latent site {site.name!r} is not enumerated, and gradients cannot move it. Have it summed out: give "
            'its sample statement infer={"enumerate": "parallel"}. Or marginalise it yourself, for example by '
            "dist.MixtureSameFamily."
        )
    if len(axes) != 1:
        raise ValueError(
            f"The enumerated latent site {site.name!r} is not wholly inside {where}: summing it out ties all data together, so "
            "that no batch has a likelihood of its own. Move it into the data plate, or sample with all the data by NumPyro."
        )
    if not site.support_size:
        raise ValueError(
            f"The enumerated latent site {site.name!r} cannot be summed out: its law has no finite support of a known size."
        )
    if site.scaled:
        raise ValueError(
            f"The enumerated latent site {site.name!r} is scaled, and the sum over its values has no meaning then (a power of a "
            "sum is not the sum of the powers). Take numpyro.handlers.scale away."
        )
    axis = axes[0] - site.event_dim
    num_elements = math.prod(_without(site.shape, axis)) // math.prod(site.element_shape)
    return EnumeratedSite(site.name, axis, site.support_size, num_elements)


def check_few_combinations(sites: tuple[EnumeratedSite, ...]) -> None:
    """Raise where the values of one datum are too many to go through."""
    if num_combinations(sites) > MOST_COMBINATIONS:
        sizes = ", ".join(f"{site.name!r} {site.support_size}**{site.num_elements}" for site in sites)
        raise ValueError(
            f"The enumerated latent sites of one datum take {num_combinations(sites)} values together ({sizes}), more than the "
            f"{MOST_COMBINATIONS} that are summed one by one. Where the sum factorises, say so: make the inner plate the data "
            "plate, use dist.MixtureSameFamily, or write a forward algorithm with numpyro.factor."
        )


def local_site(site: Record, axes: list[int], where: str, *, allowed: bool) -> LocalSite:
    """Describe a continuous latent site of which each datum has its own value; raise unless that is allowed."""
    if not allowed:
        raise ValueError(
            f"The latent site {site.name!r} is local to {where}: each datum has its own value, which a batch of other data cannot "
            "move. Integrate it out, or make it global: a latent in a plate over groups, indexed by each datum's group. Or "
            "estimate gradients by sampling it: from_numpyro(…, local_latents=True) and ergodica.estimators.LocalLatents. If "
            "another plate is meant to hold the data, name it by plate=."
        )
    if len(axes) != 1:
        raise ValueError(
            f"The latent site {site.name!r} grows with the data, but its law has no term for each datum: its log probability has "
            f"the shape {site.log_prob_shape}. Sample it in a plate over the data."
        )
    axis = len(site.log_prob_shape) + axes[0]
    shape = site.unconstrained_shape
    return LocalSite(site.name, axis, (*shape[:axis], *shape[axis + 1 :]))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], *shape[axis + 1 :])
