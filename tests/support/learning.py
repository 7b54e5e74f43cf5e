"""Training of what estimators learn, with the guide held, and replicates at given parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ergodica.estimators.variational.wrap import LEARNED


def learned(gradient, params, num_steps, learning_rate=0.05, seed=11):
    """Parameters after some steps of Adam, with a rate that falls to 0, on what estimators learn alone."""
    own = {name: x for name, x in params.items() if name.endswith(LEARNED)}
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry, key):
        own, state = carry
        ascent = gradient.probe(key, {**params, **own}, {}).gradient
        updates, state = optimiser.update({name: jax.tree.map(jnp.negative, ascent[name]) for name in own}, state)
        return (optax.apply_updates(own, updates), state), None

    @jax.jit
    def run(own):
        keys = jax.random.split(jax.random.key(seed), num_steps)
        return jax.lax.scan(step, (own, optimiser.init(own)), keys)[0][0]

    return {**params, **run(own)}


def learning_and_slopes(gradient, params, num_draws=20, step=1e-4):
    """By name of a learned scalar: its gradient (R,), and the slope of -1/2 the square of the guide's gradient (R,), in double.

    The guide's parameters must be the logits of a single site, drawn once.
    """
    (own,) = [name for name in params if name.endswith(LEARNED)]
    keys = jax.random.split(jax.random.key(6), num_draws)

    @jax.jit
    @jax.vmap
    def at(key, learned):
        found = gradient.probe(key, {**params, own: learned}, {}).gradient
        return -0.5 * jnp.sum(found["logits"] ** 2), found[own]

    def everywhere(learned):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_draws, *jnp.shape(x))), learned)

    found = at(keys, everywhere(params[own]))[1]
    slopes = {}
    for name in [name for name, x in params[own].items() if isinstance(x, jax.Array) and x.shape == ()]:
        low, high = (at(keys, everywhere(params[own] | {name: params[own][name] + h}))[0] for h in (-step, step))
        slopes[name] = np.asarray(high - low) / (2 * step)
    return {name: np.asarray(found[name]) for name in slopes}, slopes


def replicates_at(gradient, params, num_repeats, seed=12):
    """Independent gradients by name, with a leading axis of replicates."""
    keys = jax.random.split(jax.random.key(seed), num_repeats)
    one = jax.jit(
        lambda params: jax.lax.map(lambda key: gradient.probe(key, params, {}).gradient, keys, batch_size=500)
    )
    return jax.tree.map(np.asarray, one(params))
