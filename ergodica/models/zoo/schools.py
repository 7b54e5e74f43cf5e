"""Eight schools: a small hierarchical posterior with a funnel, whose moments are exact."""

import functools
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.posterior import Posterior
from ergodica.core.types import Key
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
SCALE = 5.0
SCHOOLS = len(EFFECTS)
_LOG_2PI = math.log(2 * math.pi)


class EightSchools(AbstractTarget):
    r"""Effects of coaching in eight schools, in non-centred coordinates.

    .. math:: \mu \sim N(0, 5^2), \qquad \tau \sim \text{half-Cauchy}(0, 5), \qquad z_j \sim N(0, 1), \qquad
              y_j \sim N(\theta_j, \sigma_j^2), \qquad \theta_j = \mu + \tau z_j

    A point is :math:`(\mu, \log\tau, z_1, \dots, z_8)`; the density is normalised as a joint density, so that its
    normaliser is the evidence of the data.

    Notes
    -----
    Observables: ``mu``, ``tau``, ``log_tau``, ``theta[j]``, and the squares ``mu^2``, ``tau^2``, ``theta[j]^2``.
    References are exact: given
    :math:`\tau` all else is Gaussian, and what remains is an integral over :math:`\log\tau`, by the trapezoidal rule
    right to rounding.

    References
    ----------
    Rubin (1981); Gelman et al. (2013), section 5.5.

    Examples
    --------
    >>> target = eight_schools()
    >>> round(target.reference["tau"].value, 4), round(target.log_normaliser.value, 4)
    (3.5977, -31.3113)
    """

    dim: int = eqx.field(static=True)

    source: ClassVar[str] = "Rubin (1981), the eight effects and standard errors of its table; prior as in posteriordb."
    licence: ClassVar[str] = "Sixteen published numbers."
    references: ClassVar[tuple[str, ...]] = ("rubin1981",)

    def __init__(self) -> None:
        self.dim = 2 + SCHOOLS

    def log_density(self, x: Array) -> Array:
        """Log of the joint density of parameters and data, in the coordinates above."""
        mu, log_tau, z = x[0], x[1], x[2:]
        effects, errors = jnp.asarray(EFFECTS, x.dtype), jnp.asarray(ERRORS, x.dtype)
        prior = -0.5 * (mu / SCALE) ** 2 - jax.nn.softplus(2 * log_tau - 2 * math.log(SCALE)) + log_tau
        residuals = (effects - mu - jnp.exp(log_tau) * z) / errors
        return prior - 0.5 * jnp.sum(z**2) - 0.5 * jnp.sum(residuals**2) + _CONSTANT

    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars at one point."""
        values = {"mu": x[0], "tau": jnp.exp(x[1])} | {f"theta[{j}]": t for j, t in enumerate(self._effects(x))}
        return values | {f"{name}^2": value**2 for name, value in values.items()} | {"log_tau": x[1]}

    @property
    def log_normaliser(self) -> ReferenceValue:
        """Log evidence, by quadrature."""
        return ReferenceValue(_quadrature()["log_normaliser"])

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Moments by quadrature."""
        return {name: ReferenceValue(v) for name, v in _quadrature().items() if name != "log_normaliser"}

    def start(self, key: Key) -> Array:
        """Draw a point near the middle of the prior."""
        return 0.5 * jax.random.normal(key, (self.dim,)) + jnp.zeros(self.dim).at[:2].set(jnp.array([4.0, 1.0]))

    def posterior(self) -> Posterior:
        """Make it a `Posterior` that reports ``mu``, ``tau`` and ``theta`` by school."""
        return Posterior(
            self.log_density,
            initial=self.start,
            constrain=lambda x: {"mu": x[0], "tau": jnp.exp(x[1]), "theta": self._effects(x)},
            dims={"theta": ("school",)},
            coords={"school": tuple("ABCDEFGH")},
        )

    def _effects(self, x: Array) -> Array:
        return x[0] + jnp.exp(x[1]) * x[2:]


_CONSTANT = (
    -0.5 * (2 * SCHOOLS + 1) * _LOG_2PI - math.log(SCALE) + math.log(2 / (math.pi * SCALE)) - sum(map(math.log, ERRORS))
)


def eight_schools() -> EightSchools:
    """`EightSchools`: a hierarchical posterior in 10 dimensions."""
    return EightSchools()


@functools.cache
def _quadrature() -> dict[str, float]:
    r"""Moments by integration over :math:`u = \log\tau`.

    .. math:: p(y \mid \tau) = \int N(\mu; 0, 5^2) \prod_j N(y_j; \mu, \sigma_j^2 + \tau^2)\, d\mu, \qquad
              \mathrm{E}[\theta_j \mid \mu, \tau] = \frac{\tau^2 y_j + \sigma_j^2 \mu}{\sigma_j^2 + \tau^2}
    """
    u = np.linspace(-45.0, 15.0, 6001)
    tau, y, error2 = np.exp(u)[:, None], np.array(EFFECTS), np.array(ERRORS) ** 2
    total = error2 + tau**2
    mu_variance = 1 / (1 / SCALE**2 + np.sum(1 / total, axis=1))
    mu_mean = mu_variance * np.sum(y / total, axis=1)
    log_likelihood = 0.5 * (
        np.log(mu_variance / SCALE**2)
        + mu_mean**2 / mu_variance
        - np.sum(np.log(2 * np.pi * total) + y**2 / total, axis=1)
    )
    log_prior = math.log(2 / (math.pi * SCALE)) - np.log1p(tau[:, 0] ** 2 / SCALE**2) + u
    log_mass = log_likelihood + log_prior
    mass = np.exp(log_mass - log_mass.max())
    share = mass / mass.sum()
    theta_mean = (tau**2 * y + error2 * mu_mean[:, None]) / total
    theta_variance = error2 * tau**2 / total + (error2 / total) ** 2 * mu_variance[:, None]
    moments = {
        "mu": mu_mean,
        "tau": tau[:, 0],
        "log_tau": u,
        "mu^2": mu_mean**2 + mu_variance,
        "tau^2": tau[:, 0] ** 2,
        **{f"theta[{j}]": theta_mean[:, j] for j in range(SCHOOLS)},
        **{f"theta[{j}]^2": (theta_mean**2 + theta_variance)[:, j] for j in range(SCHOOLS)},
    }
    values = {name: float(share @ value) for name, value in moments.items()}
    return values | {"log_normaliser": float(log_mass.max() + np.log(mass.sum() * (u[1] - u[0])))}
