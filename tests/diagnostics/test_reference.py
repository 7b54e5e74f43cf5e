"""Errors against a reference: known shifts and scales come out, and Monte Carlo errors are honest."""

import arviz as az
import numpy as np
import pytest

from ergodica.diagnostics.reference import reference_table


def run(seed, shift=0.0, scale=1.0, draws=1000, **more):
    rng = np.random.default_rng(seed)
    x = 2.0 + rng.normal(size=(4, draws, 2))
    x[..., 1] = 2.0 + shift + scale * (x[..., 1] - 2.0)
    return az.from_dict({"posterior": {"x": x, **more}})


def test_known_errors():
    """N(2, 1) against N(2.5, 1.2^2): mean error .5, sd ratio 1.2, E x^2 from 5 to 7.69, Var x^2 = 2 + 4 * 4 = 18."""
    table = reference_table(run(0, 0.5, 1.2, draws=20000), run(1, draws=20000))
    assert list(table.index) == ["x[0]", "x[1]"]
    off = table.loc["x[1]"]
    assert abs(off["mean_error"] - 0.5) < 5 * off["mean_error_mcse"] < 0.05
    assert abs(off["sd_ratio"] - 1.2) < 5 * off["sd_ratio_mcse"] < 0.05
    assert off["b2"] == pytest.approx((7.69 - 5.0) ** 2 / 18, rel=0.05)
    assert table.attrs["b2_max"] == off["b2"]


def test_monte_carlo_errors_are_those_of_replicates():
    tables = [reference_table(run(2 * i), run(2 * i + 1)) for i in range(100)]
    for value, error in (("mean_error", "mean_error_mcse"), ("sd_ratio", "sd_ratio_mcse")):
        spread = np.std([t[value].iloc[0] for t in tables], ddof=1)  # relative s.e. .07
        assert np.mean([t[error].iloc[0] for t in tables]) == pytest.approx(spread, rel=0.3)
    ratio = np.mean([t["b2"].iloc[0] for t in tables]) / np.mean([t["b2_floor"].iloc[0] for t in tables])
    assert ratio == pytest.approx(1.0, abs=5 * np.sqrt(2 / 100))


def test_what_is_not_common_is_named():
    table = reference_table(run(0, z=np.zeros((4, 1000))), run(1))
    assert table.attrs["left_out"] == ["z"]
    with pytest.raises(ValueError, match="no parameter in common"):
        reference_table(az.from_dict({"posterior": {"q": np.ones((2, 9))}}), run(1))


def test_nan_and_missing_groups_are_refused():
    bad = run(0)
    bad["posterior"]["x"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="dt holds draws"):
        reference_table(bad, run(1))
    with pytest.raises(ValueError, match="reference must have a group"):
        reference_table(run(0), az.from_dict({"prior": {"x": np.ones((2, 9))}}))
