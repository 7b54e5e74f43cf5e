"""Scores of predictions against closed forms, enumeration and quadrature; wrong variants must be noticed."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import ergodica as erg
from ergodica.diagnostics import calibration
from ergodica.diagnostics.predictive import coverage, crps
from ergodica.diagnostics.scoring import (
    binomial_interval,
    brier_score,
    crps_gaussian_mixture,
    expected_calibration_error,
    gaussian_mixture_log_density,
    gaussian_mixture_pit,
    rank_pit,
)


def crps_of_gaussian(y, mean, sd):
    """Closed form of Gneiting and Raftery (2007), equation 21."""
    z = (y - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_crps_of_one_gaussian_is_the_closed_form():
    y, mean, sd = np.array([0.3, -2.0, 5.0]), np.array([0.0, 1.0, 4.0]), np.array([1.0, 0.5, 3.0])
    found = crps_gaussian_mixture(mean[None], sd[None], y)
    np.testing.assert_allclose(found, crps_of_gaussian(y, mean, sd), rtol=1e-12)


def test_scores_of_a_mixture_by_quadrature():
    """CRPS is the integral of (F - 1{x >= y})²; the PIT is F(y), and the log density that of F'."""
    means, sds = np.array([[-2.0], [0.5], [3.0]]), np.array([[0.5], [1.0], [0.2]])
    x, step = np.linspace(-40, 40, 800_001, retstep=True)
    distribution = stats.norm.cdf((x - means) / sds).mean(0)
    for y in (-3.0, 0.0, 2.9):
        expected = np.sum((distribution - (x >= y)) ** 2) * step
        observed = np.array([y])
        assert crps_gaussian_mixture(means, sds, observed)[0] == pytest.approx(expected, abs=1e-4)
        assert gaussian_mixture_pit(means, sds, observed)[0] == pytest.approx(np.interp(y, x, distribution), abs=1e-6)
        density = np.interp(y, x, np.gradient(distribution, x))
        assert gaussian_mixture_log_density(means, sds, observed)[0] == pytest.approx(np.log(density), abs=1e-5)


@pytest.mark.parametrize(("form", "is_right"), [("fair", True), ("mixture", False)])
def test_crps_from_three_draws_is_unbiased(form, is_right):
    """From 20,000 triples of draws of N(0, 1), about y = 1. The mutant counts pairs of a draw with itself: its bias is 0.19."""
    draws, y = np.random.default_rng(0).normal(size=(3, 20_000)), np.ones(20_000)
    values = crps(draws, y)
    if form == "mixture":
        spread = np.abs(draws[:, None] - draws[None]).mean((0, 1)) / 2
        values = np.abs(draws - y).mean(0) - spread
    z = (values.mean() - crps_of_gaussian(1.0, 0.0, 1.0)) / (values.std(ddof=1) / np.sqrt(len(y)))
    assert (abs(z) < 5) == is_right  # sees a bias of 0.02


@pytest.mark.parametrize("size", [3, 10, 99])
def test_coverage_from_ranks_is_exact(size):
    """The rank of an exchangeable datum is uniform, so the share inside is that of the ranks; the band is made for it."""
    ranks = (np.arange(size + 1) + 0.5) / (size + 1)
    for level in (0.5, 0.8, 0.9):
        expected = np.mean(np.abs(ranks - 0.5) <= level / 2)
        generator = np.random.default_rng(size)
        y, draws = generator.normal(size=20_000), generator.normal(size=(size, 20_000))
        table = calibration(observed=y, draws=draws, levels=(level,))
        found = table.sel(score=f"coverage{100 * level:g}")
        assert abs(found.value.item() - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(y))
        low, high = stats.binom.ppf([0.025, 0.975], len(y), expected) / len(y)
        assert (found.calibrated_low, found.calibrated_high) == (low, high)
        assert abs(expected - level) <= 1 / size


def test_quantiles_of_few_draws_cover_too_little():
    """Why ranks: interpolated quantiles of S uniform draws cover L (S - 1)/(S + 1), and not L."""
    generator = np.random.default_rng(1)
    y, draws = generator.uniform(size=100_000), generator.uniform(size=(10, 100_000))
    found, expected = coverage(draws, y, 0.8), 0.8 * 9 / 11
    assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / len(y))
    assert abs(found - 0.8) > 0.1


def test_pit_from_ranks():
    draws = np.array([[1.0], [2.0], [3.0], [3.0]])
    assert rank_pit(draws, np.array([2.5])).tolist() == [2.5 / 5]
    assert rank_pit(draws, np.array([3.0])).tolist() == [3.5 / 5]  # a tie counts half


def binomial_coverage(interval, total, p):
    """Probability that the interval holds p, by enumeration."""
    held = [low <= p <= high for low, high in (interval(k, total) for k in range(total + 1))]
    return stats.binom.pmf(np.arange(total + 1), total, p)[held].sum()


def wald(count, total):
    share = count / total
    reach = 1.96 * np.sqrt(share * (1 - share) / total)
    return share - reach, share + reach


@pytest.mark.parametrize(("interval", "is_right"), [(binomial_interval, True), (wald, False)])
def test_binomial_interval_covers_as_often_as_it_says(interval, is_right):
    worst = min(binomial_coverage(interval, 20, p) for p in np.linspace(0.01, 0.99, 99))
    assert (worst >= 0.95) == is_right


# --- labels -----------------------------------------------------------------------------------------------------------


def test_brier_score_is_proper():
    """The mean score of q where labels follow p exceeds that of p itself by |p - q|², exactly."""
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    labels = np.arange(3)

    def mean_score(predicted, score=brier_score):
        return p @ score(np.tile(predicted, (3, 1)), labels)

    def of_the_label_alone(predicted, y):  # not proper for three classes
        return (1 - predicted[np.arange(3), y]) ** 2

    assert mean_score(q) - mean_score(p) == pytest.approx(np.sum((p - q) ** 2), abs=1e-12)
    assert mean_score(q, of_the_label_alone) - mean_score(p, of_the_label_alone) != pytest.approx(np.sum((p - q) ** 2))
    np.testing.assert_allclose(brier_score(np.eye(3), [1, 1, 1]), [2.0, 0.0, 2.0])


def two_classes(confidence, correct):
    """Predictions of two classes with given confidences, and labels that make them right or wrong."""
    confidence = np.asarray(confidence, float)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


def test_calibration_error_by_hand():
    confidence = [0.6] * 10 + [0.9] * 30
    calibrated = two_classes(confidence, [True] * 6 + [False] * 4 + [True] * 27 + [False] * 3)
    assert expected_calibration_error(*calibrated).ece == pytest.approx(0.0, abs=1e-12)
    # off by +0.2 in a quarter of the data, and by -0.1 in the rest: signs must not cancel, and bins must be weighted
    off = two_classes(confidence, [True] * 8 + [False] * 2 + [True] * 24 + [False] * 6)
    assert expected_calibration_error(*off).ece == pytest.approx(0.25 * 0.2 + 0.75 * 0.1)
    assert expected_calibration_error(*off, num_bins=1).ece == pytest.approx(0.025)  # one bin hides it


def test_bins_of_the_confidence():
    p, y = two_classes([0.5, 0.5, 0.51, 0.6, 1.0], [True] * 5)
    assert expected_calibration_error(p, y, num_bins=10).count.tolist() == [0, 0, 0, 0, 2, 2, 0, 0, 0, 1]
    found = expected_calibration_error(p, y, num_bins=5, binning="mass")
    assert found.count.tolist() == [1] * 5
    np.testing.assert_allclose(found.confidence, [0.5, 0.5, 0.51, 0.6, 1.0])


def test_the_bias_of_the_error_is_that_of_a_binomial():
    """One bin of n data: the mean of |K/n - p| is De Moivre's, 2 (1 - p)^(n - m) p^(m + 1) (m + 1) C(n, m + 1) / n, m = ⌊np⌋."""
    n, p = 30, 0.7
    m = int(n * p)
    expected = 2 * stats.binom.pmf(m + 1, n, p) * (1 - p) * (m + 1) / n
    found = expected_calibration_error(*two_classes([p] * n, [True] * n), num_bins=1, num_null=20_000)
    assert found.calibrated_mean == pytest.approx(expected, abs=5 * 0.06 / np.sqrt(20_000))
    assert found.calibrated_mean > 0.06  # no small matter


@pytest.mark.parametrize(("excess", "inside"), [(0.0, True), (0.1, False)])
def test_the_range_under_calibration_holds_calibrated_predictors(excess, inside):
    """95 in 100 of them, and hardly any that is over-confident by 0.1: 200 data sets of 300 data."""
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        confidence = generator.uniform(0.65, 1.0, size=300)
        correct = generator.uniform(size=300) < confidence - excess
        found = expected_calibration_error(*two_classes(confidence, correct), num_null=200)
        held += found.calibrated_low <= found.ece <= found.calibrated_high
    if inside:
        assert abs(held / 200 - 0.95) < 5 * np.sqrt(0.05 * 0.95 / 200)  # sees 0.87
    else:
        assert held < 60


def test_calibration_error_of_a_known_overconfidence():
    """Confidence exceeds accuracy by 0.1 for each datum of 50,000: so does the error, to a noise of 0.002."""
    generator = np.random.default_rng(3)
    confidence = generator.uniform(0.6, 1.0, size=50_000)
    found = expected_calibration_error(
        *two_classes(confidence, generator.uniform(size=50_000) < confidence - 0.1), num_null=20
    )
    assert abs(found.ece - 0.1) < 5 * 0.4 / np.sqrt(50_000)


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_of_gaussians_is_that_of_many_draws():
    generator = np.random.default_rng(4)
    means, sds, y = generator.normal(size=(5, 60)), generator.uniform(0.5, 1.5, size=(5, 60)), generator.normal(size=60)
    exact = calibration(observed=y, gaussians=(means, sds))
    draws = np.repeat(means, 4000, 0) + np.repeat(sds, 4000, 0) * generator.normal(size=(20_000, 60))
    log_density = stats.norm.logpdf(y, means, sds)
    sampled = calibration(observed=y, draws=draws, log_likelihood=log_density)
    np.testing.assert_allclose(sampled.pit, exact.pit, atol=5 * 0.5 / np.sqrt(20_000))
    assert sampled.value.sel(score="crps").item() == pytest.approx(exact.value.sel(score="crps").item(), abs=0.005)
    assert sampled.value.sel(score="nll").item() == pytest.approx(exact.value.sel(score="nll").item(), rel=1e-12)
    assert list(exact.score.values) == ["nll", "crps", "coverage50", "coverage90"]


def test_table_of_labels():
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]])
    table = calibration(observed=np.array([0, 0, 1]), probabilities=p)
    assert table.value.sel(score="nll").item() == pytest.approx(-np.log([0.7, 0.3, 0.8]).mean())
    assert table.value.sel(score="accuracy").item() == pytest.approx(2 / 3)
    assert table.value.sel(score="ece").item() == pytest.approx((0.3 + 0.4 + 0.2) / 3)
    assert table.bin_count.sum() == 3


X = jnp.asarray(np.random.default_rng(5).normal(size=(30, 2)), jnp.float32)
LABELS = jnp.asarray(np.arange(30) % 3, jnp.int32)


def logits(w, x):
    return x @ w


def plain_classifier():
    def log_likelihood(p, rows):
        values = jax.nn.log_softmax(logits(p["w"], rows["x"]))
        return jnp.take_along_axis(values, rows["y"][:, None], axis=1)[:, 0]

    return erg.Posterior(
        lambda p: -0.5 * jnp.sum(p["w"] ** 2), log_likelihood, {"x": X, "y": LABELS}, initial={"w": jnp.zeros((2, 3))}
    )


def numpyro_classifier():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=logits(w, x)), obs=y)

    return erg.from_numpyro(model, data={"x": X, "y": LABELS})


@pytest.mark.parametrize("make", [plain_classifier, numpyro_classifier])
def test_probabilities_of_classes_are_those_of_the_model(make):
    w = np.random.default_rng(6).normal(size=(2, 10, 2, 3)).astype(np.float32)
    dt, posterior = az.from_dict({"posterior": {"w": w}}), make()
    if posterior.transform is not None:
        dt["unconstrained_posterior"] = dt["posterior"]
    expected = np.exp(jax.nn.log_softmax(np.asarray(X) @ w)).mean((0, 1))
    for batch_size in (7, 1000):
        result = erg.predictive(dt, posterior, data={"x": X, "y": LABELS}, classes={"y": 3}, batch_size=batch_size)
        np.testing.assert_allclose(result["held_out"]["probability_y"], expected, rtol=1e-4)
    table = calibration(result)
    assert table.value.sel(score="nll").item() == pytest.approx(result["held_out"].attrs["nll"], rel=1e-5)
    with pytest.raises(ValueError, match=r"sum to 1.*Name all the classes"):
        erg.predictive(dt, posterior, data={"x": X, "y": LABELS}, classes={"y": 2})


def test_table_of_a_result_is_that_of_its_arrays():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = erg.from_numpyro(model, data={"y": jnp.zeros(10)})
    dt = az.from_dict({"posterior": {"mu": np.random.default_rng(7).normal(size=(4, 50)).astype(np.float32)}})
    new = jnp.linspace(-2.0, 2.0, 15)
    result = erg.predictive(dt, posterior, key=jax.random.key(0), data={"y": new})
    table = calibration(result)
    by_hand = calibration(observed=new, draws=result["predictions"]["y"].values)
    assert table.value.sel(score="crps") == by_hand.value.sel(score="crps")
    assert table.value.sel(score="crps").item() == pytest.approx(result["held_out"]["crps_y"].mean().item())
    assert table.value.sel(score="nll").item() == pytest.approx(result["held_out"].attrs["nll"])
    with pytest.raises(ValueError, match="no predictions of 'y'"):
        calibration(erg.predictive(dt, posterior, data={"y": new}))
    with pytest.raises(ValueError, match=r"held_out.*flatters"):
        calibration(dt)
    with pytest.raises(ValueError, match=r"site must be one of .*'y'"):
        calibration(result, site="z")
    with pytest.raises(ValueError, match="held-out data"):
        erg.predictive(dt, posterior, classes={"y": 2})
    with pytest.raises(ValueError, match="classes names 'z'"):
        erg.predictive(dt, posterior, data={"y": new}, classes={"z": 2})


def test_errors_say_what_to_do():
    y, half = np.zeros(2), np.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="in one form"):
        calibration(observed=y)
    with pytest.raises(ValueError, match="in one form"):
        calibration(observed=y, draws=half, probabilities=half)
    with pytest.raises(ValueError, match="observed missing"):
        calibration(draws=half)
    with pytest.raises(ValueError, match="not both"):
        calibration(az.from_dict({"posterior": {"mu": half}}), observed=y)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., N\)"):
        calibration(observed=y, draws=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least two"):
        calibration(observed=y, draws=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration(observed=y, draws=half, levels=(50,))
    with pytest.raises(ValueError, match="each row sum to 1"):
        calibration(observed=y, probabilities=2 * half)
    with pytest.raises(ValueError, match="whole numbers from 0 to 1"):
        calibration(observed=np.array([0, 2]), probabilities=half)
    with pytest.raises(ValueError, match="above 0"):
        calibration(observed=y, gaussians=(half, 0 * half))
    with pytest.raises(ValueError, match="one row a draw"):
        calibration(observed=y, gaussians=(half, np.ones((3, 2))))
    with pytest.raises(ValueError, match="num_bins"):
        calibration(observed=np.zeros(2, int), probabilities=half, num_bins=0)
    with pytest.raises(TypeError, match="dt must be"):
        calibration({"y": y})
