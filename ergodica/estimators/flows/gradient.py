"""What the gradients for flows have in common: their parameters, and the rows of a table of draws."""

from collections.abc import Callable
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.flow import Flow, StandardNormal
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree


class AbstractFlowGradient(AbstractGradientEstimator):
    """Gradient of an objective by the parameters of a flow. There is no state."""

    template: eqx.AbstractVar[Flow]
    num_samples: eqx.AbstractVar[int]

    @property
    def params(self) -> PyTree:
        """Parameters of the flow that the estimator was made with: where to start."""
        return self.template.params

    def flow(self, params: PyTree) -> Flow:
        """The flow at given parameters."""
        return self.template.with_params(params)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> None:  # noqa: ARG002
        """No state."""
        return

    def probe(self, key: Key, params: PyTree, state: None) -> Estimate:
        """An independent estimate: another key."""
        return self.estimate(key, params, state)[0]

    def with_budget(self, budget: int) -> Self:
        """The same with ``budget`` draws."""
        other = object.__new__(type(self))
        for name, value in {**vars(self), "num_samples": check.integer("budget", budget)}.items():
            object.__setattr__(other, name, value)
        return other

    def base_draws(self, key: Key, params: PyTree) -> Array:
        """Draws of the base (num_samples, D) in the precision of the parameters."""
        return self.template.base.sample(key, self.num_samples).astype(dtype_of(params))

    def draws_of_base(
        self,
        key: Key,
        params: PyTree,
        objective: Callable[[Flow, Array], tuple[Array, Array]],
        *,
        linearise: bool = False,
    ) -> Draws | None:
        """Gradient of ``objective(flow, z)``, of base draws one by one; ``None`` if the base is not standard normal.

        The objective returns what is differentiated, and a value.
        """
        if not isinstance(self.template.base, StandardNormal):
            return None
        z = self.base_draws(key, params)

        def one(factor: Array, z: Array) -> tuple[PyTree, Array]:
            moved = tree.cast_like(factor, z) * z
            return jax.grad(lambda p: objective(self.flow(p), moved), has_aux=True)(params)

        zero, unit = jnp.zeros(()), jnp.ones(())
        slopes, values = jax.vmap(lambda z: one(unit, z))(z)
        linear = None
        if linearise:
            linear = jax.vmap(lambda z: jax.jvp(lambda t: one(t, z)[0], (zero,), (unit,))[1])(z)
        return Draws(slopes, values, z, -z, self.num_samples * (2 if linearise else 1), linear)


def dtype_of(params: PyTree) -> jnp.dtype:
    """The precision of the parameters; the default one of a flow without parameters."""
    leaves = jax.tree.leaves(params)
    return jnp.result_type(*leaves) if leaves else jnp.result_type(float)


def check_draws(name: str, draws: Array, dim: int) -> Array:
    """Return draws (N, D) as an array; raise for another shape, for none, or where they are not finite."""
    draws = jnp.asarray(draws)
    if draws.ndim != 2 or draws.shape[1] != dim or not draws.shape[0]:
        raise ValueError(f"{name} must be an array (N, {dim}) with N >= 1; got shape {draws.shape}.")
    if not jnp.issubdtype(draws.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got {draws.dtype}.")
    if check.is_concrete(draws) and not bool(jnp.all(jnp.isfinite(draws))):
        raise ValueError(f"{name} must be finite; some entries are NaN or infinite.")
    return draws


def rows(key: Key, table: PyTree, num_rows: int) -> Batch:
    """Rows drawn uniformly, with replacement."""
    length = jax.tree.leaves(table)[0].shape[0]
    index = jax.random.randint(key, (num_rows,), 0, length)
    dtype = jax.tree.leaves(table)[0].dtype
    return Batch(jax.tree.map(lambda x: x[index], table), jnp.full((num_rows,), 1.0 / num_rows, dtype))
