"""Scores added up over clients are those of all rows in one place."""

import arviz as az
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.diagnostics import HeldOutSums, combine_held_out, held_out_sums

ROWS = np.random.default_rng(3).normal(0.5, 2.0, 23).astype(np.float32)
CUTS = (4, 5, 17)  # clients of 4, 1, 12 and 6 rows


@pytest.fixture
def shards():
    def log_likelihood(p, y):
        return -0.5 * (y - p["mu"]) ** 2

    posterior = erg.Posterior(
        lambda p: -0.5 * p["mu"] ** 2, log_likelihood, jnp.arange(8.0), initial={"mu": jnp.array(0.0)}
    )
    return erg.Shards(posterior, np.arange(8) // 2)


@pytest.fixture
def draws():
    mu = np.random.default_rng(0).normal(0.5, 0.7, size=(4, 60)).cumsum(1) / np.arange(1, 61) ** 0.5
    return az.from_dict({"posterior": {"mu": mu.astype(np.float32)}})


def sums_of(draws, shards):
    parts = np.split(ROWS, CUTS)
    return [held_out_sums(draws, shards.only(s).posterior, jnp.asarray(rows)) for s, rows in enumerate(parts)]


def test_sums_of_clients_give_the_scores_of_pooled_rows(shards, draws):
    found = combine_held_out(sums_of(draws, shards))
    pooled = erg.predictive(draws, shards.posterior, data=jnp.asarray(ROWS))["held_out"].attrs
    assert found["rows"] == len(ROWS)
    for name in ("elpd", "elpd_se", "elpd_mcse", "nll", "nll_mcse"):
        assert found[name] == pytest.approx(pooled[name], rel=1e-6), name


def test_forgetting_that_clients_differ_would_be_seen(shards, draws):
    """The spread between clients is part of the error: sums of squares about the clients' own means are not enough."""
    sums = sums_of(draws, shards)
    within = sum(s.squares for s in sums)
    n = len(ROWS)
    assert np.sqrt(n * within / (n - 1)) < 0.98 * combine_held_out(sums)["elpd_se"]


def test_a_client_without_rows_changes_nothing(shards, draws):
    sums = sums_of(draws, shards)
    empty = HeldOutSums(0, 0.0, 0.0, np.zeros_like(sums[0].influence))
    assert combine_held_out([*sums, empty]) == combine_held_out(sums)


def test_sums_of_different_draws_are_refused(shards, draws):
    sums = sums_of(draws, shards)
    with pytest.raises(ValueError, match="same draws"):
        combine_held_out([sums[0], sums[1]._replace(influence=sums[1].influence[:, :5])])
    with pytest.raises(ValueError, match="at least one held-out row"):
        combine_held_out([])
