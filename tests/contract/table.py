"""Every public kernel and estimator, one row each: how it is made, and what it can do.

A new algorithm is one row here; `test_table_is_complete` fails until it has one. A capability that is declared ``False``
must raise a clear error when it is asked for, and that is tested too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ergodica as erg
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
    """A Student-like regression: not Gaussian, so that nothing is right by linearity alone."""

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
    bad_input: tuple[Callable[[erg.Posterior], Any], type[Exception], str] | None = None


def _minibatch(scheme):
    return lambda p: erg.estimators.Minibatch(p, None if scheme == "full" else BATCH_SIZE, scheme)


def _control_variate(scheme):
    return lambda p: erg.estimators.ControlVariate(_minibatch(scheme)(p), p.initial)


ESTIMATORS = [
    EstimatorRow(
        "Minibatch",
        _minibatch("blocks"),
        "Minibatch-blocks",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 0), ValueError, "batch_size must be between 1 and 7; got 0"),
    ),
    EstimatorRow(
        "Minibatch",
        _minibatch("uniform"),
        "Minibatch-uniform",
        bad_input=(lambda p: erg.estimators.Minibatch(p, 3, "unifrom"), ValueError, "scheme must be one of"),
    ),
    EstimatorRow(
        "Minibatch",
        _minibatch("full"),
        "Minibatch-full",
        random=False,
        bad_input=(lambda p: erg.estimators.Minibatch(p, 3, "full"), ValueError, "leave batch_size out"),
    ),
    EstimatorRow(
        "ControlVariate",
        _control_variate("blocks"),
        "ControlVariate-blocks",
        works_without_data=False,
        bad_input=(
            lambda p: erg.estimators.ControlVariate(_minibatch("blocks")(p), {"other": jnp.zeros(5)}),
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
    *(_splitting(name) for name in ("ABOBA", "BAOA", "LieTrotter", "OBABO", "SGHMC", "UBU")),
    KernelRow(
        "Splitting",
        lambda gradient, step_size, **options: erg.samplers.Splitting("OABAO", gradient, step_size, **options),
        "Splitting-OABAO",
        ("step_size", "temperature", "friction"),
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
# Kernels made by `from_blackjax` belong here too, with ``streams=False, probes=False``: they are rows like any other.


def kernel_of(row: KernelRow, posterior: erg.Posterior, **options: Any) -> Any:
    return row.make(_minibatch(row.scheme)(posterior), options.pop("step_size", 0.05), **options)
