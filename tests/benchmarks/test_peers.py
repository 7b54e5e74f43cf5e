"""What the benchmarks claim of peers and of orders, held against the kernels themselves."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    yield
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("accuracy", "exact", "stochasticity_exact", "step_time")
    ]:
        del sys.modules[name]


def contraction_of_sghmc(step_size, num_inner, alpha):
    """Derivative of BlackJAX's own call by the position: the factor ``a`` of its AR(1) chain on a standard normal."""
    import blackjax

    kernel = blackjax.sgmcmc.sghmc.build_kernel(alpha)

    def call(x, batch):
        return kernel(jax.random.key(0), x, lambda x, batch: batch - x, batch, step_size, num_inner, 0.0)

    return tuple(float(d) for d in jax.grad(call, (0, 1))(jnp.asarray(0.3), jnp.asarray(0.7)))


@pytest.mark.usefixtures("numpyro_promotion", "x64")
@pytest.mark.parametrize(("step_size", "num_inner", "alpha"), [(0.1, 10, 0.01), (0.2, 3, 1.0), (0.1, 1, 0.5)])
@pytest.mark.swept_after(1)
def test_law_of_blackjax_sghmc_is_that_of_its_step(step_size, num_inner, alpha):
    from accuracy.laws import law_of_blackjax_sghmc
    from exact import explicit_euler, redrawn

    contraction, pushed = contraction_of_sghmc(step_size, num_inner, alpha)
    F, Q = explicit_euler(step_size, alpha, 1.0)
    power = np.linalg.matrix_power(np.array(F), num_inner)
    assert contraction == pytest.approx(power[0, 0], abs=1e-12)
    held = np.sum([np.linalg.matrix_power(np.array(F), j) @ [0.0, step_size] for j in range(num_inner)], axis=0)[0]
    assert pushed == pytest.approx(held, abs=1e-12)
    law = law_of_blackjax_sghmc(np.ones(1), np.array([0.5]), step_size, alpha, num_inner)
    by_script = redrawn(F, Q, 1.0, num_inner, [0.0, step_size], 0.5)
    if num_inner == 1:  # the gradient never reaches the position: a random walk
        assert contraction == 1.0
        assert law is None
        assert by_script == np.inf
    else:
        assert law.variance[0] == pytest.approx(by_script, rel=1e-12)


def test_law_of_small_steps_is_too_wide_by_the_number_of_inner_steps():
    from exact import explicit_euler, redrawn

    for num_inner in (2, 5, 20):
        assert redrawn(*explicit_euler(1e-4, 0.0, 1.0), 1.0, num_inner) == pytest.approx(
            num_inner / (num_inner - 1), rel=1e-5
        )


def test_thermostat_law_agrees_with_splitting_at_its_friction():
    """With the noise gone, the thermostat's friction is the one of the injected noise, and the law that of BAOAB."""
    from accuracy.laws import law_of_badodab, law_of_kernel

    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(1))
    gradient = erg.estimators.Minibatch(posterior, scheme="full")
    curvatures, noise = np.array([0.5, 2.0]), np.zeros(2)
    plain = law_of_kernel(erg.samplers.BAOAB(gradient, 0.01, 1.0), curvatures, noise, None)
    frozen = law_of_badodab(curvatures, noise, 0.01, 1.0)
    for ours, theirs in zip(plain, frozen, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=2e-3)
    warm = law_of_badodab(curvatures, np.array([50.0, 50.0]), 0.01, 1.0)
    np.testing.assert_allclose(warm.time / frozen.time, 1 + 0.01 * 50 / 2, rtol=2e-2)  # friction takes up the noise


def test_predicted_calls_of_sgld_are_those_of_the_closed_form():
    from accuracy.laws import law_of_kernel, predicted_calls

    posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(1))
    h, s2 = 0.01, 10.0
    kernel = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), h)
    law = law_of_kernel(kernel, np.ones(1), np.array([s2]), None)
    variance, rho = (2 + h * s2) / (2 - h), 1 - h
    assert law.variance[0] == pytest.approx(variance, rel=1e-6)
    assert law.time[0] == pytest.approx((1 + rho) / (1 - rho), rel=1e-5)
    assert law.time_of_square[0] == pytest.approx((1 + rho**2) / (1 - rho**2), rel=1e-5)
    bias = (variance - 1) ** 2 / 2
    expected = max(variance * law.time[0] / 0.01, variance**2 * law.time_of_square[0] / (0.01 - bias))
    assert predicted_calls(law, np.ones(1)) == pytest.approx(expected, rel=1e-6)
    assert predicted_calls(law, np.ones(1), threshold=0.9 * bias) == np.inf


def test_an_error_must_stay_below():
    from accuracy.run import stays_below

    errors = [
        np.array(e) for e in ([0.5, 0.5, 0.005], [0.005, 0.5, 0.005], [0.02, 0.005, 0.005], [0.005, 0.005, 0.005])
    ]
    costs = [10.0, 20.0, 30.0, 40.0]
    # first: below, above again, and then not for long enough; second: not for long enough unless the run goes on
    np.testing.assert_array_equal(stays_below(errors, costs, 0.01), [np.inf, 30.0, 10.0])


@pytest.mark.slow
def test_blackjax_sghmc_samples_its_own_law_and_not_the_temperature():
    """|z| < 5 from groups of chains; 1.5% would be seen. The target's variance, 0.1, is what a correct kernel would pass."""
    from blackjax_laws import sampled_variance
    from exact import explicit_euler, redrawn, with_error

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mean, error = with_error(sampled_variance(jax.random.key(3), 0.1, 10, 0.01, 0.1))
    assert error < 0.003
    assert abs(mean - redrawn(*explicit_euler(0.1, 0.01, 0.1), 1.0, 10)) < 5 * error
    assert abs(mean - 0.1) > 100 * error


@pytest.mark.slow
def test_orders_between_a_step_and_its_half():
    """Averaged over all iterates: 1.9 or more for symmetric sweeps, and for blocks where kernel and noise do not cancel."""
    from stochasticity_exact import gaussian_errors, halving_table

    steps = (0.005, 0.0025)
    orders = halving_table(gaussian_errors(steps), steps=steps)
    assert min(orders["symmetric"].values()) >= 1.9
    assert min(orders["blocks"][name] for name in ("UBU", "BAOA", "BAOAB", "ABOBA")) >= 1.9
    assert max(orders["uniform"].values()) < 1.1
