"""Densities that an objective is written over: a NumPyro program, drawn from and evaluated."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions.util import is_identically_one
from numpyro.primitives import Messenger

from ergodica.estimators.variational.choose import INFER
from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.facts import Distribution, SiteError
from ergodica.estimators.variational.programmed.log_density import LogDensity, Origin
from ergodica.estimators.variational.site import AbstractSiteEstimator

OTHER = "_other_program"
"""Marks parameters that belong neither to the model nor to the guide."""


class AbstractDensity(abc.ABC):
    """Something with a density that can be drawn from.

    Where the density is an estimate, `log_density` is the logarithm of an unbiased estimate of it, and `sample` comes with the
    logarithm of one whose reciprocal is unbiased for the reciprocal, given the draw.
    """

    run: "ObjectiveRun"

    @abc.abstractmethod
    def sample(self) -> tuple[dict[str, Array], Any]:
        """Draw values by the names of their sites, and their log density; independent at each call."""

    @abc.abstractmethod
    def log_density(self, values: Mapping[str, Array]) -> Any:
        """Log density of values."""

    @property
    @abc.abstractmethod
    def held(self) -> "AbstractDensity":
        """The same with the parameters held: derivatives flow through values alone."""


class _Uncounted(dist.MaskedDistribution):
    """A law without a term in the objective, whose draws come with the intermediate values of its transformations."""

    def __init__(self, base_dist: Distribution) -> None:
        super().__init__(base_dist, mask=False)

    def sample_with_intermediates(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Those of the law."""
        return self.base_dist.sample_with_intermediates(key, sample_shape)


class ObjectiveRun:
    """One run of an objective.

    Attributes
    ----------
    sites : dict of str to AbstractSiteEstimator or None
        The objective's own.
    names : set of str
        Names in use.
    plates : dict
        Random parts of subsampled plates, by name and sizes: each is drawn once, and serves all programs.
    estimators : dict of str to AbstractSiteEstimator
        Of sites whose values may lie off the support: their densities are the estimator's, in all programs.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        self.sites = sites
        self.names: set[str] = set()
        self.plates: dict[tuple, Array] = {}
        self.estimators: dict[str, AbstractSiteEstimator] = {}

    def unused(self, name: str) -> str:
        """Return the name, or name#2, name#3, …: the first that was not used."""
        found, count = name, 1
        while found in self.names:
            count += 1
            found = f"{name}#{count}"
        self.names.add(found)
        return found

    def let_out(self, msg: dict) -> None:
        """Make a draw a site of its own of the whole program, without a term in the objective."""
        name = msg["name"]
        msg["name"], msg["fn"] = self.unused(name), _Uncounted(msg["fn"])
        infer = dict(msg["infer"] or {}) | {"is_auxiliary": True}
        if name in self.sites:  # holds for its repeats too
            infer[INFER] = "auto" if self.sites[name] is None else self.sites[name]
        msg["infer"] = infer
        chosen = self.sites[msg["name"]] if msg["name"] in self.sites else infer.get(INFER, self.sites.get("*"))
        if isinstance(chosen, AbstractSiteEstimator):
            check_lands(msg["name"], chosen)
            if type(chosen).log_prob is not AbstractSiteEstimator.log_prob:
                self.estimators[name] = chosen

    def draw(self, name: str, fn: Distribution) -> Array:
        """Draw from a law that belongs to no program."""
        msg = {"name": name, "fn": fn, "infer": {}}
        self.let_out(msg)
        return jnp.asarray(numpyro.sample(msg["name"], msg["fn"], infer=msg["infer"]))


def check_lands(name: str, estimator: AbstractSiteEstimator) -> None:
    """Raise for an estimator that would hold parameters in a term that is not there."""
    if estimator.landing == "stick":
        raise SiteError(
            f"Reparam(stl=True) cannot be used at site {name!r} of an objective that is written as a program: the program "
            "itself says where parameters are held. Use Reparam(), and guide.held.log_density(values) for the log density "
            "that sample() returned."
        )


class Met(NamedTuple):
    """A sample site as the program has it: its value, and its log density with scale and mask."""

    value: Array
    log_prob: Array
    origin: Origin
    drawn: bool
    observed: bool
    auxiliary: bool


class _Inside(Messenger):
    """Keeps a program's sites apart from those of others: hands in values, lets draws out, and notes what it meets."""

    def __init__(self, program: "ProgramDensity", given: Mapping[str, Array]) -> None:
        super().__init__()
        self.program, self.given, self.met = program, given, {}

    def process_message(self, msg: dict) -> None:
        """Hand in what is given, let out what is drawn, keep the rest inside."""
        run, kind = self.program.run, msg["type"]
        if kind == "sample":
            msg["_own"] = (msg["name"], msg["fn"], dict(msg["infer"] or {}))
            if msg["name"] in self.given and not msg["is_observed"]:
                self._hand_in(msg)
            scanned = msg.get("_control_flow_done", False) and msg["name"] not in self.given
            msg["_drawn"] = not msg["is_observed"] and (msg["value"] is None or scanned)
            if msg["_drawn"]:
                run.let_out(msg)
            else:
                msg["stop"] = True
        elif kind == "deterministic":
            msg["stop"] = True
        elif kind == "plate" and _is_part(*msg["args"]):
            msg["value"] = run.plates.get((msg["name"], *msg["args"]), msg["value"])
        elif kind == "param":
            msg[OTHER] = self.program.other
        elif kind == "control_flow":
            msg["kwargs"]["substitute_stack"].append(("substitute", dict(self.given)))

    def postprocess_message(self, msg: dict) -> None:
        """Note the density, and hold parameters."""
        kind = msg["type"]
        if kind == "sample":
            msg["name"], msg["fn"], infer = msg["_own"]
            self.met[msg["name"]] = self._met(msg, auxiliary=bool(infer.get("is_auxiliary", False)))
        elif kind == "plate" and _is_part(*msg["args"]):
            self.program.run.plates[(msg["name"], *msg["args"])] = msg["value"]
        elif kind == "param" and self.program.is_held:
            msg["value"] = jax.lax.stop_gradient(msg["value"])

    def _hand_in(self, msg: dict) -> None:
        value, shape = self.given[msg["name"]], tuple(msg["fn"].shape())
        if not msg.get("_control_flow_done", False):
            if jnp.shape(value) != shape:
                raise ValueError(
                    f"values[{msg['name']!r}] has shape {jnp.shape(value)}, and the site has {shape} in {self.program.name}. "
                    "Hand in what sample() returned, or an array of the site's shape."
                )
            msg["value"] = value

    def _met(self, msg: dict, *, auxiliary: bool) -> Met:
        fn, name, value = msg["fn"], msg["name"], msg["value"]
        estimator = None if msg["is_observed"] else self.program.run.estimators.get(name)
        try:
            log_prob = (log_density if estimator is None else estimator.log_prob)(fn, value, msg.get("intermediates"))
        except NotImplementedError as error:
            raise SiteError(
                f"Site {name!r} of {self.program.name}: its density at a given value needs the inverse of a transformation "
                "that has none, and an objective that is written as a program evaluates it there. Use ELBO() or IWELBO(), or a "
                "transformation with an inverse."
            ) from error
        if msg["scale"] is not None and not is_identically_one(msg["scale"]):
            log_prob = jnp.asarray(msg["scale"], log_prob.dtype) * log_prob
        frames = tuple(msg["cond_indep_stack"])
        parts = {plate[0] for plate in self.program.run.plates}
        subsampled = tuple(f.name for f in frames if f.name in parts)
        origin = Origin(self.program.label.format(name), frames, jnp.ndim(log_prob), subsampled)
        return Met(value, log_prob, origin, msg["_drawn"], msg["is_observed"], auxiliary)


def _is_part(size: int, subsample_size: int | None) -> bool:
    """Whether a plate holds a random part of its elements."""
    return subsample_size is not None and subsample_size != size


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramDensity(AbstractDensity):
    """The density of a NumPyro program with its arguments, inside of an objective.

    An objective gets two of them, its model and its guide.

    Attributes
    ----------
    name : str
        ``"model"``, ``"guide"`` or ``"proposal"``.
    given : dict
        Values that were set (see `given_values`).
    latents_only : bool
        Whether only the sites that are drawn, or handed to `log_density`, count (see `prior`).
    """

    function: Callable
    args: tuple
    kwargs: dict
    run: ObjectiveRun
    name: str
    label: str
    other: bool = False
    given: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    latents_only: bool = False
    is_held: bool = False

    def sample(self) -> tuple[dict[str, Array], LogDensity]:
        """Draw every latent site; return values by name (without auxiliary ones), and the log density of all that was drawn.

        Raises
        ------
        ValueError
            If the program observes something: what is drawn has then not the law of the density.
        """
        met = self._run(self.given)
        counted = {name: site for name, site in met.items() if not site.drawn}
        if counted and not self.latents_only:
            raise ValueError(
                f"{self.name}.sample() draws from the program as it runs, but it also counts {', '.join(map(repr, counted))}, "
                f"which it does not draw. Draw from {self.name}.prior, which leaves that out, or approximately from the posterior: "
                f"normalise({self.name}, num_particles, proposal)."
            )
        drawn = {name: site for name, site in met.items() if site.drawn}
        if not drawn:
            raise ValueError(f"{self.name}.sample() drew nothing: the program has no latent site.")
        return {name: site.value for name, site in drawn.items() if not site.auxiliary}, _sum(drawn)

    def log_density(self, values: Mapping[str, Array]) -> LogDensity:
        """Log density at values for all latent sites, with what the program observes.

        Raises
        ------
        ValueError
            For sites without a value, values without a site, and values of another shape than the site.
        """
        if not isinstance(values, Mapping):
            raise TypeError(
                f"values must map names of sites to arrays, as sample() returns them; got {type(values).__name__}. (sample() "
                "returns two things: values, and their log density.)"
            )
        met = self._run({**self.given, **values})
        lacking = [name for name, site in met.items() if site.drawn]
        if lacking:
            raise ValueError(
                f"{self.name}.log_density needs a value for every latent site, and got none for "
                f"{', '.join(map(repr, lacking))}; it got {', '.join(map(repr, values)) or 'nothing'}. Draw them, or sum them "
                f"out: marginal({self.name}, keep=[…], …)."
            )
        extra = [name for name in values if name not in met or met[name].observed]
        if extra:
            raise ValueError(
                f"{self.name}.log_density got values for {', '.join(map(repr, extra))}, which it does not draw; it draws "
                f"{', '.join(repr(n) for n, s in met.items() if not s.observed) or 'nothing'}. Hand in those alone; of a "
                "guide with more sites than the model take marginal(guide, keep=[…], …)."
            )
        return _sum({name: site for name, site in met.items() if not self.latents_only or name in values})

    @property
    def held(self) -> "ProgramDensity":
        """The same with the parameters held: derivatives flow through values alone."""
        return dataclasses.replace(self, is_held=True)

    @property
    def prior(self) -> "ProgramDensity":
        """The law of the latent sites as the program draws them, without what it observes."""
        return dataclasses.replace(self, latents_only=True)

    def given_values(self, values: Mapping[str, Array]) -> "ProgramDensity":
        """The same with some sites set; they count in the density."""
        return dataclasses.replace(self, given={**self.given, **values})

    def _run(self, given: Mapping[str, Array]) -> dict[str, Met]:
        inside = _Inside(self, given)
        with inside:
            self.function(*self.args, **self.kwargs)
        return inside.met


def _sum(met: Mapping[str, Met]) -> LogDensity:
    return LogDensity([site.log_prob for site in met.values()], [site.origin for site in met.values()])
