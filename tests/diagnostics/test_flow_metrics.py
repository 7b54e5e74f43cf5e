"""Metrics of flows: closed forms of normal laws, all pairs, jackknife, errors that hold, dropped modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_base import from_dict
from scipy.stats import chi2, f, norm

import ergodica as erg
from ergodica.core.flow import Flow
from ergodica.diagnostics import flow_weights
from ergodica.diagnostics.flow_metrics import FlowMetrics, estimates
from ergodica.diagnostics.flow_report import flow_report, report_of
from tests.support.flow_layers import Scaled, normals
from tests.support.statistics import REJECTION, assert_mean, z_scores

LOG_Z = 1.7


def log_weight(x, s):
    """Of N(0, s^2) against ``exp(LOG_Z)`` times N(0, 1); the last axis runs over the coordinates."""
    return LOG_Z + np.sum(norm.logpdf(x) - norm.logpdf(x, scale=s), axis=-1)


@functools.cache
def quantiles(n=100_000):
    """Points that stand for equal shares of N(0, 1), so that means over them are midpoint rules."""
    return norm.ppf((np.arange(n) + 0.5) / n)[:, None]


def closed_forms(s):
    kl_reverse = -np.log(s) + (s**2 - 1) / 2
    return {
        "ess_reverse": np.sqrt(2 * s**2 - 1) / s**2,
        "ess_forward": np.sqrt(2 * s**2 - 1) / s**2,
        "log_z": LOG_Z,
        "log_z_bridge": LOG_Z,
        "acceptance_rate": 4 / np.pi * np.arctan(min(s, 1 / s)),
        "kl_reverse": kl_reverse,
        "kl_forward": np.log(s) + 1 / (2 * s**2) - 0.5,
    }


@pytest.mark.parametrize("s", [0.95, 1.0, 1.1, 3.0])
def test_normal_laws_have_the_known_values(s):
    """Both sets of draws, and the flow's alone.

    At s = 3 the mean of 1/w over the target has no variance, and the rule no accuracy: the forward size is not had like this.
    """
    of_flow, of_target = log_weight(s * quantiles(), s), log_weight(quantiles(), s)
    exact = closed_forms(s)
    both = estimates(of_flow, of_target)
    assert both.keys() == exact.keys()
    for found in (both, estimates(of_flow, None)):
        for name, estimate in found.items():
            if name != "ess_forward" or s < 2:
                np.testing.assert_allclose(estimate.value, exact[name], atol=3e-4, err_msg=name)
    # a known constant is used
    np.testing.assert_allclose(
        estimates(of_flow, None, LOG_Z + 1)["kl_reverse"].value, exact["kl_reverse"] + 1, atol=3e-4
    )


def test_sums_over_pairs_are_those_of_all_pairs():
    own, other = np.array([0.3, -2.0, 5.0, 0.3]), np.array([0.3, 4.0, -np.inf, -1000.0, 0.1])
    exact = np.minimum(1, np.exp(other[:, None] - own)).mean(0)
    np.testing.assert_allclose(flow_weights.mean_minimum(own, other), exact, rtol=1e-14)
    np.testing.assert_allclose(flow_weights.mean_minimum(jnp.asarray(own), jnp.asarray(other)), exact, rtol=1e-5)
    w = np.exp(other)
    n = len(w)
    unlike = np.minimum(w[:, None], w)[~np.eye(n, dtype=bool)].mean()
    np.testing.assert_allclose(flow_weights.acceptance_of_flow(other).value, unlike / w.mean(), rtol=1e-14)


def weights(num_flow=400, num_target=300, s=1.3, seed=0, dim=3):
    """More draws continue what fewer draws begin with."""
    x = np.random.default_rng((seed, 0)).normal(size=(num_flow, dim))
    y = np.random.default_rng((seed, 1)).normal(size=(num_target, dim))
    return log_weight(s * x, s), log_weight(y, s)


def test_influences_are_what_leaving_one_draw_out_changes():
    """To first order in one over the number of draws: the rest shrinks as that does."""

    def worst(num):
        of_flow, of_target = weights(num, num)
        whole = estimates(of_flow, of_target)
        gaps = []
        for i in range(5):
            for side in ("flow", "target"):
                less = (np.delete(of_flow, i), of_target) if side == "flow" else (of_flow, np.delete(of_target, i))
                without = estimates(*less)
                for name, estimate in whole.items():
                    influence = getattr(estimate, side)
                    if np.ndim(influence):
                        moved = (num - 1) * (estimate.value - without[name].value)
                        gaps.append(abs(moved - influence[i]))
        return np.max(gaps)

    few, many = worst(200), worst(3200)  # the same five draws
    assert many < 0.02
    assert many < few / 4


def test_arrays_of_either_library_give_the_same():
    of_flow, of_target = weights()
    compiled = jax.jit(estimates)(jnp.asarray(of_flow), jnp.asarray(of_target))
    for name, estimate in estimates(of_flow, of_target).items():
        np.testing.assert_allclose(compiled[name].value, estimate.value, rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(compiled[name].flow, estimate.flow, rtol=1e-3, atol=1e-3, err_msg=name)


def test_the_bridge_has_its_known_limits():
    """With hardly a draw of the target it is importance sampling, with hardly one of the flow the reciprocal of it."""
    of_flow, of_target = weights()
    few = flow_weights.bridge_log_z(of_flow, of_target, 1e-9)
    np.testing.assert_allclose(few.value, flow_weights.importance_log_z(of_flow).value, rtol=1e-7)
    many = flow_weights.bridge_log_z(of_flow, of_target, 1e12)
    np.testing.assert_allclose(many.value, -flow_weights.importance_log_z(-of_target).value, rtol=1e-7)


def test_the_bridge_is_the_fixed_point_of_its_iteration():
    """Meng and Wong's iteration as printed, from a start far off; draws of the flow outside the target among them."""
    of_flow, of_target = weights(300, 500)
    of_flow[:20] = -np.inf
    n, m = len(of_flow), len(of_target)
    z, l_flow, l_target = 100.0, np.exp(of_flow), np.exp(of_target)
    for _ in range(200):
        above = np.mean(l_flow / (m / (n + m) * l_flow + n / (n + m) * z))
        z = above / np.mean(1 / (m / (n + m) * l_target + n / (n + m) * z))
    np.testing.assert_allclose(flow_weights.bridge_log_z(of_flow, of_target).value, np.log(z), rtol=1e-12)


REPLICATES = 400


@functools.cache
def replicates():
    """Estimates over their errors, of independent sets of draws in three dimensions."""
    rows = []
    for seed in range(REPLICATES):
        found = report_of(*weights(400, 400, s=1.12, seed=seed)).table
        rows.append(found["estimate"].to_numpy() + 1j * found["standard_error"].to_numpy())
    names = list(found.index)
    return {name: np.array(rows)[:, i] for i, name in enumerate(names)}


def exact_values(s, dim=3):
    one = closed_forms(s)
    return {
        "log_z": LOG_Z,
        "log_z_bridge": LOG_Z,
        "ess_reverse": one["ess_reverse"] ** dim,
        "ess_forward": one["ess_forward"] ** dim,
        "kl_reverse": dim * one["kl_reverse"],
        "kl_forward": dim * one["kl_forward"],
        # accepted where the proposal's squared length is below the position's: 2 P(chi2 >= s^2 chi2')
        "acceptance_rate": 2 * f.sf(s**2, dim, dim),
    }


def test_means_and_errors_are_right():
    """Z itself is unbiased; other estimates to first order. Errors are held against the spread of the replicates."""
    found, exact = replicates(), exact_values(1.12)
    assert_mean(np.exp(found["log_z"].real - LOG_Z), 1.0, smallest_error=0.005)  # unbiased at any number of draws
    for name, values in found.items():
        z = (values.real - exact[name]) / values.imag
        # the errors' own: sqrt(chi2 / R) at a false-alarm rate of 1e-6 on either side, and 8% for 400 draws being few
        low, high = np.sqrt(chi2.ppf([1e-6, 1 - 1e-6], REPLICATES - 1) / (REPLICATES - 1))
        assert 0.92 * low < np.std(z, ddof=1) < 1.08 * high, (name, np.std(z, ddof=1))
        assert abs(np.mean(z)) < 5 / np.sqrt(REPLICATES) + 0.15, (
            name,
            np.mean(z),
        )  # bias is O(1/n) of an error of O(1/sqrt n)


def test_a_reverse_size_at_the_targets_draws_is_rejected():
    """Mutant: the formula for the flow's draws, applied to the target's."""
    values = [flow_weights.reverse_ess(weights(400, 400, 1.5, seed)[1]).value for seed in range(100)]
    exact = exact_values(1.5)["ess_reverse"]
    assert np.abs(z_scores(np.array(values), exact)) > REJECTION


def test_errors_count_the_autocorrelation_of_the_targets_chains():
    """Chains of autocorrelation 0.9, whose squares are worth a tenth of independent ones; so is their mean log weight."""
    z = {"chains": [], "as if independent": []}
    for seed in range(100):
        random = np.random.default_rng(seed)
        x = np.zeros((4, 500, 1))
        x[:, 0] = random.normal(size=(4, 1))
        noise = np.sqrt(1 - 0.81) * random.normal(size=x.shape)
        for t in range(1, 500):
            x[:, t] = 0.9 * x[:, t - 1] + noise[:, t]
        of_flow, of_target = log_weight(2.5 * random.normal(size=(200, 1)), 2.5), log_weight(x, 2.5)
        for name, given in (("chains", of_target), ("as if independent", of_target.ravel())):
            row = report_of(of_flow, given, log_z=LOG_Z).table.loc["kl_forward"]
            z[name].append((row["estimate"] - closed_forms(2.5)["kl_forward"]) / row["standard_error"])
    assert 0.6 < np.std(z["chains"]) < 1.5
    assert np.std(z["as if independent"]) > 2.0  # and would be far too short otherwise


def two_modes(seed=0, num=2000):
    """The flow on one of two equal modes."""
    random = np.random.default_rng(seed)

    def weigh(x):
        log_p = np.logaddexp(norm.logpdf(x, -4), norm.logpdf(x, 4)) - np.log(2) + LOG_Z
        return log_p - norm.logpdf(x, -4)

    target = random.normal(size=num) + 4 * random.choice([-1, 1], size=num)
    return weigh(random.normal(size=num) - 4), weigh(target)


def test_a_dropped_mode_shows_in_the_targets_draws_alone():
    of_flow, of_target = two_modes()
    blind, seeing = report_of(of_flow), report_of(of_flow, of_target)
    assert blind.table.loc["ess_reverse", "estimate"] > 0.99
    assert blind.modes_dropped is None
    assert "would not show" in str(blind)
    assert seeing.modes_dropped is True
    assert seeing.table.loc["ess_forward", "estimate"] < 1e-3
    assert abs(seeing.unseen - 0.5) < 5 * 0.5 / np.sqrt(len(of_target))
    assert seeing.notes[0].startswith("Modes or tails dropped")
    # importance sampling sees half of the mass; the bridge sees all
    np.testing.assert_allclose(seeing.table.loc["log_z", "estimate"], LOG_Z - np.log(2), atol=0.01)
    bridge = seeing.table.loc["log_z_bridge"]
    assert abs(bridge["estimate"] - LOG_Z) < 5 * bridge["standard_error"] < 0.3
    assert seeing.log_z_gap < -5
    assert seeing.log_z_bounds[0] < LOG_Z < seeing.log_z_bounds[1]


def test_a_good_flow_is_left_alone():
    for s in (1.0, 1.15):
        found = report_of(*weights(3000, 3000, s))
        assert found.modes_dropped is False
        assert found.notes == ()
        assert abs(found.log_z_gap) < 5


def test_heavy_tails_leave_no_standard_error():
    """A flow that is too narrow: the weights have no variance."""
    of_flow, of_target = weights(3000, 3000, s=0.5, dim=6)
    found = report_of(of_flow)
    assert found.pareto_k > 0.7
    assert found.table.loc[["ess_reverse", "log_z", "acceptance_rate", "kl_reverse"], "standard_error"].isna().all()
    assert found.table.loc["log_z", "upper"] == np.inf
    assert found.table.loc["log_z", "lower"] < LOG_Z
    assert found.log_z_bounds == (found.table.loc["log_z", "lower"], np.inf)
    with_draws = report_of(of_flow, of_target).table
    bounded = with_draws.loc[["log_z_bridge", "acceptance_rate", "kl_reverse", "kl_forward"]]
    assert bounded["standard_error"].notna().all()
    exact = 2 * f.cdf(0.25, 6, 6)
    assert (
        abs(with_draws.loc["acceptance_rate", "estimate"] - exact)
        < 5 * with_draws.loc["acceptance_rate", "standard_error"]
    )


def test_weights_that_are_no_numbers_are_said_so():
    found = report_of(np.array([0.0] * 199 + [np.nan]), np.zeros(100))
    assert "1 weights are NaN or infinite" in found.notes[0]
    assert found.modes_dropped is None
    # no density at some of the flow's draws is a zero weight, and legal
    assert report_of(np.array([0.0] * 150 + [-np.inf] * 50)).table.loc["log_z", "estimate"] == pytest.approx(
        np.log(0.75)
    )


# --- flows -------------------------------------------------------------------------------------------------------


def tree_posterior(counter=None):
    """A standard normal over a tree of three numbers, ``exp(LOG_Z)`` times normalised."""

    def log_prior(position):
        if counter is not None:
            counter.append(1)
        total = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(position))
        return LOG_Z - 0.5 * total - 1.5 * np.log(2 * np.pi)

    return erg.Posterior(log_prior, initial={"a": jnp.zeros(2), "b": jnp.zeros(())})


def test_a_perfect_flow_has_perfect_metrics():
    flow, draws = normals(1.0, dim=3), jax.random.normal(jax.random.key(0), (500, 3))
    metrics = FlowMetrics(flow, tree_posterior(), draws, num_samples=300)
    found = metrics(jax.random.key(1), flow.params)
    exact = dict.fromkeys(("ess_reverse", "ess_forward", "acceptance_rate"), 1.0) | {
        "kl_reverse": 0.0,
        "kl_forward": 0.0,
    }
    exact |= dict.fromkeys(("log_z", "log_z_bridge", "elbo"), LOG_Z)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    report = flow_report(jax.random.key(1), flow, tree_posterior(), draws, num_samples=300)
    assert report.pareto_k == -np.inf
    assert report.notes == ()


def test_metrics_follow_the_parameters_and_trace_once():
    counter = []
    flow = normals(1.0, dim=3)
    metrics = FlowMetrics(flow, tree_posterior(counter), num_samples=20_000, log_z=LOG_Z)
    metrics(jax.random.key(0), flow.params)
    traced = len(counter)
    found = metrics(jax.random.key(1), normals(1.3, dim=3).params)
    assert len(counter) == traced
    table = flow_report(jax.random.key(1), normals(1.3, dim=3), tree_posterior(), num_samples=20_000, log_z=LOG_Z).table
    exact = exact_values(1.3)
    for name, row in table.iterrows():
        np.testing.assert_allclose(found[name], row["estimate"], rtol=1e-3, err_msg=name)
        assert abs(row["estimate"] - exact[name]) < 5 * row["standard_error"] < 0.05, name
        assert row["lower"] < row["estimate"] < row["upper"]


def test_draws_of_a_run_are_taken_as_they_are():
    """Coordinates in the order of the flow; chains' autocorrelation counted; an approximate run said to be one."""
    scales = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(5.0)}
    posterior = erg.Posterior(
        lambda p: -0.5 * sum(jnp.sum((p[k] / scales[k]) ** 2) for k in p),
        initial={"a": jnp.zeros(2), "b": jnp.zeros(())},
    )
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 500, 2)) * np.array([1.0, 2.0]), 5 * random.normal(size=(4, 500))
    dt = from_dict({"posterior": {"b": b, "a": a}}, attrs={"/": {"exact": "approximate"}}, check_conventions=False)
    fitting = Flow(3, Scaled(jnp.log(jnp.array([1.0, 2.0, 5.0])), jnp.zeros(3)))
    found = flow_report(jax.random.key(1), fitting, posterior, dt, num_samples=500)
    assert found.table.loc["ess_forward", "estimate"] > 0.999
    assert any("approximate sampler" in note for note in found.notes)
    shuffled = Flow(3, Scaled(jnp.log(jnp.array([5.0, 2.0, 1.0])), jnp.zeros(3)))
    assert (
        flow_report(jax.random.key(1), shuffled, posterior, dt, num_samples=500).table.loc["ess_forward", "estimate"]
        < 0.9
    )
    with pytest.raises(TypeError, match="draws can be a DataTree where target is the Posterior"):
        flow_report(jax.random.key(1), fitting, lambda x: -jnp.sum(x**2), dt)


def test_bad_input_raises():
    flow, key = normals(1.0, dim=3), jax.random.key(0)
    with pytest.raises(TypeError, match="flow must be an Flow"):
        FlowMetrics(lambda x: x, tree_posterior())
    with pytest.raises(ValueError, match="dimension 2, the positions of the posterior have 3"):
        FlowMetrics(normals(1.0, dim=2), tree_posterior())
    with pytest.raises(ValueError, match=r"draws must be an array \(N, 3\), of two draws or more; got shape \(5, 2\)"):
        FlowMetrics(flow, tree_posterior(), jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="draws must be finite"):
        flow_report(key, flow, tree_posterior(), np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="must be ten or more a chain"):
        flow_report(key, flow, tree_posterior(), np.zeros((2, 5, 3)))
    with pytest.raises(TypeError, match="draws must be of floating point; got dtype int"):
        flow_report(key, flow, tree_posterior(), np.zeros((5, 3), int))
    with pytest.raises(ValueError, match="num_samples must be at least 100"):
        flow_report(key, flow, tree_posterior(), num_samples=10)
