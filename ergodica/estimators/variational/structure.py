"""What model and guide look like before anything is drawn: sites, plates, and which terms depend on which sites."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.ops.provenance import eval_provenance

from ergodica.core.types import PyTree
from ergodica.estimators.variational.facts import Plate, Site, base, list_support, unmasked
from ergodica.estimators.variational.sites.implicit import has_distribution_function

MODEL, GUIDE = "log p({})", "-log q({})"


class Program(NamedTuple):
    """A model, a guide, and what they are called with."""

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict = {}  # noqa: RUF012  (never written to)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The static part of a program.

    Attributes
    ----------
    sites : dict of str to Site
        Latent sites of the guide, in order.
    upstream : dict of str to frozenset of str
        Latent sites that each term of the objective depends on, by the term's name.
    plates : dict of str to tuple of Plate
        Plates around each term.
    rank : int
        Batch dimensions that all terms are aligned to.
    inferred : dict of str to Any
        What sites of the guide say in ``infer={"gradient": …}``.
    moved_by_parameters : frozenset of str
        Point masses of the guide that are placed by parameters, not by draws alone.
    """

    sites: dict[str, Site]
    upstream: dict[str, frozenset[str]]
    plates: dict[str, tuple[Plate, ...]]
    rank: int
    inferred: dict[str, Any]
    moved_by_parameters: frozenset[str]

    @property
    def subsampled(self) -> bool:
        """Whether a plate holds a random part of its elements."""
        return any(plate.subsampled for plates in self.plates.values() for plate in plates)


def inspect(program: Program, params: dict[str, jax.Array]) -> Structure:
    """Trace model and guide abstractly, and follow each latent value to the terms that it enters."""
    found: dict[str, Any] = {}

    def run() -> dict:
        guide_trace, model_trace = _traces(program, params)
        found.update(guide=_static(guide_trace), model=_static(model_trace))
        return {name: site["value"] for name, site in guide_trace.items() if name in found["guide"]["latent"]}

    values = jax.eval_shape(run)
    check_match(found["model"], found["guide"])
    tracked = {name: value for name, value in values.items() if not found["guide"]["latent"][name]["delta"]}
    upstream = _dependencies(program, params, tracked)
    plates = {MODEL.format(name): p for name, p in found["model"]["plates"].items()}
    plates |= {GUIDE.format(name): p for name, p in found["guide"]["plates"].items()}
    ranks = [len(shape) for part in found.values() for shape in part["batch"].values()]
    sites = {
        name: _site(name, facts, upstream, plates, in_model=name in found["model"]["latent"])
        for name, facts in found["guide"]["latent"].items()
    }
    points = [name for name, facts in found["guide"]["latent"].items() if facts["delta"]]
    moved = _moved_by_parameters(program, params, tracked, points) if points else frozenset()
    inferred = {name: facts for name, facts in found["guide"]["inferred"].items() if name in sites}
    return Structure(sites, upstream, plates, max(ranks, default=0), inferred, moved)


def _traces(program: Program, params: PyTree, substitute_fn: Callable | None = None) -> tuple[dict, dict]:
    """Run guide and model once, on any key; the model replays the guide's values."""
    guide, model = (seed(f, rng_seed=0) for f in (program.guide, program.model))
    if substitute_fn is not None:
        guide, model = (substitute(f, substitute_fn=substitute_fn) for f in (guide, model))
    guide_trace = trace(substitute(guide, data=params)).get_trace(*program.args, **program.kwargs)
    model = substitute(replay(model, guide_trace), data=params)
    return guide_trace, trace(model).get_trace(*program.args, **program.kwargs)


def _static(sites: dict) -> dict:
    """Facts of a trace that are known without values."""
    full = {name: site["args"][0] for name, site in sites.items() if site["type"] == "plate"}
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    latent = {name: _facts(site) for name, site in samples.items() if not site.get("is_observed", False)}
    plates = {
        name: tuple(Plate(f.name, f.dim, f.size, full.get(f.name, f.size)) for f in site["cond_indep_stack"])
        for name, site in samples.items()
    }
    batch = {name: site["fn"].batch_shape for name, site in samples.items()}
    shape = {name: tuple(site["fn"].shape()) for name, site in samples.items()}
    inferred = {name: site["infer"]["gradient"] for name, site in samples.items() if "gradient" in site["infer"]}
    return {"latent": latent, "plates": plates, "batch": batch, "shape": shape, "inferred": inferred}


def _facts(site: dict) -> dict:
    fn = site["fn"]
    support = list_support(fn) if fn.support.is_discrete else None
    return {
        "distribution": type(base(fn)).__name__,
        "batch_shape": tuple(fn.batch_shape),
        "event_shape": tuple(fn.event_shape),
        "element_shape": tuple(base(fn).event_shape),
        "discrete": bool(fn.support.is_discrete),
        "reparameterised": bool(fn.has_rsample),
        "implicit": has_distribution_function(fn),
        "delta": isinstance(base(fn), dist.Delta),
        "support_size": None if support is None else int(support.shape[0]),
        "in_scan": bool(site.get("_control_flow_done", False)),
        "auxiliary": bool(site["infer"].get("is_auxiliary", False)),
    }


def _dependencies(program: Program, params: PyTree, latents: dict) -> dict[str, frozenset[str]]:
    """Latent sites upstream of each term, by provenance; no array is computed."""

    def log_probs(**latents: jax.Array) -> dict:
        def tracked(message: dict) -> jax.Array | None:
            if message["type"] != "sample" or message["name"] not in latents or message.get("is_observed", False):
                return None
            value = latents[message["name"]]
            try:
                fresh = message["fn"](*message["args"], **message["kwargs"])
            except NotImplementedError:  # no draws, as of an improper prior: the model replays the guide's value
                return value
            missing = value.ndim - fresh.ndim  # inside a scan the value has an axis of its steps
            return (0 * fresh).reshape((1,) * missing + fresh.shape) + value

        guide_trace, model_trace = _traces(program, params, tracked)
        both = ((MODEL, model_trace), (GUIDE, guide_trace))
        return {
            label.format(name): _depends_on(unmasked(site["fn"]) if label == GUIDE else site["fn"], site["value"])
            for label, sites in both
            for name, site in sites.items()
            if site["type"] == "sample"
        }

    return eval_provenance(log_probs, **latents)


def _depends_on(fn: dist.Distribution, value: Any) -> Any:
    """Something that depends on what the log density depends on."""
    try:
        return fn.log_prob(value)
    except NotImplementedError:  # a transformation without an inverse: all that it and the value depend on
        return sum(jnp.sum(jnp.asarray(leaf, float)) for leaf in jax.tree.leaves((fn, value)))


def _moved_by_parameters(program: Program, params: PyTree, latents: dict, points: list[str]) -> frozenset[str]:
    """Which point masses depend on parameters when the draws are held."""
    if not params:
        return frozenset()

    def values(params: PyTree) -> dict:
        guide = substitute(seed(program.guide, rng_seed=0), data={**params, **held})
        sites = trace(guide).get_trace(*program.args, **program.kwargs)
        return {name: sites[name]["value"] for name in points}

    held = {name: jnp.zeros(value.shape, value.dtype) for name, value in latents.items()}
    return frozenset(name for name, sources in eval_provenance(values, params=params).items() if sources)


def _site(name: str, facts: dict, upstream: dict, plates: dict, *, in_model: bool) -> Site:
    facts = dict(facts)
    auxiliary = facts.pop("auxiliary")
    own = plates[GUIDE.format(name)]
    terms = tuple(label for label in plates if name in upstream[label])
    shared = frozenset(
        p.name for p in own if all((p.name, p.dim) in {(q.name, q.dim) for q in plates[t]} for t in terms)
    )
    return Site(
        name=name,
        plates=own,
        upstream=upstream.get(GUIDE.format(name), frozenset()) - {name},
        terms=terms,
        shared_plates=shared,
        in_model=in_model or auxiliary,
        **facts,
    )


def check_match(model: dict, guide: dict) -> None:
    """Raise where model and guide do not belong together."""
    missing = [name for name in model["latent"] if name not in guide["shape"]]
    if missing:
        raise ValueError(
            f"The model draws {', '.join(map(repr, missing))}, which the guide does not: the objective would lack -log q of it. "
            "Draw it in the guide, observe it, or sum it out: by hand, or by numpyro.infer.TraceEnum_ELBO where the site is "
            "marked infer={'enumerate': 'parallel'}."
        )
    extra = [name for name, facts in guide["latent"].items() if name not in model["latent"] and not facts["auxiliary"]]
    if extra:
        raise ValueError(
            f"The guide draws {', '.join(map(repr, extra))}, which the model does not draw. Correct the name, or mark it "
            "infer={'is_auxiliary': True} if the model's sites are functions of it."
        )
    for name in [name for name in guide["latent"] if name in model["latent"]]:
        if guide["shape"][name] != model["shape"][name]:
            raise ValueError(
                f"Site {name!r} has shape {guide['shape'][name]} in the guide and {model['shape'][name]} in the model. "
                "Give both distributions the same batch and event shape, and put them into the same plates."
            )


def pad(x: jax.Array, missing: int) -> jax.Array:
    """Add axes of size 1 on the left."""
    return jnp.reshape(x, (1,) * missing + jnp.shape(x))
