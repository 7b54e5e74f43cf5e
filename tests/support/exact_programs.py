"""Small NumPyro programs, and their objectives without sampling: enumeration times Gauss–Hermite quadrature.

An exact objective is a differentiable function of the parameters; its gradient is what every estimator is held against.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.primitives import Messenger

from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.estimators.variational.facts import base

NODES = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a guide with normal and discrete sites, their arguments, and parameters away from the optimum."""

    name: str
    model: Callable
    guide: Callable
    args: tuple
    params: dict


class _OnGrid(Messenger):
    """Sets each latent value to a node of its quadrature or a value of its support, and multiplies up the weights."""

    def __init__(self, fn, indices):
        super().__init__(fn)
        self.indices, self.log_weight = indices, 0.0

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        index, fn = self.indices[msg["name"]], msg["fn"]
        if fn.support.is_discrete:
            support = base(fn).enumerate_support(expand=False)
            msg["value"] = support.reshape(support.shape[0])[index]
            self.log_weight += jnp.sum(fn.log_prob(msg["value"]))
        else:
            nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
            msg["value"] = fn.mean + jnp.sqrt(fn.variance) * jnp.asarray(nodes)[index]
            self.log_weight += jnp.sum(jnp.log(jnp.asarray(weights / weights.sum()))[index])


def on_grid(case: Case, params: dict) -> tuple[jax.Array, jax.Array]:
    """Log probability of each grid point under the guide (G,), and log importance weight there (G,)."""

    def at(indices):
        grid = _OnGrid(substitute(case.guide, params), indices)
        guide_trace = trace(grid).get_trace(*case.args)
        model_trace = trace(substitute(replay(case.model, guide_trace), params)).get_trace(*case.args)
        return grid.log_weight, _log_joint(model_trace) - _log_joint(guide_trace)

    return _over_grid(case, at)


def on_held_grid(case: Case, params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log probability of each grid point under the guide, log p and log q there, (G,) each, at values that do not move."""

    def at(indices):
        grid = _OnGrid(substitute(case.guide, jax.lax.stop_gradient(params)), indices)
        drawn = trace(grid).get_trace(*case.args)
        values = {n: s["value"] for n, s in drawn.items() if s["type"] == "sample"}
        guide_trace = trace(substitute(case.guide, params | values)).get_trace(*case.args)
        model_trace = trace(substitute(replay(case.model, drawn), params)).get_trace(*case.args)
        return grid.log_weight, _log_joint(model_trace), _log_joint(guide_trace)

    log_weight, log_p, log_q = _over_grid(case, at)
    return jax.lax.stop_gradient(log_weight), log_p, log_q


def _over_grid(case: Case, function: Callable) -> Any:
    """Map over all grid points, given as the indices of each site's elements."""
    sites = trace(seed(substitute(case.guide, case.params), 0)).get_trace(*case.args)
    latent = {n: s["fn"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
    counts, shapes = [], {}
    for name, fn in latent.items():
        count = base(fn).enumerate_support(expand=False).shape[0] if fn.support.is_discrete else NODES
        shapes[name] = fn.shape()
        counts += [count] * int(np.prod(fn.shape()))
    digits = np.stack(np.unravel_index(np.arange(np.prod(counts)), counts), axis=-1)

    def at(row):
        indices, start = {}, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            indices[name] = row[start : start + size].reshape(shape)
            start += size
        return function(indices)

    return jax.vmap(at)(jnp.asarray(digits))


def _log_joint(sites: dict) -> jax.Array:
    return sum(jnp.sum(s["fn"].log_prob(s["value"])) for s in sites.values() if s["type"] == "sample")


def exact_elbo(case: Case, params: dict) -> jax.Array:
    log_q, log_w = on_grid(case, params)
    return jnp.sum(jnp.exp(log_q) * log_w)


def exact_iwelbo(case: Case, params: dict) -> jax.Array:
    """With two particles, over all pairs of grid points."""
    log_q, log_w = on_grid(case, params)
    bound = jnp.logaddexp(log_w[:, None], log_w[None, :]) - jnp.log(2.0)
    return jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * bound)


@functools.cache
def exact_renyi(alpha: float) -> Callable:
    """Rényi's bound with two particles, over all pairs of grid points."""

    def bound(case: Case, params: dict) -> jax.Array:
        log_q, log_w = on_grid(case, params)
        powers = (1 - alpha) * log_w
        pairs = (jnp.logaddexp(powers[:, None], powers[None, :]) - jnp.log(2.0)) / (1 - alpha)
        return jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pairs)

    return bound


def exact_wake(case: Case, params: dict) -> jax.Array:
    """Its gradient is the mean of self-normalised weights times the derivatives of log p + log q, with two particles."""
    log_weight, log_p, log_q = on_held_grid(case, params)
    log_w = jax.lax.stop_gradient(log_p - log_q)
    weight = jnp.exp(log_weight[:, None] + log_weight[None, :]) * jax.nn.sigmoid(log_w[:, None] - log_w[None, :])
    return jnp.sum(2 * jnp.sum(weight, axis=1) * (log_p + log_q))  # either of the pair is the first


def exact_inclusive(case: Case, params: dict) -> jax.Array:
    """The same with infinitely many particles: draws of the posterior."""
    log_weight, log_p, log_q = on_held_grid(case, params)
    posterior = jax.nn.softmax(log_weight + jax.lax.stop_gradient(log_p - log_q))
    return jnp.sum(posterior * (log_p + log_q))


class Exact(AbstractGradientEstimator):
    """The exact gradient, as an estimator to hold others against in `ergodica.compare_gradients`."""

    value: Callable

    def init(self, key, params, batch=None):
        return ()

    def estimate(self, key, params, state, batch=None):
        value, gradient = jax.value_and_grad(self.value)(params)
        return Estimate(gradient, value), state

    @property
    def exact(self):
        return True


# --- programs ------------------------------------------------------------------------------------------------------


def _param(name: str, value: Any) -> jax.Array:
    return numpyro.param(name, jnp.asarray(value, jnp.result_type(float)))


def _discrete() -> Case:
    """A bit, a category whose law depends on it, and a pair of bits outside of any plate."""
    prior = jnp.array([[0.2, 0.3, 0.5], [0.5, 0.1, 0.4]])

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        c = numpyro.sample("c", dist.Categorical(prior[z]))
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.4, 0.6])).to_event(1))
        numpyro.sample("x", dist.Normal(1.0 * c - z + jnp.sum(1.0 * b), 0.8), obs=x)

    def guide(x):
        z = numpyro.sample("z", dist.Bernoulli(logits=_param("z_logit", 0.4)))
        numpyro.sample("c", dist.Categorical(logits=_param("c_logits", jnp.zeros((2, 3)))[z]))
        numpyro.sample("b", dist.Bernoulli(logits=_param("b_logits", jnp.zeros(2))).to_event(1))

    params = {
        "z_logit": jnp.array(0.4),
        "c_logits": jnp.array([[0.1, -0.3, 0.5], [0.4, 0.2, -0.6]]),
        "b_logits": jnp.array([0.3, -0.5]),
    }
    return Case("discrete", model, guide, (jnp.array(1.7),), params)


def _continuous() -> Case:
    """A chain of two normals, with a parameter of the model too."""

    def model(x):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        w = numpyro.sample("w", dist.Normal(jnp.sin(u), _param("spread", 0.8)))
        numpyro.sample("x", dist.Normal(w + 0.3 * w**2, 0.7), obs=x)

    def guide(x):
        u = numpyro.sample("u", dist.Normal(_param("u_loc", 0.3), jnp.exp(_param("u_scale", -0.4))))
        numpyro.sample(
            "w", dist.Normal(_param("w_loc", 0.2) + _param("slope", 0.5) * u, jnp.exp(_param("w_scale", -0.3)))
        )

    params = {"spread": 0.8, "u_loc": 0.3, "u_scale": -0.4, "w_loc": 0.2, "slope": 0.5, "w_scale": -0.3}
    return Case("continuous", model, guide, (jnp.array(1.2),), {k: jnp.array(v) for k, v in params.items()})


def _plated() -> Case:
    """A global bit, and a category for each of two data."""

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        with numpyro.plate("data", 2):
            c = numpyro.sample("c", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("x", dist.Normal(1.0 * c + 0.5 * z, 0.9), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Bernoulli(logits=_param("z_logit", 0.2)))
        with numpyro.plate("data", 2):
            numpyro.sample("c", dist.Categorical(logits=_param("c_logits", jnp.zeros((2, 3)))))

    params = {"z_logit": jnp.array(0.2), "c_logits": jnp.array([[0.4, 0.0, -0.2], [-0.5, 0.3, 0.1]])}
    return Case("plated", model, guide, (jnp.array([0.7, 1.9]),), params)


def _nested() -> Case:
    """A bit for each row, and a bit for each entry that depends on its row's."""

    def model(x):
        with numpyro.plate("rows", 2, dim=-2):
            r = numpyro.sample("r", dist.Bernoulli(0.4))
            with numpyro.plate("columns", 2, dim=-1):
                e = numpyro.sample("e", dist.Bernoulli(0.3 + 0.3 * r))
                numpyro.sample("x", dist.Normal(1.0 * e - 0.5 * r, 0.8), obs=x)
        numpyro.factor("tie", -0.3 * jnp.sum(r) ** 2)

    def guide(x):
        with numpyro.plate("rows", 2, dim=-2):
            r = numpyro.sample("r", dist.Bernoulli(logits=_param("r_logits", jnp.zeros((2, 1)))))
            with numpyro.plate("columns", 2, dim=-1):
                numpyro.sample("e", dist.Bernoulli(logits=_param("e_logits", jnp.zeros((2, 2))) + 0.4 * r))

    params = {"r_logits": jnp.array([[0.3], [-0.4]]), "e_logits": jnp.array([[0.5, -0.2], [0.1, 0.7]])}
    return Case("nested", model, guide, (jnp.array([[0.9, -0.4], [0.2, 1.1]]),), params)


def _mixed(*, coupled: bool = False) -> Case:
    """A bit, a normal whose law depends on it, and a bit for each of two data, whose law may depend on the normal's value."""

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        w = numpyro.sample("w", dist.Normal(1.0 * z, 1.0))
        with numpyro.plate("data", 2):
            c = numpyro.sample("c", dist.Bernoulli(0.7))
            numpyro.sample("x", dist.Normal(w + 1.0 * c, 0.9), obs=x)

    def guide(x):
        z = numpyro.sample("z", dist.Bernoulli(logits=_param("z_logit", 0.2)))
        loc = _param("w_loc", 0.4) * (1.0 + z)
        w = numpyro.sample("w", dist.Normal(loc, jnp.exp(_param("w_scale", -0.4))))
        with numpyro.plate("data", 2):
            law = dist.Bernoulli(logits=_param("c_logits", jnp.zeros(2)) + (0.3 * w if coupled else 0.0))
            numpyro.sample("c", law)

    params = {
        "z_logit": jnp.array(0.2),
        "w_loc": jnp.array(0.4),
        "w_scale": jnp.array(-0.4),
        "c_logits": jnp.array([0.4, -0.5]),
    }
    return Case("mixed-chain" if coupled else "mixed", model, guide, (jnp.array([0.6, 1.8]),), params)


CASES = {
    "discrete": _discrete,
    "continuous": _continuous,
    "plated": _plated,
    "nested": _nested,
    "mixed": _mixed,
    "mixed-chain": lambda: _mixed(coupled=True),
}
