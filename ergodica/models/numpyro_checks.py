"""Checks, on a few rows at one position, that a NumPyro model is what its shapes say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.types import Position, PyTree
from ergodica.models.numpyro_latents import num_combinations
from ergodica.models.numpyro_program import Program, log_prob
from ergodica.models.numpyro_structure import listed

_RELATIVE_DIFFERENCE = 1e-2
"""What one row may gain or lose by company before the likelihood counts as not factorising: far above rounding."""


def check_factorises(program: Program) -> None:
    """Raise unless a datum's value is the same alone and in company, and what is inside the data plate stays there."""
    position = program.start_uniform(jax.random.key(0))
    num_data = program.structure.num_data
    chosen = np.unique(np.linspace(0, num_data - 1, 4).astype(int))
    rows = jax.tree.map(lambda x: x[chosen], program.rows)
    together, alone, global_terms = jax.device_get(_alone_and_together(program, position, rows))
    if not _alike(together, alone):
        raise ValueError(
            "The likelihood does not factorise by datum: the log likelihood of a row changes with the rows beside it. Work out "
            "what depends on all the data (means for standardising, sizes) before, and pass it as an argument."
        )
    for name, (values_together, values_alone) in global_terms.items():
        if not _alike(values_together, values_alone):
            raise ValueError(
                f"The likelihood does not factorise by datum: the site {name!r} depends on the data but has no term for each "
                "datum. Give a factor one value a datum, inside the data plate, instead of their sum."
            )
    if program.structure.enumerated or program.structure.local:
        _check_hidden_stay_inside(program, position)


def _check_hidden_stay_inside(program: Program, position: Position) -> None:
    hidden = [site.name for site in (*program.structure.enumerated, *program.structure.local)]
    for name, (value, other) in jax.device_get(_outside(program, position)).items():
        if not _alike(value, other):
            raise ValueError(
                f"The site {name!r} is outside the data plate but depends on the latent sites {listed(hidden)} inside it, so that "
                "they tie all data together. Move it into the data plate; a deterministic site there is not reported."
            )


@jax.jit
def _alone_and_together(
    program: Program, position: Position, rows: PyTree
) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    latents = _some_latents(program, jax.tree.leaves(rows)[0].shape[0])

    def evaluate(rows: PyTree, latents: Position) -> tuple[Array, dict[str, Array]]:
        values = program.log_joint(position, latents, rows)
        return values, program.global_terms(position, rows)

    def one_row(row: PyTree, latent: Position) -> tuple[Array, dict[str, Array]]:
        value, terms = evaluate(*jax.tree.map(lambda x: x[None], (row, latent)))
        return value[0], terms

    alone, global_alone = jax.vmap(one_row)(rows, latents)
    together, global_together = evaluate(rows, latents)
    return together, alone, {name: (x, global_alone[name]) for name, x in global_together.items()}


@jax.jit
def _outside(program: Program, position: Position) -> dict[str, tuple[Array, Array]]:
    """Log probabilities and deterministic values outside the data plate, for two values of the latents inside."""
    structure = program.structure
    inside = {site.name for site in structure.data_sites}

    def evaluate(local: Position, combination: int) -> dict[str, Array]:
        sites = program.at({**position, **local}, program.rows, combination)
        terms = {
            name: jnp.sum(log_prob(site))
            for name, site in sites.items()
            if site["type"] == "sample" and name not in inside
        }
        return terms | {name: sites[name]["value"] for name in structure.deterministics}

    first = evaluate({}, 0)
    last = evaluate(
        program.local(_some_latents(program, structure.num_data)), num_combinations(structure.enumerated) - 1
    )
    return {name: (first[name], last[name]) for name in first}


def _some_latents(program: Program, num_rows: int) -> Position:
    sites = program.structure.local
    keys = jax.random.split(jax.random.key(1), len(sites)) if sites else ()
    return {site.name: jax.random.normal(key, (num_rows, *site.shape)) for site, key in zip(sites, keys, strict=True)}


def _alike(a: Any, b: Any) -> bool:
    scale = max(1.0, float(np.max(np.abs(b), where=np.isfinite(b), initial=0.0)))
    return bool(np.allclose(a, b, rtol=0.0, atol=_RELATIVE_DIFFERENCE * scale, equal_nan=True))
