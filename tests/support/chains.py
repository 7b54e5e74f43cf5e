"""Many short chains at once, for laws."""

import functools

import jax
import jax.numpy as jnp


def time_averages(key, kernel, positions, statistic, *arguments, num_discarded, num_steps, trace_anew=False):
    """Average ``statistic(position, *arguments)`` over the steps of each chain: (chains, ...).

    The chains start at the rows of ``positions``. One program serves all kernels of one structure, unless
    ``trace_anew``: needed where a function that the kernel calls was replaced.
    """
    sizes = {"statistic": statistic, "num_discarded": num_discarded, "num_steps": num_steps}
    run = jax.jit(functools.partial(_run, **sizes)) if trace_anew else functools.partial(_run_compiled, **sizes)
    return run(key, kernel, positions, tuple(map(jnp.asarray, arguments)))


def _run(key, kernel, positions, arguments, *, statistic, num_discarded, num_steps):
    key_init, key_steps = jax.random.split(key)
    num_chains = jax.tree.leaves(positions)[0].shape[0]

    def body(i, carry):
        state, total = carry
        state, _ = jax.vmap(kernel.step)(jax.random.split(jax.random.fold_in(key_steps, i), num_chains), state)
        now = jax.vmap(lambda position: statistic(position, *arguments))(state.position)
        return state, jax.tree.map(lambda t, x: t + jnp.where(i >= num_discarded, x, 0), total, now)

    state = jax.vmap(kernel.init)(jax.random.split(key_init, num_chains), positions)
    zero = jax.tree.map(jnp.zeros_like, jax.vmap(lambda position: statistic(position, *arguments))(state.position))
    _, total = jax.lax.fori_loop(0, num_discarded + num_steps, body, (state, zero))
    return jax.tree.map(lambda x: x / num_steps, total)


_run_compiled = jax.jit(_run, static_argnames=("statistic", "num_discarded", "num_steps"))
