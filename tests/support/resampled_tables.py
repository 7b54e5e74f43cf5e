"""A guide with an auxiliary bit, and expectations over its resampled densities by enumeration of tables: no program is run.

Kept is ``z``, summed out is ``u``. In the discrete program ``z`` is a category; in the continuous one it is normal, and its table
is a quadrature whose nodes move with the parameters.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from tests.support.exact_programs import Case

NODES = 24


def _param(name, value):
    return numpyro.param(name, jnp.asarray(value, jnp.result_type(float)))


def proposal(kept):
    """The bit, given what is kept, with parameters of its own."""
    numpyro.sample("u", dist.Bernoulli(logits=_param("r_base", 0.3) + _param("r_slope", -0.4) * kept["z"]))


PRIOR = (0.5, 0.3, 0.2)
DISCRETE = {
    "u_logit": 0.4,
    "z_logits": ((0.3, -0.2, 0.5), (-0.6, 0.4, 0.1)),
    "x_scale": 0.9,
    "r_base": 0.3,
    "r_slope": -0.4,
}
CONTINUOUS = {"u_logit": 0.4, "means": (-0.6, 0.9), "log_scale": -0.3, "x_scale": 0.9, "r_base": 0.3, "r_slope": -0.4}


def discrete() -> Case:
    def model(x):
        z = numpyro.sample("z", dist.Categorical(jnp.array(PRIOR)))
        numpyro.sample("x", dist.Normal(1.0 * z, _param("x_scale", 0.9)), obs=x)

    def guide(x):
        u = numpyro.sample("u", dist.Bernoulli(logits=_param("u_logit", 0.4)))
        numpyro.sample("z", dist.Categorical(logits=_param("z_logits", jnp.zeros((2, 3)))[u]))

    return Case("discrete-auxiliary", model, guide, (jnp.array(1.2),), jax.tree.map(jnp.asarray, _arrays(DISCRETE)))


def continuous() -> Case:
    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z + 0.3 * z**2, _param("x_scale", 0.9)), obs=x)

    def guide(x):
        u = numpyro.sample("u", dist.Bernoulli(logits=_param("u_logit", 0.4)))
        numpyro.sample("z", dist.Normal(_param("means", jnp.zeros(2))[u], jnp.exp(_param("log_scale", 0.0))))

    return Case("continuous-auxiliary", model, guide, (jnp.array(1.2),), _arrays(CONTINUOUS))


def _arrays(values):
    return {name: jnp.asarray(value) for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows are the draws of ``(u, z)``: their probability, value of ``z``, and log densities as functions of ``z``."""

    log_joint: jax.Array
    z: jax.Array
    log_target: Callable
    log_q: Callable
    """``log_q(u, z)``, the guide's density."""
    log_u: jax.Array
    log_r: Callable
    """``log_r(u, z)``, the proposal's."""


def _log_r(params):
    def log_r(u, z):
        logit = params["r_base"] + params["r_slope"] * z
        return jax.nn.log_sigmoid(logit if u else -logit)

    return log_r


def discrete_table(params, x=1.2) -> Table:
    log_u = jnp.stack([jax.nn.log_sigmoid(-params["u_logit"]), jax.nn.log_sigmoid(params["u_logit"])])
    log_z = jax.nn.log_softmax(params["z_logits"], axis=-1)

    def log_target(z):
        return jnp.log(jnp.array(PRIOR))[z] + dist.Normal(1.0 * z, params["x_scale"]).log_prob(x)

    def log_q(u, z):
        return log_u[u] + log_z[u, z]

    rows = jnp.stack([log_q(u, jnp.arange(3)) for u in (0, 1)])
    return Table(rows, jnp.tile(jnp.arange(3), (2, 1)), log_target, log_q, log_u, _log_r(params))


def continuous_table(params, x=1.2) -> Table:
    log_u = jnp.stack([jax.nn.log_sigmoid(-params["u_logit"]), jax.nn.log_sigmoid(params["u_logit"])])
    scale = jnp.exp(params["log_scale"])
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)

    def log_target(z):
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + 0.3 * z**2, params["x_scale"]).log_prob(x)

    def log_q(u, z):
        return log_u[u] + dist.Normal(params["means"][u], scale).log_prob(z)

    log_weights = jnp.log(jnp.asarray(weights / weights.sum()))
    z = params["means"][:, None] + scale * jnp.asarray(nodes)
    return Table(log_u[:, None] + log_weights, z, log_target, log_q, log_u, _log_r(params))


def draws_with_estimate(table: Table, num_particles: int, own_proposal: bool):
    """All outcomes of a marginal's ``sample()``: log probability, value, and log estimate of the density, flat arrays."""
    probabilities, values, estimates = [], [], []
    for first in (0, 1):
        z = table.z[first]

        def log_r(u, z=z):
            return table.log_r(u, z) if own_proposal else table.log_u[u] + jnp.zeros(z.shape)

        for others in itertools.product((0, 1), repeat=num_particles - 1):
            probabilities.append(table.log_joint[first] + sum(log_r(u) for u in others))
            weights = jnp.stack([table.log_q(u, z) - log_r(u) for u in (first, *others)])
            estimates.append(jax.nn.logsumexp(weights, axis=0) - jnp.log(1.0 * num_particles))
            values.append(z)
    return jnp.concatenate(probabilities), jnp.concatenate(values), jnp.concatenate(estimates)


def exact_hvi(table_of, num_particles, own_proposal, num_outer, params):
    """Bound with ``num_outer`` draws of a marginal with ``num_particles``: HVI, IWHVI, DIWHVI."""
    table = table_of(params)
    log_p, z, log_q_hat = draws_with_estimate(table, num_particles, own_proposal)
    log_w = table.log_target(z) - log_q_hat
    outcomes = functools.reduce(lambda a, b: (a[..., None] + b).reshape(-1), [log_p] * num_outer)
    grids = jnp.meshgrid(*[log_w] * num_outer, indexing="ij")
    bound = jax.nn.logsumexp(jnp.stack([g.reshape(-1) for g in grids]), axis=0) - jnp.log(1.0 * num_outer)
    return jnp.sum(jnp.exp(outcomes) * bound)


def resampled_law(log_r, log_target, num_particles):
    """Law of what sampling importance resampling returns, by all sets of particles: (values,)."""
    law = jnp.zeros(log_r.shape)
    log_w = log_target - log_r
    for drawn in itertools.product(range(log_r.shape[0]), repeat=num_particles):
        chosen = jnp.asarray(drawn)
        probability = jnp.exp(jnp.sum(log_r[chosen]))
        law = law.at[chosen].add(probability * jax.nn.softmax(log_w[chosen]))
    return law
