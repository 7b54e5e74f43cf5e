"""Schedules, and averages under them: against the exact recursion of the variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import ergodica as erg
from ergodica.diagnostics import weighted_mean
from ergodica.samplers import SGLD
from ergodica.samplers.schedules import cyclical, polynomial
from tests.support.affine import NoisyQuadratic, Prepared, step_map
from tests.support.statistics import REJECTION, assert_mean, z_scores

LAM, SPREAD = 2.0, 1.5
CYCLE = {"step_size": 0.3, "cycle_length": 40, "exploration": 0.25, "temperature": 0.7}


def test_cosine_and_phases():
    cycle = cyclical(**CYCLE)
    counts = np.arange(120)
    place = counts % 40 / 40
    np.testing.assert_allclose(
        [cycle.step_size(jnp.asarray(k)) for k in counts], 0.15 * (np.cos(np.pi * place) + 1), atol=1e-7
    )
    np.testing.assert_allclose(
        [cycle.temperature(jnp.asarray(k)) for k in counts], np.where(place < 0.25, 0, 0.7), rtol=1e-6
    )


def test_polynomial_is_that_of_welling_and_teh():
    a, b, gamma = 0.2, 50.0, 0.55
    schedule = polynomial(a * b**-gamma, b, gamma)
    counts = np.array([0, 1, 10, 1000, 10**6])
    found = [schedule(jnp.asarray(k)) for k in counts]
    np.testing.assert_allclose(found, a * (b + counts) ** -gamma, rtol=1e-5)


def test_other_numbers_do_not_compile_again():
    traces = []

    @jax.jit
    def position(kernel):
        traces.append(kernel)
        state = kernel.init(jax.random.key(0), jnp.zeros(1))
        return kernel.step(jax.random.key(1), state)[0].position

    gradient = erg.estimators.Minibatch(erg.Posterior(lambda t: -jnp.sum(t**2), initial=jnp.zeros(1)), scheme="full")
    for h, length in ((0.1, 10), (0.2, 20)):
        cycle = cyclical(h, length)
        position(SGLD(gradient, cycle.step_size, temperature=cycle.temperature))
    assert len(traces) == 1


def recursion(step_sizes, temperatures, start):
    """V' = (1 - h lam)^2 V + 2 h T + h^2 s2."""
    variances = [start]
    for h, T in zip(step_sizes, temperatures, strict=True):
        variances.append((1 - h * LAM) ** 2 * variances[-1] + 2 * h * T + h**2 * SPREAD**2)
    return np.array(variances[1:])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["cyclical", "polynomial"])
def test_shipped_steps_obey_the_recursion(kind):
    if kind == "cyclical":
        step_size, temperature = cyclical(**CYCLE)
    else:
        step_size, temperature = polynomial(0.3, 20.0), 0.7
    gradient = NoisyQuadratic(jnp.full((1, 1), LAM), jnp.asarray(SPREAD))
    kernel = SGLD(gradient, step_size, temperature=temperature)

    @jax.jit
    @jax.vmap
    def maps(count):
        return step_map(Prepared(kernel, count=count), jnp.zeros(1))

    counts = np.arange(60)
    found = maps(jnp.asarray(counts, jnp.int32))
    variances = [0.5]
    for F, G in zip(np.asarray(found.transition), np.asarray(found.loading), strict=True):
        variances.append((F @ F.T * variances[-1] + G @ G.T).item())
    h = [float(step_size(k)) for k in jnp.asarray(counts)]
    T = [float(temperature(k)) if kind == "cyclical" else 0.7 for k in jnp.asarray(counts)]
    np.testing.assert_allclose(variances[1:], recursion(h, T, 0.5), rtol=1e-12)


def tree_of(step_size, temperature, draws):
    stats = {"step_size": (("chain", "draw"), step_size), "temperature": (("chain", "draw"), temperature)}
    posterior = {"x": (("chain", "draw", "i"), draws)}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(posterior), "sample_stats": xr.Dataset(stats)})


def test_weighted_mean_by_hand():
    steps, temperatures = np.array([[1.0, 2.0, 4.0], [8.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5]])
    draws = np.arange(12.0).reshape(2, 3, 2)
    dt = tree_of(steps, temperatures, draws)
    weights = np.array([[1.0, 2.0, 0.0], [8.0, 1.0, 1.0]])
    np.testing.assert_allclose(weighted_mean(dt)["x"], np.einsum("cd,cdi->i", weights, draws) / 13)
    squares = weighted_mean(dt, lambda draws: draws**2, dim="draw")["x"]
    np.testing.assert_allclose(squares, np.einsum("cd,cdi->ci", weights, draws**2) / weights.sum(1)[:, None])


def test_weighted_mean_refuses_what_has_no_weights():
    dt = tree_of(np.ones((1, 3)), np.zeros((1, 3)), np.ones((1, 3, 1)))
    with pytest.raises(ValueError, match="All draws were made at temperature 0"):
        weighted_mean(dt)
    del dt["sample_stats"]
    with pytest.raises(ValueError, match="no sample_stats step_size"):
        weighted_mean(dt)


def test_weighted_mean_of_a_run_is_that_of_the_recursion():
    """Many short chains from 0 under a falling step: the expected weighted average of the squares is exact."""
    posterior = erg.Posterior(lambda t: -0.5 * LAM * t**2, initial=jnp.array(0.0))
    schedule = polynomial(0.4, 10.0, 0.75)
    sampler = SGLD(erg.estimators.Minibatch(posterior, scheme="full"), schedule)
    dt = erg.sample(
        jax.random.key(0), sampler, num_samples=60, num_warmup=0, num_chains=8192, probes=False, progress=False
    )
    h = np.array([float(schedule(jnp.asarray(k))) for k in range(60)])
    np.testing.assert_allclose(dt["sample_stats"]["step_size"][0], h, rtol=1e-5)
    variances, V = [], 0.0
    for step in h:
        V = (1 - step * LAM) ** 2 * V + 2 * step
        variances.append(V)
    found = weighted_mean(dt, lambda draws: draws**2, dim="draw")["position"].values
    assert_mean(found, np.sum(h * variances) / h.sum(), smallest_error=0.02)
    plain = (dt.posterior["position"] ** 2).mean("draw").values
    assert abs(z_scores(plain, np.sum(h * variances) / h.sum())) > REJECTION


def test_bad_input_raises():
    with pytest.raises(ValueError, match="exploration must be below 1"):
        cyclical(0.1, 10, exploration=1.0)
    with pytest.raises(ValueError, match="cycle_length must be at least 1; got 0"):
        cyclical(0.1, 0)
    with pytest.raises(ValueError, match="delay must be finite and above 0; got 0"):
        polynomial(0.1, 0)
