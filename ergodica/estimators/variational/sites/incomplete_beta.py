r"""The regularised incomplete beta function with its derivatives by the parameters, which `jax.scipy.special.betainc` lacks.

They are integrals of the beta density against a logarithm,

.. math::

    \partial_a I_x(a, b) = \int_0^x p(t) \left( \log t - \psi(a) + \psi(a + b) \right) \mathrm{d}t, \qquad
    \partial_b I_x(a, b) = \int_0^x p(t) \left( \log(1 - t) - \psi(b) + \psi(a + b) \right) \mathrm{d}t

with integrable singularities at the ends, which the double exponential rule (Takahasi and Mori 1974) takes: :math:`t = x v`,
:math:`v = 1/(1 + e^{-\pi \sinh s})`, equidistant :math:`s`. Above the mean, :math:`I_x(a, b) = 1 - I_{1-x}(b, a)` is used.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, betaln, digamma
from jaxtyping import Array

FIRST, LAST, NUM_NODES = -7.0, 3.3, 129
"""Range of :math:`s`: below it the integrand is under 1e-16 for parameters above .02, above it always."""


@jax.custom_jvp
def incomplete_beta(a: Array, b: Array, x: Array, complement: Array) -> Array:
    r""":math:`I_x(a, b)`, given :math:`x` and ``complement`` :math:`1 - x`, all of one shape."""
    del complement
    return betainc(a, b, x)


@incomplete_beta.defjvp
def _incomplete_beta_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    a, b, x, complement = primals
    by_a, by_b = parameter_derivatives(a, b, x, complement)
    density = jnp.exp((a - 1) * jnp.log(x) + (b - 1) * jnp.log(complement) - betaln(a, b))
    return betainc(a, b, x), by_a * tangents[0] + by_b * tangents[1] + density * tangents[2]


def parameter_derivatives(a: Array, b: Array, x: Array, complement: Array) -> tuple[Array, Array]:
    r""":math:`\partial_a I_x(a, b)` and :math:`\partial_b I_x(a, b)`, by 129 evaluations of the integrand each."""
    above = x * (a + b) > a
    low, high = jnp.where(above, b, a), jnp.where(above, a, b)
    y, rest = jnp.where(above, complement, x), jnp.where(above, x, complement)
    y = jnp.maximum(y, jnp.finfo(y.dtype).tiny)
    s = np.linspace(FIRST, LAST, NUM_NODES)
    step = (LAST - FIRST) / (NUM_NODES - 1)
    inner = jnp.asarray(np.pi * np.sinh(s), x.dtype)
    log_v, log_w = jax.nn.log_sigmoid(inner), jax.nn.log_sigmoid(-inner)
    rise = jnp.asarray(np.log(step * np.pi * np.cosh(s)), x.dtype)
    log_v, log_w, rise = (jnp.broadcast_to(t, (*x.shape, NUM_NODES)) for t in (log_v, log_w, rise))
    low_, high_, y_, rest_ = (jnp.broadcast_to(t[..., None], log_v.shape) for t in (low, high, y, rest))
    log_t, log_rest = jnp.log(y_) + log_v, jnp.log(rest_ + y_ * jnp.exp(log_w))
    mass = jnp.exp(low_ * log_t + (high_ - 1) * log_rest - betaln(low_, high_) + log_w + rise)
    by_low = jnp.sum(mass * (log_t - digamma(low_) + digamma(low_ + high_)), axis=-1)
    by_high = jnp.sum(mass * (log_rest - digamma(high_) + digamma(low_ + high_)), axis=-1)
    return jnp.where(above, -by_high, by_low), jnp.where(above, -by_low, by_high)


@jax.custom_jvp
def student_t(df: Array, t: Array) -> Array:
    r"""Distribution function of Student's law.

    .. math:: \tfrac12 \left( 1 + \text{sgn}\, t\, (1 - I_w(\nu/2, \tfrac12)) \right), \qquad w = \nu / (\nu + t^2)
    """
    w = df / (df + t * t)
    return 0.5 * (1 + jnp.sign(t) * (1 - betainc(0.5 * df, jnp.full_like(df, 0.5), w)))


@student_t.defjvp
def _student_t_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    df, t = primals
    half, a, square = jnp.full_like(df, 0.5), 0.5 * df, t * t
    total = df + square
    by_a, _ = parameter_derivatives(a, half, df / total, square / total)
    log_beta = betaln(a, half)
    by_w = jnp.exp((a - 1) * jnp.log(df / total) - log_beta) * jnp.abs(t) / total**1.5
    by_df = -0.5 * jnp.sign(t) * (0.5 * by_a + by_w)
    density = jnp.exp(-(a + 0.5) * jnp.log1p(square / df) - log_beta) / jnp.sqrt(df)
    return student_t(df, t), by_df * tangents[0] + density * tangents[1]
