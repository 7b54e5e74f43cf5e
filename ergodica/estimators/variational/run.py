"""One particle of a guide and a model: values by the sites' estimators, and the log probabilities of all terms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.primitives import Messenger

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.facts import SiteError, base, unmasked
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.structure import GUIDE, MODEL, Program, Structure, pad

type Estimators = Mapping[str, AbstractSiteEstimator]


class Keys(NamedTuple):
    """Keys of a particle, and the key of the plates' subsamples, which all particles share (or ``None``)."""

    model: Key
    guide: Key
    plates: Key | None


class Particle(NamedTuple):
    """What one particle leaves: every array of log probabilities has the structure's rank.

    Attributes
    ----------
    terms : dict of str to array
        Terms of the objective, ``log p`` and ``-log q``, scaled and masked.
    held : dict of str to array
        Terms with the parameters held, at values that move, if a site sticks the landing: those of the guide, or all of them if
        derivatives are split.
    log_prob : dict of str to array
        Log probabilities of the latent sites, neither scaled nor masked.
    records : dict of str to pytree
        What the estimators recorded.
    mutable : dict
        Values of ``numpyro.mutable`` sites.
    """

    terms: dict[str, Array]
    held: dict[str, Array]
    log_prob: dict[str, Array]
    records: dict[str, PyTree]
    mutable: dict[str, Any]


class DrawSites(Messenger):
    """Draws the latent sites of a guide by their estimators. To be entered outside of `numpyro.handlers.seed`."""

    def __init__(self, structure: Structure, estimators: Estimators, branches: dict, noise: dict, given: dict) -> None:
        super().__init__()
        self.structure, self.estimators, self.branches, self.noise = structure, estimators, branches, noise
        self.given = given
        self.records: dict[str, PyTree] = {}

    def process_message(self, msg: dict) -> None:
        """Set the value of a latent site."""
        name = msg.get("name")
        if msg["type"] != "sample" or msg.get("is_observed", False) or name not in self.structure.sites:
            return
        if msg["value"] is not None:  # drawn inside a scan
            return
        estimator, site = self.estimators[name], self.structure.sites[name]
        if name in self.given:
            msg["value"] = self.given[name].reshape(site.batch_shape + site.event_shape)
            return
        key, branch = msg["kwargs"]["rng_key"], self.branches.get(name, 0)
        drawn = estimator.draw(key, msg["fn"], branch, site, self.noise.get(name))
        if drawn is not None:
            msg["value"] = drawn.value
            batch = len(msg["fn"].batch_shape)
            self.records[name] = jax.tree.map(lambda x: pad(x, self.structure.rank - batch), drawn.record)


def run_particle(
    program: Program,
    structure: Structure,
    estimators: Estimators,
    keys: Keys,
    branches: dict[str, Array],
    noise: dict[str, PyTree],
    given: dict[str, Array],
    params: dict[str, PyTree],
    *,
    split: bool = False,
) -> Particle:
    """Run guide and model once; sites in ``given`` have that value, whatever their estimator draws.

    With ``split``, derivatives are taken apart: ``terms`` are at values that do not move, and ``held``, where a site sticks
    the landing, has all terms, those of the model too, with the parameters held.
    """
    guide, model = _seeded(program.guide, keys.guide, keys.plates), _seeded(program.model, keys.model, keys.plates)
    drawing = DrawSites(structure, estimators, branches, noise, given)
    with drawing:
        drawn = trace(substitute(guide, data=params)).get_trace(*program.args, **program.kwargs)

    def model_at(params: PyTree, values: Any) -> dict:
        return trace(substitute(replay(model, values), data=params)).get_trace(*program.args, **program.kwargs)

    def guide_at(params: PyTree, values: dict) -> dict:
        return trace(substitute(guide, data=params | _values(values))).get_trace(*program.args, **program.kwargs)

    def terms_of(guide_trace: dict, model_trace: dict) -> dict:
        terms = {MODEL.format(n): _log_prob(s, structure, estimators) for n, s in _samples(model_trace)}
        return terms | {GUIDE.format(n): -_log_prob(s, structure, estimators) for n, s in _samples(guide_trace)}

    if split:
        frozen = {n: s | {"value": jax.lax.stop_gradient(s["value"])} for n, s in drawn.items() if n not in params}
        guide_trace, model_trace = guide_at(params, frozen), model_at(params, frozen)
    else:
        guide_trace, model_trace = drawn, model_at(params, drawn)
    held = {}
    if any(estimator.landing == "stick" for estimator in estimators.values()):
        stopped = jax.lax.stop_gradient(params)
        held = terms_of(guide_at(stopped, drawn), model_at(stopped, drawn) if split else {})
    bare = {n: _bare_log_prob(guide_trace[n], structure, estimators) for n in structure.sites}
    mutable = {n: s["value"] for sites in (drawn, model_trace) for n, s in sites.items() if s["type"] == "mutable"}
    return Particle(terms_of(guide_trace, model_trace), held, bare, drawing.records, mutable)


def _values(drawn: dict) -> dict:
    """Values of a guide's run, to run it at again. Point masses follow from the rest."""
    values = {name: site["value"] for name, site in _samples(drawn) if not isinstance(base(site["fn"]), dist.Delta)}
    return values | {name: site["value"] for name, site in drawn.items() if site["type"] == "plate"}


def _seeded(function: Any, key: Key, plate_key: Key | None) -> Any:
    if plate_key is not None:
        function = seed(function, plate_key, hide_types=["sample", "prng_key", "control_flow"])
    return seed(function, key)


def _samples(sites: dict) -> list[tuple[str, dict]]:
    return [(name, site) for name, site in sites.items() if site["type"] == "sample"]


def _log_prob(site: dict, structure: Structure, estimators: Estimators) -> Any:
    """Log probability of a site as it enters the objective."""
    log_prob = _density(site, site["fn"], estimators)
    if site["scale"] is not None and not is_identically_one(site["scale"]):
        log_prob = jnp.asarray(site["scale"], log_prob.dtype) * log_prob
    return pad(log_prob, structure.rank - jnp.ndim(log_prob))


def _bare_log_prob(site: dict, structure: Structure, estimators: Estimators) -> Array:
    """Log probability under the law that a site is drawn from, whatever its scale and mask."""
    log_prob = _density(site, unmasked(site["fn"]), estimators)
    batch_shape = site["fn"].batch_shape
    return pad(jnp.broadcast_to(log_prob, batch_shape), structure.rank - len(batch_shape))


def _density(site: dict, fn: dist.Distribution, estimators: Estimators) -> Any:
    estimator = None if site.get("is_observed", False) else estimators.get(site["name"])
    value, intermediates = site["value"], site.get("intermediates")
    try:
        return (log_density if estimator is None else estimator.log_prob)(fn, value, intermediates)
    except NotImplementedError as error:
        raise SiteError(
            f"Site {site['name']!r} ({type(base(fn)).__name__}): its density at a given value needs the inverse of a "
            "transformation that has none. Reparam(stl=True), the score function and objectives of the wake and sleep phases "
            "evaluate it there. Use Reparam() without stl, under ELBO or IWELBO."
        ) from error
