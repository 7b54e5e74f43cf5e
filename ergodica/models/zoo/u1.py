r"""U(1) lattice gauge theory in two dimensions."""

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.models.lattice import gauge_transform, plaquettes, wrap
from ergodica.models.zoo import u1_reference
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue, finite_float

_TURN = 2 * math.pi


class U1Gauge(AbstractTarget):
    r"""Angles on the links of a periodic square lattice; made by `u1_gauge`.

    .. math:: \log\pi(\theta) = -S(\theta) = \beta \sum_x \cos P(x), \qquad
              P(x) = \theta_0(x) + \theta_1(x + \hat 0) - \theta_0(x + \hat 1) - \theta_1(x)

    Points are arrays (2 L T,) of angles: the links in direction 0 site by site, row by row, then those in direction 1.
    """

    dim: int = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    beta: float = eqx.field(static=True)

    source: ClassVar[str] = "Kanwar et al. (2020); Vaitl et al. (2024)."
    licence: ClassVar[str] = "A formula; no data."
    references: ClassVar[tuple[str, ...]] = ("kanwar2020", "migdal1975")

    def __init__(self, shape: tuple[int, int], beta: float) -> None:
        self.shape, self.beta = shape, beta
        self.dim = 2 * shape[0] * shape[1]

    @property
    def num_plaquettes(self) -> int:
        """L T."""
        return self.dim // 2

    def plaquettes(self, x: Array) -> Array:
        """Plaquette angles (L, T) of one point, in [-pi, pi)."""
        return wrap(plaquettes(x.reshape(2, *self.shape)))

    def log_density(self, x: Array) -> Array:
        """-S."""
        return self.beta * jnp.sum(jnp.cos(plaquettes(x.reshape(2, *self.shape))))

    def score(self, x: Array) -> Array:
        """The force, by the transpose of the sums around squares."""
        sines = -self.beta * jnp.sin(plaquettes(x.reshape(2, *self.shape)))
        return jnp.stack([sines - jnp.roll(sines, 1, axis=1), jnp.roll(sines, 1, axis=0) - sines]).ravel()

    def topological_charge(self, x: Array) -> Array:
        r""":math:`Q = \frac{1}{2\pi} \sum_x P(x)` with :math:`P \in [-\pi, \pi)`: an integer, as a float."""
        return jnp.round(jnp.sum(self.plaquettes(x)) / _TURN)

    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars of one point; see `u1_gauge`."""
        angle = self.plaquettes(x)
        pairs = angle + jnp.roll(angle, -1, axis=0)
        charge = self.topological_charge(x)
        return {
            "plaquette": jnp.mean(jnp.cos(angle)),
            "wilson_loop[2x2]": jnp.mean(jnp.cos(pairs + jnp.roll(pairs, -1, axis=1))),
            "topological_charge": charge,
            "topological_susceptibility": charge**2 / self.num_plaquettes,
            "zero_charge": (charge == 0).astype(x.dtype),
        }

    @property
    def log_normaliser(self) -> ReferenceValue:
        """The character expansion, over all 2 L T angles from -pi to pi."""
        return ReferenceValue(u1_reference.log_partition(self.beta, self.num_plaquettes))

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Character expansions and a quadrature in one dimension."""
        beta, count = self.beta, self.num_plaquettes
        charges, probabilities = u1_reference.charge_law(beta, count)
        values = {
            "plaquette": u1_reference.wilson_loop(beta, count),
            "wilson_loop[2x2]": u1_reference.wilson_loop(beta, count, 4),
            "topological_charge": 0.0,
            "topological_susceptibility": u1_reference.mean_square_charge(beta, count) / count,
            "zero_charge": float(probabilities[charges == 0][0]),
        }
        return {name: ReferenceValue(value) for name, value in values.items()}

    def start(self, key: Key) -> Array:
        """Draw uniform angles."""
        return jax.random.uniform(key, (self.dim,), minval=-math.pi, maxval=math.pi)

    @property
    def has_draws(self) -> bool:
        """Always."""
        return True

    def _draws(self, key: Key, num_draws: int) -> Array:
        key_plaquettes, key_links = jax.random.split(key)
        angles = _draw_plaquettes(key_plaquettes, self.beta, num_draws, self.num_plaquettes)
        return _links_of(key_links, angles.reshape(num_draws, *self.shape)).reshape(num_draws, self.dim)


def u1_gauge(size: int | Sequence[int] = 8, beta: float = 3.0) -> U1Gauge:
    r"""U(1) gauge theory on a periodic lattice of L x T sites, with every reference in closed form.

    .. math:: \pi(\theta) \propto \exp\Big( \beta \sum_x \cos P(x) \Big), \qquad
              P(x) = \theta_0(x) + \theta_1(x + \hat 0) - \theta_0(x + \hat 1) - \theta_1(x)

    Parameters
    ----------
    size : int or pair of int
        L, or (L, T); at least 2.
    beta : float
        Inverse coupling, at least 0; larger values freeze the topological charge of chains that move locally.

    Returns
    -------
    U1Gauge
        A target of dimension 2 L T.

    Raises
    ------
    ValueError, TypeError
        For sizes below 2 or a negative beta.

    Notes
    -----
    Observables: ``plaquette``, the mean of cos P; ``wilson_loop[2x2]``, that of the cosine around squares of four plaquettes;
    ``topological_charge``, :math:`Q = \sum_x P(x)/2\pi` of angles in :math:`[-\pi, \pi)` (0 in the mean);
    ``topological_susceptibility``, :math:`Q^2/LT`; ``zero_charge``, whether Q = 0, which shows charges that were dropped.

    Exact draws: plaquette angles are independent von Mises but for their sum, which is met by rejection (accepted at a rate of
    about :math:`e^{-\beta} I_0(\beta) \approx (2\pi\beta)^{-1/2}`); links follow from them up to the gauge and two windings,
    which are uniform. The density is flat along L T + 1 directions (gauge, windings): samplers that need a proper density on
    R^D must wrap the angles.

    References
    ----------
    Migdal (1975); Kanwar, Albergo, Boyda, Cranmer, Hackett, Racanière, Rezende and Shanahan (2020).

    Examples
    --------
    >>> import jax
    >>> target = u1_gauge(8, beta=3.0)
    >>> target.dim, round(target.reference["plaquette"].value, 4)
    (128, 0.81)
    >>> target.draws(jax.random.key(0), 5).shape
    (5, 128)
    """
    pair = (size, size) if not isinstance(size, Sequence) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size must be an integer or a pair of them; got {size!r}.")
    shape = (check.integer("size", pair[0], least=2), check.integer("size", pair[1], least=2))
    return U1Gauge(shape, finite_float("beta", beta, least=0.0))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_plaquettes(key: Key, beta: float, num_draws: int, count: int) -> Array:
    """Von Mises angles (num_draws, count), each row given that its sum is a multiple of a turn, by rejection with the last."""

    def body(state: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        key, out, filled = state
        key, key_angle, key_accept = jax.random.split(key, 3)
        free = _von_mises(key_angle, beta, (num_draws, count - 1))
        last = wrap(-jnp.sum(free, axis=1))
        accept = jnp.log(jax.random.uniform(key_accept, (num_draws,))) < beta * (jnp.cos(last) - 1)
        slot = jnp.where(accept, filled + jnp.cumsum(accept, dtype=jnp.int32) - 1, num_draws)
        rows = jnp.concatenate([free, last[:, None]], axis=1)
        return key, out.at[slot].set(rows, mode="drop"), filled + jnp.sum(accept, dtype=jnp.int32)

    start = (key, jnp.zeros((num_draws, count)), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda state: state[2] < num_draws, body, start)[1]


def _von_mises(key: Key, beta: float, shape: tuple[int, int]) -> Array:
    if beta == 0:
        return jax.random.uniform(key, shape, minval=-math.pi, maxval=math.pi)
    from numpyro import distributions as dist

    return dist.VonMises(0.0, beta).sample(key, shape)


def _links_of(key: Key, angles: Array) -> Array:
    """Links (n, 2, L, T) with given plaquette angles (n, L, T), windings and gauge uniform."""
    key_winding, key_gauge = jax.random.split(key)
    winding = jax.random.uniform(key_winding, (len(angles), 2), minval=-math.pi, maxval=math.pi)
    turns = jax.random.uniform(key_gauge, angles.shape, minval=-math.pi, maxval=math.pi)
    columns = jnp.sum(angles, axis=1)
    first = jnp.zeros_like(angles).at[:, -1, :].set(winding[:, :1] + columns - jnp.cumsum(columns, axis=1))
    second = jnp.cumsum(angles, axis=1) - angles
    second = second.at[:, :, 0].add(winding[:, 1:])
    return wrap(jax.vmap(gauge_transform)(jnp.stack([first, second], axis=1), turns))
