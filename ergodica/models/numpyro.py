"""Posteriors from NumPyro models."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.core.types import Position, PyTree
from ergodica.models.numpyro_arguments import Arguments, to_rows
from ergodica.models.numpyro_program import Program
from ergodica.models.numpyro_source import NumPyroSource
from ergodica.models.numpyro_start import resolve
from ergodica.models.numpyro_structure import axis_names, classify_rows_as_arguments, classify_rows_as_indices

_RELATIVE_DIFFERENCE = 1e-2
"""What one row may gain or lose by company before the likelihood counts as not factorising: far above rounding."""


def from_numpyro(
    model: Callable,
    data: dict[str, Any] | None = None,
    *,
    args: Sequence[Any] = (),
    plate: str | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    initial: Any = "uniform",
    deterministic: Literal["global", "all", "none"] = "global",
    **kwargs: Any,
) -> Posterior:
    """Make a posterior from a NumPyro model, split exactly into log prior and one log likelihood value a datum.

    Parameters
    ----------
    model : callable
        With sample, plate, factor and deterministic statements, handlers and reparameterisations at will. Latent sites
        are continuous and global; discrete ones are to be marginalised.
    data : dict of str to array, optional
        The model's arguments that have one row a datum, by name: batches are rows of them. The model may use a plate over the
        data or none. Left out, the model must have a ``plate(name, N, subsample_size=n)`` of its own and pick rows by its
        indices: batches are indices. The first is faster, since batches can be contiguous in memory.
    args : sequence, optional
        Other arguments of the model, by position.
    plate : str, optional
        The data plate, where the model has one without ``subsample_size`` whose indices it uses.
    dims : mapping of str to sequence of str, optional
        Names of axes, beside those that plates and ``infer={"event_dims": [...]}`` give.
    coords : mapping of str to sequence, optional
        Labels along axes.
    initial : {"uniform", "prior"}, StartAt, StartFromGuide or callable
        Where chains start: uniformly on (-2, 2) in each unconstrained coordinate, at a draw from the prior, at
        ``start_at(constrained=...)`` or ``start_at(unconstrained=...)``, at draws of a fitted guide,
        ``start_from_guide(guide, params)`` (both in `ergodica.models`), or where a function of a key says (an unconstrained
        dict).
    deterministic : {"global", "all", "none"}
        Which deterministic sites to report: those without an axis that runs over the data, all, or none.
    **kwargs
        Other arguments of the model. Arrays (NumPy's are converted) may change without compiling anew; all else is
        static.

    Returns
    -------
    Posterior
        Positions are dicts of the latent sites in unconstrained space. ``posterior.source`` predicts and evaluates pointwise log
        likelihoods (`NumPyroSource`).

    Raises
    ------
    ValueError, TypeError
        For models whose likelihood does not split into data (local latents in the data plate, `scan`, joint laws over the
        data, batch statistics), discrete latents, several subsampled plates, data of unequal length, names that the model does
        not have, or a model that needs the values of its arguments while it is traced.

    Notes
    -----
    The sum of both parts is minus NumPyro's potential energy. Which sites belong to the data is found from shapes, by
    tracing the model at two data lengths, and nothing is sampled, so that improper priors are no obstacle. On a few rows it
    is then checked that each datum's value does not depend on the company it is in. `numpyro.param` sites are held at their
    initial values, as in NumPyro's MCMC.

    A prior that depends on the data is evaluated with all of them at every gradient, and costs accordingly; so does anything
    observed outside the data plate. Not for time series and Gaussian processes, whose likelihood has no terms for single data.

    Examples
    --------
    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> def model(x, y):
    ...     slope = numpyro.sample("slope", dist.Normal())
    ...     sigma = numpyro.sample("sigma", dist.HalfNormal())
    ...     with numpyro.plate("data", x.shape[0]):
    ...         numpyro.sample("y", dist.Normal(slope * x, sigma), obs=y)
    >>> x = jnp.array([0.0, 1.0, 2.0])
    >>> posterior = from_numpyro(model, data=dict(x=x, y=2 * x))
    >>> posterior.num_data, sorted(posterior.shape())
    (3, ['sigma', 'slope'])
    """
    check.function("model", model)
    check.one_of("deterministic", deterministic, ("global", "all", "none"))
    keyword = _by_name(model, args, kwargs, data)
    arguments = Arguments(keyword)
    if data is None:
        structure, records = classify_rows_as_indices(model, arguments, plate, deterministic)
        rows: PyTree = jnp.arange(structure.num_data)
    else:
        rows = {name: to_rows(name, value) for name, value in data.items()}
        structure, records = classify_rows_as_arguments(model, arguments, rows, plate, deterministic)
    program = Program(model, arguments, rows, structure)
    _check_factorises(program)
    return Posterior(
        Partial(Program.log_prior, program),
        Partial(Program.log_likelihood, program),
        rows,
        initial=resolve(initial, program),
        constrain=Partial(Program.constrain, program),
        dims={**axis_names(records, structure), **(dims or {})},
        coords=coords,
        observed=_observed(program),
        source=NumPyroSource(program),
    )


def _by_name(model: Callable, args: Sequence[Any], kwargs: dict[str, Any], data: Any) -> dict[str, Any]:
    """Give positional arguments their names, and check that all arguments are the model's."""
    if data is not None and not isinstance(data, dict):
        raise TypeError(
            f"data must be a dict from argument names to arrays with one row a datum; got {type(data).__name__}. An argument "
            "of the model that is itself called 'data' goes in as data=dict(data=…), or by position in args=."
        )
    if data is not None and not data:
        raise ValueError("data must name at least one argument of the model; got an empty dict.")
    signature = inspect.signature(model)
    twice = sorted(set(data or {}) & set(kwargs))
    if twice:
        raise ValueError(f"The arguments {twice} are given twice, in data= and as keywords; give them once.")
    try:
        signature.bind(*args, **kwargs, **(data or {}))
    except TypeError as error:
        raise TypeError(
            f"The arguments do not fit the model, whose signature is {signature}: {error}. Name the model's arguments in data= "
            "(those with one row a datum) and as keywords (all others)."
        ) from error
    named = dict(zip(signature.parameters, args, strict=False))
    kinds = [signature.parameters[name].kind for name in named]
    if any(kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) or len(named) != len(args):
        raise TypeError(
            f"args must belong to arguments that have a name; the model's signature is {signature}. Wrap the model in a function "
            "with named arguments."
        )
    return {**named, **kwargs}


def _check_factorises(program: Program) -> None:
    """Raise unless a datum's value is the same alone and in company, on a few rows at one position."""
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
    for name, (values_together, values_alone) in zip(program.structure.global_observed, global_terms, strict=True):
        if not _alike(values_together, values_alone):
            raise ValueError(
                f"The likelihood does not factorise by datum: the site {name!r} depends on the data but has no term for each "
                "datum. Give a factor one value a datum, inside the data plate, instead of their sum."
            )


@jax.jit
def _alone_and_together(
    program: Program, position: Position, rows: PyTree
) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    def one_row(row: PyTree) -> tuple[Array, list[Array]]:
        batch = jax.tree.map(lambda x: x[None], row)
        return program.log_likelihood(position, batch)[0], program.global_terms(position, batch)

    alone, global_alone = jax.vmap(one_row)(rows)
    together, global_together = (program.log_likelihood(position, rows), program.global_terms(position, rows))
    return together, alone, list(zip(global_together, global_alone, strict=True))


def _alike(a: Any, b: Any) -> bool:
    scale = max(1.0, float(np.max(np.abs(b), where=np.isfinite(b), initial=0.0)))
    return bool(np.allclose(a, b, rtol=0.0, atol=_RELATIVE_DIFFERENCE * scale, equal_nan=True))


@jax.jit
def _observed(program: Program) -> dict[str, Array]:
    return program.observed()
