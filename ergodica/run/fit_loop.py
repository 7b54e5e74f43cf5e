"""The compiled part of a fit: a loop over steps whose number is traced, and the guard against steps that must not be taken."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Batch, Estimate, Key, PyTree

SLOTS = 4096
"""Steps whose records fit into the buffer; a chunk has no more."""

TAKEN, NONFINITE, SPIKE = 0, 1, 2
"""What became of a step."""

_SETTLE = 100
_WINDOW = 100


class Carry(NamedTuple):
    """What goes from step to step.

    Attributes
    ----------
    params, optimiser, estimator : pytree
        Parameters, and the states of the optimiser and of the estimator.
    mean_norm : scalar
        Running mean of the gradient's norm over the steps taken, the last 100 or so.
    num_taken, skipped_in_a_row : int32 scalar
    stop : bool scalar
        Whether the guard has ended the run.
    """

    params: PyTree
    optimiser: Any
    estimator: Any
    mean_norm: Array
    num_taken: Array
    skipped_in_a_row: Array
    stop: Array


class Record(NamedTuple):
    """Numbers of a step; ``learning_rate`` is ``None`` where the optimiser's state does not hold it."""

    value: Array
    grad_norm: Array
    update_norm: Array
    n_grad: Array
    status: Array
    learning_rate: Array | None


class Guard(NamedTuple):
    """When a step is not taken, and when that ends the run.

    Attributes
    ----------
    spike : scalar
        Steps whose gradient is longer than this times the running mean are skipped; infinity for none.
    most_skipped : int32 scalar
        So many skipped steps in a row end the run.
    stop_at_nonfinite : bool scalar
        Whether the first step with NaN or infinity ends it.
    roll_back : bool
        Whether the estimator's state goes back with the step (static, since it costs a copy of that state).
    """

    spike: Array
    most_skipped: Array
    stop_at_nonfinite: Array
    roll_back: bool


class Inputs(NamedTuple):
    """What a chunk is told: what is ascended and how, where it begins and how long it is."""

    gradient: AbstractGradientEstimator
    optimiser: Any
    guard: Guard
    key: Key
    first_step: Array
    num_steps: Array
    batches: Batch | None = None


def start(gradient: AbstractGradientEstimator, optimiser: Any, key: Key, params: PyTree, batch: Batch | None) -> Carry:
    """Make the carry of a fit that starts at ``params``; no two of its leaves share memory."""
    zero = jnp.zeros((), jnp.int32)
    norm = jnp.zeros((), jax.eval_shape(tree.norm, params).dtype)
    with jax.numpy_dtype_promotion("standard"):
        state = optimiser.init(params)
    carry = Carry(params, state, gradient.init(key, params, batch), norm, zero, zero, jnp.zeros((), bool))
    return jax.tree.map(_fresh, carry)


def step(inputs: Inputs, carry: Carry, index: Array, batch: Batch | None) -> tuple[Carry, Record]:
    r"""Make one step of ascent: :math:`\theta' = \theta + u(-\hat g, \ldots)`, with the update u of the optimiser.

    A step whose gradient or update is not finite, or whose gradient is a spike, leaves parameters and optimiser as they were.
    """
    import optax

    key = jax.random.fold_in(inputs.key, index)
    estimate, estimator = inputs.gradient.estimate(key, carry.params, carry.estimator, batch)
    check_estimate(estimate, carry.params)
    updates, optimiser = _update(inputs.optimiser, estimate, carry)
    params = optax.apply_updates(carry.params, updates)
    norm, update_norm = tree.norm(estimate.gradient), tree.norm(updates)
    status = _status(norm, update_norm, carry, inputs.guard.spike)
    after = _guarded(inputs.guard, status, norm, carry, (params, optimiser, estimator))
    cost = jnp.asarray(estimate.n_grad, jnp.int32)
    rate = _learning_rate(optimiser)
    return after, Record(estimate.value, norm, update_norm.astype(norm.dtype), cost, status, rate)


class Held(NamedTuple):
    """What all chunks of a fit have in common, taken apart into what is traced and what is not.

    Attributes
    ----------
    arrays : list of arrays
    rest : tuple
        Structure, and the leaves that are no arrays with their types (1 and True are equal, and not the same); hashable, and
        equal for another fit of the same estimator and optimiser.
    """

    arrays: list[Array]
    rest: tuple

    @classmethod
    def of(cls, gradient: AbstractGradientEstimator, optimiser: Any, guard: Guard, key: Key) -> "Held":
        """Take apart once, so that a chunk costs no more than a call of a compiled function."""
        leaves, treedef = jax.tree.flatten((gradient, optimiser, guard, key))
        traced = [isinstance(x, jax.Array | np.ndarray | np.generic) for x in leaves]
        arrays = [jnp.asarray(x) for x, is_array in zip(leaves, traced, strict=True) if is_array]
        others = tuple(None if t else (type(x), x) for x, t in zip(leaves, traced, strict=True))
        return cls(arrays, (treedef, others))

    def inputs(self, first_step: Any, num_steps: Any, batches: Batch | None) -> Inputs:
        """Put together again for a chunk."""
        treedef, others = self.rest
        arrays = iter(self.arrays)
        leaves = [next(arrays) if other is None else other[1] for other in others]
        gradient, optimiser, guard, key = jax.tree.unflatten(treedef, leaves)
        return Inputs(gradient, optimiser, guard, key, first_step, num_steps, batches)


def advance(
    held: Held, first_step: Any, num_steps: Any, batches: Batch | None, carry: Carry, buffer: Record
) -> tuple[Carry, Record, Array]:
    """Make ``num_steps`` steps, or fewer where the guard ends the run; step ``i`` uses ``fold_in(key, i)``.

    Parameters
    ----------
    held : Held
    first_step, num_steps : int32 scalar
        At most `SLOTS` steps.
    batches : Batch or None
        Those of the steps, with a leading axis.
    carry : Carry
    buffer : Record
        Of `SLOTS` steps, overwritten from the front. Both are donated.

    Returns
    -------
    Carry
    Record
        The buffer.
    int32 scalar
        Steps made; so many records in front are valid.
    """
    return _advance(held.rest, held.arrays, first_step, num_steps, batches, carry, buffer)


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _advance(
    rest: tuple, arrays: list, first_step: Array, num_steps: Array, batches: Any, carry: Carry, buffer: Record
) -> tuple[Carry, Record, Array]:
    inputs = Held(arrays, rest).inputs(first_step, num_steps, batches)

    def more(loop: tuple[Carry, Record, Array]) -> Array:
        carry, _, slot = loop
        return (slot < inputs.num_steps) & ~carry.stop

    def one_step(loop: tuple[Carry, Record, Array]) -> tuple[Carry, Record, Array]:
        carry, buffer, slot = loop
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), inputs.batches)
        carry, record = step(inputs, carry, inputs.first_step + slot, batch)
        buffer = jax.tree.map(lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, slot, 0), buffer, record)
        return carry, buffer, slot + 1

    return jax.lax.while_loop(more, one_step, (carry, buffer, jnp.zeros((), jnp.int32)))


def empty_buffer(held: Held, carry: Carry, batch: Batch | None) -> Record:
    """Reserve the records of a chunk."""
    zero = jnp.zeros((), jnp.int32)
    inputs = held.inputs(zero, zero, None)
    _, shape = eqx.filter_eval_shape(step, inputs, carry, inputs.first_step, batch)
    return jax.tree.map(lambda s: jnp.zeros((SLOTS, *s.shape), s.dtype), shape)


def check_estimate(estimate: Estimate, params: PyTree) -> None:
    """Raise where an estimator does not return a gradient of the parameters' structure and a scalar value."""
    check.same_structure("the estimator's gradient", estimate.gradient, "params", params)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(estimate.gradient), jax.tree.leaves(params), strict=True
    ):
        if x.dtype != y.dtype:
            raise TypeError(
                f"the estimator's gradient{jax.tree_util.keystr(path)} must have the dtype {y.dtype} of params; got {x.dtype}. "
                "Cast params, or what the estimator holds."
            )
    if jnp.shape(estimate.value) != () or not jnp.issubdtype(jnp.result_type(estimate.value), jnp.floating):
        raise TypeError(
            f"the estimator's value must be a scalar of floating point; got shape {jnp.shape(estimate.value)} and dtype "
            f"{jnp.result_type(estimate.value)}."
        )


def _update(optimiser: Any, estimate: Estimate, carry: Carry) -> tuple[PyTree, Any]:
    """The optimiser's update, which descends."""
    import optax

    descent = tree.scale(estimate.gradient, -1.0)
    update = optax.with_extra_args_support(optimiser).update
    try:
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes its int32 count
            return update(descent, carry.optimiser, carry.params, value=-estimate.value, grad=descent)
    except TypeError as error:
        if "value_fn" not in str(error):
            raise
        raise TypeError(
            "optimiser must not call the objective itself, as line searches do: along an estimated gradient there is none to call. "
            "Use a first-order optimiser such as optax.adam, or ergodica.find_mode."
        ) from error


def _status(norm: Array, update_norm: Array, carry: Carry, spike: Array) -> Array:
    nonfinite = ~(jnp.isfinite(norm) & jnp.isfinite(update_norm))
    settled = carry.num_taken >= _SETTLE
    too_long = settled & (norm > spike.astype(norm.dtype) * carry.mean_norm)
    return jnp.where(nonfinite, NONFINITE, jnp.where(too_long, SPIKE, TAKEN)).astype(jnp.int8)


def _guarded(guard: Guard, status: Array, norm: Array, before: Carry, new: tuple) -> Carry:
    """Take the step, or stay."""
    taken = status == TAKEN
    params, optimiser, estimator = new
    if guard.roll_back:
        estimator = tree.select(taken, estimator, before.estimator)
    num_taken = before.num_taken + taken.astype(jnp.int32)
    mean = before.mean_norm + (norm - before.mean_norm) / jnp.clip(num_taken, 1, _WINDOW).astype(norm.dtype)
    skipped = jnp.where(taken, 0, before.skipped_in_a_row + 1)
    return Carry(
        tree.select(taken, params, before.params),
        tree.select(taken, optimiser, before.optimiser),
        estimator,
        jnp.where(taken, mean, before.mean_norm),
        num_taken,
        skipped,
        ((status == NONFINITE) & guard.stop_at_nonfinite) | (skipped >= guard.most_skipped),
    )


def _learning_rate(state: Any) -> Array | None:
    """The learning rate, if the optimiser's state holds exactly one (as that of ``optax.inject_hyperparams`` does)."""
    import optax

    def is_number(_: Any, value: Any) -> bool:
        return isinstance(value, jax.Array) and value.ndim == 0

    found = optax.tree_utils.tree_get_all_with_path(state, "learning_rate", filtering=is_number)
    return found[0][1] if len(found) == 1 else None


def _fresh(leaf: Any) -> Array:
    """Copy a leaf into an array of its own; weak types, which checkpoints lose, become strong."""
    if is_key(leaf):
        return jax.random.clone(leaf)
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is made of typed keys, which optimisers may hold."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
