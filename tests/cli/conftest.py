"""A folder with a small model and its data, as a user would have it."""

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from ergodica.cli import app

MODEL = """
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import ergodica as erg


def model(x, y=None, scale=1.0):
    slope = numpyro.sample("slope", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("obs", dist.Normal(x @ slope, scale), obs=y)


def two_inputs(x, z, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("obs", dist.Normal(slope * (x + z), 1.0), obs=y)


posterior = erg.Posterior(
    lambda theta: -0.5 * theta**2,
    lambda theta, rows: -0.5 * (rows - theta) ** 2,
    jnp.arange(100.0),
    initial=jnp.array(0.0),
)
number = 3
"""


@pytest.fixture(autouse=True)
def _settings_of_a_user():
    """Let JAX promote as it does by default: users' models, and BlackJAX's adaptation, count on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    y = x @ [1.0, -1.0] + rng.normal(size=200)
    (tmp_path / "model.py").write_text(MODEL)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    rows = [f"{a:.5f},{b:.5f},{c:.5f}" for (a, b), c in zip(x, y, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(["height,weight,y", *rows]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call():
    """Run the program with arguments as typed in a shell; give exit code and what it wrote."""
    runner = CliRunner()
    return lambda line: runner.invoke(app, line.split(), catch_exceptions=False)
