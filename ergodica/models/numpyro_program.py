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
from ergodica.models.numpyro_latents import num_combinations
from ergodica.models.numpyro_structure import Structure, reported_name
from ergodica.models.numpyro_trace import bind, feasible, log_det_name

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

    def log_prior(self, position: Position, elsewhere: tuple[str, ...] = ()) -> Array:
        """Sum the terms of all sites that do not belong to the data, Jacobians included, save those named."""
        left_out = {site.name for site in self.structure.data_sites} | set(elsewhere)
        sites = self.at(position, self.rows)
        return sum_terms(
            jnp.sum(log_prob(site)) for name, site in sites.items() if site["type"] == "sample" and name not in left_out
        )

    def log_likelihood(self, position: Position, rows: PyTree) -> Array:
        """Log likelihood of each datum (n,), enumerated sites summed out."""
        return self._by_pieces(lambda piece: self._marginal(self._sites_at(position), piece), rows)

    def log_joint(self, position: Position, latents: Position, rows: PyTree) -> Array:
        """Log density (n,) of each datum together with its local latents, unconstrained, one row a datum."""

        def of_piece(piece: PyTree) -> Array:
            rows, latents = piece
            return self._marginal(self._sites_at({**position, **self.local(latents)}), rows)

        return self._by_pieces(of_piece, (rows, latents))

    def local(self, latents: Position) -> Position:
        """Local latents as the model has them, from one row a datum."""
        return {site.name: jnp.moveaxis(latents[site.name], 0, site.axis) for site in self.structure.local}

    def marginal_terms(self, values: dict[str, Array], rows: PyTree) -> dict[str, Array]:
        """Log likelihood of each datum (n,) at constrained values, by site; sites that enumerated ones may tie count as one."""

        def substituted(model: Callable) -> Callable:
            return handlers.substitute(model, data=values)

        if self.structure.enumerated:
            observed = [site.name for site in self.structure.data_sites if site.name in self.structure.observed]
            name = "+".join(observed) or self.structure.data_sites[-1].name
            return {name: self._marginal(lambda rows, combination: self.trace(substituted, rows, combination), rows)}
        return self.terms_of_data(self.trace(substituted, rows))

    def terms_of_data(self, sites: Sites) -> dict[str, Array]:
        """Log probability of each datum (n,) for every site that belongs to the data."""
        return {site.name: _per_datum(log_prob(sites[site.name]), site.axis) for site in self.structure.data_sites}

    def global_terms(self, position: Position, rows: PyTree, combination: Array | int = 0) -> dict[str, Array]:
        """Log probabilities (scalars) of the observed sites that count as prior."""
        sites = self.at(position, rows, combination)
        return {name: jnp.sum(log_prob(sites[name])) for name in self.structure.global_observed}

    def constrain(self, position: Position) -> dict[str, Array]:
        """Latent values on the scale of the model, and deterministic sites, under the names to report."""
        sites = self.at(position, self.rows)
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
        sites = self.at(feasible, self.rows)
        values = self.leading_rows({name: _observed_value(sites[name]) for name in self.structure.observed})
        return {reported_name(name): x for name, x in values.items()}

    def leading_rows(self, values: dict[str, Array]) -> dict[str, Array]:
        """Bring the axis of the data to the front."""
        axes = {site.name: site.axis - site.event_dim for site in self.structure.data_sites}
        return {name: jnp.moveaxis(x, axes[name], 0) if name in axes else x for name, x in values.items()}

    def reported_data_sites(self) -> list[str]:
        """Names under which the sites that belong to the data are reported."""
        return [reported_name(site.name) for site in self.structure.data_sites]

    def bind(self, rows: PyTree) -> tuple[Callable, dict[str, Any]]:
        """Give the model that sees some rows, and its arguments."""
        return bind(self.model, self.arguments, self.structure.plate, rows)

    def trace(self, wrap: Callable[[Callable], Callable], rows: PyTree, combination: Array | int = 0) -> Sites:
        """Run the model on some rows under a handler.

        Enumerated sites take the values with number ``combination``. Local latents that the handler does not set are at
        their origin, and a fixed key answers what the model asks a key for beside samples: initial values of `numpyro.param`.
        """

        def value_of_hidden(site: dict[str, Any]) -> Array | None:
            return self._value_of_hidden(site, combination)

        model, keyword = self.bind(rows)
        model = wrap(handlers.substitute(model, substitute_fn=value_of_hidden)) if self._hides() else wrap(model)
        model = handlers.seed(model, 0, hide_types=["sample", "plate", "control_flow"])
        return handlers.trace(model).get_trace(**keyword)

    def _hides(self) -> bool:
        return bool(self.structure.enumerated or self.structure.local)

    def _value_of_hidden(self, site: dict[str, Any], combination: Array | int) -> Array | None:
        if site["type"] != "sample":
            return None
        for enumerated in self.structure.enumerated:
            if site["name"] == enumerated.name:
                shape = (*site["kwargs"]["sample_shape"], *site["fn"].shape())
                return enumerated.value(site["fn"], shape, jnp.asarray(combination))
            combination = combination // enumerated.num_combinations
        return feasible(site) if site["name"] in [local.name for local in self.structure.local] else None

    def _marginal(self, sites_at: Callable[[PyTree, Array | int], Sites], rows: PyTree) -> Array:
        """Sum the terms of each datum (n,) over sites, and their exponentials over the values of the enumerated ones."""

        def joint(combination: Array | int) -> Array:
            return sum_terms(self.terms_of_data(sites_at(rows, combination)).values())

        if not self.structure.enumerated:
            return joint(0)
        combinations = jnp.arange(num_combinations(self.structure.enumerated))
        return jax.nn.logsumexp(jax.vmap(joint)(combinations), axis=0)

    def _by_pieces(self, of_rows: Callable[[PyTree], Array], rows: PyTree) -> Array:
        """Evaluate (n,) values: by pieces where `numpyro.subsample` would take as many rows as data for all of them."""
        num_rows, limit = leading_length(rows), self.structure.num_data - 1
        if not self.structure.gathers or num_rows <= limit or limit < 1:
            return of_rows(rows)
        pieces = [jax.tree.map(lambda x: x[i : i + limit], rows) for i in range(0, num_rows, limit)]  # noqa: B023
        return jnp.concatenate([of_rows(piece) for piece in pieces])

    def _sites_at(self, position: Position) -> Callable[[PyTree, Array | int], Sites]:
        return lambda rows, combination: self.at(position, rows, combination)

    def at(self, position: Position, rows: PyTree, combination: Array | int = 0) -> Sites:
        """Run the model at an unconstrained position."""

        def substitute_fn(site: dict[str, Any]) -> Array | None:
            return _from_unconstrained(position, site)

        return self.trace(lambda model: handlers.substitute(model, substitute_fn=substitute_fn), rows, combination)

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
    numpyro.factor(log_det_name(site["name"]), log_det)
    return value


def _draw_latent(site: dict[str, Any]) -> Array | None:
    if site["type"] != "sample" or site["value"] is not None:
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
