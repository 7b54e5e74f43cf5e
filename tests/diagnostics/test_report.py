"""The report: self-contained, complete, and outspoken about what is missing."""

import html
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ergodica.diagnostics.checks import diagnose
from ergodica.diagnostics.plots import plot_running_temperature, plot_temperature, worst_parameters
from ergodica.diagnostics.report import report
from tests.diagnostics.trees import gaussian_run


def page_of(path):
    return html.unescape(path.read_text(encoding="utf-8"))


def assert_self_contained(path):
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    for target in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert target.startswith(("data:image/png;base64,", "#"))


@pytest.fixture(scope="module")
def runs():
    reference = gaussian_run(2, np.ones(4), draws=1000, exact="exact", settings={"class": "NUTS"})
    reference["sample_stats"]["energy"] = (reference["posterior"]["beta"] ** 2).sum("feature")
    return {
        "good": gaussian_run(0, np.ones(4), draws=6000, correlation=0.0, grad_noise=1.0),
        "<hot>": gaussian_run(1, np.full(4, 1.6), grad_noise=80.0),
        "NUTS": reference,
    }


def test_single_run(tmp_path, runs):
    path = report(runs["good"], tmp_path / "r.html", reference=runs["NUTS"], max_parameters=2)
    text = page_of(path)
    assert_self_contained(path)
    diagnosis = diagnose(runs["good"])
    assert diagnosis.headline in text
    for check in diagnosis.checks:
        assert check.sentence in text
    assert "2 of 4 parameters are shown" in text
    assert text.count("data:image/png") == 6
    for words in ("Trace.", "Ranks.", "Effective sample size.", "Autocorrelation.", "sd_ratio", "mcse_mean"):
        assert words in text
    assert "threefry2x32:0,0" in text
    assert '"batch_size": 10' in text
    assert "title={On <sampling> & such}" in text
    assert "<sampling>" not in path.read_text(encoding="utf-8")
    assert plt.get_fignums() == []


def test_several_runs_say_which_to_believe(tmp_path, runs):
    tables = {
        "Of pandas": pd.DataFrame({"a": [1.5, 2.0], "b": ["<x>", "y"]}),
        "Of xarray": xr.Dataset({"v": ("name", [1.0, 2.0])}, {"name": ["one", "two"]}),
        "Of HTML": "<em>as it is</em>",
    }
    path = report(runs, tmp_path / "r.html", reference=runs["NUTS"], tables=tables, sections=("checks",), title="A & B")
    raw, text = path.read_text(encoding="utf-8"), page_of(path)
    assert_self_contained(path)
    assert "<h1>A &amp; B</h1>" in raw
    assert "<hot>" not in raw
    assert "Believe: good" in text
    assert "Do not believe: <hot>" in text
    assert "biased: hot by" in text
    assert "reference" in text
    assert text.index("Which run to believe") < text.index("Of pandas") < text.index("Checks")
    assert "&lt;x&gt;" in raw
    assert "<em>as it is</em>" in raw
    assert "two" in text


def test_missing_groups_are_named(tmp_path):
    dt = gaussian_run(0, draws=200)
    bare = xr.DataTree.from_dict({"posterior": dt["posterior"].to_dataset()})
    text = page_of(report(bare, tmp_path / "r.html"))
    assert "stored no probe gradients" in text
    assert "The result does not say: sampler" in text
    assert "names no papers" in text
    assert "No problems found" not in text


def test_broken_chains_still_give_a_page(tmp_path):
    dt = gaussian_run(0, draws=200)
    dt["posterior"]["beta"][1, 50:] = np.nan
    dt["probe"]["temperature"][1, 50:] = np.nan
    text = page_of(report(dt, tmp_path / "nan.html", reference=gaussian_run(1, draws=200)))
    assert "Do not believe these draws" in text
    assert "averages over them mean nothing" in text
    assert "No comparison" in text
    frozen = gaussian_run(0, draws=200)
    frozen["posterior"]["beta"][1] = 0.1
    assert "some parameter never moved" in page_of(report(frozen, tmp_path / "frozen.html"))
    one = gaussian_run(0, draws=200, chains=1)
    assert "Ranks not shown" in page_of(report(one, tmp_path / "one.html"))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"sections must be one of.*'bogus'"):
        report(gaussian_run(), tmp_path / "r.html", sections=("bogus",))
    with pytest.raises(ValueError, match="at least one run"):
        report({}, tmp_path / "r.html")
    with pytest.raises(TypeError, match="DataTree or a dict"):
        report([1], tmp_path / "r.html")


def test_temperature_figures_say_what_they_show():
    dt = gaussian_run(0, np.append(np.ones(30), 3.0), draws=500)
    figure = plot_temperature(dt, max_coordinates=5)
    axes = figure.axes[0]
    assert "5 of 31 coordinates" in axes.get_title()
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[0] == "mean"
    assert "beta[30]" in labels
    running = plot_running_temperature(dt).axes[0]
    overall = next(line for line in running.lines if line.get_label() == "all chains")
    assert overall.get_ydata()[-1] == pytest.approx(float(dt["probe"]["temperature"].mean()))
    del dt["probe"]
    with pytest.raises(ValueError, match="probes=True"):
        plot_temperature(dt)


def test_worst_parameters_are_those_that_mix_least():
    dt = gaussian_run(0, np.ones(5))
    dt["posterior"]["beta"][..., 3] = np.cumsum(np.random.default_rng(0).normal(size=(4, 1000)), axis=1)
    assert worst_parameters(dt, 1) == ["beta[3]"]
