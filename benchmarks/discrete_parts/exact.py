"""Sums over all values of small latents: the bound, the evidence and their gradients without noise."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from discrete_parts.programs import Task

SEED = 0
"""Programs ask for a key, which nothing uses where all values are given."""


def support(fn: Any) -> np.ndarray:
    """All values of a picture's layer (S, event shape): of bits, or of one-hot vectors."""
    inner = fn
    while isinstance(inner, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        inner = inner.base_dist
    one_hot, parts = bool(inner.event_shape), fn.event_shape[0]
    choices = inner.event_shape[0] if one_hot else 2
    index = np.array(list(itertools.product(range(choices), repeat=parts)))
    return np.eye(choices, dtype=np.float32)[index] if one_hot else index


def all_values(task: Task, params: dict, arguments: tuple) -> dict[str, jax.Array]:
    """All joint values of the layers: (S, 1, event shape) for each site, to be broadcast over pictures."""
    with numpyro.handlers.seed(rng_seed=SEED):
        sites = numpyro.handlers.trace(numpyro.handlers.substitute(task.guide, data=params)).get_trace(*arguments)
    lists = {name: support(sites[name]["fn"]) for name in task.sites}
    rows = np.array(list(itertools.product(*(range(len(values)) for values in lists.values()))))
    return {name: jnp.asarray(values[rows[:, i]][:, None]) for i, (name, values) in enumerate(lists.items())}


def log_probs_and_weights(task: Task, params: dict, arguments: tuple) -> tuple[jax.Array, jax.Array]:
    """Log q(z) and log w(z) for all values and pictures (S, N); what programs mask counts in the former alone."""
    number = arguments[0].shape[0]

    def one(values: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values = {k: jnp.broadcast_to(v, (number, *v.shape[1:])) for k, v in values.items()}

        def run(program: Any) -> dict[str, Any]:
            given = numpyro.handlers.substitute(program, data=params | values)
            return numpyro.handlers.trace(numpyro.handlers.seed(given, SEED)).get_trace(*arguments)

        guide, model = run(task.guide), run(task.model)
        log_q = sum(_unmasked(guide[name]["fn"]).log_prob(values[name]) for name in task.sites)
        log_w = sum(s["fn"].log_prob(s["value"]) for s in model.values() if s["type"] == "sample")
        log_w -= sum(guide[name]["fn"].log_prob(values[name]) for name in task.sites)
        return log_q, jnp.asarray(log_w)

    return jax.lax.map(one, all_values(task, params, arguments), batch_size=64)


def _unmasked(fn: Any) -> Any:
    return fn.base_dist if isinstance(fn, dist.MaskedDistribution) else fn


def exact_bound(task: Task, params: dict, arguments: tuple) -> jax.Array:
    """Evidence lower bound, mean over pictures; differentiable."""
    log_q, log_w = log_probs_and_weights(task, params, arguments)
    return jnp.mean(jnp.sum(jnp.exp(log_q) * log_w, axis=0))


def exact_evidence(task: Task, params: dict, arguments: tuple) -> jax.Array:
    """Log likelihood of each picture (N,)."""
    log_q, log_w = log_probs_and_weights(task, params, arguments)
    return jax.nn.logsumexp(log_q + log_w, axis=0)
