"""The figure of a fit, read back from its lines."""

import json

import numpy as np
import pytest

from ergodica.diagnostics import plot_fit
from ergodica.diagnostics.training_plot import binned
from ergodica.run.fit_history import Table, to_datatree

NUM = 100_000


@pytest.fixture(scope="module")
def history():
    """A hundred thousand steps: an objective that climbs out of a hole, with two steps left out, and a metric that falls."""
    i = np.arange(NUM)
    status = np.zeros(NUM, np.int8)
    status[[500, 70_000]] = (1, 2)
    steps, evaluations = Table(["value", "grad_norm", "update_norm", "n_grad", "wall_time", "status"]), None
    value = np.where(i < 2000, -1e9, -1.0 / (1 + i / 1000) + 0.01 * (-1.0) ** i)
    value[500] = np.nan
    steps.append(
        {
            "value": value,
            "grad_norm": np.full(NUM, 2.0),
            "update_norm": np.full(NUM, 1e-3),
            "n_grad": 10 * (i + 1),
            "wall_time": (i + 1) / 1000,
            "status": status,
        }
    )
    at = np.arange(0, NUM + 1, 10_000)
    evaluations = Table(["step", "value", "n_grad", "wall_time", "loss"])
    evaluations.append(
        {"step": at, "value": -at / NUM, "n_grad": 10 * at, "wall_time": at / 1000, "loss": 10.0 ** (-at / 1e4)}
    )
    attributes = {
        "gradient": "Some",
        "result": "timed_out",
        "monitored": "loss",
        "best_step": 90_000,
        "monitor": json.dumps({}),
    }
    return to_datatree(steps, evaluations, attributes)


def test_bins_hold_means_and_ranges():
    series = binned(np.arange(10.0), np.array([0.0, 4.0, np.nan, 2.0, 2.0, 2.0, np.nan, np.nan, 1.0, np.inf]), num=5)
    np.testing.assert_array_equal(series.x, [0.5, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_array_equal(series.mean, [2.0, 2.0, 2.0, np.nan, 1.0])
    np.testing.assert_array_equal(series.low, [0.0, 2.0, 2.0, np.nan, 1.0])
    np.testing.assert_array_equal(series.high, [4.0, 2.0, 2.0, np.nan, 1.0])
    assert len(binned(np.arange(3.0), np.arange(3.0)).x) == 3


@pytest.mark.parametrize(("against", "unit"), [("step", 1.0), ("wall_time", 1e-3), ("n_grad", 10.0)])
def test_a_long_fit_is_drawn(history, against, unit):
    figure = plot_fit(history, against=against)
    objective, norms, loss = figure.axes
    lines = {line.get_label(): line for line in objective.get_lines()}
    steps = lines["steps, mean"]
    assert len(steps.get_xdata()) == 400
    late = np.asarray(steps.get_xdata()) > 10_000 * unit
    np.testing.assert_allclose(
        np.asarray(steps.get_ydata())[late], -1.0 / (1 + np.asarray(steps.get_xdata())[late] / unit / 1000), atol=2e-4
    )
    low, high = objective.get_ylim()
    assert -1 < low < -0.05  # the hole of the first steps does not flatten the rest
    assert 0 < high < 0.1
    offset = 0.0 if against == "step" else unit  # sums are up to and with the step
    assert lines["left out: not finite"].get_xdata().tolist() == pytest.approx([500 * unit + offset])
    assert lines["left out: spike"].get_xdata().tolist() == pytest.approx([70_000 * unit + offset])
    assert [line.get_label() for line in norms.get_lines()][:2] == ["gradient", "update"]
    assert loss.get_yscale() == "log"
    for axes in figure.axes:
        assert axes.get_lines()[-1].get_xdata() == pytest.approx([90_000 * unit] * 2)
    assert "100,000 steps, timed out; best loss after 90,000" in objective.get_title()


def test_errors(history):
    with pytest.raises(ValueError, match="against must be one of"):
        plot_fit(history, against="hours")
    with pytest.raises(ValueError, match="metrics must be one of 'loss'"):
        plot_fit(history, metrics=["ess"])
    assert len(plot_fit(history, metrics=[]).axes) == 2
    empty = history.copy()
    empty["steps"] = history["steps"].isel(step=slice(0))
    with pytest.raises(ValueError, match="no step"):
        plot_fit(empty)
