r"""Implicit reparameterisation of mixtures: derivatives of a draw from the distribution function that it leaves unchanged.

A mixture's draw picks a component, and that has no derivative. Its distribution function has one, and
:math:`F(z; \theta) = u` with :math:`u` held gives (Figurnov, Mohamed and Mnih 2018)

.. math:: \partial_\theta z = -\frac{\partial_\theta F(z; \theta)}{q(z; \theta)}

For components whose elements are independent, the elements of :math:`z` are taken one after the other, each with the
distribution function given those before (the distributional transform):

.. math::

    F_d(z_d \mid z_{<d}) = \sum_k w_{k, d}\, F_{k, d}(z_d), \qquad
    w_{k, d} \propto \pi_k \prod_{j < d} q_{k, j}(z_j)

whose derivative has a part through :math:`z_{<d}` too.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

from ergodica.estimators.variational.facts import Distribution, base
from ergodica.estimators.variational.sites.incomplete_beta import incomplete_beta, student_t

LAWS = (
    "Beta",
    "Cauchy",
    "Chi2",
    "Exponential",
    "Gamma",
    "Gumbel",
    "HalfCauchy",
    "HalfNormal",
    "Laplace",
    "Logistic",
    "Normal",
    "StudentT",
    "Weibull",
)
"""Components whose distribution function can be differentiated, besides monotone transformations of them (log-normal …)."""


def has_distribution_function(fn: Distribution) -> bool:
    """Whether a law is a mixture, of components with independent elements whose distribution functions can be differentiated."""
    mixture = base(fn)
    if not isinstance(mixture, dist.MixtureSameFamily | dist.MixtureGeneral):
        return False
    return all(_is_known(law) for law in _laws(mixture))


def implicit_value(fn: Distribution, value: Array) -> Array:
    """A draw of a mixture, unchanged, with derivatives by the mixture's parameters.

    Parameters
    ----------
    fn : Distribution
        A mixture, expanded, masked or with reinterpreted dimensions.
    value : array (batch, event)

    Returns
    -------
    array (batch, event)
        Derivatives are right to first order.

    Notes
    -----
    Cost: density, distribution function and their derivatives for all components at all elements, and a scan over the elements of
    one draw. Where the density is 0 or not finite, at values that were rounded to an end of the support, the derivative is 0;
    if so for all components, the element says nothing of the weights at those after it.
    """
    mixture, value = base(fn), jax.lax.stop_gradient(value)
    num_event = len(mixture.event_shape)
    lead, event = value.shape[: value.ndim - num_event], value.shape[value.ndim - num_event :]
    at, num = components(mixture, value), mixture.mixture_size
    log_weights = jax.nn.log_softmax(jnp.broadcast_to(mixture.mixing_distribution.logits, (*lead, num)), axis=-1)
    flat = [x.reshape(*lead, num, -1) for x in at]
    return mixture_value(log_weights, Components(*flat), value.reshape(*lead, -1)).reshape(*lead, *event)


class Components(NamedTuple):
    """At each element of a value, for each component: log density, its derivative by the value (held), distribution function."""

    log_density: Array
    slope: Array
    distribution: Array


def mixture_value(log_weights: Array, at: Components, z: Array) -> Array:
    r"""Elements :math:`z`, unchanged, with their implicit derivatives.

    Parameters
    ----------
    log_weights : array (…, K)
        Normalised.
    at : Components of arrays (…, K, D)
    z : array (…, D)

    Returns
    -------
    array (…, D)
    """

    def element(log_w: Array, at: tuple[Components, Array]) -> tuple[Array, Array]:
        (log_density, slope, distribution), x = at
        mean = jnp.sum(jax.nn.softmax(log_w, axis=-1) * distribution, axis=-1)
        density = jnp.exp(jax.nn.logsumexp(jax.nn.log_softmax(log_w, axis=-1) + log_density, axis=-1))
        regular = (density > 0) & jnp.isfinite(density)
        per_mass = jax.lax.stop_gradient(jnp.where(regular, 1 / jnp.where(regular, density, 1), 0))
        moves = -(mean - jax.lax.stop_gradient(mean)) * per_mass
        after = log_w + log_density + slope * moves[..., None]
        possible = jnp.any(after > -jnp.inf, axis=-1, keepdims=True)
        return jnp.where(possible, after, log_w), x + moves

    elements_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (at, z))
    return jnp.moveaxis(jax.lax.scan(element, log_weights, elements_first)[1], 0, -1)


def components(mixture: Distribution, value: Array) -> Components:
    """Density and distribution function of all components: (…, K, event), from a value (…, event)."""
    axis = -len(mixture.event_shape) - 1
    if isinstance(mixture, dist.MixtureGeneral):
        each = [_at(law, value) for law in _laws(mixture)]
        return Components(*(jnp.stack(x, axis=axis) for x in zip(*each, strict=True)))
    (law,) = _laws(mixture)
    return _at(law, jnp.repeat(jnp.expand_dims(value, axis), mixture.mixture_size, axis=axis))


def _at(law: Distribution, z: Array) -> Components:
    """One law of single elements, elementwise; outside of its support no density, and all or nothing of the mass below.

    An end of the support, where the density is 0 or infinite, counts as outside.
    """
    point = law.support.feasible_like(z)
    inside = law.support(z) & jnp.isfinite(law.log_prob(z))
    x = jnp.where(inside, z, point)
    log_density, slope = jax.jvp(law.log_prob, (x,), (jnp.ones_like(x),))
    distribution = jnp.where(inside, distribution_function(law, x), (z > point).astype(z.dtype))
    slope = jax.lax.stop_gradient(jnp.where(inside, slope, 0))
    return Components(jnp.where(inside, log_density, -jnp.inf), slope, distribution)


def distribution_function(law: Distribution, z: Array) -> Array:
    """Distribution function of a law of single elements, elementwise, differentiable by all of its parameters."""
    if isinstance(law, dist.TransformedDistribution):
        sign = jnp.ones_like(z)
        for transform in reversed(law.transforms):
            sign, z = sign * jnp.asarray(transform.sign, z.dtype), jnp.asarray(transform.inv(z))
        below = distribution_function(base(law.base_dist), z)
        return jnp.where(sign < 0, 1 - below, below)
    if type(law).__name__ == "Beta":
        a, b, z = jnp.broadcast_arrays(law.concentration1, law.concentration0, z)
        return incomplete_beta(a.astype(z.dtype), b.astype(z.dtype), z, 1 - z)
    if type(law).__name__ == "StudentT":
        df, t = jnp.broadcast_arrays(law.df, (z - law.loc) / law.scale)
        return student_t(df.astype(t.dtype), t)
    return law.cdf(z)


def _laws(mixture: Distribution) -> Iterator[Distribution]:
    """Laws of single elements that the components are made of."""
    if isinstance(mixture, dist.MixtureGeneral):
        yield from map(base, mixture.component_distributions)
    else:
        yield base(mixture.component_distribution)


def _is_known(law: Distribution) -> bool:
    if law.event_shape:
        return False
    if isinstance(law, dist.TransformedDistribution):
        return all(_is_monotone(t) for t in law.transforms) and _is_known(base(law.base_dist))
    return type(law).__name__ in LAWS


def _is_monotone(transform: dist.transforms.Transform) -> bool:
    try:
        return transform.domain.event_dim == 0 and transform.sign is not None
    except NotImplementedError:
        return False
