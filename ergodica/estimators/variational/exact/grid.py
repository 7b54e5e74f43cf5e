"""The grid over all latent sites of a guide: lists of values times quadrature nodes, and the program run at one of its points."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.primitives import Messenger

from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.exact.quadrature import (
    from_normals,
    is_normal,
    is_number,
    mixture_nodes,
    normal_nodes,
    number_nodes,
)
from ergodica.estimators.variational.facts import SiteError, base, list_support, unmasked
from ergodica.estimators.variational.objectives.weighted import enclosing_plates
from ergodica.estimators.variational.structure import Program, Structure, inspect

MOST_VALUES = 2**16
"""More joint values of the discrete sites than this are not listed."""
MOST_DIMENSIONS = 3
"""More continuous dimensions than this are not integrated over."""
MOST_POINTS = 2**20
"""Points of the grid, at most."""


class Axis(NamedTuple):
    """What one site adds to the grid: ``num_points`` for each of its ``shape``'s elements."""

    kind: Literal["list", "normal", "number", "mixture"]
    shape: tuple[int, ...]
    num_points: int


class Grid(NamedTuple):
    """The axes by site, and the plates that enclose every term."""

    axes: dict[str, Axis]
    plates: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Points along each of the grid's dimensions."""
        return tuple(axis.num_points for axis in self.axes.values() for _ in range(math.prod(axis.shape)))

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(self.counts)

    @property
    def refinable(self) -> bool:
        """Whether there is quadrature in it."""
        return any(axis.kind != "list" for axis in self.axes.values())

    def at(self, index: Array) -> dict[str, Array]:
        """Index into the points of every element of every site, at a point of the grid."""
        digits = list(jnp.unravel_index(index, self.counts)) if self.counts else []
        found = {}
        for name, axis in self.axes.items():
            number = math.prod(axis.shape)
            own, digits = digits[:number], digits[number:]
            found[name] = jnp.stack(own).reshape(axis.shape)
        return found


class GridError(SiteError):
    """The mean over a program cannot be computed without sampling: says which site, and why."""


def make_grid(program: Program, params: dict, num_nodes: int) -> Grid:
    """Lay out the grid; raise `GridError` where there is none."""
    structure = inspect(program, params)
    if structure.subsampled:
        raise GridError("A plate is subsampled: the mean over its subsets is not computed. Take the whole plate.")
    kinds = _kinds(program, params, structure)
    axes: dict[str, Axis] = {}
    for name, site in structure.sites.items():
        if site.delta:
            continue
        kind, factor = kinds[name]
        if site.discrete:
            shape = site.batch_shape + site.event_shape[: len(site.event_shape) - len(site.element_shape)]
            axes[name] = Axis("list", shape, site.support_size or 0)
        else:
            axes[name] = Axis(kind, site.batch_shape + site.event_shape, num_nodes * factor)
    _check_size(axes)
    grid = Grid(axes, tuple(sorted(p.dim for p in enclosing_plates(structure))))
    if grid.size > MOST_POINTS:
        raise GridError(
            f"The grid would have {grid.size:,} points, and {MOST_POINTS:,} are the most: fewer latent variables, or fewer "
            "num_nodes."
        )
    return grid


def run_on_grid(program: Program, params: dict, grid: Grid, index: Array) -> tuple[Array, Array]:
    """Log probability of a point of the grid, and the log importance weights there, one for each element of the common plates."""
    placing = _Place(seed(substitute(program.guide, data=params), jax.random.key(0)), grid, grid.at(index))
    guide = trace(placing).get_trace(*program.args, **program.kwargs)
    seeded = seed(substitute(replay(program.model, guide), data=params), jax.random.key(1))
    model = trace(seeded).get_trace(*program.args, **program.kwargs)
    terms = [_term(s, grid.plates) for s in model.values() if s["type"] == "sample"]
    terms += [-_term(s, grid.plates) for s in guide.values() if s["type"] == "sample"]
    total = jnp.zeros(jnp.broadcast_shapes(*(t.shape for t in terms)))
    for term in terms:
        total = total + term.astype(total.dtype)
    return placing.log_prob, total.reshape(-1)


class _Place(Messenger):
    """Sets each latent value to its point of the grid, and adds up the log probabilities of the points."""

    def __init__(self, fn: Any, grid: Grid, indices: dict[str, Array]) -> None:
        super().__init__(fn)
        self.grid, self.indices = grid, indices
        self.log_prob = jnp.zeros(())

    def process_message(self, msg: dict) -> None:
        """Set the value of a latent site."""
        if msg["type"] != "sample" or msg.get("is_observed", False) or msg["name"] not in self.indices:
            return
        axis, index, fn = self.grid.axes[msg["name"]], self.indices[msg["name"]], unmasked(msg["fn"])
        if axis.kind == "list":
            support: Any = list_support(fn)
            value = support[index]
            msg["value"], log_prob = value, log_density(fn, value)
        elif axis.kind == "normal":
            nodes, log_weights = normal_nodes(axis.num_points, jnp.result_type(float))
            msg["value"], log_prob = from_normals(fn, nodes[index]), log_weights[index]
        elif axis.kind == "mixture":
            points = mixture_nodes(fn, axis.shape, axis.num_points // base(fn).mixture_size)
            msg["value"], log_prob = (jnp.take_along_axis(x, index[None], axis=0)[0] for x in points)
        else:
            nodes, log_weights = number_nodes(fn, axis.shape, axis.num_points)
            value, log_weight = (jnp.take_along_axis(x, index[None], axis=0)[0] for x in (nodes, log_weights))
            msg["value"], log_prob = value, log_density(base(fn), value) + log_weight
        self.log_prob = self.log_prob + jnp.sum(log_prob).astype(self.log_prob.dtype)


def _term(site: dict, plates: tuple[int, ...]) -> Array:
    """Log probability of a site as it enters the objective, summed to the plates that enclose every term."""
    log_prob = jnp.asarray(log_density(site["fn"], site["value"]))
    if site["scale"] is not None:
        log_prob = jnp.asarray(site["scale"], log_prob.dtype) * log_prob
    log_prob = jnp.broadcast_to(log_prob, jnp.broadcast_shapes(log_prob.shape, site["fn"].batch_shape))
    outside = tuple(i for i in range(log_prob.ndim) if i - log_prob.ndim not in plates)
    log_prob = jnp.sum(log_prob, axis=outside, keepdims=True)
    rank = -min(plates, default=0)
    return log_prob.reshape(log_prob.shape[log_prob.ndim - rank :])


def _kinds(program: Program, params: dict, structure: Structure) -> dict[str, Any]:
    """How each latent site is put on the grid, and what its number of nodes is multiplied by."""
    kinds: dict[str, Any] = {}

    def look() -> None:
        sites = trace(seed(substitute(program.guide, data=params), 0)).get_trace(*program.args, **program.kwargs)
        for name in structure.sites:
            fn = unmasked(sites[name]["fn"])
            kinds[name] = _kind(fn)

    jax.eval_shape(look)
    for name, site in structure.sites.items():
        if site.delta:
            continue
        if site.in_scan:
            raise GridError(f"Site {name!r} is inside a scan, whose steps are not put on a grid.")
        if site.discrete and site.support_size is None:
            raise GridError(f"The values of site {name!r} ({site.distribution}) cannot be listed.")
        if not site.discrete and kinds[name][0] is None:
            raise GridError(
                f"Site {name!r} ({site.distribution}) is neither normal, nor an elementwise function of normals, nor made of "
                "numbers of their own: there is no quadrature for it."
            )
    return kinds


def _kind(fn: Any) -> tuple[str | None, int]:
    if is_normal(fn):
        return "normal", 1
    if isinstance(base(fn), dist.MixtureSameFamily) and is_number(base(fn).component_distribution):
        return "mixture", base(fn).mixture_size
    return ("number", 1) if is_number(fn) else (None, 1)


def _check_size(axes: dict[str, Axis]) -> None:
    values = math.prod(a.num_points ** math.prod(a.shape) for a in axes.values() if a.kind == "list")
    dimensions = sum(math.prod(a.shape) for a in axes.values() if a.kind != "list")
    if values > MOST_VALUES:
        raise GridError(
            f"The discrete sites have {values:,} joint values, and {MOST_VALUES:,} are the most that are listed."
        )
    if dimensions > MOST_DIMENSIONS:
        raise GridError(
            f"The continuous sites have {dimensions} dimensions, and {MOST_DIMENSIONS} are the most that are integrated over."
        )
