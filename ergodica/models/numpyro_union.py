"""NumPyro models with several data plates side by side."""

from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Position
from ergodica.models.numpyro_program import Program


class Union(eqx.Module):
    """Programs that are alike but for their data plate: a row is an index of one of the plates, counted through.

    The likelihood is the sum over the first plate's data, then over the second's, and so on. A row's value is worked out in
    every plate, at an index clipped to it, and the one that the row belongs to is chosen: a batch costs as much as
    one batch in each plate.
    """

    programs: tuple[Program, ...]

    def log_prior(self, position: Position) -> Array:
        """Sum the terms of the sites that are in none of the plates."""
        elsewhere = [site.name for program in self.programs for site in program.structure.data_sites]
        return self.programs[0].log_prior(position, tuple(elsewhere))

    def log_likelihood(self, position: Position, rows: Array) -> Array:
        """Log likelihood of each row (n,)."""
        values = None
        for program, first in self._with_first_row():
            index = jnp.clip(rows - first, 0, program.structure.num_data - 1)
            here = program.log_likelihood(position, index)
            values = here if values is None else jnp.where(rows < first, values, here)
        assert values is not None
        return values

    def observed(self) -> dict[str, Array]:
        """Values of all observed sites; where a site belongs to the data, these run along the leading axis."""
        observed = self.programs[0].observed()
        for program in self.programs[1:]:
            own = program.observed()
            observed |= {name: own[name] for name in program.reported_data_sites() if name in own}
        return observed

    @property
    def rows(self) -> Array:
        """All rows."""
        return jnp.arange(sum(program.structure.num_data for program in self.programs))

    def _with_first_row(self) -> Iterator[tuple[Program, int]]:
        first = 0
        for program in self.programs:
            yield program, first
            first += program.structure.num_data
