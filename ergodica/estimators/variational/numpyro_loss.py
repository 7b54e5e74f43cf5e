"""NumPyro's own losses, and anything with their face, as losses that `VariationalGradient` takes."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.explain import Explanation
from ergodica.estimators.variational.objectives.loss import AbstractLoss, Evaluation
from ergodica.estimators.variational.structure import Program


class NumPyroLoss(AbstractLoss):
    """A loss of `numpyro.infer`, or any object with ``loss(key, params, model, guide, *args, **kwargs)``.

    `VariationalGradient` makes one of what it is given. The derivative of the loss is taken as it comes: where it is wrong,
    as NumPyro's are for some guides, `ergodica.compare_gradients` finds it biased.
    """

    of: Any = eqx.field(static=True)

    references: ClassVar = ()

    @property
    def num_particles(self) -> int:
        """Runs of the program a call, as far as the loss says so."""
        return int(getattr(self.of, "num_particles", 1))

    @property
    def linear(self) -> bool:
        """Whether the objective is known to be a mean over the particles."""
        return isinstance(self.of, Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO | TraceMeanField_ELBO)

    def with_particles(self, num_particles: int) -> "NumPyroLoss":
        """The same loss with another number of particles."""
        changed = copy.copy(self.of)
        changed.num_particles = num_particles
        return NumPyroLoss(changed)

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:
        """Negate the loss."""
        value = -self.of.loss(key, {**params, **learned}, program.model, program.guide, *program.args, **program.kwargs)
        return Evaluation(value, state, {}, self.num_particles)

    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:  # noqa: ARG002
        """Nothing is remembered."""
        return {}

    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:  # noqa: ARG002
        """Raise: what it does at each site is not known here."""
        raise TypeError(
            f"{type(self.of).__name__} does not say what it does at each site. Compare it by ergodica.compare_gradients."
        )

    def guide(self, model: Callable, guide: Callable) -> Callable:  # noqa: ARG002
        """The guide itself."""
        return guide


def as_loss(loss: Any) -> AbstractLoss:
    """Return one of ours, or one of NumPyro's wrapped; raise for anything else."""
    if isinstance(loss, AbstractLoss):
        return loss
    if callable(getattr(loss, "loss", None)) and not isinstance(loss, type):
        return NumPyroLoss(loss)
    raise TypeError(
        f"loss must be one of ergodica's such as ELBO(num_particles=8), one of NumPyro's, or have their method loss(key, params, "
        f"model, guide, *args, **kwargs); got {loss!r} of type {type(loss).__name__}."
    )
