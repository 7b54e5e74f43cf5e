"""The face of a variational loss: what NumPyro's SVI and `VariationalGradient` see of it."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.explain import Explanation
from ergodica.estimators.variational.structure import Program
from ergodica.estimators.variational.wrap import LEARNED, STATE


class Evaluation(NamedTuple):
    """An objective's value, whose derivatives are the estimate; what is remembered; mutable values; runs it took."""

    value: Array
    state: dict[str, PyTree]
    mutable: dict[str, PyTree]
    num_runs: int


class AbstractLoss(eqx.Module):
    """Something to be ascended over a model and a guide, with what it remembers from step to step.

    It has the face of NumPyro's ``ELBO`` classes, and goes where they go: ``SVI(model, guide, optimiser, loss)``.
    """

    references: ClassVar[tuple[str, ...]] = ()
    can_infer_discrete: ClassVar[bool] = True
    multi_sample_guide: ClassVar[bool] = False
    estimates_elbo: ClassVar[bool] = False
    """Whether the objective is the plain evidence lower bound, whose gradient can be had by quadrature."""

    @abc.abstractmethod
    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:
        """Estimate the objective; ascends."""

    @abc.abstractmethod
    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:
        """What is remembered, before the first step, by name."""

    @abc.abstractmethod
    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """What `explain` prints, as rows."""

    @abc.abstractmethod
    def guide(self, model: Callable, guide: Callable) -> Callable:
        """The guide with what the loss remembers and learns declared, so that SVI carries and trains it."""

    def loss(self, rng_key: Key, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Array:
        """Negative objective, for `numpyro.infer.SVI`; its gradient is the negative estimate."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)["loss"]

    def loss_with_mutable_state(
        self, rng_key: Key, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> dict:
        """Negative objective, and the mutable values after the step."""
        program = Program(model, guide, args, kwargs)
        state = {k.removesuffix(STATE): v for k, v in param_map.items() if k.endswith(STATE)}
        learned = {k.removesuffix(LEARNED): v for k, v in param_map.items() if k.endswith(LEARNED)}
        done = self.evaluate(rng_key, param_map, program, state, learned)
        mutable = done.mutable | {name + STATE: value for name, value in done.state.items()}
        return {"loss": -done.value, "mutable_state": mutable or None}

    def explain(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> None:
        """Print what is done at each site, why, whether it is unbiased, its cost, and the terms downstream."""
        print(self.plan(model, guide, *args, **kwargs))
