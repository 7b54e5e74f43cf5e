"""NumPyro models that cover what a split into prior and data has to get right.

Each can be run on all its data at once, which is what NumPyro's own density is asked for.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import random_eqx_module
from numpyro.distributions import constraints
from numpyro.handlers import mask, reparam, scale
from numpyro.infer.reparam import LocScaleReparam

N = 11
BATCH = 4


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20260801)
    return {
        "x": rng.normal(size=(N, 3)),
        "y": rng.normal(size=N),
        "w": rng.normal(size=(N, 2)),
        "count": rng.poisson(3.0, size=N),
        "label": rng.integers(0, 2, size=N),
        "group": np.arange(N) % 4,
        "known": np.arange(N) % 3 > 0,
        "series_t": rng.normal(size=(N, 5)),
    }


ARRAYS = _arrays()


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its arguments.

    Attributes
    ----------
    data : names of the arguments that have one row a datum
    sites : the sites that belong to the data, with the axis of the data in their log probability
    patterns : "A" (indices of a subsampled plate), "B" (rows as arguments), or both
    relaxed : whether NumPyro's own laws mix dtypes and ranks, and so need JAX's standard promotion
    """

    model: Callable
    data: tuple[str, ...]
    sites: dict[str, int]
    patterns: str = "AB"
    relaxed: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return {name: ARRAYS[name] for name in self.data}

    def arguments(self, pattern: str) -> dict[str, Any]:
        """Of `from_numpyro`."""
        if pattern == "B":
            return {"data": self.rows, **self.fixed}
        return {**self.rows, **self.fixed, "n": BATCH}

    def everything(self) -> dict[str, Any]:
        """Of the model, on all its data."""
        return {name: jnp.asarray(x) for name, x in self.rows.items()} | self.fixed


def data_plate(rows: jax.Array, n: int | None, **options: Any) -> numpyro.plate:
    return numpyro.plate("data", rows.shape[0], subsample_size=n, **options)


def linear(x, y, n=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    with data_plate(x, n) as i:
        numpyro.sample("y", dist.Normal(intercept + x[i] @ slope, sigma), obs=y[i])


def dynamic_supports(y, n=None):
    low = numpyro.sample("low", dist.Normal())
    above = numpyro.sample("above", dist.TruncatedNormal(0.0, 1.0, low=low))
    a = numpyro.sample("a", dist.Beta(2.0, 3.0))
    b = numpyro.sample("b", dist.Uniform(0.0, 1.0 - a))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    with data_plate(y, n) as i:
        numpyro.sample("y", dist.Normal(low + above + b, a + weights[0]), obs=y[i])


def groups(group, y, n=None, num_groups=4):
    mu = numpyro.sample("mu", dist.Normal())
    tau = numpyro.sample("tau", dist.HalfNormal())
    with numpyro.plate("groups", num_groups):
        effect = numpyro.sample("effect", dist.Normal(mu, tau))
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with data_plate(y, n) as i:
        numpyro.sample("y", dist.Normal(effect[group[i]], noise[group[i]]), obs=y[i])


decentred_groups = reparam(groups, config={"effect": LocScaleReparam(0.0)})
learned_groups = reparam(groups, config={"effect": LocScaleReparam()})


def masked(known, y, n=None):
    mu = numpyro.sample("mu", dist.Normal())
    with mask(mask=False):
        numpyro.sample("ignored", dist.Exponential())
    with data_plate(y, n) as i, mask(mask=known[i]):
        numpyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y[i])


def factors(y, n=None):
    mu = numpyro.sample("mu", dist.Normal())
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.factor("outside", -0.3 * mu**4 * rate)
    with data_plate(y, n) as i:
        numpyro.factor("inside", -rate * jnp.abs(y[i] - mu))
        numpyro.sample("y", dist.Normal(mu, 2.0), obs=y[i])


def several_observed(x, y, count, n=None):
    slope = numpyro.sample("slope", dist.Laplace(jnp.zeros(3), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.InverseGamma(2.0, 1.0))
    numpyro.sample("pilot", dist.Normal(slope, 1.0).to_event(1), obs=jnp.array([0.3, -0.1, 0.2]))
    with data_plate(x, n) as i:
        numpyro.sample("y", dist.Normal(x[i] @ slope, sigma), obs=y[i])
        numpyro.sample("count", dist.Poisson(jnp.exp(0.1 * x[i] @ slope)), obs=count[i])


def vectors(w, n=None):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(jnp.ones(2)).to_event(1))
    corr = numpyro.sample("corr", dist.LKJCholesky(2, 1.5))
    with data_plate(w, n) as i:
        numpyro.sample("w", dist.MultivariateNormal(mu, scale_tril=sigma[:, None] * corr), obs=w[i])


def time_by_data(series_t, n=None):
    mu = numpyro.sample("mu", dist.Normal())
    with numpyro.plate("time", 5, dim=-2):
        level = numpyro.sample("level", dist.Normal(mu, 1.0))
        with data_plate(series_t, n, dim=-1) as i:
            numpyro.sample("series", dist.Normal(level, 1.0), obs=series_t[i].T)


def improper(label, x, n=None):
    slope = numpyro.sample("slope", dist.ImproperUniform(constraints.real, (), (3,)))
    shift = numpyro.sample("shift", dist.ImproperUniform(constraints.positive, (), ()))
    with data_plate(x, n) as i:
        numpyro.sample("label", dist.Bernoulli(logits=x[i] @ slope - shift), obs=label[i])


def scaled(y, n=None):
    with scale(scale=0.5):
        spread = numpyro.sample("spread", dist.HalfNormal())
    with scale(scale=3.0), data_plate(y, n) as i:
        numpyro.sample("y", dist.Normal(0.0, spread), obs=y[i])


def no_plate(x, y, count):
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Normal(x @ slope, rate), obs=y)
    numpyro.sample("count", dist.Poisson(rate), obs=count)


def no_plate_matrix(w):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("w", dist.Normal(mu[None], 1.0), obs=w)


def subsample_statement(x, y, n=None):
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with data_plate(x, n):
        rows, values = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(rows @ slope, 1.0), obs=values)


def scale_of_prior_from_all_data(x, y, n=None):
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), jnp.std(x, axis=0)).to_event(1))
    with data_plate(x, n) as i:
        numpyro.sample("y", dist.Normal(x[i] @ slope, 1.0), obs=y[i])


class Layer(eqx.Module):
    weight: jax.Array


def network(x, y, n=None):
    layer = random_eqx_module("layer", Layer(jnp.ones(3)), prior=dist.Normal())
    with data_plate(x, n) as i:
        numpyro.sample("y", dist.Normal(jnp.tanh(x[i] @ layer.weight), 1.0), obs=y[i])


CASES = {
    "linear": Case(linear, ("x", "y"), {"y": 0}),
    "dynamic supports": Case(dynamic_supports, ("y",), {"y": 0}),
    "groups": Case(groups, ("group", "y"), {"y": 0}),
    "decentred groups": Case(decentred_groups, ("group", "y"), {"y": 0}),
    "learned centring": Case(learned_groups, ("group", "y"), {"y": 0}),
    "masked": Case(masked, ("known", "y"), {"y": 0}),
    "factors": Case(factors, ("y",), {"inside": 0, "y": 0}),
    "several observed": Case(several_observed, ("x", "y", "count"), {"y": 0, "count": 0}),
    "vectors": Case(vectors, ("w",), {"w": 0}, relaxed=True),
    "time by data": Case(time_by_data, ("series_t",), {"series": 1}),
    "improper": Case(improper, ("label", "x"), {"label": 0}, relaxed=True),
    "scaled": Case(scaled, ("y",), {"y": 0}),
    "no plate": Case(no_plate, ("x", "y", "count"), {"y": 0, "count": 0}, patterns="B"),
    "no plate, matrix": Case(no_plate_matrix, ("w",), {"w": 0}, patterns="B"),
    "subsample statement": Case(subsample_statement, ("x", "y"), {"y": 0}),
    "prior from all data": Case(scale_of_prior_from_all_data, ("x", "y"), {"y": 0}),
    "network": Case(network, ("x", "y"), {"y": 0}),
    "partial": Case(functools.partial(groups, num_groups=4), ("group", "y"), {"y": 0}),
}
