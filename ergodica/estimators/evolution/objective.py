"""What black-box and forward gradients have in common: a function to ascend, and how often it is evaluated."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree
from ergodica.estimators.minibatch.subsample import Minibatch, as_batch

type Ascended = Callable[..., Any] | Posterior | Minibatch
"""What can be ascended: ``f(params)``, ``f(params, key)`` with ``takes_key``, a posterior, or a minibatch of one."""


class Objective(eqx.Module):
    """A function of the parameters alone, once `at` has fixed its batch or its random numbers.

    All evaluations that make up one estimate see the same batch or key (common random numbers): what they differ by is then
    what the parameters differ by.
    """

    function: Callable | None
    minibatch: Minibatch | None
    takes_key: bool = eqx.field(static=True)

    def __init__(self, objective: Ascended, *, takes_key: bool = False) -> None:
        self.takes_key = takes_key
        self.function, self.minibatch = None, None
        if isinstance(objective, Posterior):
            self.minibatch = Minibatch(objective, scheme="full")
        elif isinstance(objective, Minibatch):
            self.minibatch = objective
        elif callable(objective) and not isinstance(objective, AbstractGradientEstimator):
            self.function = as_partial(objective)
        else:
            raise TypeError(
                "objective must be a function of the parameters that returns a scalar, a Posterior or a Minibatch; got "
                f"{type(objective).__name__}."
            )
        if takes_key and self.minibatch is not None:
            raise ValueError("takes_key=True is for functions objective(params, key); a posterior takes no key.")

    def init(self, key: Key, params: PyTree) -> Any:
        """Open the first epoch of a minibatch; ``None`` for functions."""
        return None if self.minibatch is None else self.minibatch.init(key, params)

    def at(self, key: Key, state: Any, batch: Any, owner: str) -> tuple[Callable[[PyTree], Array], int, Any]:
        """Fix the batch or key: a function of the parameters, the data it looks at a call, and the next state."""
        if self.minibatch is None:
            if batch is not None:
                raise ValueError(
                    f"{owner} takes no batch that is handed over where its objective is a function; give a Posterior or "
                    "a Minibatch."
                )
            return self._of_function(key), 1, state
        if batch is not None:
            batch = as_batch(batch)
        elif self.minibatch.target.num_data:
            batch, state = self.minibatch.draw(key, state)
        return self._of_batch(batch), 1 if batch is None else batch.weight.shape[0], state

    def apart(self, key: Key) -> tuple[Callable[[PyTree], Array], int] | None:
        """As `at`, independent of the epoch; ``None`` where the data are streamed."""
        if self.minibatch is None:
            return self._of_function(key), 1
        target = self.minibatch.target
        if not target.num_data:
            return self._of_batch(None), 1
        if target.data is None:
            return None
        batch = self.minibatch.independent_batch(key)
        return self._of_batch(batch), batch.weight.shape[0]

    def _of_function(self, key: Key) -> Callable[[PyTree], Array]:
        assert self.function is not None
        function, takes_key = self.function, self.takes_key
        return lambda params: scalar("objective", function(params, key) if takes_key else function(params))

    def _of_batch(self, batch: Batch | None) -> Callable[[PyTree], Array]:
        assert self.minibatch is not None
        minibatch = self.minibatch

        def log_density(params: PyTree) -> Array:
            prior = minibatch.target.log_prior(params)
            return prior if batch is None else prior + minibatch.log_likelihood(params, batch).astype(prior.dtype)

        return log_density


class AbstractBlackBox(AbstractGradientEstimator):
    """An estimator that looks at an objective through evaluations of it at chosen points or along chosen directions."""

    objective: eqx.AbstractVar[Objective]

    differentiates: ClassVar[bool] = False
    """Whether evaluations come with a derivative along a direction."""

    @abc.abstractmethod
    def search(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Estimate:
        """Estimate the gradient of a function of the parameters; ``n_grad`` counts its evaluations."""

    def draws(self, key: Key, params: PyTree, function: Callable[[PyTree], Array]) -> Draws | None:  # noqa: ARG002
        """As `search`, direction by direction; ``None`` where directions are not normal, or depend on each other."""
        return None

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> Any:  # noqa: ARG002
        """Open the first epoch where the objective is a minibatch; else there is no state."""
        return self.objective.init(key, params)

    def estimate(self, key: Key, params: PyTree, state: Any, batch: Batch | None = None) -> tuple[Estimate, Any]:
        """Estimate the gradient at ``params``, all evaluations on one batch or key."""
        key_objective, key_search = jax.random.split(key)
        function, rows, state = self.objective.at(key_objective, state, batch, type(self).__name__)
        return self._counted(self.search(key_search, params, function), rows), state

    def probe(self, key: Key, params: PyTree, state: Any) -> Estimate | None:  # noqa: ARG002
        """Estimate with other random numbers; ``None`` where the data are streamed."""
        key_objective, key_search = jax.random.split(key)
        apart = self.objective.apart(key_objective)
        if apart is None:
            return None
        return self._counted(self.search(key_search, params, apart[0]), apart[1])

    def per_draw(
        self,
        key: Key,
        params: PyTree,
        state: Any,
        batch: Batch | None = None,
        *,
        linearise: bool = False,
        independent: bool = False,
    ) -> tuple[Draws, Any] | None:
        """Directions one by one, all on one batch or key; ``None`` where they are not independent normals."""
        key_objective, key_search = jax.random.split(key)
        if independent:
            apart = self.objective.apart(key_objective)
            if apart is None:
                return None
            function, rows = apart
        else:
            function, rows, state = self.objective.at(key_objective, state, batch, type(self).__name__)
        draws = None if linearise else self.draws(key_search, params, function)
        return None if draws is None else (draws._replace(n_grad=draws.n_grad * rows), state)

    def evaluations(self, params: PyTree, n_grad: float) -> tuple[float, float]:  # noqa: ARG002
        """Evaluations, and as many derivatives along directions where there are any."""
        return n_grad, n_grad if self.differentiates else 0.0

    @property
    def posterior(self) -> Posterior | None:
        """The posterior whose log density is ascended, if it is one."""
        return None if self.objective.minibatch is None else self.objective.minibatch.target

    @property
    def reshuffles(self) -> bool:
        """Whether the batches are those of a reshuffled epoch."""
        return self.objective.minibatch is not None and self.objective.minibatch.reshuffles

    @property
    def batch_source(self) -> Any:
        """The minibatch inside, if it draws batches."""
        return None if self.objective.minibatch is None else self.objective.minibatch.batch_source

    @staticmethod
    def _counted(estimate: Estimate, rows: int) -> Estimate:
        return estimate._replace(n_grad=estimate.n_grad * rows)


def scalar(name: str, value: Any) -> Array:
    """Return what a function gave as a strongly typed scalar; raise at the first trace if it is none."""
    array = jnp.asarray(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return a scalar of floating point; got shape {array.shape} of dtype {array.dtype}. "
            "Sum or average it."
        )
    return jax.lax.convert_element_type(array, array.dtype)


def repeated(num: int, params: PyTree) -> PyTree:
    """Shapes and dtypes of ``num`` copies of the parameters, along a new leading axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *jnp.shape(x)), jnp.result_type(x)), params)


def signs_like(key: Key, like: PyTree) -> PyTree:
    """Independent signs, -1 or 1 with probability 1/2, in the structure, shapes and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, draws)


def normal_draws(weights: Array, noise: PyTree, value: Array, num_evaluations: int) -> Draws:
    r"""Draws :math:`w_i v_i` of standard normal directions :math:`v_i` with leading axis (n,)."""
    gradient = jax.tree.map(lambda v: weights.astype(v.dtype).reshape(-1, *(1,) * (v.ndim - 1)) * v, noise)
    points = jax.vmap(tree.ravel)(noise)
    return Draws(gradient, value, points, -points, num_evaluations)


def weighted_sum(weights: Array, directions: PyTree) -> PyTree:
    r"""Sum :math:`\sum_i w_i v_i` of directions along their leading axis (n,), leaf by leaf."""
    return jax.tree.map(lambda v: jnp.tensordot(weights.astype(v.dtype), v, axes=1), directions)
