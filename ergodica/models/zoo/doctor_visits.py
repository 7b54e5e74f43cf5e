"""Visits to a doctor under different insurance plans: real data for a logistic regression."""

import importlib.resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

_DATA = "data/doctor_visits.npz"
_COLUMNS = ("lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp")


class RegressionData(NamedTuple):
    """Data of a regression.

    Attributes
    ----------
    x : float32 array (N, K)
        One row a datum; each column has mean 0 and standard deviation 1.
    y : float32 array (N,)
    columns : tuple of str
        What the columns of ``x`` are.
    description : str
        What the data are, where they are from, and their licence.
    """

    x: np.ndarray
    y: np.ndarray
    columns: tuple[str, ...]
    description: str


def doctor_visits() -> RegressionData:
    """Load 20,190 person-years of the RAND Health Insurance Experiment.

    ``y`` is 1 if the person saw a doctor as an outpatient in that year, else 0 (69 % did); ``x`` holds the insurance plan and the
    health of the person in nine standardised columns. Persons occur in several years, which `logistic_regression` ignores.

    Returns
    -------
    RegressionData

    References
    ----------
    Cameron and Trivedi (2005), Microeconometrics; public domain (``ergodica/models/zoo/data/LICENSE-doctor_visits``).

    Examples
    --------
    >>> data = doctor_visits()
    >>> data.x.shape, data.y.shape, data.columns[:3]
    ((20190, 9), (20190,), ('lncoins', 'idp', 'lpi'))
    """
    with importlib.resources.files("ergodica.models.zoo").joinpath(_DATA).open("rb") as file:
        table = np.load(file)
        raw = np.stack([table[name].astype(np.float64) for name in _COLUMNS], axis=1)
        visits = table["mdvis"]
    x = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    return RegressionData(
        x=x.astype(np.float32),
        y=(visits > 0).astype(np.float32),
        columns=_COLUMNS,
        description=(
            "Did a person see a doctor in a year? RAND Health Insurance Experiment (Cameron and Trivedi 2005), "
            f"{len(x):,} person-years, {len(_COLUMNS)} features of the insurance plan and of health; public domain."
        ),
    )


def logistic_regression(x: Array, y: Array | None = None) -> None:
    r"""Logistic regression as a NumPyro model.

    .. math:: y_i \sim \mathrm{Bernoulli}(\mathrm{logit}^{-1}(a + x_i^T b)), \qquad a \sim N(0, 5^2), \quad b_k \sim N(0, 2.5^2)

    Parameters
    ----------
    x : array (N, K)
        Features, best standardised.
    y : array (N,), optional
        Zeros and ones.
    """
    import numpyro
    from numpyro import distributions as dist

    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    with numpyro.plate("feature", x.shape[1]):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.5))
    with numpyro.plate("datum", x.shape[0]):
        numpyro.sample("visit", dist.Bernoulli(logits=intercept + x @ slope), obs=y)
