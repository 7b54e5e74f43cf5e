"""The parts of the demonstration that decide; all of it is run by ``make demo``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.cli import demo
from ergodica.core.posterior import Posterior
from ergodica.diagnostics.diagnosis import Check, Diagnosis
from ergodica.estimators import Minibatch
from ergodica.models import zoo
from ergodica.run.sample import sample
from ergodica.samplers import SGLD


def test_data():
    data = zoo.doctor_visits()
    assert data.x.shape == (20190, 9)
    assert len(data.columns) == 9
    np.testing.assert_allclose(data.x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(data.x.std(axis=0), 1, atol=1e-3)
    assert set(np.unique(data.y)) == {0.0, 1.0}
    assert data.y.mean() == pytest.approx(0.6876, abs=1e-4)  # as the published table has it: 31.2% have no visit
    assert "public domain" in data.description


@pytest.mark.sweep
def test_predicted_temperature_is_that_of_the_run():
    """On a Gaussian with independent batches the rule that chooses the steps is right to first order."""
    rows = jax.random.normal(jax.random.key(0), (400, 2))
    posterior = Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2),
        lambda theta, x: -0.5 * jnp.sum((x - theta[None]) ** 2, axis=1),
        rows,
        initial=jnp.zeros(2),
    )
    noise = 400**2 / 20 * float(jnp.var(rows, axis=0).sum())
    scales = demo.Scales(401.0, 401.0, 802.0, {"uniform": noise}, 2)
    step = scales.step_for_temperature(1.5, "uniform")
    exact = float(np.mean((2 + step * 400**2 / 20 * np.var(rows, axis=0) / 1) / (2 - step * 401.0)))
    assert exact == pytest.approx(1.5, rel=0.03)
    dt = sample(jax.random.key(1), SGLD(Minibatch(posterior, 20, "uniform"), step), 4000, 500, thin=5, progress=False)
    variance = dt["posterior"]["position"].var(("chain", "draw")).values
    # 16,000 draws with correlation below exp(-5 h λ): the variance is known to about 3%, and 1.5 is 15 errors from 1
    assert np.mean(variance * 401.0) == pytest.approx(exact, rel=0.12)


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ({"R-hat": "passed", "ESS": "passed", "temperature": "passed"}, "Yes."),
        (
            {"R-hat": "passed", "ESS": "passed", "temperature": "failed"},
            "No: the spread is wrong. R-hat and ESS do not see it.",
        ),
        ({"R-hat": "failed", "ESS": "passed", "temperature": "failed"}, "No: the spread is wrong."),
        ({"R-hat": "failed", "ESS": "failed", "temperature": "undecided"}, "No: too short, it mixes slowly."),
        ({"R-hat": "passed", "ESS": "passed", "temperature": "undecided"}, "Not yet: run longer to decide."),
        ({"finite": "failed", "temperature": "not run"}, "No: it broke down."),
    ],
)
def test_plain_words(statuses, words):
    checks = tuple(Check(name, status, "", "") for name, status in statuses.items())
    assert demo.in_plain_words(Diagnosis("run", checks)) == words
