"""The compiled part of a run: one program that serves warm-up, thinning and what is left at the end."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Batch, Key, Position, PyTree

_WORD = 1 << 20


class Count(NamedTuple):
    """A count beyond int32, as ``high * 2**20 + low``."""

    high: Array
    low: Array


class Carry(NamedTuple):
    """What goes from chunk to chunk; the leading axis of every leaf but ``since`` and ``shared`` runs over the chains.

    Attributes
    ----------
    state : pytree
        States of the kernel.
    since : int32 scalar
        Steps since a draw was stored.
    n_grad : Count
        Gradient evaluations of single data since a draw was stored.
    first_bad : int32
        The first step whose position was not finite; -1 while there is none.
    shared : pytree or None
        Where all chains see the same batches: the state of what draws them, without a leading axis.
    """

    state: Any
    since: Array
    n_grad: Count
    first_bad: Array
    shared: Any = None


class Plan(NamedTuple):
    """What a chunk shall do; all are int32 scalars and traced, so that one program does for all.

    Attributes
    ----------
    first_step, first_draw : int
        Indices, over the whole run, of the next step and the next stored draw.
    num_steps : int
    thin : int
        Steps a stored draw.
    """

    first_step: Array
    first_draw: Array
    num_steps: Array
    thin: Array


class Probe(NamedTuple):
    r"""What independent gradients say at a stored draw.

    Attributes
    ----------
    temperature : array (num_parameters,)
        :math:`-(\theta_i - c_i)\,\hat g_i`, whose mean is the temperature of coordinate ``i``.
    grad_noise : scalar or None
        Variance of one gradient, mean over the coordinates; ``None`` where gradients carry no noise.
    value : scalar
        Estimate of the log density.
    n_grad : int32 scalar
        What the probes cost.
    """

    temperature: Array
    grad_noise: Array | None
    value: Array
    n_grad: Array


class Record(NamedTuple):
    """A stored draw of all chains; scalars of the kernel's info by name."""

    position: Position
    info: dict[str, Array]
    n_grad: Count
    probe: Probe | None


@jax.jit
def start(
    kernel: AbstractKernel,
    keys: Key,
    positions: Position,
    batch: Batch | None = None,
    shared_key: Key | None = None,
) -> Carry:
    """Make the carry of chains that start at ``positions``, with one key each.

    Where data are streamed, there is a batch for all; with ``shared_key``, all will see the batches that it leads to.
    """
    state = jax.vmap(kernel.init, in_axes=(0, 0, None))(keys, positions, batch)
    zeros = [jnp.zeros(keys.shape, jnp.int32) for _ in range(3)]
    shared = None if shared_key is None else kernel.batch_source.init(shared_key, positions)
    return Carry(state, jnp.zeros((), jnp.int32), Count(zeros[0], zeros[1]), zeros[2] - 1, shared)


def record_shape(kernel: AbstractKernel, carry: Carry, batch: Batch | None = None, *, probes: bool) -> Record:
    """Shapes and dtypes of a record."""

    def one(kernel: AbstractKernel, carry: Carry, batch: Batch | None) -> Record:
        keys = jax.random.split(jax.random.key(0), carry.first_bad.shape)
        if carry.shared is not None:
            batch, _ = kernel.batch_source.draw(jax.random.key(0), carry.shared)
        state, info = jax.vmap(kernel.step, in_axes=(0, 0, None))(keys, carry.state, batch)
        return _record(kernel, state, _scalars(info), carry.n_grad, keys, jnp.zeros(()), probes=probes)

    return jax.eval_shape(one, kernel, carry, batch)


@partial(jax.jit, static_argnames="probes", donate_argnames=("carry", "buffer"))
def advance(
    kernel: AbstractKernel,
    carry: Carry,
    buffer: Record,
    run_keys: Key,
    probe_keys: Key,
    centre: Array,
    plan: Plan,
    batches: Batch | None = None,
    shared_key: Key | None = None,
    *,
    probes: bool,
) -> tuple[Carry, Record]:
    """Run ``plan.num_steps`` steps of all chains and store every ``plan.thin``-th.

    Step ``i`` of a chain uses ``fold_in(run_key, i)`` and the probe of draw ``j`` uses ``fold_in(probe_key, j)``, so the
    result does not depend on how a run is cut into chunks.

    Parameters
    ----------
    buffer : Record
        Where draws are stored: records with a leading axis, overwritten from the front. The plan must not fill more.
    run_keys, probe_keys : keys (num_chains,)
    centre : array (num_parameters,)
        :math:`c` of the configurational temperature.
    batches : Batch, optional
        Streamed data: the batches of this chunk's steps, with a leading axis no shorter than ``plan.num_steps``. All chains
        see the same.
    shared_key : key, optional
        For the batches that all chains see, where the carry holds the state of what draws them.

    Returns
    -------
    Carry
    Record
        The buffer; the records in front that the plan completed are valid.
    """
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    step = jax.vmap(kernel.step, in_axes=(0, 0, None))

    def one_step(_: Array, inner: tuple) -> tuple:
        state, scalars, n_grad, first_bad, shared, step_index = inner
        place = step_index - plan.first_step
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), batches)
        if shared_key is not None:
            batch, shared = kernel.batch_source.draw(jax.random.fold_in(shared_key, step_index), shared)
        state, info = step(fold(run_keys, step_index), state, batch)
        scalars = _scalars(info)
        bad = ~jax.vmap(tree.all_finite)(state.position)
        first_bad = jnp.where(bad & (first_bad < 0), step_index, first_bad)
        return state, scalars, _add(n_grad, scalars.get("n_grad")), first_bad, shared, step_index + 1

    def one_draw(outer: tuple) -> tuple:
        carry, scalars, left, step_index, slot, buffer = outer
        todo = jnp.minimum(plan.thin - carry.since, left)
        state, scalars, n_grad, first_bad, shared, step_index = jax.lax.fori_loop(
            0, todo, one_step, (carry.state, scalars, carry.n_grad, carry.first_bad, carry.shared, step_index)
        )
        since = carry.since + todo
        complete = since == plan.thin
        keys = fold(probe_keys, plan.first_draw + slot)
        record = _record(kernel, state, scalars, n_grad, keys, centre, probes=probes)
        buffer = jax.tree.map(lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, slot, 0), buffer, record)
        n_grad = jax.tree.map(lambda n: jnp.where(complete, 0, n), n_grad)
        carry = Carry(state, jnp.where(complete, 0, since), n_grad, first_bad, shared)
        return carry, scalars, left - todo, step_index, slot + complete.astype(jnp.int32), buffer

    scalars = jax.tree.map(lambda b: jnp.zeros(b.shape[1:], b.dtype), buffer.info)
    outer = (carry, scalars, plan.num_steps, plan.first_step, jnp.zeros((), jnp.int32), buffer)
    outer = jax.lax.while_loop(lambda outer: outer[2] > 0, one_draw, outer)
    return outer[0], outer[-1]


def _record(
    kernel: AbstractKernel, state: Any, scalars: dict, n_grad: Count, keys: Key, centre: Array, *, probes: bool
) -> Record:
    probe = jax.vmap(partial(_probe, kernel), in_axes=(0, 0, None))(keys, state, centre) if probes else None
    return Record(state.position, scalars, n_grad, probe)


def _probe(kernel: AbstractKernel, key: Key, state: Any, centre: Array) -> Probe | None:
    """Evaluate two independent gradients at a draw: their mean gives the temperature, their difference the noise."""
    first_key, second_key = jax.random.split(key)
    first = kernel.probe(first_key, state)
    if first is None:
        return None
    gradient, value, cost, noise = tree.ravel(first.gradient), first.value, first.n_grad, None
    if not kernel.exact_gradient:
        second = kernel.probe(second_key, state)
        assert second is not None
        other = tree.ravel(second.gradient)
        noise = jnp.mean((gradient - other) ** 2) / 2
        gradient, value, cost = (gradient + other) / 2, (value + second.value) / 2, cost + second.n_grad
    position = tree.ravel(state.position)
    return Probe(-(position - centre.astype(position.dtype)) * gradient, noise, value, jnp.asarray(cost, jnp.int32))


def _scalars(info: PyTree) -> dict[str, Array]:
    """Entries of an info that are one number a chain."""
    return {
        name: leaf
        for name, leaf in tree.named_leaves(info, root="value").items()
        if leaf.ndim == 1 and (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool)
    }


def _add(count: Count, more: Array | None) -> Count:
    if more is None:
        return count
    low = count.low + more % _WORD
    return Count(count.high + more // _WORD + low // _WORD, low % _WORD)
