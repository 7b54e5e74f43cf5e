"""Run a NumPyro model on some rows of its data, and note in shapes what it does."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from ergodica.core.types import PyTree
from ergodica.models.numpyro_arguments import Arguments


class PinnedPlates(Messenger):
    """Run a model on chosen rows of its data plate and on the whole of all others that subsample, without their scales."""

    def __init__(self, fn: Callable, data_plate: str | None = None, rows: Any = None) -> None:
        super().__init__(fn)
        self.data_plate, self.rows = data_plate, rows
        self.share = 1.0

    def process_message(self, msg: Any) -> None:
        """Set the indices of plates; undo the scale of the sites within the data plate."""
        if msg["type"] == "plate":
            self._pin(msg)
        elif msg["type"] == "sample" and self.share != 1.0 and self._inside(msg):
            msg["scale"] = msg["scale"] * self.share

    def _pin(self, msg: Any) -> None:
        size, subsample_size = msg["args"]
        if msg["name"] == self.data_plate:
            msg["value"], msg["args"] = self.rows, (size, self.rows.shape[0])
            self.share = self.rows.shape[0] / size
        elif subsample_size is not None and subsample_size != size:
            msg["value"], msg["args"] = jnp.arange(size), (size, size)

    def _inside(self, msg: Any) -> bool:
        return any(frame.name == self.data_plate for frame in msg["cond_indep_stack"])


def bind(model: Callable, arguments: Arguments, plate: str | None, rows: PyTree) -> tuple[Callable, dict[str, Any]]:
    """Give the model that sees some rows, and its arguments."""
    keyword = arguments.keyword()
    if plate is None:
        return PinnedPlates(model), {**keyword, **rows}
    return PinnedPlates(model, plate, rows), keyword


@dataclass
class Record:
    """What a trace shows of one sample or deterministic site, in shapes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int], ...]
    """Name, dim and size of the plates around it, from the right."""
    observed: bool = False
    factor: bool = False
    discrete: bool = False
    enumerated: bool = False
    support_size: int = 0
    """How many values a discrete latent site can take; 0 where they are not finitely many."""
    element_shape: tuple[int, ...] = ()
    """Axes of the event of a discrete latent site that one value of its support fills."""
    scaled: bool = False
    """Whether `numpyro.handlers.scale` is at work here."""
    log_prob_shape: tuple[int, ...] = ()
    unconstrained_shape: tuple[int, ...] = ()
    event_dim: int = 0
    event_dims: tuple[str, ...] = ()

    @property
    def latent(self) -> bool:
        """Whether it is sampled and not observed."""
        return self.kind == "sample" and not self.observed


@dataclass
class Records:
    """What a trace shows: sites in order, plates with their sizes, and the sizes of subsampled ones."""

    sites: dict[str, Record] = field(default_factory=dict)
    plates: dict[str, int] = field(default_factory=dict)
    subsampled: dict[str, int] = field(default_factory=dict)
    gathers: bool = False


class Recorder(Messenger):
    """Write down the sites and plates that a model passes."""

    def __init__(self, fn: Callable, records: Records) -> None:
        super().__init__(fn)
        self.records = records

    def process_message(self, msg: Any) -> None:
        """Refuse control flow; note plates that subsample."""
        if msg["type"] == "control_flow":
            raise ValueError(
                "The model uses scan or cond of numpyro.contrib.control_flow, whose steps depend on each other, so that its "
                "likelihood does not split into data. Make whole series the data (a leading axis over series, with the steps "
                "vectorised by jax.lax inside), or write a global random walk with jnp.cumsum or dist.GaussianRandomWalk."
            )
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            self.records.plates[msg["name"]] = size
            if subsample_size is not None and subsample_size != size:
                self.records.subsampled[msg["name"]] = size
        self.records.gathers |= msg["type"] == "subsample"

    def postprocess_message(self, msg: Any) -> None:
        """Note a site."""
        if msg["type"] not in ("sample", "deterministic"):
            return
        sites, name = self.records.sites, msg["name"]
        if name in sites:
            raise ValueError(f"Two sites of the model have the name {name!r}; rename one.")
        sites[name] = _record_sample(msg) if msg["type"] == "sample" else _record_deterministic(msg)

    def __exit__(self, *exception: Any) -> None:
        """Refuse names that stand for a site and a plate at once."""
        super().__exit__(*exception)
        if exception[0] is None:
            for name in self.records.sites.keys() & self.records.plates.keys():
                raise ValueError(f"{name!r} names both a site and a plate of the model; rename one.")


def record(model: Callable, arguments: Arguments, plate: str | None, rows: PyTree) -> Records:
    """Trace a model abstractly; ``rows`` are shapes."""
    records = Records()

    def run(arguments: Arguments, rows: PyTree) -> None:
        recorder = Recorder(handlers.substitute(model, substitute_fn=feasible), records)
        # the key is for plates that subsample and for initial values; abstract, as all else here
        bound, keyword = bind(handlers.seed(recorder, jax.random.key(0)), arguments, plate, rows)
        bound(**keyword)

    with _explained():
        jax.eval_shape(run, arguments, rows)
    return records


def log_det_name(site: str) -> str:
    """Name of the factor that holds the log Jacobian of a latent site."""
    return f"_{site}_log_det"


def feasible(site: Any) -> Array | None:
    """Value of a latent site at the origin of unconstrained space (of a discrete one, only its shape counts)."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    shape = (*site["kwargs"]["sample_shape"], *site["fn"].shape())
    if site["fn"].support.is_discrete:
        return jnp.zeros(shape, int)
    transform = _bijection(site)
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def _bijection(site: Any) -> Any:
    try:
        return biject_to(site["fn"].support)
    except NotImplementedError as error:
        raise ValueError(
            f"The latent site {site['name']!r} of law {type(site['fn']).__name__} has the support {site['fn'].support}, which "
            "NumPyro cannot map to unconstrained space."
        ) from error


def _record_sample(msg: Any) -> Record:
    law, shape = msg["fn"], jnp.shape(msg["value"])
    latent = not msg["is_observed"]
    discrete = latent and bool(law.support.is_discrete)
    support = _support_of_one(law) if discrete else None
    return Record(
        name=msg["name"],
        kind="sample",
        shape=np.broadcast_shapes(shape, law.shape()),
        plates=_plates(msg),
        observed=msg["is_observed"],
        factor=bool(msg["infer"].get("is_auxiliary")),
        discrete=discrete,
        enumerated=msg["infer"].get("enumerate") == "parallel",
        support_size=0 if support is None else support.shape[0],
        element_shape=() if support is None else support.shape[1:],
        scaled=msg["scale"] is not None and not _is_one(msg["scale"]),
        log_prob_shape=law.batch_shape if latent else jnp.shape(law.log_prob(msg["value"])),
        unconstrained_shape=_bijection(msg).inverse_shape(shape) if latent and not discrete else (),
        event_dim=law.event_dim,
        event_dims=tuple(msg["infer"].get("event_dims", ())),
    )


def support_of_one(law: Any) -> Array:
    """All values that one element of a discrete law can take (K, …), without its batch and independent axes."""
    while isinstance(law, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        law = law.base_dist
    values = jnp.asarray(law.enumerate_support(expand=False))
    return values.reshape(values.shape[0], *law.event_shape)


def _support_of_one(law: Any) -> Array | None:
    try:
        return support_of_one(law)
    except (NotImplementedError, jax.errors.ConcretizationTypeError):
        return None


def _is_one(scale: Any) -> bool:
    return isinstance(scale, int | float) and math.isclose(scale, 1.0)


def _record_deterministic(msg: Any) -> Record:
    shape, plates = jnp.shape(msg["value"]), _plates(msg)
    batch_dim = max((-dim for _, dim, _ in plates), default=0)
    return Record(msg["name"], "deterministic", shape, plates, event_dim=max(len(shape) - batch_dim, 0))


def _plates(msg: Any) -> tuple[tuple[str, int, int], ...]:
    return tuple((frame.name, frame.dim, frame.size) for frame in msg["cond_indep_stack"])


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do where a model asks for the values of its arguments, which are abstract here."""
    try:
        yield
    except (jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError) as error:
        _raise_conversion(
            "The model turns a traced array into a NumPy array: most likely it indexes a NumPy array of its surroundings by "
            "the indices of a plate. Pass that array as an argument of the model, or convert it by jnp.asarray",
            error,
        )
    except jax.errors.ConcretizationTypeError as error:
        _raise_conversion(
            "The model needs the value of an array while it is traced (for a size, or an if). Work it out before, and pass "
            "it as a plain number",
            error,
        )


def _raise_conversion(message: str, error: Exception) -> NoReturn:
    raise TypeError(f"{message}. JAX says: {str(error).splitlines()[0]}") from error
