"""Dreams: latents and data drawn from a model, and a guide that is shown the data."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.handlers import seed, substitute, trace, uncondition
from numpyro.ops.provenance import eval_provenance

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.facts import base
from ergodica.estimators.variational.structure import Program, Structure

type Observed = Mapping[str, str] | Callable[..., tuple[tuple, dict]]
"""The guide's argument for each observed site of the model, or a function ``(draws, *args, **kwargs) -> (args, kwargs)``."""


def check_observed(observed: Any) -> Observed:
    """Return ``observed``; raise unless it says where simulated data go."""
    if callable(observed):
        return cast("Callable[..., tuple[tuple, dict]]", observed)
    hint = (
        "It says where simulated data go: {'x': 'data'} hands the draw of the model's observed site 'x' to the guide as its "
        "argument 'data'; for anything else give a function (draws, *args, **kwargs) -> (args, kwargs)."
    )
    if not isinstance(observed, Mapping) or not all(isinstance(s, str) for pair in observed.items() for s in pair):
        raise TypeError(f"observed must map names of sites to names of arguments; got {observed!r}. {hint}")
    if not observed:
        raise ValueError(f"observed must name at least one site; got {observed!r}. {hint}")
    if len(set(observed.values())) < len(observed):
        raise ValueError(f"observed hands several sites to one argument: {dict(observed)!r}. {hint}")
    return dict(observed)


def dream_log_density(key: Key, params: PyTree, program: Program, observed: Observed) -> Array:
    """Log density of the model's latents under the guide that is shown the model's data; one joint draw, which is held."""
    key_model, key_guide = jax.random.split(key)
    sites = simulate(key_model, params, program)
    total = jnp.zeros(())
    for term in guide_terms(key_guide, params, hand_over(observed, sites, program), sites).values():
        total = total + term.astype(total.dtype)
    return total


def simulate(key: Key, params: PyTree, program: Program) -> dict:
    """Draw all sites of the model, the observed ones too."""
    model = substitute(uncondition(seed(program.model, key)), data=jax.lax.stop_gradient(params))
    try:
        return trace(model).get_trace(*program.args, **program.kwargs)
    except NotImplementedError as error:
        raise ValueError(
            f"The model cannot be simulated, which WakeSleep does: a distribution of it has no draws ({error}). "
            "Use ForwardKL, which draws from the guide alone."
        ) from error


def guide_terms(key: Key, params: PyTree, shown: Program, sites: dict) -> dict[str, Array]:
    """Log densities of the guide's sites at the latents of a simulation, scaled and masked, each summed."""
    fixed = {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not was_observed(s)}
    fixed |= {n: s["value"] for n, s in sites.items() if s["type"] == "plate"}
    guide = substitute(seed(shown.guide, key), data=params | jax.lax.stop_gradient(fixed))
    found = trace(guide).get_trace(*shown.args, **shown.kwargs)
    return {name: _scaled(site) for name, site in found.items() if site["type"] == "sample"}


def _scaled(site: dict) -> Array:
    log_prob = log_density(site["fn"], site["value"])
    return jnp.sum(log_prob if site["scale"] is None else jnp.asarray(site["scale"], log_prob.dtype) * log_prob)


def was_observed(site: dict) -> bool:
    """Whether a simulated site holds data in the model."""
    return bool(site["infer"].get("was_observed", False))


# --- the guide's arguments -----------------------------------------------------------------------------------------------


def hand_over(observed: Observed, sites: dict, program: Program) -> Program:
    """Put simulated data into the place of the data in the program's arguments."""
    draws = {
        n: jax.lax.stop_gradient(s["value"]) for n, s in sites.items() if s["type"] == "sample" and was_observed(s)
    }
    if callable(observed):
        shown = observed(draws, *program.args, **program.kwargs)
        if not (isinstance(shown, tuple) and len(shown) == 2 and isinstance(shown[1], Mapping)):
            raise TypeError(f"observed must return (args, kwargs) for the guide; got {shown!r}.")
        return program._replace(args=tuple(shown[0]), kwargs=dict(shown[1]))
    args, kwargs = list(program.args), dict(program.kwargs)
    for name, argument in observed.items():
        place = find_argument(program, argument)
        if isinstance(place, str):
            kwargs[place] = in_place_of(kwargs[place], draws[name], name, argument, sites)
        else:
            args[place] = in_place_of(args[place], draws[name], name, argument, sites)
    return program._replace(args=tuple(args), kwargs=kwargs)


def find_argument(program: Program, name: str) -> int | str:
    """Position or keyword of an argument, by its name in the guide's or the model's signature."""
    if name in program.kwargs:
        return name
    for function in (program.guide, program.model):
        names = positional(function)
        if name in names[: len(program.args)]:
            return names.index(name)
    raise ValueError(
        f"observed names the argument {name!r}, which the guide is not called with: it takes "
        f"{', '.join(map(repr, positional(program.guide))) or 'no positional arguments'}, and is called with "
        f"{len(program.args)} positional arguments and the keywords {sorted(program.kwargs)}. WakeSleep shows the guide simulated "
        "data; a guide that reads none is fitted by ForwardKL or ELBO."
    )


def positional(function: Callable) -> list[str]:
    """Names of the arguments that can be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def in_place_of(given: Any, draw: Array, name: str, argument: str, sites: dict) -> Array:
    """The draw with the data's dtype, in the subsample's rows of them, where the model's mask lets it be seen."""
    site, data = sites[name], jnp.asarray(given)
    if jnp.issubdtype(draw.dtype, jnp.floating) and not jnp.issubdtype(data.dtype, jnp.floating):
        raise TypeError(
            f"The model draws {draw.dtype} at {name!r}, and the argument {argument!r} holds {data.dtype}: cast the data with "
            ".astype(float)."
        )
    rows, full = rows_of(site, draw, sites)
    if data.shape not in (draw.shape, full):
        expects = f"{draw.shape}" if full == draw.shape else f"{draw.shape} or {full}"
        raise ValueError(
            f"The model draws shape {draw.shape} at {name!r}, and the argument {argument!r} holds shape {data.shape}, which must "
            f"be {expects}. Where data are kept otherwise, give observed as a function (draws, *args, **kwargs) -> (args, kwargs)."
        )
    whole = data.shape == draw.shape
    draw = jnp.where(visible(site, draw), draw.astype(data.dtype), data if whole else data[rows])
    return draw if whole else data.at[rows].set(draw)


def rows_of(site: dict, draw: Array, sites: dict) -> tuple[tuple, tuple[int, ...]]:
    """Index of a site's elements in all data, and the shape of these."""
    index, shape = [jnp.arange(n) for n in draw.shape], list(draw.shape)
    for frame in site["cond_indep_stack"]:
        axis = draw.ndim - len(site["fn"].event_shape) + frame.dim
        full_size = sites[frame.name]["args"][0]
        if full_size != frame.size:
            index[axis], shape[axis] = sites[frame.name]["value"], full_size
    return jnp.ix_(*index), tuple(shape)


def visible(site: dict, draw: Array) -> Array:
    """Which elements the model's mask leaves."""
    fn, mask = site["fn"], jnp.ones((), bool)
    while isinstance(fn, dist.MaskedDistribution):
        mask, fn = jnp.logical_and(mask, fn._mask), fn.base_dist
    mask = jnp.broadcast_to(mask, site["fn"].batch_shape)
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * len(site["fn"].event_shape)), draw.shape)


# --- what must be true -----------------------------------------------------------------------------------------------------


def check_dreams(observed: Observed, program: Program, params: PyTree, structure: Structure) -> None:
    """Raise where the model cannot be simulated, or the guide cannot be evaluated at what it draws. Nothing is computed."""
    found: dict[str, dict] = {}

    def look() -> dict:
        sites = simulate(jax.random.key(0), params, program)
        found.update({n: s for n, s in sites.items() if s["type"] == "sample"})
        return {n: s["value"] for n, s in found.items() if was_observed(s)}

    draws = jax.eval_shape(look)
    check_model(observed, found)
    check_guide(structure, found)

    def densities(**draws: Array) -> dict:
        sites = simulate(jax.random.key(0), params, program)
        sites = sites | {n: sites[n] | {"value": draw} for n, draw in draws.items()}
        return guide_terms(jax.random.key(0), params, hand_over(observed, sites, program), sites)

    if not any(eval_provenance(densities, **draws).values()):
        raise ValueError(
            f"No density of the guide depends on {', '.join(sorted(draws))}: WakeSleep would fit it to the prior. It needs a guide "
            "that reads the data (and autoguides do not). ForwardKL fits any guide to the data at hand."
        )


def check_model(observed: Observed, sites: dict) -> None:
    """Raise where observed sites are not those that the user names, or have no draws."""
    factors = [n for n, s in sites.items() if isinstance(base(s["fn"]), dist.Unit)]
    if factors:
        raise ValueError(
            f"The model has the factor {', '.join(map(repr, factors))}, from which nothing can be drawn, while WakeSleep simulates "
            "the model. Write it as an observed site, or use ForwardKL."
        )
    scanned = [n for n, s in sites.items() if was_observed(s) and s.get("_control_flow_done", False)]
    if scanned:
        raise ValueError(
            f"The observed site {', '.join(map(repr, scanned))} is inside a scan, where it cannot be drawn. Write the scan as a "
            "Python loop, or use ForwardKL."
        )
    seen = {n for n, s in sites.items() if was_observed(s)}
    if not seen:
        raise ValueError("The model observes nothing, so that there are no data to simulate. Use ForwardKL or ELBO.")
    if callable(observed):
        return
    unknown, unnamed = sorted(set(observed) - seen), sorted(seen - set(observed))
    if unknown:
        raise ValueError(
            f"observed names {', '.join(map(repr, unknown))}, which the model does not observe; it observes "
            f"{', '.join(map(repr, sorted(seen)))}."
        )
    if unnamed:
        raise ValueError(
            f"The model observes {', '.join(map(repr, unnamed))} too, which observed does not name: all data are simulated "
            "together. Name the argument of the guide that each of them goes to, or give a function."
        )


def check_guide(structure: Structure, sites: dict) -> None:
    """Raise where the guide has no density at the latents that the model draws."""
    for name, site in structure.sites.items():
        if name not in sites:
            reason = "the model does not draw it, so that there is no value of it to evaluate the guide at"
        elif site.delta:
            reason = "a point mass has no density at what the model draws"
        else:
            continue
        raise ValueError(
            f"WakeSleep cannot be used with the guide's site {name!r} ({site.distribution}): {reason}. Use ForwardKL or ELBO."
        )
