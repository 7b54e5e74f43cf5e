"""The estimators that are compared, and how their temperatures and slopes move."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from discrete_parts.programs import Task
from ergodica.estimators import (
    DARN,
    ELBO,
    IWELBO,
    VIMCO,
    DisARM,
    GumbelSoftmax,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    Network,
    ReinMax,
    Score,
    StraightThrough,
)

HIDDEN = 100
"""Units of the network that is a baseline."""


class Method(NamedTuple):
    """An estimator: its title, particles, estimators by site for a value of its knob, the knob's course, the objective."""

    title: str
    num_particles: int
    sites: Callable[[Task, Any], dict[str, Any]]
    knob: Callable[[float, Task], float] = lambda progress, task: 1.0  # noqa: ARG005
    objective: type = ELBO

    def loss(self, task: Task, knob: Any) -> Any:
        """The objective, at a value of the knob."""
        return self.objective(self.num_particles, self.sites(task, knob))


def everywhere(make: Callable[[Any], Any]) -> Callable[[Task, Any], dict[str, Any]]:
    """One estimator at all sites."""
    return lambda task, knob: dict.fromkeys(task.sites, make(knob))


def temperature(progress: float, task: Task) -> float:
    """1 for the conditional network, as in the paper; elsewhere from 1 down to 0.5 at half of the run, exponentially."""
    return 1.0 if task.name.startswith("half") else max(0.5, math.exp(-2 * math.log(2) * progress))


def slope(progress: float, task: Task) -> float:  # noqa: ARG001
    """From 1 to 3, linearly."""
    return 1.0 + 2.0 * progress


def baseline_network(task: Task) -> Network:
    """A hidden layer on the first argument, around the start."""
    return Network(_Apply(task.start), jax.tree_util.Partial(_initial))


def _initial(key: jax.Array, x: jax.Array, *rest: Any) -> dict[str, jax.Array]:  # noqa: ARG001
    size = x.shape[-1]
    weight = jax.random.normal(key, (size, HIDDEN)) / math.sqrt(size)
    return {"in": weight, "bias": jnp.zeros(HIDDEN), "out": jnp.zeros(HIDDEN), "shift": jnp.zeros(())}


class _Apply(NamedTuple):
    """Equal where the start is, so that a loss made anew is the same to `jax.jit`."""

    start: float

    def __call__(self, psi: dict[str, jax.Array], x: jax.Array, *rest: Any) -> jax.Array:  # noqa: ARG002
        hidden = jnp.tanh(x @ psi["in"] + psi["bias"])
        return self.start * (1 + 0.1 * (hidden @ psi["out"] + psi["shift"]))


def disarm(task: Task, knob: Any) -> dict[str, Any]:  # noqa: ARG001
    """Particles are pairs at the first site; at a site whose law depends on another the program runs twice."""
    return {site: DisARM(coupled=site == task.sites[0]) for site in task.sites}


METHODS = {
    "score": Method("score function", 1, everywhere(lambda _: Score(MovingAverage(0.9)))),
    "darn": Method("DARN", 1, everywhere(lambda _: DARN())),
    "muprop": Method("MuProp", 1, everywhere(lambda _: MuProp())),
    "straight_through": Method("straight-through", 1, everywhere(lambda _: StraightThrough())),
    "annealed": Method("slope-annealed", 1, everywhere(StraightThrough), slope),
    "gumbel": Method("Gumbel-Softmax", 1, everywhere(GumbelSoftmax), temperature),
    "gumbel_hard": Method(
        "ST Gumbel-Softmax", 1, everywhere(lambda t: GumbelSoftmax(t, straight_through=True)), temperature
    ),
    "reinmax": Method("ReinMax", 1, everywhere(lambda _: ReinMax())),
    "leave_one_out": Method("leave-one-out", 2, everywhere(lambda _: LeaveOneOut())),
    "disarm": Method("DisARM", 2, disarm),
    "vimco": Method("VIMCO", 2, everywhere(lambda _: VIMCO()), objective=IWELBO),
    "ten_particles": Method("leave-one-out, ten particles", 10, everywhere(lambda _: LeaveOneOut())),
    "constant": Method("constant", 2, lambda task, _: dict.fromkeys(task.sites, Score(task.start))),
    "average": Method("moving average", 2, everywhere(lambda _: Score(MovingAverage(0.9)))),
    "network": Method("network", 2, lambda task, _: dict.fromkeys(task.sites, Score(baseline_network(task)))),
}

PAPER = ("score", "darn", "muprop", "straight_through", "annealed", "gumbel", "gumbel_hard")
"""Estimators of the paper's table; DARN, as defined for bits alone."""
OURS = ("reinmax", "leave_one_out", "disarm", "vimco")
BASELINES = ("constant", "average", "network")
"""With two particles each, as leave-one-out has."""


def cells() -> list[tuple[str, str]]:
    """Pairs of task and method, in the order in which they are run for a seed."""
    pairs = []
    for task in ("vae_categories", "vae_bits", "half_bits", "half_categories"):
        pairs += [(task, name) for name in (*PAPER, *OURS) if name not in ("darn", "disarm") or task.endswith("bits")]
    pairs += [(task, name) for task in ("vae_bits", "deep_bits") for name in BASELINES]
    pairs += [("deep_bits", "leave_one_out"), ("deep_bits", "disarm")]
    return [*pairs, ("vae_categories", "ten_particles"), ("vae_bits", "ten_particles")]
