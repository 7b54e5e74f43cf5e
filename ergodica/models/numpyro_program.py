"""A NumPyro model with its arguments, evaluated at unconstrained positions: prior and data apart."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost

from ergodica.core.types import Key, Position, PyTree
from ergodica.models.numpyro_arguments import Arguments
from ergodica.models.numpyro_structure import Structure, reported_name
from ergodica.models.numpyro_trace import bind

type Sites = dict[str, dict[str, Any]]
"""Of a trace: the record of each site by name."""

_START_RADIUS = 2.0


class Program(eqx.Module):
    """A NumPyro model, its arguments, all its data, and the knowledge which site belongs to them.

    `numpyro.param` sites are held at their initial values, as NumPyro's own MCMC holds them.
    """

    model: Callable = eqx.field(static=True)
    arguments: Arguments
    rows: PyTree
    structure: Structure = eqx.field(static=True)

    def log_prior(self, position: Position) -> Array:
        """Sum the terms of all sites that do not belong to the data, Jacobians included."""
        data_sites = {site.name for site in self.structure.data_sites}
        sites = self._at(position, self.rows)
        return sum_terms(
            jnp.sum(log_prob(site))
            for name, site in sites.items()
            if site["type"] == "sample" and name not in data_sites
        )

    def log_likelihood(self, position: Position, rows: PyTree) -> Array:
        """Sum the terms of each datum (n,)."""
        num_rows, limit = leading_length(rows), self.structure.num_data - 1
        if self.structure.gathers and num_rows > limit >= 1:
            # from num_data rows on, numpyro.subsample leaves the rows as they are instead of gathering
            pieces = [rows[i : i + limit] for i in range(0, num_rows, limit)]
            return jnp.concatenate([self.log_likelihood(position, piece) for piece in pieces])
        terms = self.terms_of_data(self._at(position, rows))
        return sum_terms(terms.values())

    def terms_of_data(self, sites: Sites) -> dict[str, Array]:
        """Log likelihood of each datum (n,) for every site that belongs to the data."""
        return {site.name: _per_datum(log_prob(sites[site.name]), site.axis) for site in self.structure.data_sites}

    def global_terms(self, position: Position, rows: PyTree) -> list[Array]:
        """Log probabilities (scalars) of the observed sites that count as prior."""
        sites = self._at(position, rows)
        return [jnp.sum(log_prob(sites[name])) for name in self.structure.global_observed]

    def constrain(self, position: Position) -> dict[str, Array]:
        """Latent values on the scale of the model, and deterministic sites, under the names to report."""
        sites = self._at(position, self.rows)
        latents = [name for name, _ in self.structure.latents]
        return {reported_name(name): sites[name]["value"] for name in (*latents, *self.structure.deterministics)}

    def unconstrain(self, values: dict[str, Array]) -> Position:
        """Invert `constrain` for the latent sites."""
        return self._unconstrained(self.trace(lambda model: handlers.substitute(model, data=values), self.rows))

    def start_uniform(self, key: Key) -> Position:
        """Draw every unconstrained coordinate from the uniform law on (-2, 2)."""
        latents = self.structure.latents
        return {
            name: jax.random.uniform(k, shape, minval=-_START_RADIUS, maxval=_START_RADIUS)
            for k, (name, shape) in zip(jax.random.split(key, len(latents)), latents, strict=True)
        }

    def start_prior(self, key: Key) -> Position:
        """Draw from the prior."""

        def drawn(model: Callable) -> Callable:
            return handlers.substitute(handlers.seed(model, key), substitute_fn=_draw_latent)

        return self._unconstrained(self.trace(drawn, self.rows))

    def observed(self) -> dict[str, Array]:
        """Values of all observed sites; where a site belongs to the data, these run along the leading axis."""
        feasible = {name: jnp.zeros(shape) for name, shape in self.structure.latents}
        sites = self._at(feasible, self.rows)
        values = self.leading_rows({name: _observed_value(sites[name]) for name in self.structure.observed})
        return {reported_name(name): x for name, x in values.items()}

    def leading_rows(self, values: dict[str, Array]) -> dict[str, Array]:
        """Bring the axis of the data to the front."""
        axes = {site.name: site.axis - site.event_dim for site in self.structure.data_sites}
        return {name: jnp.moveaxis(x, axes[name], 0) if name in axes else x for name, x in values.items()}

    def bind(self, rows: PyTree) -> tuple[Callable, dict[str, Any]]:
        """Give the model that sees some rows, and its arguments."""
        return bind(self.model, self.arguments, self.structure.plate, rows)

    def trace(self, wrap: Callable[[Callable], Callable], rows: PyTree) -> Sites:
        """Run the model on some rows under a handler.

        A fixed key answers what the model asks a key for beside samples: initial values of `numpyro.param`.
        """
        model, keyword = self.bind(rows)
        model = handlers.seed(wrap(model), 0, hide_types=["sample", "plate", "control_flow"])
        return handlers.trace(model).get_trace(**keyword)

    def _at(self, position: Position, rows: PyTree) -> Sites:
        def substitute_fn(site: dict[str, Any]) -> Array | None:
            return _from_unconstrained(position, site)

        return self.trace(lambda model: handlers.substitute(model, substitute_fn=substitute_fn), rows)

    def _unconstrained(self, sites: Sites) -> Position:
        return {
            name: biject_to(sites[name]["fn"].support).inv(sites[name]["value"]) for name, _ in self.structure.latents
        }


def log_prob(site: dict[str, Any]) -> Array:
    """Log probability of the value at a site, over its batch shape."""
    value = site["fn"].log_prob(site["value"])
    return value if site["scale"] is None else value * site["scale"]


def sum_terms(terms: Iterable[Array]) -> Array:
    """Add arrays of one shape and dtype."""
    return functools.reduce(operator.add, terms)


def leading_length(rows: PyTree) -> int:
    """Count rows."""
    return jax.tree.leaves(rows)[0].shape[0]


def _per_datum(values: Array, axis: int) -> Array:
    values = jnp.moveaxis(values, axis, 0)
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def _from_unconstrained(position: Position, site: dict[str, Any]) -> Array | None:
    """Value of a latent site; its log Jacobian is added as a factor where the site stands (plates, masks and all)."""
    if site["type"] != "sample" or site["name"] not in position:
        return None
    transform, x = biject_to(site["fn"].support), position[site["name"]]
    value = transform(x)
    log_det = transform.log_abs_det_jacobian(x, value)
    log_det = sum_rightmost(log_det, log_det.ndim - value.ndim + site["fn"].event_dim)
    numpyro.factor(f"_{site['name']}_log_det", log_det)
    return value


def _draw_latent(site: dict[str, Any]) -> Array | None:
    if site["type"] != "sample" or site["is_observed"]:
        return None
    try:
        return site["fn"](**site["kwargs"])
    except NotImplementedError as error:
        raise ValueError(
            f"initial='prior' needs a prior that can be sampled, and that of the site {site['name']!r}, "
            f"{type(site['fn']).__name__}, cannot. Use initial='uniform'."
        ) from error


def _observed_value(site: dict[str, Any]) -> Array:
    shape = jnp.broadcast_shapes(jnp.shape(site["value"]), site["fn"].shape())
    return jnp.broadcast_to(site["value"], shape)
