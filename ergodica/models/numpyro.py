"""Posteriors from NumPyro models."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.latent import LatentPosterior
from ergodica.core.posterior import Posterior
from ergodica.models.numpyro_arguments import Arguments, to_rows
from ergodica.models.numpyro_checks import check_factorises
from ergodica.models.numpyro_plates import find_plates
from ergodica.models.numpyro_program import Program
from ergodica.models.numpyro_source import NumPyroSource
from ergodica.models.numpyro_start import resolve
from ergodica.models.numpyro_structure import axis_names, classify_rows_as_arguments, classify_rows_as_indices
from ergodica.models.numpyro_union import Union


def from_numpyro(
    model: Callable,
    data: dict[str, Any] | None = None,
    *,
    args: Sequence[Any] = (),
    plate: str | Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    initial: Any = "uniform",
    deterministic: Literal["global", "all", "none"] = "global",
    local_latents: bool = False,
    **kwargs: Any,
) -> Posterior:
    """Make a posterior from a NumPyro model, split exactly into log prior and one log likelihood value a datum.

    Parameters
    ----------
    model : callable
        With sample, plate, factor and deterministic statements, handlers and reparameterisations at will. Discrete latent sites
        inside the data plate are summed out if they say ``infer={"enumerate": "parallel"}``.
    data : dict of str to array, optional
        The model's arguments that have one row a datum, by name: batches are rows of them. The model may use a plate over the
        data or none. Left out, the model must have a ``plate(name, N, subsample_size=n)`` of its own and pick rows by its
        indices: batches are indices. The first is faster, since batches can be contiguous in memory.
    args : sequence, optional
        Other arguments of the model, by position.
    plate : str or sequence of str, optional
        The data plate, where the model has one without ``subsample_size`` whose indices it uses, or several with. Left out, it is
        the outermost one that subsamples; of several side by side, all are, and a row is an index of one of them (counted
        through, the first plate first). All other plates are run in full, whatever their ``subsample_size``.
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
    local_latents : bool
        Allow continuous latent sites inside the data plate, and make a `LatentPosterior` of which gradients are estimated by
        `ergodica.estimators.LocalLatents`. Only the global latents are sampled and reported.
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
        For models whose likelihood does not split into data (`scan`, joint laws over the data, batch statistics), local latents
        unless allowed, discrete latents that are not enumerated, not wholly inside the data plate, or of more than 4096 values a
        datum, subsampled plates that cross, data of unequal length, names that the model does not have, or a model that
        needs the values of its arguments while it is traced.

    Notes
    -----
    The sum of both parts is minus NumPyro's potential energy. Which sites belong to the data is found from shapes, by
    tracing the model at two data lengths, and nothing is sampled, so that improper priors are no obstacle. On a few rows it
    is then checked that each datum's value does not depend on the company it is in. `numpyro.param` sites are held at their
    initial values, as in NumPyro's MCMC.

    The likelihood of a row is evaluated at every value that its enumerated sites can take together, and costs accordingly; no
    structure between them is used. (NumPyro's own density of a subsampled model with enumerated sites is wrong: it
    scales before it sums.)

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
    arguments = Arguments(_by_name(model, args, kwargs, data))
    options = {"deterministic": deterministic, "local_latents": local_latents}
    if data is None:
        programs, names = _programs_by_plate(model, arguments, plate, options)
    else:
        rows = {name: to_rows(name, value) for name, value in data.items()}
        structure, records = classify_rows_as_arguments(model, arguments, rows, _one(plate), **options)
        programs, names = [Program(model, arguments, rows, structure)], axis_names(records, structure)
    for program in programs:
        check_factorises(program)
    whole = programs[0] if len(programs) == 1 else Union(tuple(programs))
    described = {
        "initial": resolve(initial, programs[0]),
        "constrain": Partial(Program.constrain, programs[0]),
        "dims": {**names, **(dims or {})},
        "coords": coords,
        "observed": _observed(whole),
        "source": NumPyroSource(programs[0], tuple(programs[1:])),
    }
    log_prior = Partial(type(whole).log_prior, whole)
    if programs[0].structure.local:
        return _with_local_latents(programs, log_prior, described)
    return Posterior(log_prior, Partial(type(whole).log_likelihood, whole), whole.rows, **described)


def _programs_by_plate(
    model: Callable, arguments: Arguments, plate: str | Sequence[str] | None, options: dict[str, Any]
) -> tuple[list[Program], dict[str, tuple[str, ...]]]:
    """Make a program for each data plate, and name the axes of what is reported."""
    programs: list[Program] = []
    names: dict[str, tuple[str, ...]] = {}
    for name, size in find_plates(model, arguments, plate).items():
        structure, records = classify_rows_as_indices(model, arguments, name, size, **options)
        programs.append(Program(model, arguments, jnp.arange(size), structure))
        of_plate = axis_names(records, structure)
        own = programs[-1].reported_data_sites()
        names |= {site: axes for site, axes in of_plate.items() if site in own or site not in names}
    return programs, names


def _with_local_latents(programs: list[Program], log_prior: Callable, described: dict[str, Any]) -> LatentPosterior:
    if len(programs) > 1:
        plates = [program.structure.plate for program in programs]
        raise ValueError(
            f"local_latents=True takes one data plate; the model has {plates}. Name it by plate=; the others are run in full."
        )
    (program,) = programs
    shapes = {site.name: site.shape for site in program.structure.local}
    return LatentPosterior(log_prior, Partial(Program.log_joint, program), program.rows, latents=shapes, **described)


def _one(plate: str | Sequence[str] | None) -> str | None:
    if plate is not None and not isinstance(plate, str):
        raise TypeError(f"plate must be a name where data= gives the rows; got {plate!r}.")
    return plate


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


@jax.jit
def _observed(program: Program | Union) -> dict[str, Array]:
    return program.observed()
