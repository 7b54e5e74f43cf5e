"""The statistics of a comparison of gradients on samples whose law is known: no program is compiled."""

import numpy as np
import pytest
from scipy.stats import binom

from ergodica.diagnostics.gradient_bias import (
    Errors,
    Target,
    detectable,
    errors_of,
    holm,
    largest_bias,
    look_for_bias,
    size_of_bias,
    without_own_share,
)
from ergodica.diagnostics.gradient_judgement import judge
from ergodica.diagnostics.gradient_repeats import PILOT, in_lots, repeats_needed
from ergodica.diagnostics.gradient_replicates import Opening
from ergodica.diagnostics.gradient_settings import Settings
from ergodica.diagnostics.gradient_statistics import (
    Replicates,
    hall,
    inverse_hall,
    signal_to_noise,
    summarise,
    variance_ratios,
)
from ergodica.diagnostics.gradients import Taken


def score_function(rng, r):
    """Estimates of the gradient of E x², x ~ N(1, 1), by the mean and the scale: means 2 and 2, variances 30 and 136."""
    e = rng.standard_normal(r)
    return np.stack([(1 + e) ** 2 * e, (1 + e) ** 2 * (e**2 - 1)], axis=1)


def settings(confidence, bias_tolerance=0.1):
    return Settings(None, 20_000, confidence, bias_tolerance, Opening(), common_random_numbers=False)


def against(gradients, exact):
    """Errors of replicates against an exact gradient."""
    target = Target(np.asarray(exact, float), np.zeros(len(exact)), {})
    return errors_of("a", {"a": Replicates(gradients, np.nan)}, target), target


def test_holm():
    """By hand, for five tests of which one is none."""
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.5]])
    np.testing.assert_allclose(holm(p), [[0.04, 0.09, np.nan], [0.09, 0.025, 0.5]])
    assert np.all(holm(np.array([0.6, 0.7])) == 1.0)


@pytest.mark.parametrize("skewness", [0.0, 0.05, -0.4])
def test_the_correction_for_skewness_is_inverted(skewness):
    z = np.linspace(-6.0, 6.0, 25)
    np.testing.assert_allclose(inverse_hall(hall(z, skewness), skewness), z, atol=1e-9)
    assert np.all(np.diff(hall(z, skewness)) >= 0)


@pytest.mark.parametrize(("column", "variance", "kurtosis", "r"), [(0, 30.0, 42.0, 4000), (1, 136.0, 243.0, 16_000)])
def test_intervals_of_variances_with_heavy_tails_cover(column, variance, kurtosis, r):
    """Coverage of at least 96% at 99%, by a binomial test at one in 10⁵; half as many repeats in the error is a mutant."""
    rng, runs = np.random.default_rng(column), 250
    covered, too_short, kurtoses = 0, 0, []
    for _ in range(runs):
        found = summarise(Replicates(score_function(rng, r)[:, [column]], np.nan), 0.99)
        covered += found.lower < variance < found.upper
        quarter = [variance > found.variance + (end - found.variance) / 4 for end in (found.lower, found.upper)]
        too_short += quarter == [True, False]
        kurtoses.append(found.kurtosis)
    assert binom.cdf(covered, runs, 0.96) > 1e-5, f"covered {covered} of {runs}"
    assert binom.cdf(too_short, runs, 0.96) < 1e-5
    assert 0.4 * kurtosis < np.median(kurtoses) < 1.2 * kurtosis  # a sample's kurtosis is too small, not too large


def test_intervals_not_to_be_trusted_are_marked():
    rng = np.random.default_rng(3)
    few, many = (summarise(Replicates(score_function(rng, r)[:, [1]], np.nan), 0.99) for r in (1000, 100_000))
    assert not few.trustworthy
    assert many.trustworthy
    assert 60_000 < many.repeats_for_variance < 160_000  # (243 - 1) / 0.05² = 97 thousand
    normal = summarise(Replicates(rng.standard_normal((20_000, 1)), np.nan), 0.99)
    assert abs(normal.repeats_for_variance - 800) < 80
    rare = np.zeros((1000, 1))
    rare[0] = 1.0
    assert not summarise(Replicates(rare, np.nan), 0.99).trustworthy


def test_false_alarms_of_skewed_estimates():
    """Three unbiased estimators at one point, 1,000 repeats, 200 comparisons at 90%: alarms are no more than a tenth.

    The same tests without Holm's correction raise it in far more.
    """
    rng, runs = np.random.default_rng(4), 200
    alarms, uncorrected = 0, 0
    target = Target(np.array([2.0, 2.0]), np.zeros(2), {})
    for _ in range(runs):
        replicates = {name: Replicates(score_function(rng, 1000), np.nan) for name in "abc"}
        figures, facts = judge([Taken(replicates, target, {})], settings(0.9))
        alarms += bool((figures["verdict"] == "biased").any())
        uncorrected += min(look_for_bias(errors_of(n, replicates, target)).p.min() for n in "abc") < 0.1
    assert facts["num_tests"] == 9
    assert binom.sf(alarms - 1, runs, 0.1) > 1e-5, f"{alarms} alarms of {runs}"
    assert binom.sf(uncorrected - 1, runs, 0.1) < 1e-5


def test_what_the_pilot_asks_for_finds_the_bias_that_matters():
    """A bias of 5% of the norm, along one coordinate, both, or the noisiest direction: found in nine of ten or more."""
    rng, runs, exact = np.random.default_rng(5), 100, np.array([20.0, 20.0])
    level, norm = 0.01 / 3, 0.05 * np.sqrt(800.0)

    def sample(r):
        return score_function(rng, r) + exact - 2.0

    errors, target = against(sample(PILOT), exact)
    needs = repeats_needed(errors, summarise(Replicates(errors.rows, np.nan), 0.99), exact, level, 0.1)
    r = in_lots(needs.detect, 100_000)
    assert 2 * PILOT <= r <= 60_000
    for direction in ([1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]):
        found = 0
        for _ in range(runs):
            tested = look_for_bias(
                errors_of("a", {"a": Replicates(sample(r) + norm * np.array(direction), 1.0)}, target)
            )
            found += min(tested.p.min(), tested.joint) < level
        assert binom.cdf(found, runs, 0.9) > 1e-4, f"found {found} of {runs}"
    assert in_lots(np.inf, 20_000) == 20_000
    assert in_lots(3.0, 20_000) == PILOT


def test_the_joint_test_sees_what_no_coordinate_shows():
    rng, d, r = np.random.default_rng(6), 20, 4000
    x = rng.standard_normal((r, d))
    x += 2.5 / np.sqrt(r) - x.mean(axis=0)
    errors, _ = against(x, np.zeros(d))
    tested = look_for_bias(errors)
    assert tested.p.min() > 0.01
    assert tested.joint < 1e-10
    twice, _ = against(np.concatenate([x, x], axis=1)[:, : d + 1], np.zeros(d + 1))  # a coordinate that repeats another
    assert 1e-40 < look_for_bias(twice).joint < 1e-10


def test_bounds_and_control():
    rng, r = np.random.default_rng(7), 4000
    exact = np.array([1.0, -2.0])
    errors, target = against(exact + rng.standard_normal((r, 2)), exact)
    level = 0.01 / 3
    bounds = largest_bias(errors, level)
    assert np.all(bounds > np.abs(errors.bias) + 2.5 / np.sqrt(r))
    assert np.all(bounds < np.abs(errors.bias) + 3.5 / np.sqrt(r))
    shrinkage = detectable(errors, target.gradient, level)
    np.testing.assert_allclose(shrinkage, (2.935 + 1.645) / np.sqrt(r) / 2, rtol=0.05)
    mean = exact + errors.bias
    assert look_for_bias(errors, -2 * shrinkage * mean).p.min() < level
    for size, outcome in ((0.2, "found"), (0.01, "missed")):
        replicates = {"a": Replicates(exact + rng.standard_normal((r, 2)), np.nan)}
        figures, _ = judge([Taken(replicates, target, {})], settings(0.99, 2 * size))
        assert figures["control"].item() == outcome
    own = Target(exact, np.zeros(2), {"a": np.ones(2)})
    figures, _ = judge([Taken(replicates, own, {})], settings(0.99))
    assert figures["control"].item() == "none"


def test_size_of_the_bias():
    """Debiased norm, an interval that covers, mean squared error and cosine, over 200 runs of a known bias."""
    rng, r, exact = np.random.default_rng(8), 1000, np.array([3.0, 4.0, 0.0])
    bias, spread = np.array([0.0, 0.0, 0.25]), np.array([1.0, 2.0, 0.5])
    sizes = []
    for _ in range(200):
        x = exact + bias + spread * rng.standard_normal((r, 3))
        errors, target = against(x, exact)
        sizes.append(size_of_bias(errors, target, summarise(Replicates(x, np.nan), 0.99).variance, 0.99))
    relative = np.array([s.relative for s in sizes])
    assert np.sum([s.lower <= 0.05 <= s.upper for s in sizes]) >= 194
    np.testing.assert_allclose(np.sqrt(np.mean(relative**2)), 0.05, rtol=0.05)
    np.testing.assert_allclose(np.mean([s.mse for s in sizes]), 5.25 + 0.0625, rtol=0.01)
    np.testing.assert_allclose(np.mean([s.cosine for s in sizes]), 5 / np.sqrt(25 + 0.0625), rtol=1e-3)
    nothing = size_of_bias(Errors(np.zeros(3), None, np.zeros(3)), Target(exact, np.zeros(3), {}), 0.0, 0.99)
    assert nothing == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_ratios_by_a_paired_bootstrap():
    """Common random numbers shorten the interval; it covers 3 in at least 57 of 60 runs at 99%; without noise there is no ratio."""
    rng, covered, lengths = np.random.default_rng(9), 0, []
    for seed in range(60):
        e, other = rng.standard_normal((2, 1500, 1)) ** 3
        paired = {"a": Replicates(e, 1.0), "b": Replicates(np.sqrt(3.0) * e + 0.3 * other, 1.0)}
        alone = paired | {"b": Replicates(np.sqrt(3.09) * other, 1.0)}
        found = [
            variance_ratios({n: x.deviations for n, x in those.items()}, "a", 0.99, seed)["b"]
            for those in (paired, alone)
        ]
        covered += found[0][1] < 3.09 < found[0][2]
        lengths.append([np.log(f[2] / f[1]) for f in found])
    assert covered >= 57
    assert np.median([a / b for a, b in lengths]) < 0.5
    quiet = {"a": np.ones(5), "b": np.zeros(2)}
    assert variance_ratios(quiet, "a", 0.99)["b"] == (0.0, 0.0, 0.0)
    assert np.isnan(variance_ratios(quiet, "b", 0.99)["a"][0])


def test_signal_to_noise():
    rng = np.random.default_rng(10)
    x = np.concatenate([rng.standard_normal((4000, 1)) * 2.0, np.ones((4000, 1))], axis=1)
    snr = signal_to_noise(np.array([3.0, 1.0]), Replicates(x, np.nan))
    np.testing.assert_allclose(snr[0], 1.5, rtol=0.05)
    assert np.isinf(snr[1])


def test_a_mean_that_makes_most_of_the_pool_is_held_against_the_others():
    """The mutant: of a bias, a pool that is nearly all the estimator's own shows a hundredth."""
    generator = np.random.default_rng(3)
    good = generator.normal(0.0, 10.0, (4000, 2))
    biased = 1.0 + generator.normal(0.0, 1.0, (4000, 2))
    replicates = {"biased": Replicates(biased, 1.0), "good": Replicates(good, 1.0)}
    weights = {"biased": np.full(2, 0.99), "good": np.full(2, 0.01)}
    pooled = 0.99 * biased.mean(axis=0) + 0.01 * good.mean(axis=0)
    target = Target(pooled, np.zeros(2), weights)
    shown = errors_of("biased", replicates, target)
    own = without_own_share(shown, target, "biased")
    difference = biased.mean(axis=0) - good.mean(axis=0)
    np.testing.assert_allclose(own.bias, difference, rtol=1e-8)
    assert (np.abs(shown.bias) < 0.02 * np.abs(difference)).all()
    np.testing.assert_allclose(own.standard_error, 100 * shown.standard_error, rtol=1e-10)
    assert (largest_bias(own, 0.01) > 0.9).all()
    alone = Target(pooled, np.zeros(2), {"good": np.ones(2)})
    assert without_own_share(shown, alone, "biased") is shown
