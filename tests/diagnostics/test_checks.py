"""`diagnose`: each check says whether it ran, and nothing is passed that was skipped or met a NaN."""

import json

import arviz as az
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import ergodica as erg
from ergodica.diagnostics.checks import diagnose
from ergodica.diagnostics.gradient_noise import BLOCK_BIAS, kick_shares
from tests.diagnostics.trees import SGLD_SETTINGS, gaussian_run

BLOCKS = SGLD_SETTINGS | {"gradient": SGLD_SETTINGS["gradient"] | {"scheme": "blocks"}}
BAOAB = {
    "class": "Splitting",
    "scheme": "BAOAB",
    "step_size": 0.01,
    "friction": 4.0,
    "mass": 1.0,
    "temperature": 1.0,
    "reuse_gradient": True,
    "gradient": {"class": "ControlVariate", "minibatch": BLOCKS["gradient"]},
}
ORDER = ["finite", "frozen", "chains", "R-hat", "ESS", "temperature", "gradient noise"]


def good_run(**options):
    return gaussian_run(0, np.ones(6), draws=8000, correlation=0.0, grad_noise=1.0, **options)


def test_good_run_passes_every_check_in_order():
    diagnosis = diagnose(good_run())
    assert [check.name for check in diagnosis.checks] == ORDER
    assert all(check.ran for check in diagnosis.checks)
    assert diagnosis.belief == "yes"
    assert "No problems found" in str(diagnosis)


def spoilt_runs():
    nan = good_run()
    nan["posterior"]["beta"][2, 100, 1] = np.nan
    infinite = good_run()
    infinite["posterior"]["beta"][2, 100, 1] = np.inf
    frozen = good_run()
    frozen["posterior"]["beta"][1] = 0.3
    all_frozen = good_run()
    all_frozen["posterior"]["beta"][...] = 0.3
    one_chain = good_run(chains=1)
    no_probe = good_run()
    del no_probe["probe"]
    nan_probe = good_run()
    nan_probe["probe"]["temperature"][0, 0, 0] = np.nan
    no_noise = good_run()
    del no_noise["sample_stats"]["grad_noise"]
    short = gaussian_run(0, np.ones(6), draws=3)
    return {
        "nan": (nan, "no"),
        "inf": (infinite, "no"),
        "frozen": (frozen, "no"),
        "all frozen": (all_frozen, "no"),
        "one chain": (one_chain, "open"),
        "no probe": (no_probe, "open"),
        "nan probe": (nan_probe, "open"),
        "no noise": (no_noise, "open"),
        "short": (short, "open"),
    }


@pytest.mark.parametrize("name", spoilt_runs())
def test_skipped_or_nan_is_never_no_problem(name):
    dt, belief = spoilt_runs()[name]
    diagnosis = diagnose(dt)
    assert diagnosis.belief == belief
    assert "No problems found" not in str(diagnosis)
    for check in diagnosis.checks:
        assert check.ran or check.sentence.startswith("Not run: ")


def test_arviz_passes_what_we_refuse():
    """The mutant is ArviZ's own verdict, whose comparisons with NaN are false."""
    dt = spoilt_runs()["nan"][0]
    has_errors = az.diagnose(dt)
    assert not has_errors
    assert diagnose(dt)["finite"].status == "failed"


def test_nan_chain_is_named():
    dt, _ = spoilt_runs()["nan"]
    check = diagnose(dt)["finite"]
    assert list(check.values["chains"]) == [2]
    assert "from draw 100 on" in check.sentence


def test_frozen_chain_is_named_and_a_constant_is_not_frozen():
    check = diagnose(spoilt_runs()["frozen"][0])["frozen"]
    assert list(check.values["chains"]) == [1]
    dt = good_run()
    dt["posterior"]["beta"][..., 2] = 1.0
    diagnosis = diagnose(dt)
    assert diagnosis["frozen"].status == "passed"
    assert "beta[2]" in diagnosis["frozen"].sentence
    assert diagnosis["R-hat"].status == "passed"


def test_one_chain_says_that_rhat_did_not_run():
    diagnosis = diagnose(spoilt_runs()["one chain"][0])
    assert not diagnosis["R-hat"].ran
    assert "there is one" in diagnosis["R-hat"].sentence
    assert diagnosis["ESS"].ran


def test_chains_that_disagree():
    dt = good_run()
    dt["posterior"]["beta"][0, :, 3] += 3.0
    check = diagnose(dt)["R-hat"]
    assert check.status == "failed"
    assert "beta[3]" in check.sentence
    assert check.values["max"] == pytest.approx(float(az.rhat(dt["posterior"]["beta"]).max()))


def test_few_effective_draws():
    dt = gaussian_run(0, np.ones(2), draws=1000, correlation=0.99)
    check = diagnose(dt)["ESS"]
    assert check.status == "failed"
    assert check.values["bulk_min"] == pytest.approx(float(az.ess(dt["posterior"]["beta"]).min()))


def test_rhat_and_ess_reward_the_bias_that_the_temperature_finds():
    diagnosis = diagnose(gaussian_run(0, np.full(6, 6.25), correlation=0.0, draws=2000))  # sd 2.5 times too large
    assert diagnosis["R-hat"].status == diagnosis["ESS"].status == "passed"
    assert diagnosis["temperature"].status == "failed"
    assert diagnosis.belief == "no"


def test_exact_sampler_gets_the_temperature_and_divergences():
    diagnosis = diagnose(good_run(exact="exact"))
    assert diagnosis["temperature"].status == "passed"
    assert diagnosis["gradient noise"].verdict == "none"
    assert diagnosis["divergences"].status == "passed"
    dt = good_run(exact="exact")
    dt["sample_stats"]["diverging"][0, :3] = True
    assert diagnose(dt)["divergences"].values["num_divergences"] == 3
    assert diagnose(dt).belief == "no"


def test_ensemble_of_an_optimiser_is_refused_rhat_and_ess():
    dt = xr.DataTree.from_dict({"ensemble": xr.Dataset({"u": (("iteration", "particle"), np.ones((3, 5)))})})
    diagnosis = diagnose(dt)
    for name in ("R-hat", "ESS", "temperature"):
        assert not diagnosis[name].ran
        assert "optimiser" in diagnosis[name].sentence
    dt["ensemble"]["u"][0, 0] = np.nan
    assert diagnose(dt).belief == "no"


def test_result_of_the_run_is_heeded():
    dt = good_run()
    dt.attrs |= {"result": "nonfinite", "result_message": "It went wrong in chain 3."}
    assert "chain 3" in diagnose(dt)["finite"].sentence
    assert diagnose(dt).belief == "no"
    dt.attrs |= {"result": "interrupted", "result_message": "The run was interrupted."}
    assert diagnose(dt)["finite"].status == "noted"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SGLD_SETTINGS, 0.01 * 8 / 2),
        (BAOAB, 0.01 * 8 / (2 * 4.0)),
        (BAOAB | {"scheme": "ABOBA"}, 0.01 * 8 / (2 * 4.0)),
        (BAOAB | {"scheme": "ABOBA", "reuse_gradient": False}, 0.01 * 8 / (4 * 4.0)),
        (BAOAB | {"mass": 2.0}, 0.01 * 8 / (2 * 4.0 * 2.0)),
    ],
)
def test_gradient_noise_ratio_is_the_leading_excess_of_the_closed_forms(settings, expected):
    """h s2 / 2 for SGLD, h s2 / (2 gamma M) for one gradient a step, half of it for two."""
    check = diagnose(gaussian_run(grad_noise=8.0, settings=settings))["gradient noise"]
    assert check.values["ratio"] == pytest.approx(expected)


def test_gradient_noise_is_relative_to_the_temperature():
    check = diagnose(gaussian_run(grad_noise=8.0, run_temperature=0.1))["gradient noise"]
    assert check.values["ratio"] == pytest.approx(0.4)


def test_blocks_are_told_their_epoch_and_no_correction():
    dt = gaussian_run(0, [1.0, 1.0], draws=5000, grad_noise=8.0, settings=BLOCKS)
    dt["posterior"]["beta"][..., 1] *= 2.0  # λ = 1 and 1/4, K h = 1
    check = diagnose(dt)["gradient noise"]
    assert check.values["epoch_high"] == pytest.approx(1.0, rel=0.1)
    assert check.values["epoch_low"] == pytest.approx(0.25, rel=0.1)
    assert all(f"{bias:g} at {epoch:g}" in check.sentence for epoch, bias in BLOCK_BIAS)
    assert "No formula is applied" in check.sentence
    damped = diagnose(gaussian_run(0, [1.0, 1.0], draws=5000, grad_noise=8.0, settings=BAOAB))["gradient noise"]
    assert damped.values["epoch_high"] == pytest.approx(0.25, rel=0.1)
    assert "K·h·λ/γ" in damped.sentence
    assert "approximate" in damped.sentence


@pytest.mark.parametrize(
    ("scheme", "reuse", "shares"),
    [
        ("BAOAB", True, [1.0]),
        ("BAOAB", False, [0.5, 0.5]),
        ("OBABO", True, [1.0]),
        ("BABO", True, [1.0]),
        ("ABOBA", True, [1.0]),
        ("UBU", True, [1.0]),
        ("BABAB", True, [1 / 3, 2 / 3]),
    ],
)
def test_kicks_that_share_a_gradient(scheme, reuse, shares):
    assert sorted(kick_shares(scheme, reuse_gradient=reuse)) == pytest.approx(shares)


def test_unknown_sampler_is_said():
    check = diagnose(gaussian_run(grad_noise=1.0, settings={"class": "Strange"}))["gradient noise"]
    assert not check.ran
    assert "'Strange'" in check.sentence


def test_temperature_from_the_posterior_where_there_are_no_probes():
    dt = good_run()
    del dt["probe"]
    posterior = erg.Posterior(lambda p: -0.5 * jnp.sum(p["beta"] ** 2), initial={"beta": jnp.zeros(6)})
    check = diagnose(dt, posterior)["temperature"]
    expected = float((dt["posterior"]["beta"] ** 2).mean())
    assert check.values["mean"] == pytest.approx(expected, rel=1e-3)
    assert check.status == "passed"
    wrong = erg.Posterior(lambda p: -0.5 * jnp.sum(p["b"] ** 2), initial={"b": jnp.zeros(6)})
    with pytest.raises(ValueError, match=r"'b'.*'beta'"):
        diagnose(dt, wrong)
    shape = erg.Posterior(lambda p: -0.5 * jnp.sum(p["beta"] ** 2), initial={"beta": jnp.zeros(5)})
    with pytest.raises(ValueError, match=r"\(5,\)"):
        diagnose(dt, shape)


def test_outputs_hold_every_check(tmp_path):
    diagnosis = diagnose(good_run())
    words = json.loads(json.dumps(diagnosis.to_dict()))
    assert list(words["checks"]) == ORDER
    assert all(entry["ran"] for entry in words["checks"].values())
    for check in diagnosis.checks:
        assert check.sentence[:30] in str(diagnosis).replace("\n" + " " * 11, " ")
    dt = good_run()
    dt["quality"] = diagnosis.to_datatree()
    dt.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as loaded:
        assert list(loaded["quality"]["check"].values) == ORDER
        assert float(loaded["quality"]["temperature_mean"]) == pytest.approx(diagnosis["temperature"].values["mean"])
    with pytest.raises(KeyError, match="no check 'rhat'"):
        diagnosis["rhat"]


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="DataTree"):
        diagnose({"posterior": 1})
    with pytest.raises(ValueError, match="observed_data"):
        diagnose(xr.DataTree.from_dict({"observed_data": xr.Dataset({"y": ("r", [1.0])})}))
    with pytest.raises(ValueError, match="tolerance"):
        diagnose(good_run(), tolerance=0.0)
