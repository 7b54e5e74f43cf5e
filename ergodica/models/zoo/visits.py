"""The posterior of the logistic regression of `doctor_visits`, with reference moments."""

import functools
import importlib.resources
import json
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key
from ergodica.models.zoo.doctor_visits import doctor_visits
from ergodica.models.zoo.target import AbstractTarget, ReferenceValue

_STORED = "data/visit_regression.json"
_SCALES = (5.0, 2.5)


class VisitRegression(AbstractTarget):
    r"""Posterior of `logistic_regression` for the data of `doctor_visits`: intercept, and nine slopes.

    Parameters
    ----------
    every : int
        Take every so manieth of the 20,190 rows. With all of them the posterior is close to a Gaussian; of the 202 rows
        at ``every=100`` it is wider, skewed, and close to its prior in some directions.

    Raises
    ------
    ValueError, TypeError
        If ``every`` is not between 1 and 2,019.

    Notes
    -----
    A point is (intercept, slopes). The density is normalised as the joint density of coefficients and labels, so that
    its normaliser is the evidence. Observables: ``intercept``, ``slope[name]`` and their squares ``intercept^2``,
    ``slope[name]^2``. References with standard errors are stored for ``every`` 1 and 100: antithetic importance sampling
    from a t law around the mode (``benchmarks/visit_regression_reference.py``). `posterior` holds the rows as data, for
    minibatches.

    Cost of an evaluation: a pass over the rows.

    Examples
    --------
    >>> target = visit_regression(every=100)
    >>> target.dim, target.posterior()
    (10, Posterior(num_data=202, num_parameters=10))
    """

    dim: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    columns: tuple[str, ...] = eqx.field(static=True)
    x: np.ndarray
    y: np.ndarray

    source: ClassVar[str] = "Cameron and Trivedi (2005), the RAND Health Insurance Experiment."
    licence: ClassVar[str] = "Public domain."

    def __init__(self, every: int = 1) -> None:
        self.every = check.integer("every", every, most=2019)
        data = doctor_visits()
        self.x, self.y, self.columns = data.x[::every], data.y[::every], data.columns
        self.dim = 1 + len(self.columns)

    def log_density(self, x: Array) -> Array:
        """Log of the joint density of coefficients and labels."""
        rows = {"x": jnp.asarray(self.x, x.dtype), "y": jnp.asarray(self.y, x.dtype)}
        return log_prior(x) + jnp.sum(log_likelihood(x, rows))

    def observables(self, x: Array) -> dict[str, Array]:
        """Coefficients and their squares."""
        names = ["intercept", *(f"slope[{name}]" for name in self.columns)]
        return {n: x[i] for i, n in enumerate(names)} | {f"{n}^2": x[i] ** 2 for i, n in enumerate(names)}

    @property
    def log_normaliser(self) -> ReferenceValue | None:
        """Log evidence, where it is stored."""
        return _stored(self.every).get("log_normaliser")

    @property
    def reference(self) -> dict[str, ReferenceValue]:
        """Moments, where they are stored."""
        return {name: value for name, value in _stored(self.every).items() if name != "log_normaliser"}

    def start(self, key: Key) -> Array:
        """Draw a point near zero."""
        return 0.1 * jax.random.normal(key, (self.dim,))

    def posterior(self) -> Posterior:
        """Make it a `Posterior` with one likelihood a row, that reports ``intercept`` and ``slope``."""
        dtype = jnp.result_type(float)
        return Posterior(
            log_prior,
            log_likelihood,
            {"x": jnp.asarray(self.x, dtype), "y": jnp.asarray(self.y, dtype)},
            initial=self.start,
            constrain=lambda x: {"intercept": x[0], "slope": x[1:]},
            dims={"slope": ("feature",)},
            coords={"feature": self.columns},
        )


def log_prior(coefficients: Array) -> Array:
    """Independent normals: sd 5 for the intercept, 2.5 for each slope."""
    scales = jnp.asarray([_SCALES[0]] + [_SCALES[1]] * (coefficients.shape[0] - 1), coefficients.dtype)
    return -0.5 * jnp.sum((coefficients / scales) ** 2 + math.log(2 * math.pi)) - jnp.sum(jnp.log(scales))


def log_likelihood(coefficients: Array, rows: dict[str, Array]) -> Array:
    """Bernoulli, one value a row."""
    logits = coefficients[0] + rows["x"] @ coefficients[1:]
    return rows["y"] * logits - jax.nn.softplus(logits)


def visit_regression(every: int = 1) -> VisitRegression:
    """`VisitRegression`: a Bayesian logistic regression on real data, in 10 dimensions."""
    return VisitRegression(every)


@functools.cache
def _stored(every: int) -> dict[str, ReferenceValue]:
    with importlib.resources.files("ergodica.models.zoo").joinpath(_STORED).open(encoding="utf-8") as file:
        entries = json.load(file)["entries"]
    found = [entry for entry in entries if entry["every"] == every]
    return {name: ReferenceValue(*pair) for name, pair in found[0]["values"].items()} if found else {}
