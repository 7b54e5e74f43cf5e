"""Estimators for discrete sites in a subsampled and partly masked plate: unbiased for the bound of all the data."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ergodica as erg
from tests.support.exact_programs import Case
from tests.support.replicates import gradients
from tests.support.statistics import assert_mean

pytestmark = [pytest.mark.usefixtures("numpyro_promotion", "x64"), pytest.mark.slow]

X = jnp.array([0.7, 1.9, -0.4, 0.2])
SEEN = jnp.array([True, True, False, True])
LOGITS = jnp.array([0.4, -0.5, 0.2, -0.1])


def program():
    def model(x):
        with numpyro.plate("data", 4, subsample_size=2) as rows, numpyro.handlers.mask(mask=SEEN[rows]):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(1.2 * z, 0.7), obs=x[rows])

    def guide(x):
        logits = numpyro.param("logits", jnp.zeros(4))
        with numpyro.plate("data", 4, subsample_size=2) as rows, numpyro.handlers.mask(mask=SEEN[rows]):
            numpyro.sample("z", dist.Bernoulli(logits=logits[rows]))

    return Case("subsampled", model, guide, (X,), {"logits": LOGITS})


def exact(logits):
    bits = jnp.arange(2.0)[:, None]
    log_q = dist.Bernoulli(logits=logits).log_prob(bits)
    log_p = dist.Bernoulli(0.4).log_prob(bits) + dist.Normal(1.2 * bits, 0.7).log_prob(X)
    return jnp.sum(jnp.where(SEEN, jnp.exp(log_q) * (log_p - log_q), 0))


@pytest.mark.parametrize(
    "estimator",
    [
        erg.estimators.MeasureValued(),
        erg.estimators.DisARM(),
        erg.estimators.DisARM(coupled=True),
        erg.estimators.REBAR(0.5),
        erg.estimators.MuProp(),
        erg.estimators.ReinMax(),
        pytest.param(erg.estimators.DARN(), marks=pytest.mark.sweep),
        pytest.param(erg.estimators.DoubleControlVariate(), marks=pytest.mark.sweep),
        pytest.param(erg.estimators.RODEO(), marks=pytest.mark.sweep),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_subsampled_plates(estimator):
    """The cost is quadratic in the bit. An error of 20% of the largest entry would be seen."""
    found = gradients(erg.estimators.ELBO(2, {"z": estimator}), program(), 10_000)
    expected = np.asarray(jax.grad(exact)(LOGITS))
    np.testing.assert_array_equal(found[:, 2], 0.0)  # masked
    rest = np.array([0, 1, 3])
    assert_mean(found[:, rest], expected[rest], smallest_error=0.2)
