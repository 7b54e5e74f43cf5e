"""Arithmetic on the terms of an objective over particles, branches and plates.

Every array has the axes ``(K, A_1 … A_m, batch dimensions)``: particles, the branches of each site that has several, and the
batch dimensions of the program aligned to the right. A term that does not depend on a site's branches is the same on all
of them, and is kept on the first alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import PyTree
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.structure import GUIDE, Plate, Structure


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The branches of all sites, and how they are weighted.

    Attributes
    ----------
    structure : Structure
    branching : tuple of str
        Sites with more than one branch, in the order of their axes.
    log_weights : dict of str to array
        For sites whose branches are averaged: the log weights, reduced to the plates that the site shares with all its terms.
    """

    structure: Structure
    branching: tuple[str, ...]
    log_weights: Mapping[str, Array]

    @property
    def lead(self) -> int:
        """Axes before the batch dimensions."""
        return 1 + len(self.branching)

    def axis(self, name: str) -> int:
        """Axis of a site's branches."""
        return 1 + self.branching.index(name)

    def upstream(self, term: str) -> frozenset[str]:
        """Latent sites that a term depends on."""
        return self.structure.upstream[term]

    def select(self, x: Array, sites: Iterable[str]) -> Array:
        """Keep the branches of ``sites`` alone: the first of all others."""
        for name in self.branching:
            if name not in sites:
                x = jax.lax.slice_in_dim(x, 0, 1, axis=self.axis(name))
        return x

    def on_branches(self, term: str, x: Array, own: str | None = None) -> Array:
        """A term on the branches that count: those that are averaged, and those of the site ``own``."""
        counted = {name for name in self.upstream(term) if name in self.log_weights}
        return self.select(x, counted | ({own} if own in self.upstream(term) else set()))

    def weigh(self, term: str, x: Array, without: str | None = None) -> Array:
        """Multiply by the weights of all averaged sites that the term depends on, with derivatives through them."""
        total = None
        for name, log_weight in self.log_weights.items():
            if name in self.upstream(term) and name != without:
                on = self.on_branches(GUIDE.format(name), log_weight, without)
                total = on if total is None else total + on
        return x if total is None else jnp.exp(total) * x

    def sum_branches(self, x: Array, keep: Iterable[str] = ()) -> Array:
        """Sum over the axes of all sites but ``keep``."""
        axes = tuple(self.axis(name) for name in self.branching if name not in keep)
        return jnp.sum(x, axis=axes, keepdims=True) if axes else x

    def sum_to(self, x: Array, has: Iterable[Plate], wants: Iterable[Plate]) -> Array:
        """Sum over batch dimensions that are no plate of both."""
        kept = {p.dim for p in common_plates(has, wants)}
        rank = self.structure.rank
        axes = tuple(self.lead + i for i in range(rank) if i - rank not in kept)
        return jnp.sum(x, axis=axes, keepdims=True) if axes else x


def common_plates(has: Iterable[Plate], wants: Iterable[Plate]) -> list[Plate]:
    """Plates of both, at the same dimension."""
    wanted = {(p.name, p.dim) for p in wants}
    return [p for p in has if (p.name, p.dim) in wanted]


def make_lanes(
    structure: Structure,
    estimators: Mapping[str, AbstractSiteEstimator],
    log_prob: Mapping[str, Array],
    records: Mapping[str, PyTree],
) -> Lanes:
    """Find the branches, and the weights of those that are averaged."""
    branching = branching_sites(structure, estimators)
    bare, weights = Lanes(structure, branching, {}), {}
    for name in branching:
        site = structure.sites[name]
        shared = [p for p in site.plates if p.name in site.shared_plates]
        log_weight = estimators[name].log_weights(bare.sum_to(log_prob[name], site.plates, shared), records.get(name))
        if log_weight is not None:
            weights[name] = log_weight
    return Lanes(structure, branching, weights)


def branching_sites(structure: Structure, estimators: Mapping[str, AbstractSiteEstimator]) -> tuple[str, ...]:
    """Sites with more than one branch."""
    return tuple(name for name, site in structure.sites.items() if estimators[name].num_branches(site) > 1)


def own_axis_second(lanes: Lanes, name: str, x: PyTree) -> PyTree:
    """Put the site's own branches behind the particles, with an axis of size 1 where it has none."""

    def move(leaf: Array) -> Array:
        return jnp.moveaxis(leaf, lanes.axis(name), 1) if name in lanes.branching else jnp.expand_dims(leaf, 1)

    return jax.tree.map(move, x)


def on_every_branch(lanes: Lanes, name: str, x: Array, counts: Mapping[str, int]) -> Array:
    """Undo `own_axis_second`, and repeat along branches of other sites that the array is not on."""
    x = jnp.moveaxis(x, 1, lanes.axis(name)) if name in lanes.branching else jnp.squeeze(x, 1)
    return jnp.broadcast_to(x, (x.shape[0], *(counts[n] for n in lanes.branching), *x.shape[lanes.lead :]))


def downstream_cost(lanes: Lanes, name: str, terms: Mapping[str, Array]) -> Array:
    """Sum the weighted terms that depend on a site, to the site's plates, on the branches that the site itself is on."""
    site = lanes.structure.sites[name]
    keep = own_branches(lanes, name)
    total = jnp.zeros((1,) * (lanes.lead + lanes.structure.rank), jnp.result_type(float))
    for term in site.terms:
        x = lanes.weigh(term, lanes.on_branches(term, terms[term], name), without=name)
        x = lanes.sum_to(x, lanes.structure.plates[term], separate_plates(lanes.structure, name, term))
        total = total + lanes.sum_branches(x, keep)
    return total


def separate_plates(structure: Structure, name: str, term: str) -> list[Plate]:
    """Plates of a site along which each element of a term depends on its own element of the site alone.

    Not those that a site in between is outside of: it takes in all elements, and hands them on to each.
    """
    between = [s for s in structure.sites.values() if s.name in structure.upstream[term] and name in s.upstream]
    return [p for p in structure.sites[name].plates if all(common_plates([p], s.plates) for s in between)]


def own_branches(lanes: Lanes, name: str) -> frozenset[str]:
    """Branches on which the site's own law differs: its own, and those of averaged sites upstream of it."""
    return frozenset({name}) | frozenset(s for s in lanes.structure.sites[name].upstream if s in lanes.log_weights)
