"""Fits: steps against closed forms and Optax by hand, the guard, early ends, errors."""

import json
import math
import signal
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Estimate
from ergodica.run import FitError, Monitor, fit_loop
from ergodica.run.checkpoint import Checkpoint
from ergodica.run.fit_monitor import Best
from tests.support.fits import (
    CURVATURES,
    TRACES,
    Quadratic,
    assert_same,
    is_spoiled,
    noisy,
    quadratic,
    quiet,
    squared_length,
    start,
)

KEY = jax.random.key(0)


@pytest.fixture(name="quadratic")
def _quadratic():
    return quadratic()


class TestSteps:
    @pytest.mark.usefixtures("x64")
    def test_sgd_on_a_quadratic_is_the_closed_form(self):
        """After i steps t = (1 - ηC)^i t0; value, norms and the distance after them follow."""
        gradient = Quadratic(jnp.asarray(CURVATURES))
        rate, i = 0.1, np.arange(50)[:, None]
        done = quiet(KEY, gradient, start(jnp.float64), num_steps=50, optimiser=optax.sgd(rate), evaluate_every=20)
        path = (1 - rate * CURVATURES) ** i * np.asarray(start())
        steps = done.history["steps"]
        np.testing.assert_allclose(done.params, (1 - rate * CURVATURES) ** 50 * np.asarray(start()), rtol=1e-13)
        np.testing.assert_allclose(steps["value"], -0.5 * np.sum(CURVATURES * path**2, -1), rtol=1e-13)
        np.testing.assert_allclose(steps["grad_norm"], np.linalg.norm(CURVATURES * path, axis=-1), rtol=1e-13)
        np.testing.assert_allclose(steps["update_norm"], rate * steps["grad_norm"], rtol=1e-13)
        np.testing.assert_array_equal(steps["n_grad"], 7 * np.arange(1, 51))
        evaluations = done.history["evaluations"]
        assert evaluations["step"].values.tolist() == [20, 40, 50]
        means = [float(steps["value"][end - 20 : end].mean()) for end in (20, 40, 50)]
        np.testing.assert_allclose(evaluations["value"], means, rtol=1e-13)
        assert done.params.dtype == jnp.float64
        assert done.result == "successful"

    def test_a_loop_that_descends_is_noticed(self, quadratic, monkeypatch):
        """The mutant leaves out the turn of the sign."""
        monkeypatch.setattr(fit_loop.tree, "scale", lambda gradient, factor: gradient)
        done = quiet(KEY, quadratic, start(), num_steps=50, optimiser=optax.sgd(0.1))
        assert np.all(np.abs(done.params) > np.abs(start()))

    @pytest.mark.parametrize("given", ["number", "schedule", "optimiser"])
    def test_adam_equals_optax_by_hand_bit_for_bit(self, given):
        """Operation by operation; two compiled programs may round differently, and agree to that."""
        schedule = optax.exponential_decay(0.05, 10, 0.5)
        optimiser = {"number": 0.05, "schedule": schedule, "optimiser": optax.inject_hyperparams(optax.adam)(schedule)}
        by_hand = {"number": optax.adam(0.05), "schedule": optax.adam(schedule), "optimiser": optimiser["optimiser"]}
        num, arguments = 30, {"optimiser": optimiser[given], "evaluate_every": 12}
        _, key_init, key_run, _ = jax.random.split(KEY, 4)
        gradient, params, adam, values = noisy(), start(), by_hand[given], []
        with jax.disable_jit():
            done = quiet(KEY, gradient, params, num_steps=num, **arguments)
            state, memory = adam.init(params), gradient.init(key_init, params)
            for i in range(num):
                estimate, memory = gradient.estimate(jax.random.fold_in(key_run, i), params, memory)
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = adam.update(-estimate.gradient, state, params)
                params = optax.apply_updates(params, updates)
                values.append(estimate.value)
        compiled = quiet(KEY, noisy(), start(), num_steps=num, **arguments)
        np.testing.assert_array_equal(done.history["steps/value"], np.stack(values))
        by_hand_all = jax.tree.leaves((params, state, memory))
        for x, y, z in zip(
            jax.tree.leaves((done.params, done.optimiser_state, done.state)),
            by_hand_all,
            jax.tree.leaves((compiled.params, compiled.optimiser_state, compiled.state)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-6)
        rates = 0.05 if given == "number" else 0.05 * 0.5 ** (np.arange(num) / 10)
        np.testing.assert_allclose(done.history["steps/learning_rate"], np.broadcast_to(rates, num), rtol=1e-5)

    def test_an_unknown_learning_rate_is_not_made_up(self, quadratic):
        done = quiet(KEY, quadratic, start(), num_steps=3, optimiser=optax.adam(0.1))
        assert "learning_rate" not in done.history["steps"]

    def test_the_optimiser_sees_the_loss(self, quadratic):
        """``reduce_on_plateau`` takes the loss: with no descent it cuts its scale."""
        optimiser = optax.chain(optax.set_to_zero(), optax.contrib.reduce_on_plateau(0.5, patience=3))
        done = quiet(KEY, quadratic, start(), num_steps=20, optimiser=optimiser)
        assert float(done.optimiser_state[1].scale) < 1
        assert float(done.optimiser_state[1].best_value) == pytest.approx(
            0.5 * np.sum(CURVATURES * np.asarray(start()) ** 2)
        )

    def test_one_trace_for_all_chunks_and_for_another_fit(self):
        gradient, optimiser = noisy(), optax.adam(0.01)
        quiet(KEY, gradient, start(), num_steps=10, optimiser=optimiser)
        before = len(TRACES)
        done = quiet(jax.random.key(1), gradient, start(), num_steps=5000, optimiser=optimiser, evaluate_every=1300)
        assert len(TRACES) - before <= 1  # shapes of the records
        assert done.history.attrs["num_steps"] == 5000

    def test_params_are_copied_and_left_alone(self, quadratic):
        given, kept = start(), []
        done = quiet(
            KEY, quadratic, given, num_steps=30, evaluate_every=10, metrics=lambda k, p: kept.append(p) or {"zero": 0}
        )
        np.testing.assert_array_equal(given, start())
        assert len({float(p[0]) for p in kept}) == 4
        assert done.history["evaluations"]["step"].values.tolist() == [0, 10, 20, 30]


class TestGuard:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_raises_and_keeps_what_was_before(self, value):
        gradient = noisy(spoiled=(30,), spoil_with=value)
        with pytest.raises(FitError, match="gradient became NaN or infinite at step 30") as caught:
            quiet(KEY, gradient, start(), num_steps=100, optimiser=0.1)
        partial = caught.value.partial
        before = quiet(KEY, noisy(), start(), num_steps=30, optimiser=0.1)
        np.testing.assert_array_equal(partial.params, before.params)
        assert partial.result == "nonfinite"
        assert partial.history["steps"]["status"].values.tolist() == [0] * 30 + [1]
        told = quiet(KEY, gradient, start(), num_steps=100, optimiser=0.1, throw=False)
        assert told.result == "nonfinite"
        assert "step 30" in told.history.attrs["result_message"]

    def test_without_the_guard_nan_would_spread(self, monkeypatch):
        """The mutant takes every step."""
        monkeypatch.setattr(fit_loop, "_status", lambda *_: jnp.zeros((), jnp.int8))
        gradient = noisy(spoiled=(30,), spoil_with=math.nan)
        mutant = quiet(KEY, gradient, start(), num_steps=60, optimiser=optax.adam(0.1), on_nonfinite="skip")
        assert np.all(np.isnan(mutant.params))

    def test_an_update_that_is_not_finite_is_not_taken(self, quadratic):
        optimiser = optax.sgd(lambda count: jnp.where(count == 5, jnp.nan, 0.1))
        with pytest.raises(FitError, match="optimiser's update became NaN or infinite at step 5"):
            quiet(KEY, quadratic, start(), num_steps=20, optimiser=optimiser)

    def test_skips_and_says_so(self):
        """A step that is left out leaves all as it was, the estimator's state too."""
        with pytest.warns(UserWarning, match=r"of 200 steps were skipped"):
            done = quiet(KEY, noisy(chance=0.2), start(), num_steps=200, optimiser=0.05, on_nonfinite="skip")
        keys = [jax.random.fold_in(jax.random.split(KEY, 4)[2], i) for i in range(200)]
        bad = np.array([is_spoiled(key, 0.2) for key in keys])
        np.testing.assert_array_equal(done.history["steps"]["status"] == 1, bad)
        taken = int((~bad).sum())
        assert int(done.state["calls"]) == taken < 190
        assert int(optax.tree_utils.tree_get(done.optimiser_state, "count")) == taken
        assert np.all(np.isfinite(done.state["seen"]))
        assert np.all(np.isfinite(done.params))
        assert done.history.attrs["num_nonfinite"] == 200 - taken
        evaluation = float(done.history["evaluations"]["value"][-1])
        assert evaluation == pytest.approx(float(done.history["steps"]["value"][100:][~bad[100:]].mean()), rel=1e-5)

    def test_schedules_count_the_steps_taken(self):
        schedule = optax.linear_schedule(0.1, 0.0, 200)
        for optimiser in (schedule, optax.inject_hyperparams(optax.adam)(schedule)):
            with pytest.warns(UserWarning, match="skipped"):
                done = quiet(KEY, noisy(chance=0.2), start(), num_steps=50, optimiser=optimiser, on_nonfinite="skip")
            taken = done.history["steps"]["status"].values == 0
            rates = 0.1 * (1 - (np.cumsum(taken) - taken) / 200)
            np.testing.assert_allclose(done.history["steps/learning_rate"][taken], rates[taken], rtol=1e-5)

    def test_too_many_in_a_row_end_the_fit(self):
        gradient = noisy(lost_from=40)
        with pytest.raises(FitError, match="6 steps in a row were skipped, the last at step 45"):
            quiet(KEY, gradient, start(), num_steps=100, on_nonfinite="skip", max_skipped=6)

    def test_spikes_are_left_out(self):
        """A gradient a thousand times as long moves the parameters far; the guard, once settled, leaves it out."""
        common = {"num_steps": 400, "optimiser": optax.sgd(0.1)}
        wild = noisy(chance=0.02, spoil_with=1e3)
        assert float(jnp.max(jnp.abs(quiet(KEY, wild, jnp.zeros(3), **common).state["seen"]))) > 5
        with pytest.warns(UserWarning, match="0 with NaN or infinity"):
            done = quiet(KEY, wild, jnp.zeros(3), spike=20.0, **common)
        status = done.history["steps"]["status"].values
        assert np.all(status[:100] == 0)
        bad = np.array([is_spoiled(jax.random.fold_in(jax.random.split(KEY, 4)[2], i), 0.02) for i in range(400)])
        np.testing.assert_array_equal(status[100:] == 2, bad[100:])
        assert done.history.attrs["num_spikes"] == bad[100:].sum() > 0

    def test_a_failure_is_not_saved(self, tmp_path):
        arguments = {"num_steps": 100, "evaluate_every": 10, "checkpoint": Checkpoint(tmp_path / "fit", every=0.0)}
        for _ in range(2):  # the second goes on from the last good save, and meets the same step
            with pytest.raises(FitError, match="step 35"):
                quiet(KEY, noisy(spoiled=(35,)), start(), **arguments)
        assert json.loads((tmp_path / "fit" / "manifest.json").read_text())["progress"]["step"] <= 35


class TestEnds:
    def test_patience(self, quadratic):
        """The metric falls until step 200 and rises after: three evaluations later the fit ends, with the parameters of then."""

        def valley(key, params):
            return {"loss": jnp.abs(params[0] - target)}

        target = 0.5 * 0.99**200
        gradient = Quadratic(jnp.ones(1))
        arguments = {"num_steps": 1000, "optimiser": optax.sgd(0.01), "metrics": valley, "evaluate_every": 20}
        monitor = Monitor("loss", patience=3, minimise=True)
        done = quiet(KEY, gradient, jnp.array([0.5]), monitor=monitor, **arguments)
        assert (str(done.result), done.best_step, done.history.attrs["num_steps"]) == ("stopped", 200, 260)
        np.testing.assert_allclose(done.best_params, target, rtol=1e-5)
        np.testing.assert_allclose(done.params, 0.5 * 0.99**260, rtol=1e-5)
        maximised = quiet(KEY, gradient, jnp.array([0.5]), monitor=Monitor("loss", patience=3), **arguments)
        assert maximised.best_step == 0

    def test_more_patience_goes_on(self, tmp_path):
        def run(patience, checkpoint=None):
            monitor = Monitor("noise", patience=patience)
            return quiet(
                KEY,
                noisy(),
                start(),
                num_steps=400,
                metrics=squared_length,
                evaluate_every=5,
                monitor=monitor,
                checkpoint=checkpoint,
            )

        first = run(2, tmp_path / "fit")
        assert first.result == "stopped"
        assert_same(run(2, tmp_path / "fit"), first)
        assert_same(run(12, tmp_path / "fit"), run(12))
        assert run(12).history.attrs["num_steps"] > first.history.attrs["num_steps"]

    def test_best_of_a_sequence(self):
        best, monitor = Best(), Monitor("x", patience=3, least_gain=1.0)
        found = [
            best.update(monitor, value, step)
            for step, value in enumerate([math.nan, 1.0, 1.5, 2.5, 2.0, 2.6, math.nan])
        ]
        assert found == [False, True, True, True, False, True, False]
        assert (best.step, best.score, best.mark, best.waited) == (5, 2.6, 2.5, 3)
        assert best.exhausted(monitor)
        assert not best.exhausted(Monitor("x"))

    def test_time(self, quadratic):
        """Metrics and compilation do not count; what is left of the budget bounds each chunk."""

        def slow(key, params):
            time.sleep(0.1)
            return {"zero": 0.0}

        done = quiet(KEY, quadratic, start(), num_steps=10**9, max_seconds=0.3, metrics=slow, evaluate_every=20_000)
        attributes = done.history.attrs
        assert done.result == "timed_out"
        chunk = float(np.max(np.diff(done.history["evaluations"]["wall_time"].values)))
        assert 0.3 <= attributes["wall_time"] <= 0.3 + chunk
        assert attributes["evaluation_time"] >= 0.1 * done.history["evaluations"].sizes["step"] - 1e-3
        assert (
            int(done.history["evaluations"]["step"][-1])
            == attributes["num_steps"]
            == done.history["steps"].sizes["step"]
        )
        wall = done.history["steps/wall_time"].values
        assert np.all(np.diff(wall) > 0)
        assert wall[-1] == pytest.approx(attributes["wall_time"])

    def test_control_c_keeps_what_was_reached(self, quadratic, tmp_path):
        def interrupt(key, params):
            if params[2] != 3.0:
                signal.raise_signal(signal.SIGINT)
            return {"zero": 0.0}

        arguments = {"metrics": interrupt, "evaluate_every": 50, "checkpoint": tmp_path / "fit", "num_steps": 120}
        done = quiet(KEY, quadratic, start(), **arguments)
        assert (str(done.result), done.history.attrs["num_steps"]) == ("interrupted", 50)
        on = quiet(KEY, quadratic, start(), **arguments)
        assert (on.history.attrs["resumed_from"], on.history.attrs["num_steps"]) == (50, 100)


class TestResult:
    def test_the_history_survives_netcdf(self, quadratic, tmp_path):
        done = quiet(KEY, quadratic, start(), num_steps=25, metrics=squared_length, evaluate_every=10, optimiser=0.1)
        done.history.to_netcdf(tmp_path / "fit.nc")
        with xarray.open_datatree(tmp_path / "fit.nc") as read:
            xarray.testing.assert_identical(read.load(), done.history)
        assert done.history["evaluations"]["step"].values.tolist() == [0, 10, 20, 25]
        np.testing.assert_allclose(done.history["evaluations"]["squared"][-1], jnp.sum(done.params**2), rtol=1e-6)
        assert done.history.attrs["num_gradients"] == 7 * 25

    def test_metrics_see_fresh_keys(self, quadratic):
        metrics = {"a": squared_length, "b": lambda key, params: jax.random.normal(key)}
        done = quiet(KEY, quadratic, start(), num_steps=30, evaluate_every=10, metrics=metrics)
        evaluations = done.history["evaluations"]
        assert {"a.squared", "a.noise", "b"} <= set(evaluations.data_vars)
        noise = np.concatenate([evaluations["a.noise"], evaluations["b"]])
        assert len(set(noise.tolist())) == 8

    @pytest.mark.usefixtures("numpyro_promotion")
    def test_fits_a_guide_to_the_exact_posterior(self):
        """Normal model: the guide's family holds the posterior, N(sum / (n + 1), 1 / (n + 1))."""
        import numpyro
        import numpyro.distributions as dist

        y = jnp.array([1.2, 0.3, 2.0, 1.1])

        def model(y):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=y)

        def guide(y):
            scale = numpyro.param("scale", jnp.array(1.0), constraint=dist.constraints.positive)
            numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.array(0.0)), scale))

        loss = erg.estimators.ELBO(8, {"z": erg.estimators.Reparam(stl=True)})
        gradient = erg.estimators.VariationalGradient(loss, model, guide, y)
        done = quiet(KEY, gradient, num_steps=1500, optimiser=optax.cosine_decay_schedule(0.02, 1500))
        params = gradient.constrain(done.params)
        np.testing.assert_allclose(params["loc"], y.sum() / 5, atol=2e-3)  # noise falls to zero at the optimum
        np.testing.assert_allclose(params["scale"], 5**-0.5, rtol=5e-3)
        covariance = np.eye(4) + 1.0
        evidence = -0.5 * (y @ np.linalg.solve(covariance, y) + np.log(np.linalg.det(2 * np.pi * covariance)))
        np.testing.assert_allclose(done.history["evaluations"]["value"][-1], evidence, atol=1e-4)

    @pytest.mark.usefixtures("numpyro_promotion")
    def test_trains_a_policy(self):
        import numpyro.distributions as dist

        right = jnp.array([2, 0])
        gradient = erg.estimators.PolicyGradient(
            lambda logits: dist.Categorical(logits=logits), lambda y: (y == right[None]).astype(float), 16
        )
        done = quiet(KEY, gradient, jnp.zeros((2, 3)), num_steps=300, optimiser=0.1)
        assert np.all(jax.nn.softmax(done.params)[jnp.arange(2), right] > 0.95)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"key": 3}, TypeError, "typed key"),
            ({"gradient": "elbo"}, TypeError, "gradient must be"),
            ({"params": None}, ValueError, "does not say where to start"),
            ({"params": jnp.arange(3)}, TypeError, "floating point"),
            ({"params": jnp.array([1.0, jnp.nan, 0.0])}, ValueError, "finite"),
            ({"num_steps": 0}, ValueError, "num_steps"),
            ({"evaluate_every": 0}, ValueError, "evaluate_every"),
            ({"optimiser": "adam"}, TypeError, "optimiser must be a number"),
            ({"optimiser": -0.1}, ValueError, "optimiser must be finite and above 0"),
            ({"optimiser": optax.lbfgs()}, TypeError, "line searches"),
            ({"monitor": "ess"}, ValueError, "monitor must name one of 'value'; got 'ess'"),
            ({"monitor": 3}, TypeError, "metric must be a name"),
            ({"metrics": 3}, TypeError, "metrics must be a function"),
            ({"metrics": lambda k, p: 1.0}, TypeError, "must return a dictionary"),
            ({"metrics": {"p": lambda k, p: p}}, TypeError, "'p' must be one number; got shape"),
            ({"metrics": {"value": lambda k, p: 1.0}}, ValueError, "may not be called 'value'"),
            ({"max_seconds": -1.0}, ValueError, "max_seconds"),
            ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of"),
            ({"max_skipped": 0}, ValueError, "max_skipped"),
            ({"spike": 0.5}, ValueError, "above 1"),
            ({"batches_per_epoch": 3}, ValueError, "there are none"),
        ],
    )
    def test_bad_input(self, quadratic, changes, error, words):
        arguments = {"key": KEY, "gradient": quadratic, "params": start(), "num_steps": 5}
        with pytest.raises(error, match=words):
            quiet(**arguments | changes)

    def test_bad_monitors(self):
        with pytest.raises(ValueError, match="patience"):
            Monitor(patience=0)
        with pytest.raises(ValueError, match="least_gain"):
            Monitor(least_gain=-1.0)

    def test_metrics_that_change_their_names(self, quadratic):
        def fickle(key, params):
            return {"a" if params[2] == 3.0 else "b": 0.0}

        with pytest.raises(ValueError, match="same names at each evaluation; they returned a before, and b now"):
            quiet(KEY, quadratic, start(), num_steps=200, metrics=fickle)

    def test_a_gradient_of_another_kind(self):
        class Wrong(AbstractGradientEstimator):
            what: str = eqx.field(static=True)

            def init(self, key, params, batch=None):
                return None

            def estimate(self, key, params, state, batch=None):
                gradient = {"shape": params[:2], "dtype": params.astype(jnp.float16), "value": params}[self.what]
                return Estimate(gradient, params if self.what == "value" else params[0]), state

        with pytest.raises(ValueError, match=r"gradient must have the shape \(3,\)"):
            quiet(KEY, Wrong("shape"), start())
        with pytest.raises(TypeError, match="must have the dtype float32"):
            quiet(KEY, Wrong("dtype"), start())
        with pytest.raises(TypeError, match="value must be a scalar"):
            quiet(KEY, Wrong("value"), start())
