"""The temperature from probe gradients is the true mean variance ratio; the one from the sampler's own gradient is not."""

import functools
import itertools

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.diagnostics.temperature import measure
from tests.diagnostics.exact_regression import (
    baoab_steps,
    block_forces,
    regression,
    reshuffled_covariance,
    sgld_steps,
    uniform_sgld_covariance,
)
from tests.support.marks import quick

DIM = 10
NUM_BLOCKS = 6


@functools.cache
def model():
    return regression(dim=DIM)


def blocks():
    return erg.estimators.Minibatch(model().posterior, batch_size=-(-1000 // NUM_BLOCKS))


def step_for(epoch):
    """The step at which K h λ, with the mean curvature, has a value."""
    return epoch / (NUM_BLOCKS * np.trace(model().precision) / DIM)


def uniform_case(batch_size, h):
    gradient = erg.estimators.Minibatch(model().posterior, batch_size, scheme="uniform")
    return erg.samplers.SGLD(gradient, h), uniform_sgld_covariance(model(), batch_size, h)


def blocks_case(epoch):
    gradient, h = blocks(), step_for(epoch)
    return erg.samplers.SGLD(gradient, h), reshuffled_covariance(sgld_steps(block_forces(gradient), h), DIM)


def baoab_case(h, friction):
    gradient = blocks()
    covariance = reshuffled_covariance(baoab_steps(block_forces(gradient), h, friction), DIM)
    return erg.samplers.BAOAB(gradient, h, friction), covariance


# (sampler and its exact stationary covariance, thinning, draws a chain). Thinning is coprime to the number of blocks, so
# that every place in an epoch is stored equally often. The truths go from 1.01 to 14. With fixed keys the z below are one
# fixed set; correct estimates exceed 3 anywhere in it with p = .06.
CASES = {
    "uniform n=100 h=2e-6": (lambda: uniform_case(100, 2e-6), 101, 500),
    "uniform n=100 h=5e-5": (lambda: uniform_case(100, 5e-5), 25, 500),
    "uniform n=10 h=5e-6": (lambda: uniform_case(10, 5e-6), 49, 1500),
    "uniform n=10 h=5e-5": (lambda: uniform_case(10, 5e-5), 25, 500),
    "uniform n=10 h=1.8e-4": (lambda: uniform_case(10, 1.8e-4), 25, 500),
    "blocks Khλ=.1": (lambda: blocks_case(0.1), 49, 500),
    "blocks Khλ=.3": (lambda: blocks_case(0.3), 49, 500),
    "blocks Khλ=1": (lambda: blocks_case(1.0), 25, 500),
    "blocks Khλ=2": (lambda: blocks_case(2.0), 25, 500),
    "BAOAB h=.01 γ=20": (lambda: baoab_case(0.01, 20.0), 25, 500),
    "BAOAB h=.02 γ=60": (lambda: baoab_case(0.02, 60.0), 25, 500),
}

QUICK = ("uniform n=10 h=5e-6", "uniform n=10 h=1.8e-4", "blocks Khλ=.3", "BAOAB h=.02 γ=60")


@functools.cache
def case(name):
    return CASES[name][0]()


@pytest.mark.parametrize("name", quick(CASES, QUICK))
@pytest.mark.swept_after(1)
def test_probe_temperature_is_the_true_variance_ratio(name):
    sampler, covariance = case(name)
    _, thin, num_samples = CASES[name]
    truth = model().mean_variance_ratio(covariance)
    starts = np.random.default_rng(3).multivariate_normal(model().mode, covariance, size=16)
    dt = erg.sample(
        jax.random.key(1),
        sampler,
        num_samples=num_samples,
        num_warmup=20 * thin,
        num_chains=16,
        thin=thin,
        initial=jnp.asarray(starts, jnp.float32),
        progress=False,
    )
    measured = measure(dt["probe"]["temperature"])
    assert measured.mean_mcse < 0.02 * truth  # what this can see: at 3 MCSE, 6% of the truth or less
    assert abs(measured.mean - truth) <= 3 * measured.mean_mcse, (measured.mean, truth)
    # and it is the spread of the draws themselves, in the metric of the posterior
    away = dt["posterior"]["position"].values - model().mode
    ratio = np.einsum("cdi,ij,cdj->cd", away, model().precision, away) / DIM
    error = float(arviz_stats.mcse(ratio, method="mean"))
    assert abs(ratio.mean() - truth) <= 3 * error, (ratio.mean(), truth)


def test_cases_span_no_bias_to_fourteen():
    truths = [model().mean_variance_ratio(case(name)[1]) for name in CASES]
    assert min(truths) < 1.02
    assert max(truths) > 13


class Recording(AbstractGradientEstimator):
    """Keep the last gradient, and the point it was taken at, in the state: what a diagnostic without probes would use."""

    inner: AbstractGradientEstimator

    def init(self, key, params, batch=None):
        return self.inner.init(key, params, batch), jnp.zeros_like(params), jnp.zeros_like(params)

    def estimate(self, key, params, state, batch=None):
        estimate, inner = self.inner.estimate(key, params, state[0], batch)
        return estimate, (inner, params, estimate.gradient)

    def probe(self, key, params, state):
        return self.inner.probe(key, params, state[0])


def recorded_series(sampler, num_chains, num_steps, num_warmup):
    """Series (chain, step), at the points of the kernel's gradients: temperature by these, by probes, and |g|^2."""
    centre = jnp.asarray(model().mode, jnp.float32)

    def one_step(state, key):
        key_step, key_probe = jax.random.split(key)
        following, _ = sampler.step(key_step, state)
        _, point, gradient = following.gradient
        probe = sampler.gradient.probe(key_probe, point, following.gradient)
        away = point - centre
        series = (-jnp.mean(away * gradient), -jnp.mean(away * probe.gradient), jnp.mean(gradient**2))
        return following, series

    @jax.vmap
    def chain(key):
        key_init, key_run = jax.random.split(key)
        keys = jax.random.split(key_run, num_warmup + num_steps)
        return jax.lax.scan(one_step, sampler.init(key_init, centre), keys)[1]

    series = jax.jit(chain)(jax.random.split(jax.random.key(2), num_chains))
    return [np.asarray(x)[:, num_warmup:].astype(float) for x in series]


@pytest.mark.optimised
def test_mutant_own_gradient_reports_heat_that_is_not_there():
    """Under reshuffled blocks the own gradient gives 1 + h E|g|^2 / 2D, which stationarity forces on it, and not the truth."""
    gradient, h = Recording(blocks()), step_for(1.2)
    steps = sgld_steps(block_forces(gradient.inner), h)
    truth = model().mean_variance_ratio(reshuffled_covariance(steps, DIM))
    own, probe, square = recorded_series(erg.samplers.SGLD(gradient, h), 16, 6000, 600)
    own_error, probe_error = (float(arviz_stats.mcse(x, method="mean")) for x in (own, probe))
    assert abs(probe.mean() - truth) <= 3 * probe_error, (probe.mean(), truth)
    assert own.mean() - truth > 10 * own_error, (own.mean(), truth)
    identity = own - 1 - h * square / 2
    assert abs(identity.mean()) <= 3 * float(arviz_stats.mcse(identity, method="mean"))


def test_law_over_sets_is_the_average_over_all_orders():
    """The exact law used above, against the sum over the orders written out."""
    small = regression(num_data=30, dim=2)
    forces = block_forces(erg.estimators.Minibatch(small.posterior, 10))
    steps = sgld_steps(forces, 0.004)
    eye, d = np.eye(2), 2
    epochs = []
    for order in itertools.permutations(range(3)):
        f, b, q = eye, np.zeros(d), np.zeros((d, d))
        for k in order:
            fk, bk, qk = steps[k]
            f, b, q = fk @ f, fk @ b + bk, fk @ q @ fk.T + qk
        epochs.append((f, b, q))
    mean = np.linalg.solve(eye - np.mean([f for f, _, _ in epochs], 0), np.mean([b for _, b, _ in epochs], 0))
    constant = np.mean([np.outer(f @ mean, b) + np.outer(b, f @ mean) + np.outer(b, b) + q for f, b, q in epochs], 0)
    square = np.mean([np.kron(f, f) for f, _, _ in epochs], 0)
    second = np.linalg.solve(np.eye(d * d) - square, constant.ravel()).reshape(d, d)
    per_place = []
    for place in range(1, 4):
        total_mean, total = np.zeros(d), np.zeros((d, d))
        orders = list(itertools.permutations(range(3), place))
        for order in orders:
            m, p = mean, second
            for k in order:
                fk, bk, qk = steps[k]
                fm = fk @ m
                p = fk @ p @ fk.T + np.outer(fm, bk) + np.outer(bk, fm) + np.outer(bk, bk) + qk
                m = fm + bk
            total_mean, total = total_mean + m / len(orders), total + p / len(orders)
        per_place.append((total_mean, total))
    m = np.mean([a for a, _ in per_place], 0)
    expected = np.mean([a for _, a in per_place], 0) - np.outer(m, m)
    np.testing.assert_allclose(reshuffled_covariance(steps, d), expected, rtol=1e-9)
