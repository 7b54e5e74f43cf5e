"""The verdict on temperatures: its three ways, their boundaries, its false alarms and its power."""

from statistics import NormalDist

import numpy as np
import pytest

from ergodica.diagnostics.checks import diagnose
from ergodica.diagnostics.temperature import Temperatures, holm, judge, measure, two_sided_p
from tests.diagnostics.trees import gaussian_run


def temperatures(values, mcse, mean=None, mean_mcse=None):
    values = np.asarray(values, float)
    mcse = np.broadcast_to(np.asarray(mcse, float), values.shape)
    return Temperatures(
        mean=float(values.mean() if mean is None else mean),
        mean_mcse=float(np.sqrt((mcse**2).sum()) / len(values) if mean_mcse is None else mean_mcse),
        names=tuple(f"x[{i}]" for i in range(len(values))),
        values=values,
        mcse=mcse,
    )


def test_holm_against_its_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # sorted .005 .01 .03 .04 against alpha/4, /3, /2, /1 = .0125 .0167 .025 .05: two rejected, then it stops
    assert holm(p, 0.05).tolist() == [True, False, False, True]
    assert holm(np.array([0.0]), 0.05).tolist() == [True]
    assert holm(np.array([0.02, 0.04]), 0.05).tolist() == [True, True]


def test_p_values():
    np.testing.assert_allclose(two_sided_p(np.array([0.0, 1.959963984540054, -2.5758293])), [1, 0.05, 0.01], rtol=1e-6)


class TestBoundaries:
    """One coordinate, so one test, whose critical value at alpha = .01 is the .995 quantile."""

    z = NormalDist().inv_cdf(0.995)

    def verdict(self, value, error, **options):
        return judge(temperatures([value], error), **options).verdict

    def test_significance(self):
        assert self.verdict(1 + 0.1, 0.1 / self.z * 0.999) == "biased"
        assert self.verdict(1 + 0.1, 0.1 / self.z * 1.001) == "undecided"
        assert self.verdict(1 - 0.1, 0.1 / self.z * 0.999) == "biased"

    def test_tolerance_of_a_significant_deviation(self):
        assert self.verdict(1.0501, 0.001) == "biased"
        assert self.verdict(1.0499, 0.001) == "undecided"  # significant, within the tolerance, but not surely
        assert self.verdict(1.0501, 0.001, tolerance=0.06) == "consistent"

    def test_end_of_the_interval(self):
        error = 0.01
        edge = 0.05 - self.z * error
        assert self.verdict(1 + edge - 1e-6, error) == "consistent"
        assert self.verdict(1 + edge + 1e-6, error) == "undecided"

    def test_small_but_significant(self):
        judgement = judge(temperatures([1.004], 0.001))
        assert judgement.verdict == "consistent"
        assert judgement.within_mean == pytest.approx(0.004 + self.z * 0.001)

    def test_nothing_is_certain_with_large_errors(self):
        assert self.verdict(1.0, 0.5) == "undecided"


def test_coordinates_that_cancel_are_biased():
    judgement = judge(temperatures([1.5, 0.5], 0.03))
    assert judgement.verdict == "biased"
    assert not judgement.mean_off
    assert sorted(judgement.off) == [0, 1]


def test_mutant_mean_alone_misses_what_cancels():
    values = temperatures([1.5, 0.5], 0.01)
    mean_only = Temperatures(
        values.mean, values.mean_mcse, ("mean",), np.array([values.mean]), np.array([values.mean_mcse])
    )
    assert judge(mean_only).verdict == "consistent"
    assert judge(values).verdict == "biased"


def test_coordinates_must_be_excluded_too():
    assert judge(temperatures([1.0] * 20, 0.03)).verdict == "consistent"
    assert judge(temperatures([1.0] * 20, 0.1, mean_mcse=0.01)).verdict == "undecided"


def test_factor_of_draws_decides():
    """With as many more draws as it asks for, and the same estimates at 1, the verdict is reached."""
    wide = temperatures([1.0] * 5, 0.2)
    factor = judge(wide).factor
    narrow = temperatures([1.0] * 5, 0.2 / np.sqrt(factor))
    assert judge(wide).verdict == "undecided"
    assert judge(narrow).verdict == "consistent"


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_measured_error_is_honest(correlation):
    """Squares of AR(1) draws: the spread of the mean over replicates is what the MCSE says, within 15%."""
    measured = [
        measure(gaussian_run(seed, [1.0, 1.0], draws=500, correlation=correlation)["probe"]["temperature"])
        for seed in range(200)
    ]
    spread = np.std([m.mean for m in measured], ddof=1)  # relative s.e. .05
    assert np.mean([m.mean_mcse for m in measured]) == pytest.approx(spread, rel=0.15)


def test_false_alarms():
    """Exact draws are called biased with probability at most alpha: binomial bound at five standard errors."""
    alpha, replicates = 0.05, 400
    alarms = sum(
        judge(
            measure(gaussian_run(seed, np.ones(8), draws=400, gradient_noise=1.0)["probe"]["temperature"]),
            tolerance=1e-9,
            alpha=alpha,
        ).verdict
        == "biased"
        for seed in range(replicates)
    )
    assert alarms / replicates <= alpha + 5 * np.sqrt(alpha * (1 - alpha) / replicates)


@pytest.mark.parametrize("ratios", [np.full(8, 1.15), [1.5, 0.5], [1.0] * 7 + [1.4], np.full(8, 0.85)])
def test_power(ratios):
    """Temperatures off by 15% on average, or by 40% in one of eight coordinates, are found every time."""
    verdicts = [diagnose(gaussian_run(seed, ratios, draws=2000))["temperature"].status for seed in range(10)]
    assert verdicts == ["failed"] * 10


def test_sentences():
    hot = diagnose(gaussian_run(0, [1.4] * 4, draws=3000))["temperature"]
    assert hot.verdict.startswith("biased: hot by")
    assert "too hot" in hot.sentence
    assert "√T = 1.1" in hot.sentence or "√T = 1.2" in hot.sentence
    both = diagnose(gaussian_run(0, [1.5, 0.5], draws=3000))["temperature"]
    assert both.verdict == "biased in 2 coordinates"
    assert "hot: beta[0]" in both.sentence
    assert "cold: beta[1]" in both.sentence
    good = diagnose(gaussian_run(0, np.ones(6), draws=8000, correlation=0.0))["temperature"]
    assert good.status == "passed"
    assert good.verdict.startswith("consistent within")
    unsure = diagnose(gaussian_run(0, np.ones(3), draws=100))["temperature"]
    assert unsure.status == "undecided"
    assert "draws a chain in place of 100" in unsure.sentence


def test_cold_run_is_judged_at_its_own_temperature_and_says_so():
    check = diagnose(gaussian_run(0, np.ones(6), draws=8000, correlation=0.0, run_temperature=0.1))["temperature"]
    assert check.status == "noted"
    assert check.values["mean"] == pytest.approx(1.0, abs=0.05)
    assert "T = 0.1" in check.verdict
    assert "0.32 times the posterior's" in check.sentence
    hot = diagnose(gaussian_run(0, [1.5] * 6, draws=3000, run_temperature=0.1))["temperature"]
    assert hot.status == "failed"


def test_not_run_where_there_is_no_temperature():
    changing = gaussian_run()
    changing["sample_stats"]["temperature"][..., 500:] = 2.0
    assert "changed" in diagnose(changing)["temperature"].sentence
    optimiser = gaussian_run()
    optimiser["sample_stats"]["temperature"][...] = 0.0
    assert "optimises" in diagnose(optimiser)["temperature"].sentence
    without = gaussian_run()
    del without["probe"]
    assert "stored no probe" in diagnose(without)["temperature"].sentence
    for dt in (changing, optimiser, without):
        assert not diagnose(dt)["temperature"].ran


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_nan_and_constant_series_are_no_result(value):
    dt = gaussian_run()
    dt["probe"]["temperature"][0 if value else slice(None), :, 1] = value
    check = diagnose(dt)["temperature"]
    assert check.status == "not run"
    assert "NaN or zero" in check.sentence
