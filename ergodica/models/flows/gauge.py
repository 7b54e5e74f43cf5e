r"""Gauge-equivariant couplings for U(1) lattice gauge theory in two dimensions.

A layer moves links so that the plaquettes they close go through maps of the circle, whose parameters depend on plaquettes that
none of these links touches. Plaquettes do not change under gauge transformations, so the flow's density does not either.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.flow import Flow, UniformTorus
from ergodica.core.types import Key
from ergodica.models.flows.conditioner import START, Activation, Conditioner, tanh
from ergodica.models.flows.coupling import AbstractCoupling
from ergodica.models.flows.masks import Split
from ergodica.models.flows.monotone import CircularMixture
from ergodica.models.lattice import plaquettes, wrap

_SPACING = 4


class Stripes(Split):
    r"""Links of one direction on every fourth line of a lattice, and what is frozen while they move.

    Lines run in the direction of the links. On a line c they close the plaquettes on c (active) and those on c - 1 (passive);
    all others are frozen. The part of a point that is kept has its full length, with zeros in place of the links that move.

    Parameters
    ----------
    shape : pair of int
        The lattice.
    direction : {0, 1}
        Of the links that move.
    offset : int
        The first line. If their number L is not a multiple of four, floor(L/4) lines are moved, or one, as evenly as it goes.
    """

    shape: tuple[int, int] = eqx.field(static=True)
    direction: int = eqx.field(static=True)
    lines: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, shape: tuple[int, int], direction: int, offset: int) -> None:
        self.shape, self.direction = shape, direction
        num_lines = shape[1 - direction]
        count = max(1, num_lines // _SPACING)
        self.lines = tuple(sorted((offset + num_lines * i // count) % num_lines for i in range(count)))
        sites = np.zeros((2, *shape), bool)
        np.moveaxis(sites[direction], 1 - direction, 0)[list(self.lines)] = True
        super().__init__(sites.size, tuple(int(i) for i in np.flatnonzero(sites)))

    @property
    def sign(self) -> int:
        """Of a moved link in its active plaquette."""
        return 1 if self.direction == 0 else -1

    def apart(self, x: Array) -> tuple[Array, Array]:
        """The point with zeros in place of the links that move, and these (lines, sites) raveled."""
        links = x.reshape(2, *self.shape)
        return jnp.where(self.mask(), 0, x), self.rows(links[self.direction], 0).ravel()

    def together(self, kept: Array, moved: Array) -> Array:
        """The point with given links that move."""
        return jnp.where(self.mask(), self._spread(moved), kept)

    def rows(self, field: Array, step: int) -> Array:
        """Lines (lines, sites) of a field on the lattice, a step away from those that move."""
        field = jnp.moveaxis(field, 1 - self.direction, 0)
        lines = [(line + step) % len(field) for line in self.lines]
        return jnp.stack([field[line] for line in lines])

    def frozen_steps(self, reach: int) -> tuple[int, ...]:
        """Steps within reach that lead from each line to a frozen one, each line once."""
        num_lines = self.shape[1 - self.direction]
        touched = {line % num_lines for c in self.lines for line in (c, c - 1)}
        steps: dict[int, int] = {}
        for step in sorted(range(-reach, reach + 1), key=abs):
            if all((line + step) % num_lines not in touched for line in self.lines):
                steps.setdefault(step % num_lines, step)
        return tuple(sorted(steps.values()))

    def mask(self) -> np.ndarray:
        """Whether each entry of a point moves."""
        mask = np.zeros(self.dim, bool)
        mask[list(self.moved)] = True
        return mask

    def _spread(self, moved: Array) -> Array:
        """A point with the links that move in their place, and zeros."""
        num_lines, num_sites = self.shape[1 - self.direction], self.shape[self.direction]
        moved = moved.reshape(len(self.lines), num_sites)
        zeros, rows = jnp.zeros(num_sites, moved.dtype), dict(zip(self.lines, moved, strict=True))
        field = jnp.moveaxis(jnp.stack([rows.get(line, zeros) for line in range(num_lines)]), 0, 1 - self.direction)
        both = [field, jnp.zeros_like(field)] if self.direction == 0 else [jnp.zeros_like(field), field]
        return jnp.stack(both).ravel()


class PlaquetteConditioner(eqx.Module):
    """From the links that are kept to parameters of maps of the active plaquettes, and the rest of the sums of these.

    The same network is applied at each active plaquette, to cosines and sines of the frozen ones around it.
    """

    network: Conditioner
    stripes: Stripes
    reach: int = eqx.field(static=True)

    def __call__(self, kept: Array) -> tuple[Array, Array]:
        """Parameters (P, n), and the active plaquettes' angles without the links that move (n,)."""
        angles = plaquettes(jnp.where(self.stripes.mask(), 0, kept).reshape(2, *self.stripes.shape))
        params = jax.vmap(self.network, out_axes=1)(self._patches(angles))
        return params, self.stripes.rows(angles, 0).ravel()

    def _patches(self, angles: Array) -> Array:
        """Cosines and sines (n, features) of the frozen plaquettes around each active one."""
        lines = jnp.stack([self.stripes.rows(angles, step) for step in self.stripes.frozen_steps(self.reach)])
        waves = jnp.concatenate([jnp.cos(lines), jnp.sin(lines)])
        along = _steps_along(self.stripes, self.reach)
        near = jnp.stack([jnp.roll(waves, -step, axis=2) for step in along])
        return near.reshape(len(along) * len(waves), -1).T


def _steps_along(stripes: Stripes, reach: int) -> range:
    """Steps within reach along a line, each site once."""
    count = min(2 * reach + 1, stripes.shape[stripes.direction])
    return range(-(count // 2), count - count // 2)


class PlaquetteCoupling(AbstractCoupling):
    r"""Moves links of one direction on every fourth line, by maps of the circle of the plaquettes that they close.

    .. math:: P'_a = f(P_a; \phi_a(P_{\text{frozen}})), \qquad \theta'_a = \theta_a \pm (P'_a - P_a),

    with the sign of the link in the plaquette, and f the mixture of `CircularMixture`. As a function of its link each map has
    the slope :math:`f'(P_a)`: the layer is a coupling, and the score goes through it as through any other, over the linear map
    from links to plaquettes, without root finding.

    Parameters
    ----------
    key : key
    shape : pair of int
        The lattice, at least 3 x 3. Points are raveled links (2, L, T), as in `ergodica.models.zoo.u1_gauge`.
    direction : {0, 1}
        Of the links that move.
    offset : int
        The first line that moves.
    num_components : int
        Of the mixtures.
    reach : int
        How far away frozen plaquettes are seen, in lines and along them.
    width, depth, activation, start
        Of the network, see `Conditioner`.

    Raises
    ------
    ValueError, TypeError
        For a lattice on which nothing would be frozen.

    Notes
    -----
    Cost: one pass of the network at each active plaquette (a quarter of all), and their maps; with scores one derivative of
    both. The inverse finds roots. The density does not change under gauge transformations, nor under shifts by four lines.

    References
    ----------
    Kanwar, Albergo, Boyda, Cranmer, Hackett, Racanière, Rezende and Shanahan (2020).
    """

    conditioner: PlaquetteConditioner
    split: Stripes
    monotone: CircularMixture

    references: ClassVar[tuple[str, ...]] = ("kanwar2020", "rezende2020")

    def __init__(
        self,
        key: Key,
        shape: tuple[int, int],
        direction: int,
        offset: int,
        *,
        num_components: int = 6,
        reach: int = 3,
        width: int = 32,
        depth: int = 2,
        activation: Activation = tanh,
        start: float = START,
    ) -> None:
        shape = (check.integer("shape", shape[0], least=3), check.integer("shape", shape[1], least=3))
        check.integer("direction", direction, least=0, most=1)
        self.split = Stripes(shape, direction, check.integer("offset", offset, least=0))
        self.monotone = CircularMixture(num_components)
        reach = check.integer("reach", reach)
        seen = 2 * len(self.split.frozen_steps(reach)) * len(_steps_along(self.split, reach))
        network = Conditioner(key, seen, self.monotone.num_params, width, depth, activation, start)
        self.conditioner = PlaquetteConditioner(network, self.split, reach)

    def curve(self, x: Array, raw: tuple[Array, Array]) -> tuple[Array, Array]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move links by the maps of their plaquettes."""
        params, rest = raw
        angle = self.split.sign * x + rest
        new, slope = self.monotone.forward(angle, params)
        return wrap(x + self.split.sign * (new - angle)), slope

    def curve_inverse(self, y: Array, raw: tuple[Array, Array]) -> tuple[Array, Array]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move them back, by root finding."""
        params, rest = raw
        new = self.split.sign * y + rest
        angle, slope = self.monotone.inverse(new, params)
        return wrap(y + self.split.sign * (angle - new)), slope


def u1_flow(
    key: Key,
    size: int | Sequence[int] = 8,
    num_layers: int = 16,
    num_components: int = 6,
    *,
    reach: int = 3,
    width: int = 32,
    depth: int = 2,
    activation: Activation = tanh,
    start: float = START,
) -> Flow:
    """Gauge-equivariant flow for `ergodica.models.zoo.u1_gauge`: plaquette couplings on uniform angles.

    Directions alternate, and lines move on by one every second layer: where the sides are multiples of four, eight layers move
    every link once.

    Parameters
    ----------
    key : key
    size : int or pair of int
        Sides of the lattice, at least 3.
    num_layers : int
    num_components : int
        Of the mixtures at each plaquette.
    reach, width, depth, activation, start
        Of `PlaquetteCoupling`.

    Raises
    ------
    ValueError, TypeError
        For sides below 3.

    Notes
    -----
    Cost: see `PlaquetteCoupling`. Windings of links around the lattice stay uniform, as in the target.

    References
    ----------
    Kanwar et al. (2020).

    Examples
    --------
    >>> import jax
    >>> u1_flow(jax.random.key(0), size=4, num_layers=2, width=8).sample(jax.random.key(1), 3).shape
    (3, 32)
    """
    rng.check_key(key)
    pair = (size, size) if not isinstance(size, Sequence) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size must be an integer or a pair of them; got {size!r}.")
    shape = (check.integer("size", pair[0], least=3), check.integer("size", pair[1], least=3))
    settings = {"num_components": num_components, "reach": reach, "width": width, "depth": depth}
    layers = [
        PlaquetteCoupling(k, shape, i % 2, (i // 2) % max(shape), activation=activation, start=start, **settings)
        for i, k in enumerate(jax.random.split(key, check.integer("num_layers", num_layers)))
    ]
    return Flow(UniformTorus(2 * math.prod(shape)), *layers)
