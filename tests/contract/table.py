"""Every public kernel and estimator, one row each: how it is made, and what it can do.

A new algorithm is one row here; `test_table_is_complete` fails until it has one. A capability that is declared ``False``
must raise a clear error when it is asked for, and that is tested too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ergodica as erg
from ergodica.core.latent import LatentPosterior
from ergodica.core.types import PyTree

NUM_DATA, BATCH_SIZE = 7, 3
SIZE = 2

# --- targets: one log density over positions of three structures ---------------------------------------------------

POSITIONS: dict[str, Callable[[], PyTree]] = {
    "array": lambda: jnp.array([0.3, -0.4]),
    "dict": lambda: {"a": jnp.array(0.3, jnp.result_type(float)), "b": {"c": jnp.array([[-0.4]])}},
    "scalar": lambda: jnp.array(0.3, jnp.result_type(float)),
}


class Counter:
    """Counts how often the log density is traced."""

    def __init__(self) -> None:
        self.traces = 0


def as_vector(position: PyTree) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(position)])


def posterior_of(structure: str, *, counter: Counter | None = None, with_data: bool = True) -> erg.Posterior:
    """A Student-like regression: not Gaussian, so that nothing is right by linearity alone.

    Without a counter it is one object a precision, so that tests find each other's compiled programs.
    """
    make = _make_posterior.__wrapped__ if counter else _make_posterior
    return make(structure, counter, with_data, jnp.result_type(float))


@functools.cache
def _make_posterior(structure: str, counter: Counter | None, with_data: bool, _: Any) -> erg.Posterior:
    def log_likelihood(position: PyTree, rows: PyTree) -> jax.Array:
        if counter is not None:
            counter.traces += 1
        theta = as_vector(position)
        residual = rows["y"] - rows["x"][:, : theta.shape[0]] @ theta
        return -jnp.log1p(residual**2)

    x = jnp.linspace(-1.0, 2.0, NUM_DATA * SIZE).reshape(NUM_DATA, SIZE)
    data = {"x": x, "y": jnp.sin(jnp.arange(1.0, NUM_DATA + 1.0))}
    return erg.Posterior(
        lambda position: -0.5 * jnp.sum(as_vector(position) ** 2),
        log_likelihood,
        data if with_data else None,
        num_data=NUM_DATA,
        initial=POSITIONS[structure](),
    )


# --- estimators ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EstimatorRow:
    name: str
    """The public name in `ergodica.estimators`."""
    make: Callable[[erg.Posterior], Any]
    label: str
    random: bool = True
    """Whether another key gives another estimate."""
    works_without_data: bool = True
    """Whether it can be made for a posterior whose data are streamed."""
    draws_without_data: bool = False
    streams: bool = True
    """Whether batches can be handed to `estimate`."""
    unbiased: bool = True
    adapts_posterior: bool = False
    """Whether ``make`` builds a posterior of another kind around the one it gets, or a function of it."""
    random_directions: bool = False
    """Whether the estimate is random even on a batch of all the data."""
    probes: bool = True
    takes_posterior: bool = True
    """Whether it can ascend a posterior, so that the posterior may hold no data."""
    bad_input: tuple[Callable[[erg.Posterior], Any], type[Exception], str] | None = None


def minibatch_of(scheme):
    if scheme == "importance":
        probabilities = jnp.arange(1.0, NUM_DATA + 1) / (NUM_DATA * (NUM_DATA + 1) / 2)
        return lambda p: erg.estimators.Minibatch(p, BATCH_SIZE, scheme, probabilities=probabilities)
    return lambda p: erg.estimators.Minibatch(p, None if scheme == "full" else BATCH_SIZE, scheme)


def _control_variate(scheme):
    return lambda p: erg.estimators.ControlVariate(minibatch_of(scheme)(p), p.initial)


def _with_latent(posterior: erg.Posterior, position: PyTree, latents: PyTree, rows: PyTree) -> jax.Array:
    """A standard normal beside each datum: it changes no gradient."""
    return posterior.log_likelihood(position, rows) - 0.5 * latents["z"] ** 2


def _local_latents(**options):
    def make(p):
        joint = jax.tree_util.Partial(_with_latent, p)
        target = LatentPosterior(p.log_prior, joint, p.data, latents={"z": ()}, initial=p.initial)
        return erg.estimators.LocalLatents(target, BATCH_SIZE, inner_step_size=0.8, **options)

    return make


ESTIMATORS = [
    EstimatorRow(
        "Minibatch",
        minibatch_of("blocks"),
        "Minibatch-blocks",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 0), ValueError, "batch_size must be between 1 and 7; got 0"),
    ),
    EstimatorRow(
        "Minibatch",
        minibatch_of("symmetric"),
        "Minibatch-symmetric",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 8, "symmetric"), ValueError, "must be between 1 and 7; got 8"),
    ),
    EstimatorRow(
        "Minibatch",
        minibatch_of("uniform"),
        "Minibatch-uniform",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 3, "unifrom"), ValueError, "scheme must be one of"),
    ),
    EstimatorRow(
        "Minibatch",
        minibatch_of("full"),
        "Minibatch-full",
        random=False,
        bad_input=(lambda p: erg.estimators.Minibatch(p, 3, "full"), ValueError, "leave batch_size out"),
    ),
    EstimatorRow(
        "DataParallel",
        lambda p: erg.estimators.DataParallel(minibatch_of("blocks")(p)),
        "DataParallel-blocks",
        works_without_data=False,
        adapts_posterior=True,
        bad_input=(
            lambda p: erg.estimators.DataParallel(minibatch_of("uniform")(p)),
            ValueError,
            "scheme='uniform' gathers rows from everywhere",
        ),
    ),
    EstimatorRow(
        "DataParallel",
        lambda p: erg.estimators.DataParallel(minibatch_of("full")(p)),
        "DataParallel-full",
        random=False,
        works_without_data=False,
        adapts_posterior=True,
        bad_input=(
            lambda p: erg.estimators.DataParallel(minibatch_of("full")(p), devices=[0]),
            TypeError,
            "devices must be a sequence of JAX devices",
        ),
    ),
    EstimatorRow(
        "ControlVariate",
        _control_variate("blocks"),
        "ControlVariate-blocks",
        works_without_data=False,
        bad_input=(
            lambda p: erg.estimators.ControlVariate(minibatch_of("blocks")(p), {"other": jnp.zeros(5)}),
            ValueError,
            "centre must have the structure",
        ),
    ),
    EstimatorRow(
        "ControlVariate",
        _control_variate("uniform"),
        "ControlVariate-uniform",
        works_without_data=False,
        bad_input=(lambda p: erg.estimators.ControlVariate(p, p.initial), TypeError, "gradient must be a Minibatch"),
    ),
    EstimatorRow(
        "Minibatch",
        minibatch_of("importance"),
        "Minibatch-importance",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 3, "importance"), ValueError, "probabilities belong to"),
    ),
    EstimatorRow(
        "SVRG",
        lambda p: erg.estimators.SVRG(minibatch_of("blocks")(p), centre=p.initial),
        "SVRG-blocks",
        works_without_data=False,
        bad_input=(lambda p: erg.estimators.SVRG(p), TypeError, "gradient must be a Minibatch"),
    ),
    EstimatorRow(
        "RecentringControlVariate",
        lambda p: erg.estimators.RecentringControlVariate(minibatch_of("uniform")(p), centre=p.initial),
        "RecentringControlVariate-uniform",
        works_without_data=False,
        bad_input=(
            lambda p: erg.estimators.RecentringControlVariate(minibatch_of("uniform")(p), centre=jnp.zeros(5)),
            ValueError,
            "centre must have the shape",
        ),
    ),
    EstimatorRow(
        "SAGA",
        lambda p: erg.estimators.SAGA(minibatch_of("blocks")(p), centre=p.initial),
        "SAGA",
        works_without_data=False,
        streams=False,
        bad_input=(lambda p: erg.estimators.SAGA(minibatch_of("uniform")(p)), ValueError, "scheme='blocks'"),
    ),
    EstimatorRow(
        "Clipped",
        lambda p: erg.estimators.Clipped(minibatch_of("blocks")(p), max_norm=0.05),
        "Clipped",
        unbiased=False,
        bad_input=(
            lambda p: erg.estimators.Clipped(minibatch_of("blocks")(p), 0.0),
            ValueError,
            "max_norm must be finite",
        ),
    ),
    EstimatorRow(
        "RobustAggregate",
        lambda p: erg.estimators.RobustAggregate(erg.estimators.Minibatch(p, 4), 2),
        "RobustAggregate",
        unbiased=False,
        bad_input=(
            lambda p: erg.estimators.RobustAggregate(minibatch_of("blocks")(p), 3, "mean"),
            ValueError,
            "rule must be one of",
        ),
    ),
    *(
        EstimatorRow(
            "LocalLatents",
            _local_latents(start=start),
            f"LocalLatents-{start}",
            works_without_data=False,
            streams=False,
            adapts_posterior=True,
            bad_input=bad_input,
        )
        for start, bad_input in (
            ("last", (_local_latents(num_inner_steps=-1), ValueError, "num_inner_steps must be at least 0; got -1")),
            (
                "guess",
                (
                    lambda p: erg.estimators.LocalLatents(p, BATCH_SIZE, inner_step_size=0.8),
                    TypeError,
                    "posterior must be a LatentPosterior; got Posterior",
                ),
            ),
        )
    ),
]


def _shards(posterior: erg.Posterior) -> erg.Shards:
    return erg.Shards(posterior, [0, 1, 1, 0, 2, 1, 1])


def _surrogates(posterior: erg.Posterior) -> Any:
    """Gaussians that have little to do with the likelihoods."""
    means = jax.tree.map(lambda x: jnp.stack([x, x + 0.2, x - 0.1]), posterior.initial)
    return erg.estimators.GaussianSurrogates(means, jax.tree.map(lambda x: 1.0 + x**2, means))


def conducive_of(posterior: erg.Posterior, batch_size: int | None = BATCH_SIZE, **options: Any) -> Any:
    return erg.estimators.Conducive(_shards(posterior), _surrogates(posterior), batch_size, **options)


ESTIMATORS += [
    EstimatorRow(
        "Conducive",
        conducive_of,
        "Conducive-FSGLD",
        works_without_data=False,
        streams=False,
        bad_input=(
            lambda p: conducive_of(p, probabilities=[0.5, 0.5, 0.0]),
            ValueError,
            "probabilities must be above 0 with the sum 1",
        ),
    ),
    EstimatorRow(
        "Conducive",
        lambda p: erg.estimators.Conducive(_shards(p), None, probabilities="uniform"),
        "Conducive-DSGLD-whole-shards",
        works_without_data=False,
        streams=False,
        bad_input=(
            lambda p: erg.estimators.Conducive(
                erg.Shards(p, jnp.arange(NUM_DATA)), erg.estimators.GaussianSurrogates(jnp.zeros(3), jnp.ones(3))
            ),
            ValueError,
            "surrogates must be of the 7 clients",
        ),
    ),
]

ESTIMATORS += [
    EstimatorRow(
        "PrivateConducive",
        lambda p: erg.estimators.PrivateConducive(conducive_of(p, None), 0.2, 0.5),
        "PrivateConducive",
        works_without_data=False,
        streams=False,
        unbiased=False,
        bad_input=(
            lambda p: erg.estimators.PrivateConducive(conducive_of(p), 2.0, 0.5),
            ValueError,
            "gradient must use all rows of a client; got batch_size",
        ),
    ),
]


# --- kernels -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelRow:
    name: str
    """The public name in `ergodica.samplers`."""
    make: Callable[..., Any]
    """``make(estimator, step_size, **options)``."""
    label: str
    hyperparameters: tuple[str, ...]
    """Those that another value of must not retrace."""
    streams: bool = True
    """Whether batches can be handed to `step`."""
    probes: bool = True
    works_without_data: bool = True
    """Whether it can be made for a posterior whose data are streamed."""
    independent_chains: bool = True
    """Whether chains that are vectorised together are what each would be alone."""
    exact: bool = False
    """Whether the posterior is left invariant; such a kernel rejects what diverges, and stays finite."""
    scheme: str = "uniform"
    """Batches that it is tested with; "blocks" take longer to trace, so two kernels speak for the rest."""


def _langevin(name, scheme):
    return KernelRow(name, getattr(erg.samplers, name), f"{name}-{scheme}", ("step_size", "temperature"), scheme=scheme)


def _splitting(name, scheme="uniform"):
    hyperparameters = ("step_size", "temperature", "friction")
    return KernelRow(name, getattr(erg.samplers, name), f"{name}-{scheme}", hyperparameters, scheme=scheme)


KERNELS = [
    _langevin("SGLD", "blocks"),
    _langevin("SGLD", "uniform"),
    _langevin("SGLD", "full"),
    _splitting("BAOAB", "blocks"),
    *(_splitting(name) for name in ("ABOBA", "BADODAB", "BAOA", "LieTrotter", "OBABO", "SGHMC", "SGNHT", "UBU")),
    _splitting("ForceGradient"),
    KernelRow(
        "Splitting",
        lambda gradient, step_size, **options: erg.samplers.Splitting("OABAO", gradient, step_size, **options),
        "Splitting-OABAO",
        ("step_size", "temperature", "friction"),
    ),
    KernelRow(
        "Splitting",
        lambda gradient, step_size, **options: erg.samplers.Splitting(
            "BAOAB", gradient, step_size, one_batch=True, **options
        ),
        "Splitting-BAOAB-one-batch",
        ("step_size", "temperature", "friction"),
        scheme="symmetric",
    ),
    KernelRow(
        "Thermostat",
        lambda gradient, step_size, **options: erg.samplers.Thermostat("ADOBODA", gradient, step_size, **options),
        "Thermostat-ADOBODA",
        ("step_size", "temperature", "friction", "thermal_mass"),
    ),
    _langevin("MultiplicativeLangevin", "uniform"),
    KernelRow(
        "MultiplicativeLangevin",
        lambda gradient, step_size, **options: erg.samplers.MultiplicativeLangevin(
            gradient, step_size, allow_sign_changes=True, **options
        ),
        "MultiplicativeLangevin-ambient",
        ("step_size", "temperature"),
    ),
    KernelRow(
        "AMAGOLD",
        lambda gradient, step_size, **options: erg.samplers.AMAGOLD(gradient, step_size, 3, **options),
        "AMAGOLD",
        ("step_size", "temperature", "friction"),
        streams=False,
        exact=True,
    ),
    KernelRow(
        "ReplicaExchange",
        lambda gradient, step_size, **options: erg.samplers.ReplicaExchange(gradient, step_size, (2.0, 3.0), **options),
        "ReplicaExchange",
        ("step_size", "temperature", "decay"),
        streams=False,
    ),
    KernelRow(
        "PreconditionedSGLD",
        lambda gradient, step_size, **options: erg.samplers.PreconditionedSGLD(gradient, step_size, 2, **options),
        "PreconditionedSGLD-frozen",
        ("step_size", "temperature", "decay", "damping"),
    ),
    KernelRow(
        "PreconditionedSGLD",
        lambda gradient, step_size, **options: erg.samplers.PreconditionedSGLD(
            gradient, step_size, None, drift_correction=True, **options
        ),
        "PreconditionedSGLD-drift",
        ("step_size", "temperature", "decay", "damping"),
    ),
    KernelRow(
        "NoiseCorrectedSGLD",
        lambda gradient, step_size, **options: erg.samplers.NoiseCorrectedSGLD(gradient, step_size, **options),
        "NoiseCorrectedSGLD-measured",
        ("step_size", "temperature", "decay"),
        streams=False,
    ),
    KernelRow(
        "NoiseCorrectedSGLD",
        lambda gradient, step_size, **options: erg.samplers.NoiseCorrectedSGLD(
            gradient, step_size, **({"noise": 1.0} | options)
        ),
        "NoiseCorrectedSGLD-given",
        ("step_size", "temperature", "noise"),
    ),
    KernelRow(
        "Averaged",
        lambda gradient, step_size, **options: erg.samplers.Averaged(
            erg.samplers.SGLD(gradient, step_size, **options), stride=2, covariance="full"
        ),
        "Averaged-SGLD",
        ("step_size", "temperature"),
    ),
]


def _federated(kernel: Callable, local_steps: Any, schedule: str = "independent", **settings: Any) -> Callable:
    """A kernel over the shards of the posterior of the estimator that comes in."""

    def make(gradient, step_size, **options):
        known = isinstance(gradient, erg.estimators.Minibatch)
        own = conducive_of(gradient.target, **settings) if known else gradient
        return erg.samplers.Federated(kernel(own, step_size, **options), local_steps, schedule)

    return make


KERNELS += [
    KernelRow(
        "Federated",
        _federated(erg.samplers.SGLD, (1, 2, 3)),
        "Federated-SGLD",
        ("step_size", "temperature"),
        streams=False,
        works_without_data=False,
    ),
    KernelRow(
        "Federated",
        _federated(erg.samplers.BAOAB, 2, "permutation", probabilities="uniform"),
        "Federated-BAOAB-permutation",
        ("step_size", "temperature", "friction"),
        streams=False,
        works_without_data=False,
        independent_chains=False,
    ),
]
# Kernels made by `from_blackjax` belong here too, with ``streams=False, probes=False``: they are rows like any other.

PRESETS = frozenset(
    {f"{name}-uniform" for name in ("ABOBA", "BADODAB", "BAOA", "LieTrotter", "OBABO", "SGHMC", "SGNHT", "UBU")}
    | {"Splitting-OABAO", "MultiplicativeLangevin-ambient", "NoiseCorrectedSGLD-given"}
)
"""Rows whose class another row runs with other settings."""


def kernel_of(row: KernelRow, posterior: erg.Posterior, **options: Any) -> Any:
    return row.make(minibatch_of(row.scheme)(posterior), options.pop("step_size", 0.05), **options)
