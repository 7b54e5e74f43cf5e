"""The runner: what it returns, and that nothing about how a run was cut shows in the draws."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.result import Result
from ergodica.run import chains as runner

KEY = jax.random.key(7)


@pytest.fixture
def posterior():
    data = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, 60), jnp.float32)
    return erg.Posterior(
        log_prior=lambda theta: -0.5 * theta["mu"] ** 2,
        log_likelihood=lambda theta, x: -0.5 * (x - theta["mu"]) ** 2,
        data=data,
        initial={"mu": jnp.array(0.0)},
        constrain=lambda theta: {"mu": theta["mu"], "twice": 2 * theta["mu"]},
    )


@pytest.fixture
def sampler(posterior):
    return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 7), 2e-3)


def run(sampler, **options):
    arguments = {"num_samples": 30, "num_warmup": 20, "num_chains": 3, "progress": False} | options
    return erg.sample(KEY, sampler, **arguments)


def draws(dt):
    return {name: value.values for name, value in dt.posterior.items()}


def same(a, b):
    for group in ("posterior", "sample_stats", "probe"):
        assert set(a[group].data_vars) == set(b[group].data_vars)
        for name in a[group].data_vars:
            np.testing.assert_array_equal(a[group][name].values, b[group][name].values, err_msg=f"{group}/{name}")


def test_equals_a_plain_loop(sampler, posterior):
    dt = run(sampler, thin=3)
    _, key_init, key_run, *_ = jax.random.split(KEY, 5)
    init_keys, run_keys = jax.random.split(key_init, 3), jax.random.split(key_run, 3)
    step = jax.jit(lambda sampler, key, state: sampler.step(key, state)[0])
    for chain in range(3):
        state, kept = sampler.init(init_keys[chain], posterior.start(KEY)), []
        for i in range(20 + 90):
            state = step(sampler, jax.random.fold_in(run_keys[chain], i), state)
            if i >= 20 and (i - 19) % 3 == 0:
                kept.append(float(state.position["mu"]))
        np.testing.assert_allclose(draws(dt)["mu"][chain], kept, rtol=2e-6)


def test_groups_and_attributes(sampler):
    dt = run(sampler, thin=2)
    assert set(dt.children) == {"posterior", "unconstrained_posterior", "sample_stats", "observed_data", "probe"}
    assert set(dt.posterior.data_vars) == {"mu", "twice"}
    assert {"lp_minibatch", "t_conf", "grad_noise", "n_grad", "step_size", "diverging"} <= set(
        dt.sample_stats.data_vars
    )
    assert "lp" not in dt.sample_stats
    np.testing.assert_allclose(dt.posterior["twice"], 2 * dt.posterior["mu"], rtol=1e-6)
    np.testing.assert_array_equal(dt.sample_stats["n_grad"], 2 * 7)
    assert dt.attrs["num_gradients"] == 3 * (20 + 60) * 7
    assert dt.attrs["result"] == "successful"
    assert dt.observed_data["data"].shape == (60,)


def test_attributes_survive_netcdf(sampler, tmp_path):
    import xarray

    dt = run(sampler)
    dt.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as back:
        assert dict(back.attrs) == dt.attrs
        np.testing.assert_array_equal(back.posterior["mu"].values, dt.posterior["mu"].values)


def test_lp_is_the_density_of_the_draw_where_it_is_exact(posterior):
    dt = run(erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, scheme="full"), 0.05))
    expected = jax.vmap(jax.vmap(lambda mu: posterior.log_density({"mu": mu})))(dt.posterior["mu"].values)
    np.testing.assert_allclose(dt.sample_stats["lp"], expected, rtol=1e-5)
    assert "grad_noise" not in dt.sample_stats


def test_probe_temperature_matches_its_definition(posterior):
    dt = run(erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 2e-3))
    mu = dt.posterior["mu"].values
    gradient = jax.vmap(jax.vmap(jax.grad(lambda mu: posterior.log_density({"mu": mu}))))(mu)
    centre = float(dt.probe["centre"][0])
    np.testing.assert_allclose(dt.probe["temperature"][..., 0], -(mu - centre) * gradient, rtol=2e-4, atol=1e-5)
    assert list(dt.probe["coordinate"].values) == ["mu"]


def test_centre_is_the_mean_of_the_second_half_of_warmup(posterior):
    full = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 2e-3)
    late = run(full, num_warmup=20, num_samples=10)
    everything = run(full, num_warmup=0, num_samples=30)
    centre = everything.posterior["mu"].values[:, 10:20].mean()
    np.testing.assert_allclose(float(late.probe["centre"][0]), centre, rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 4, 11])
@pytest.mark.swept_after(1)
def test_chunks_do_not_show(sampler, monkeypatch, slots):
    whole = run(sampler, thin=3)
    monkeypatch.setattr(runner, "_BUFFER_BYTES", slots * 200)
    monkeypatch.setattr(runner, "_CHUNK_SECONDS", 1e-5)
    same(whole, run(sampler, thin=3))


def test_thinning_picks_every_nth(sampler):
    every, third = run(sampler, num_samples=30), run(sampler, num_samples=10, thin=3)
    np.testing.assert_array_equal(every.posterior["mu"][:, 2::3], third.posterior["mu"])


def test_same_key_same_draws_and_chains_differ(sampler):
    first, second = run(sampler), run(sampler)
    same(first, second)
    assert len(np.unique(first.posterior["mu"].values[:, -1])) == 3


def test_probes_do_not_touch_the_chain(sampler):
    with_probes, without = run(sampler), run(sampler, probes=False)
    np.testing.assert_array_equal(with_probes.posterior["mu"], without.posterior["mu"])
    assert "probe" not in without.children
    assert "t_conf" not in without.sample_stats
    assert without.attrs["num_probe_gradients"] == 0


@pytest.mark.parametrize(
    "initial",
    [{"mu": jnp.array(5.0)}, {"mu": jnp.full(3, 5.0)}, lambda key: {"mu": jnp.array(5.0)}],
    ids=["one", "stacked", "function"],
)
def test_starts(sampler, initial):
    dt = run(sampler, num_warmup=0, num_samples=1, initial=initial)
    assert np.all(np.abs(dt.posterior["mu"] - 5.0) < 1.5)


def test_initial_is_copied(sampler):
    initial = {"mu": jnp.full(3, 5.0)}
    run(sampler, initial=initial)
    np.testing.assert_array_equal(initial["mu"], 5.0)


class TestNonFinite:
    @pytest.fixture
    def unstable(self, posterior):
        return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 1.0)

    def test_raises_with_chain_and_step_and_keeps_the_draws(self, unstable):
        with pytest.raises(erg.SamplingError, match=r"chain \d at step \d+") as caught:
            run(unstable, num_warmup=0, num_samples=400)
        assert caught.value.outcome.result is Result.NONFINITE
        assert caught.value.partial.posterior.sizes["draw"] >= 1

    def test_names_the_first_step(self, unstable, posterior):
        with pytest.raises(erg.SamplingError) as caught:
            run(unstable, num_warmup=0, num_samples=400)
        mu = run(unstable, num_warmup=0, num_samples=400, throw=False).posterior["mu"].values
        first = np.argmax(~np.isfinite(mu), axis=1)
        outcome = caught.value.outcome
        assert outcome.step == first.min()
        assert first[outcome.chain] == first.min()

    def test_other_chains_go_on(self, posterior):
        sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 2e-3)
        bad = {"mu": jnp.array([0.0, 3e38, 0.0])}
        dt = run(sampler, initial=bad, throw=False)
        assert dt.attrs["result"] == "nonfinite"
        finite = np.isfinite(dt.posterior["mu"]).all("draw").values
        assert list(finite) == [True, False, True]


@pytest.mark.terminal
def test_progress_bar_only_on_a_terminal(tmp_path):
    """Through a pseudo-terminal the bar shows rate and temperature; into a pipe nothing is written."""
    script = tmp_path / "run.py"
    script.write_text(
        "import jax, jax.numpy as jnp, ergodica as erg\n"
        "posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))\n"
        "sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme='full'), 0.1)\n"
        "erg.sample(jax.random.key(0), sampler, num_samples=20000, num_chains=2)\n"
    )
    piped = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("", "")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, script], stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # reading past the other end's close
        while block := os.read(leader, 4096):
            shown += block
    assert process.wait() == 0
    assert "steps/s" in shown.decode()
    assert "temperature" in shown.decode()


class TestInterrupt:
    def test_keeps_what_was_sampled_and_can_go_on(self, sampler, tmp_path, monkeypatch):
        """Control-C in the fifth chunk."""
        monkeypatch.setattr(runner, "_CHUNK_SECONDS", 1e-5)

        class Interrupting(runner.Progress):
            updates = 0

            def update(self, done, phase, note=""):
                self.updates += 1
                if self.updates == 5:
                    os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "Progress", Interrupting)
            dt = run(sampler, num_warmup=3, num_samples=1000, checkpoint=tmp_path / "run")
        stored = dt.posterior.sizes["draw"]
        assert dt.attrs["result"] == "interrupted"
        assert 0 < stored < 1000
        longer = run(sampler, num_warmup=3, num_samples=stored + 50, checkpoint=tmp_path / "run")
        assert longer.attrs["resumed_from"] == stored
        same(longer, run(sampler, num_warmup=3, num_samples=stored + 50))

    def test_gives_the_handler_back(self, sampler):
        before = signal.getsignal(signal.SIGINT)
        run(sampler, num_samples=2)
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 1.5}, TypeError, "num_samples must be an integer"),
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"thin": 0}, ValueError, "thin"),
        ({"num_warmup": -1}, ValueError, "num_warmup"),
        ({"thin": 2**30}, ValueError, r"2\*\*31"),
        ({"initial": {"mu": jnp.array([1, 2])}}, TypeError, "floating point"),
        ({"initial": {"nu": jnp.array(1.0)}}, ValueError, "structure of a position"),
        ({"initial": {"mu": jnp.ones(4)}}, ValueError, "shape"),
        ({"initial": {"mu": jnp.array(jnp.nan)}}, ValueError, "finite"),
    ],
)
def test_bad_arguments(sampler, options, error, words):
    with pytest.raises(error, match=words):
        run(sampler, **options)


def test_bad_key_and_sampler(sampler):
    with pytest.raises(TypeError, match="typed key"):
        erg.sample(jnp.zeros(2, jnp.uint32), sampler)
    with pytest.raises(TypeError, match="sampler must be an AbstractKernel"):
        erg.sample(KEY, "SGLD")
    bare = erg.Posterior(lambda theta: -(theta**2))
    with pytest.raises(ValueError, match="give initial="):
        run(erg.samplers.SGLD(erg.estimators.Minibatch(bare, scheme="full"), 0.1))


def test_no_retrace_for_another_step_size(posterior):
    gradient = erg.estimators.Minibatch(posterior, 7)
    advance = runner.loop.advance
    run(erg.samplers.SGLD(gradient, 1e-3))
    before = advance._cache_size()
    run(erg.samplers.SGLD(gradient, 2e-3), thin=5, num_warmup=40)
    assert advance._cache_size() == before
