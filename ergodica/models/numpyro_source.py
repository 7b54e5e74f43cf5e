"""Predictions and pointwise log likelihoods of a NumPyro model, from posterior draws."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer import Predictive

from ergodica.core import check, rng
from ergodica.core.types import Key, PyTree
from ergodica.models.numpyro_arguments import Arguments, is_array_like, to_rows
from ergodica.models.numpyro_plates import plate_size
from ergodica.models.numpyro_program import Program
from ergodica.models.numpyro_structure import reported_name

_DRAWS_AT_ONCE = 64


class NumPyroSource(eqx.Module):
    """What a posterior made by `ergodica.from_numpyro` keeps of its model, as ``posterior.source``.

    Attributes
    ----------
    program : Program
        The model with its arguments and data.
    others : tuple of Program
        The same for its other data plates, if it has several.
    """

    program: Program
    others: tuple[Program, ...] = ()

    def predictive(
        self, key: Key, samples: Mapping[str, Any], data: dict[str, Any] | None = None, *, batch_size: int = 1000
    ) -> dict[str, np.ndarray]:
        """Draw the observed sites anew, one replicate a posterior draw.

        Parameters
        ----------
        key : typed PRNG key
        samples : mapping of str to array (chain, draw, …)
            Constrained values; all latent sites must be there, and what else is there does not matter.
        data : dict, optional
            New data, with the names of the arguments that have one row a datum; the posterior's own unless given.
            Observations that are given are not looked at. Those that are left out are passed to the model as ``None``.
        batch_size : int
            Rows predicted in one go; it bounds the memory beside that of the result.

        Returns
        -------
        dict of str to array (chain, draw, rows, …)
            By observed site. Sites that do not belong to the data come without the axis of rows.

        Notes
        -----
        Runs `numpyro.infer.Predictive` on the model under `numpyro.handlers.uncondition`: observations are withheld by the
        handler, so that the model need not take ``y=None``, and subsampling is switched off. An observation that the
        model also uses elsewhere (as a covariate) is used there as given.
        """
        rng.check_key(key)
        program = self.program if data is None else self._with_data(data, withheld=True)
        samples, leading = self._flat(samples)

        def of_rows(rows: PyTree, i: int) -> dict[str, Array]:
            return _predict(program, jax.random.fold_in(key, i), samples, rows)

        return _by_chunks(program, of_rows, leading, batch_size)

    def log_likelihood(
        self, samples: Mapping[str, Any], data: dict[str, Any] | None = None, *, batch_size: int = 1000
    ) -> dict[str, np.ndarray]:
        """Log likelihood of each datum under each posterior draw.

        Parameters
        ----------
        samples, data, batch_size
            As in `predictive`; ``data`` (held-out data, say) must be complete.

        Returns
        -------
        dict of str to array (chain, draw, rows)
            By site that belongs to the data (factors inside the data plate too): their sum over sites is the log likelihood that
            was sampled, masks and scales included. Where enumerated sites are summed out, the observed sites have one
            term together, under their names joined by "+". Of several data plates, each has rows of its own.

        Raises
        ------
        ValueError
            For models with local latents: their draws are not stored, and without them a datum has no likelihood.
        """
        if self.program.structure.local:
            raise ValueError(
                f"The latent sites {[site.name for site in self.program.structure.local]} are local to the data and not among "
                "the draws, so a datum has no likelihood of its own. Integrate them out, or score predictions instead."
            )
        given, leading = self._flat(samples)
        programs = (self.program, *self.others) if data is None else (self._with_data(data, withheld=False),)
        terms: dict[str, np.ndarray] = {}
        for program in programs:

            def of_rows(rows: PyTree, i: int, program: Program = program) -> dict[str, Array]:  # noqa: ARG001
                return _pointwise(program, given, rows)

            terms |= _by_chunks(program, of_rows, leading, batch_size)
        return terms

    def _flat(self, samples: Mapping[str, Any]) -> tuple[dict[str, Array], tuple[int, int]]:
        names = {name: reported_name(name) for name, _ in self.program.structure.latents}
        missing = [name for name in names.values() if name not in samples]
        if missing:
            raise ValueError(
                f"samples must hold every latent site of the model, {list(names.values())}; it misses {missing}."
            )
        values = {site: np.asarray(samples[name]) for site, name in names.items()}
        leading = {value.shape[:2] for value in values.values()}
        if len(leading) != 1 or any(value.ndim < 2 for value in values.values()):
            raise ValueError(f"samples must have the leading axes (chain, draw), all alike; got {sorted(leading)}.")
        (shape,) = leading
        return {name: jnp.asarray(x.reshape(-1, *x.shape[2:])) for name, x in values.items()}, shape

    def _with_data(self, data: dict[str, Any], *, withheld: bool) -> Program:
        """Replace the data; what is missing becomes ``None`` where observations may be withheld."""
        program, plate = self.program, self.program.structure.plate
        if self.others:
            plates = [program.structure.plate for program in (self.program, *self.others)]
            raise ValueError(f"data cannot be replaced where several plates hold them: {plates}.")
        old = _data_arguments(program)
        given = {name: to_rows(name, value) for name, value in data.items()}
        known = old if plate is None else program.arguments.keyword()
        for name in given:
            if name not in known:
                raise ValueError(f"data has the unknown name {name!r}; the model's data are {sorted(known)}.")
        missing = [name for name in old if name not in given]
        if missing and not withheld:
            raise ValueError(f"data must hold all arrays with one row a datum, {sorted(old)}; it misses {missing}.")
        rows, arguments = {**dict.fromkeys(missing), **given}, program.arguments
        if plate is None:
            num_data = check.leading_length("data", rows)
        else:
            arguments = Arguments({**arguments.keyword(), **rows})
            num_data = plate_size(program.model, arguments, plate)
            rows = jnp.arange(num_data)
        structure = dataclasses.replace(program.structure, num_data=num_data)
        return Program(program.model, arguments, rows, structure)


def _data_arguments(program: Program) -> dict[str, Any]:
    """Arguments with one row a datum: those named, or those whose leading axis has the size of the data plate."""
    if program.structure.plate is None:
        return dict(program.rows)
    n = program.structure.num_data
    keyword = program.arguments.keyword()
    return {name: x for name, x in keyword.items() if is_array_like(x) and x.shape[:1] == (n,)}


def _by_chunks(
    program: Program, of_rows: Callable[[PyTree, int], dict[str, Array]], leading: tuple[int, int], batch_size: int
) -> dict[str, np.ndarray]:
    """Evaluate chunk after chunk of the data into arrays on the host."""
    n = program.structure.num_data
    not_in_data = set(program.structure.global_observed)
    results: dict[str, np.ndarray] = {}
    for i, (begin, end) in enumerate(_chunks(n, check.integer("batch_size", batch_size))):
        rows = jax.tree.map(lambda x: x[begin:end], program.rows)  # noqa: B023
        for name, value in jax.device_get(of_rows(rows, i)).items():
            if name in not_in_data:
                results.setdefault(name, value.reshape(*leading, *value.shape[1:]))
                continue
            if name not in results:
                results[name] = np.empty((value.shape[0], n, *value.shape[2:]), value.dtype)
            results[name][:, begin:end] = value
    shaped = {name: x.reshape(*leading, *x.shape[1:]) for name, x in results.items() if name not in not_in_data}
    return {reported_name(name): x for name, x in {**results, **shaped}.items()}


def _chunks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut into chunks of one length; the last begins early, so that it has it too (and nothing is compiled twice)."""
    size = min(size, n)
    for begin in range(0, n, size):
        begin = min(begin, n - size)
        yield begin, begin + size


@jax.jit
def _predict(program: Program, key: Key, samples: dict[str, Array], rows: PyTree) -> dict[str, Array]:
    model, keyword = program.bind(rows)
    predictive = Predictive(
        handlers.uncondition(model), posterior_samples=samples, return_sites=program.structure.observed
    )
    return jax.vmap(program.leading_rows)(predictive(key, **keyword))


@jax.jit
def _pointwise(program: Program, samples: dict[str, Array], rows: PyTree) -> dict[str, Array]:
    def of_draw(sample: dict[str, Array]) -> dict[str, Array]:
        return program.marginal_terms(sample, rows)

    return jax.lax.map(of_draw, samples, batch_size=_DRAWS_AT_ONCE)
