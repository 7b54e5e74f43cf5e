"""A noisy quadratic to fit, which can be spoiled, and what two fits are compared by."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.run import Fit, fit, fit_loop

CURVATURES = np.array([0.5, 1.0, 4.0])
TRACES = []


def is_spoiled(key, chance):
    return jax.random.uniform(jax.random.fold_in(key, 1)) < chance


class Quadratic(AbstractGradientEstimator):
    """Gradient of -t'Ct/2 at a noise level, with a state that remembers; spoiled at given calls, from one on, or by chance."""

    curvatures: jax.Array
    noise: float = 0.0
    spoiled: tuple[int, ...] = eqx.field(static=True, default=())
    spoil_with: float = eqx.field(static=True, default=math.nan)
    lost_from: int = eqx.field(static=True, default=2**30)
    chance: float = eqx.field(static=True, default=0.0)

    def init(self, key, params, batch=None):
        return {"calls": jnp.zeros((), jnp.int32), "seen": params}

    def estimate(self, key, params, state, batch=None):
        TRACES.append(1)
        noise = jax.random.normal(key, params.shape, params.dtype)
        gradient = -self.curvatures.astype(params.dtype) * params + self.noise * noise
        calls = state["calls"]
        bad = jnp.any(calls == jnp.asarray(self.spoiled, jnp.int32)) | (calls >= self.lost_from)
        bad = bad | is_spoiled(key, self.chance)
        gradient = jnp.where(bad, self.spoil_with * jnp.ones_like(gradient), gradient)
        state = {"calls": calls + 1, "seen": 0.9 * state["seen"] + gradient}
        value = -0.5 * jnp.sum(self.curvatures.astype(params.dtype) * params**2)
        return Estimate(gradient, value, n_grad=7), state


def quadratic():
    return Quadratic(jnp.asarray(CURVATURES, jnp.float32))


def noisy(**settings):
    return Quadratic(jnp.asarray(CURVATURES, jnp.float32), 0.3, **settings)


def start(dtype=jnp.float32):
    return jnp.asarray([1.0, -2.0, 3.0], dtype)


def quiet(*args, **kwargs) -> Fit:
    return fit(*args, **{"progress": False, **kwargs})


def squared_length(key, params):
    return {"squared": jnp.sum(params**2), "noise": jax.random.normal(key)}


def assert_same(a: Fit, b: Fit, but=("wall_time",)):
    for x, y in zip(jax.tree.leaves(a[:5]), jax.tree.leaves(b[:5]), strict=True):
        np.testing.assert_array_equal(*(jax.random.key_data(z) if fit_loop.is_key(z) else z for z in (x, y)))
    for group in ("steps", "evaluations"):
        assert set(a.history[group].data_vars) == set(b.history[group].data_vars)
        for name in [*a.history[group].data_vars, "step"]:
            if name not in but:
                np.testing.assert_array_equal(a.history[group][name], b.history[group][name], err_msg=name)
