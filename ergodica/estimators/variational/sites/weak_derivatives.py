r"""Weak derivatives of elementary laws, as differences between a probe and the draw.

The derivative of a law with respect to a parameter is a signed measure of total mass zero, so that for any integrable
:math:`f`

.. math:: \partial_\theta \mathrm{E}_{q_\theta} f(x) = \mathrm{E}\left[ c \left( f(x') - f(x) \right) \right]

with :math:`x \sim q_\theta`, a *probe* :math:`x'` drawn given :math:`x`, and a weight :math:`c`. Where the literature has two
probes (Mohamed et al. 2020, table 1), one of them can always be the draw itself, except for the mean of a normal law.

Every function below takes a key, the NumPyro law, its draw, and the parameters' shape, and returns `Probe`\ s.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key
from ergodica.estimators.variational.facts import Distribution, Site


class Probe(NamedTuple):
    r"""A value beside the draw, and a coefficient: its *gradient* is :math:`c\,\nabla\theta`, its value does not count."""

    value: Array
    coefficient: Array


def towards(weight: Array, parameter: Array) -> Array:
    """Coefficient whose gradient is ``weight`` times that of the parameter."""
    return jax.lax.stop_gradient(weight) * parameter


def bernoulli(key: Key, fn: Distribution, x: Array) -> list[Probe]:  # noqa: ARG001
    r""":math:`\partial_p \mathrm{E} f = f(1) - f(0)`: the probe is the other value. No noise."""
    return [Probe(1 - x, towards((1 - 2 * x).astype(fn.probs.dtype), fn.probs))]


def categorical(key: Key, fn: Distribution, x: Array) -> list[Probe]:  # noqa: ARG001
    r""":math:`\sum_v f(v)\,\nabla p_v = \sum_v (f(v) - f(x))\,\nabla p_v`: all other values are probes. No noise."""
    num = fn.probs.shape[-1]
    probs = jnp.broadcast_to(fn.probs, (*x.shape, num))
    values = [(x + i) % num for i in range(1, max(num, 2))]
    return [Probe(v, jnp.take_along_axis(probs, v[..., None], axis=-1)[..., 0]) for v in values]


def binomial(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r""":math:`\partial_p \mathrm{E} f = n\,\mathrm{E}[f(y + 1) - f(y)]`, :math:`y \sim \text{Bin}(n - 1, p)`.

    Taking one of the :math:`n` trials away from the draw, a success with probability :math:`x / n`, gives :math:`y`; the draw is
    one of the two values and the probe is the other.
    """
    n = jnp.broadcast_to(jnp.asarray(fn.total_count, fn.probs.dtype), x.shape)
    success = jax.random.uniform(key, x.shape, n.dtype) * n < x.astype(n.dtype)
    step = jnp.where(n > 0, jnp.where(success, -1, 1), 0)
    return [Probe(x + step.astype(x.dtype), towards(n * step.astype(n.dtype), fn.probs))]


def geometric(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r""":math:`\partial_p \mathrm{E} f = \frac1p \mathrm{E}[f(x) - f(x + 1 + x')]`, :math:`x'` another draw."""
    p = jnp.broadcast_to(fn.probs, x.shape)
    more = jax.random.geometric(key, p, x.shape).astype(x.dtype)  # counts trials, so 1 + x'
    return [Probe(x + more, towards(-1 / p, p))]


def poisson(key: Key, fn: Distribution, x: Array) -> list[Probe]:  # noqa: ARG001
    r""":math:`\partial_\lambda \mathrm{E} f = \mathrm{E}[f(x + 1) - f(x)]`."""
    return [Probe(x + 1, jnp.broadcast_to(jnp.asarray(fn.rate), x.shape))]


def normal(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r"""The mean: :math:`\frac{1}{\sigma\sqrt{2\pi}} \mathrm{E}[f(\mu + \sigma w) - f(\mu - \sigma w)]`, :math:`w` Rayleigh.

    The scale: :math:`\frac1\sigma \mathrm{E}[f(\mu + \sigma m) - f(\mu + \sigma m u)]`, :math:`m` double-sided Maxwell, :math:`u`
    uniform. Since :math:`n = mu` is standard normal it is the draw's own noise, and given it :math:`m = \pm\sqrt{n^2 + w^2}`.
    """
    loc, scale = jnp.broadcast_to(fn.loc, x.shape), jnp.broadcast_to(fn.scale, x.shape)
    mean, sd = jax.lax.stop_gradient((loc, scale))
    w = jax.random.rayleigh(key, jnp.ones((), x.dtype), x.shape, x.dtype)
    n = (x - mean) / sd
    density = 1 / (sd * jnp.sqrt(2 * jnp.pi).astype(x.dtype))
    return [
        Probe(mean + sd * w, towards(density, loc)),
        Probe(mean - sd * w, towards(-density, loc)),
        Probe(mean + sd * jnp.copysign(jnp.hypot(n, w), n), towards(1 / sd, scale)),
    ]


def log_normal(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    """The exponential of a normal law, and so of its probes."""
    return [Probe(jnp.exp(value), coefficient) for value, coefficient in normal(key, fn, jnp.log(x))]


def exponential(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r""":math:`\partial_\lambda \mathrm{E} f = \frac1\lambda \mathrm{E}[f(x) - f(x + x')]`, :math:`x'` another draw."""
    rate = jnp.broadcast_to(fn.rate, x.shape)
    more = jax.random.exponential(key, x.shape, x.dtype) / jax.lax.stop_gradient(rate)
    return [Probe(x + more, towards(-1 / rate, rate))]


def gamma(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r"""The rate: :math:`\frac{\alpha}{\beta} \mathrm{E}[f(x) - f(x + e/\beta)]`, :math:`e` exponential.

    The concentration: Kolmogorov's equation of the gamma process, whose jumps :math:`g` have the measure
    :math:`e^{-g}\,\mathrm{d}g / g`,

    .. math:: \partial_\alpha \mathrm{E} f = \int_0^\infty \mathrm{E}[f(x + g/\beta) - f(x)]\, g^{-1} e^{-g}\, \mathrm{d}g

    with :math:`g` drawn from the gamma law of concentration one half and weighted by :math:`\sqrt{\pi / g}`. The difference is
    of the order of :math:`g` where :math:`f` is smooth, and jumps of :math:`f` leave the variance finite.
    """
    key_rate, key_shape = jax.random.split(key)
    alpha, beta = jnp.broadcast_to(fn.concentration, x.shape), jnp.broadcast_to(fn.rate, x.shape)
    rate = jax.lax.stop_gradient(beta)
    normal = jnp.abs(jax.random.normal(key_shape, x.shape, x.dtype))
    weight = jnp.sqrt(2 * jnp.pi).astype(x.dtype) / jnp.maximum(normal, jnp.finfo(x.dtype).tiny)
    return [
        Probe(x + jax.random.exponential(key_rate, x.shape, x.dtype) / rate, towards(-alpha / beta, beta)),
        Probe(x + normal**2 / 2 / rate, towards(weight, alpha)),
    ]


def weibull(key: Key, fn: Distribution, x: Array) -> list[Probe]:
    r""":math:`x = \lambda E^{1/k}` with :math:`E` exponential.

    The scale: :math:`\frac{k}{\lambda} \mathrm{E}[f(\lambda (E + e)^{1/k}) - f(x)]`, :math:`e` exponential too. The
    concentration: :math:`-\frac1k (\mathrm{E}_M f - \mathrm{E} f(x))`, where under :math:`M` the density of :math:`E` is
    :math:`(E - 1) \log E\; e^{-E}`; it is drawn below and above 1 from laws that bound it, and weighted.
    """
    key_scale, key_shape = jax.random.split(key)
    scale, k = jnp.broadcast_to(fn.scale, x.shape), jnp.broadcast_to(fn.concentration, x.shape)
    now, power = jax.lax.stop_gradient((scale, k))
    more = (x / now) ** power + jax.random.exponential(key_scale, x.shape, x.dtype)
    other, weight = tilted_exponential(key_shape, x.shape, x.dtype)
    return [
        Probe(now * more ** (1 / power), towards(k / scale, scale)),
        Probe(now * other ** (1 / power), towards(-weight / k, k)),
    ]


def tilted_exponential(key: Key, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, Array]:
    r"""Draw from the density :math:`(E - 1)\log E\; e^{-E}` on :math:`E > 0`, with weights whose mean is 1.

    Below 1 from :math:`-\log E` (a product of two uniforms), above it :math:`E - 1` from the gamma law of concentration 3, in
    the proportion :math:`1 : 2/e` of the bounds.
    """
    key_side, key_gamma = jax.random.split(key)
    e = jax.random.exponential(key_gamma, (3, *shape), dtype)
    below, above = jnp.exp(-e[0] - e[1]), jnp.sum(e, axis=0)
    total = 1 + 2 * jnp.exp(jnp.asarray(-1, dtype))
    side = jax.random.uniform(key_side, shape, dtype) * total < 1
    weight = jnp.where(side, (1 - below) * jnp.exp(-below), jnp.log1p(above) / above)
    return jnp.where(side, below, 1 + above), total * weight


class Law(NamedTuple):
    """How many probes each element takes, and how to draw them."""

    num_probes: Callable[[Site], int]
    probes: Callable[[Key, Distribution, Array], list[Probe]]


def _others(site: Site) -> int:
    assert site.support_size is not None
    return max(site.support_size - 1, 1)


LAWS: dict[str, Law] = {
    "BernoulliProbs": Law(lambda _: 1, bernoulli),
    "BernoulliLogits": Law(lambda _: 1, bernoulli),
    "BinomialProbs": Law(lambda _: 1, binomial),
    "BinomialLogits": Law(lambda _: 1, binomial),
    "CategoricalProbs": Law(_others, categorical),
    "CategoricalLogits": Law(_others, categorical),
    "Exponential": Law(lambda _: 1, exponential),
    "Gamma": Law(lambda _: 2, gamma),
    "GeometricProbs": Law(lambda _: 1, geometric),
    "GeometricLogits": Law(lambda _: 1, geometric),
    "LogNormal": Law(lambda _: 3, log_normal),
    "Normal": Law(lambda _: 3, normal),
    "Poisson": Law(lambda _: 1, poisson),
    "Weibull": Law(lambda _: 2, weibull),
}
"""By the name of NumPyro's class."""
