"""A model and its guide, run together: one importance weight, and whether the two belong together."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.types import Key


def log_weight(key: Key, model: Callable, guide: Callable, params: dict, args: tuple, kwargs: dict) -> tuple:
    """Log importance weight of one draw of the guide, and the sum of the absolute values of its terms (for rounding)."""
    guide_sites, model_sites = run(key, model, guide, params, args, kwargs)
    terms = [_log_prob(site) for site in samples(model_sites)]
    terms += [-_log_prob(site) for site in samples(guide_sites)]
    dtype = jnp.result_type(float)
    total, absolute = (sum((jnp.sum(f(t)) for t in terms), jnp.zeros((), dtype)) for f in (jnp.asarray, jnp.abs))
    return jnp.asarray(total, dtype), jnp.asarray(absolute, dtype)


def run(key: Key, model: Callable, guide: Callable, params: dict, args: tuple, kwargs: dict) -> tuple[dict, dict]:
    """Traces of the guide, and of the model at its draw."""
    from numpyro.handlers import replay, seed, substitute, trace

    key_model, key_guide = jax.random.split(key)
    guide_sites = trace(seed(substitute(guide, data=params), key_guide)).get_trace(*args, **kwargs)
    model = substitute(replay(model, guide_sites), data=params)
    return guide_sites, trace(seed(model, key_model)).get_trace(*args, **kwargs)


def samples(sites: dict) -> list[dict]:
    """Sample sites, latent and observed."""
    return [site for site in sites.values() if site["type"] == "sample"]


def check_program(model: Callable, guide: Callable, params: dict, args: tuple, kwargs: dict) -> None:
    """Raise where weights of the guide's draws are no importance weights of the posterior."""
    if not isinstance(params, dict):
        raise TypeError(
            f"params must be a dict of fitted parameters, svi.run(...).params; got {params!r} of type {type(params).__name__}."
        )
    from numpyro.handlers import substitute

    found: list[dict] = []

    def look() -> None:
        checked_model, checked_guide = (substitute(f, substitute_fn=lookup(params)) for f in (model, guide))
        found.extend(run(jax.random.key(0), checked_model, checked_guide, {}, args, kwargs))

    jax.eval_shape(look)
    guide_sites, model_sites = found
    check_sites(model_sites, guide_sites)
    both = [*model_sites.values(), *guide_sites.values()]
    for plate in (site for site in both if site["type"] == "plate"):
        full, part = plate["args"][0], plate["value"].shape[0]
        if full != part:
            raise ValueError(
                f"Plate {plate['name']!r} is subsampled, {part} of {full}: a random part of the data gives no weights of the "
                "posterior. Call model and guide so that they take the whole plate (subsample_size=None)."
            )
    points = [site["name"] for site in samples(guide_sites) if _is_delta(site) and not site["is_observed"]]
    if points:
        check_points(points, lambda key: run(key, model, guide, params, args, kwargs)[0])


def check_sites(model_sites: dict, guide_sites: dict) -> None:
    """Raise unless the guide draws what the model does."""
    drawn = {site["name"]: site for site in samples(guide_sites) if not site["is_observed"]}
    latent = {site["name"] for site in samples(model_sites) if not site["is_observed"]}
    missing = [name for name in latent if name not in drawn]
    if missing:
        raise ValueError(
            f"The model draws {_listed(missing)}, which the guide does not: a weight would lack its density. Draw it in the "
            "guide, observe it, or sum it out of the model."
        )
    extra = [n for n, site in drawn.items() if n not in latent and not site["infer"].get("is_auxiliary", False)]
    if extra:
        raise ValueError(
            f"The guide draws {_listed(extra)}, which the model does not draw. Correct the name, or mark it "
            "infer={'is_auxiliary': True} if the model's sites are functions of it."
        )


def lookup(params: dict) -> Callable[[dict], Any]:
    """A function for `numpyro.handlers.substitute` that gives parameters, and raises for those that are missing or out of range."""
    from numpyro.distributions import constraints

    def value_of(site: dict) -> Any:
        name = site["name"]
        if site["type"] != "param":
            return params.get(name) if site["type"] == "mutable" else None
        if name not in params:
            raise ValueError(
                f"params lacks {name!r}, so that its initial value would be judged; it has {_listed(params) or 'nothing'}. Take "
                "all of svi.run(...).params, or svi.get_params(state)."
            )
        constraint = site["kwargs"].get("constraint", constraints.real)
        with jax.ensure_compile_time_eval():
            inside = constraint is constraints.real or np.all(constraint(jnp.asarray(params[name])))
        if not inside:
            raise ValueError(
                f"params[{name!r}] is outside of its constraint, {constraint}. Give the parameters as model and guide see "
                "them, svi.run(...).params or svi.get_params(state), and not the optimiser's unconstrained ones."
            )
        return params[name]

    return value_of


def check_points(names: list[str], draw: Callable[[Key], dict]) -> None:
    """Raise where a point mass of the guide does not move with its draws, as those of autoguides with densities do."""
    values = jax.jit(jax.vmap(lambda key: {name: draw(key)[name]["value"] for name in names}))(
        jax.random.split(jax.random.key(0), 2)
    )
    fixed = [name for name, (first, second) in values.items() if np.array_equal(first, second)]
    if fixed:
        raise ValueError(
            f"The guide places {_listed(fixed)} at one point, which has no density to be weighed. Take a guide with a spread, "
            "such as AutoNormal or AutoMultivariateNormal."
        )


def _log_prob(site: dict) -> Array:
    intermediates, scale = site["intermediates"], site["scale"]
    value, fn = site["value"], site["fn"]
    log_prob = fn.log_prob(value, intermediates) if intermediates else fn.log_prob(value)
    return log_prob if scale is None else jnp.asarray(scale, log_prob.dtype) * log_prob


def _is_delta(site: dict) -> bool:
    from numpyro import distributions as dist

    fn = site["fn"]
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
