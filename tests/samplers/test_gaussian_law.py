"""Every splitting against its exact stationary law on a Gaussian, without Monte Carlo.

The kernels are the shipped ones (see `tests.support.affine`); the laws are closed forms for gradient noise that is
independent between calls, that is, for `uniform` batches.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.samplers import ABOBA, BAOA, BAOAB, OBABO, SGHMC, SGLD, UBU, LieTrotter, Splitting
from tests.support.affine import NoisyQuadratic, as_function, stationary_covariance, step_map
from tests.support.composition import compose
from tests.support.laws import VARIANCES, sgld_variance, with_mass

pytestmark = pytest.mark.usefixtures("x64")

# name of the law: the preset, and whether kicks at one point share a gradient
PRESETS = {
    "BAOA": (BAOA, True),
    "BAOAB1": (BAOAB, True),
    "BAOAB2": (BAOAB, False),
    "OBABO2": (OBABO, False),
    "LieTrotter2": (LieTrotter, False),
    "ABOBA1": (ABOBA, True),
    "ABOBA2": (ABOBA, False),
    "OABAO": (functools.partial(Splitting, "OABAO"), True),
    "SGHMC": (SGHMC, True),
    "UBU": (UBU, True),
    "OBABO1": (OBABO, True),
    "LieTrotter1": (LieTrotter, True),
}
ANCHOR_SETTING = {"h": 0.3, "lam": 2.0, "gamma": 1.5, "T": 0.7, "s2": 3.0}
ANCHORS = {
    "BAOA": 0.509710,
    "BAOAB2": 0.429855,
    "OBABO2": 0.450257,
    "LieTrotter2": 0.450257,
    "ABOBA2": 0.429995,
    "OABAO": 0.487125,
    "UBU": 0.489639,
    "SGHMC": 0.530822,
}
MOMENTUM_ANCHORS = {"OBABO2": 0.84505, "LieTrotter2": 0.79249}
GRID = [
    {"h": h, "lam": lam, "gamma": gamma, "T": T, "s2": s2}
    for h, lam, gamma, T, s2 in itertools.product((0.05, 0.3), (0.5, 2.0), (0.4, 1.5), (0.7, 1.0), (0.0, 3.0))
]


@functools.cache
def mapped_step(name):
    """Compile the step maps of a preset over arrays of settings."""
    make, reuse = PRESETS[name]

    def at(h, lam, gamma, T, s2, mass):
        gradient = NoisyQuadratic(jnp.reshape(lam, (1, 1)), jnp.sqrt(s2))
        kernel = make(gradient, h, gamma, mass=mass, temperature=T, reuse_gradient=reuse)
        return step_map(kernel, jnp.zeros(1))

    return jax.jit(jax.vmap(at))


def covariances(name, settings, mass=1.0):
    columns = {key: jnp.array([setting[key] for setting in settings]) for key in settings[0]}
    maps = mapped_step(name)(**columns, mass=jnp.full(len(settings), mass))
    return [stationary_covariance(jax.tree.map(lambda x, i=i: x[i], maps)) for i in range(len(settings))]


@pytest.mark.parametrize("name", ANCHORS)
def test_published_anchor(name):
    (covariance,) = covariances(name, [ANCHOR_SETTING])
    np.testing.assert_allclose(covariance[0, 0], ANCHORS[name], rtol=0, atol=1e-6)
    if name in MOMENTUM_ANCHORS:
        np.testing.assert_allclose(covariance[1, 1], MOMENTUM_ANCHORS[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mass", [1.0, 2.5])
@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.swept_after(8)
def test_closed_form(name, mass):
    law = with_mass(VARIANCES[name], mass)
    for setting, covariance in zip(GRID, covariances(name, GRID, mass), strict=True):
        np.testing.assert_allclose(covariance[0, 0], law(**setting), rtol=1e-12, err_msg=str(setting))


@pytest.mark.parametrize("name", PRESETS)
def test_step_is_affine(name):
    """What `step_map` reads off at zero holds everywhere; otherwise the laws above would be about something else."""
    make, reuse = PRESETS[name]
    gradient = NoisyQuadratic(jnp.full((1, 1), 2.0), jnp.asarray(1.3))
    kernel = make(gradient, 0.3, 1.5, mass=2.5, temperature=0.7, reuse_gradient=reuse)
    maps = step_map(kernel, jnp.zeros(1))
    step, size, num_noises = as_function(kernel, jnp.zeros(1))
    z, noise = jnp.linspace(-1.0, 2.0, size), jnp.linspace(0.5, -3.0, num_noises)
    expected = maps.transition @ z + maps.loading @ noise + maps.offset
    np.testing.assert_allclose(step(z, noise), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mass", [1.0, 2.5])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.swept_after(6)
def test_temperature_scales_the_law(name, mass):
    """Without gradient noise the law at temperature T is T times the law at 1, whatever the scheme and the mass."""
    setting = {"h": 0.3, "lam": 2.0, "gamma": 1.5, "T": 1.0, "s2": 0.0}
    cold, warm = covariances(name, [setting | {"T": 0.25}, setting], mass)
    np.testing.assert_allclose(cold, 0.25 * warm, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scheme", ["OBABO", "BABO"])
def test_leapfrog_with_exact_friction_keeps_the_momentum_law(scheme):
    setting = {"h": 0.3, "lam": 2.0, "gamma": 1.5, "T": 0.7, "s2": 0.0}
    covariance = covariances({"OBABO": "OBABO1", "BABO": "LieTrotter1"}[scheme], [setting], mass=2.5)[0]
    np.testing.assert_allclose(covariance[1, 1], 2.5 * 0.7, rtol=1e-12)
    np.testing.assert_allclose(covariance[0, 1], 0.0, atol=1e-13)
    np.testing.assert_allclose(covariance[0, 0], 0.7 / (2.0 * (1 - 0.3**2 * 2.0 / 2.5 / 4)), rtol=1e-12)


PRECISION = np.array([[2.0, 0.6], [0.6, 1.0]])
MASSES = np.array([0.5, 2.0])


@pytest.mark.parametrize("scheme", ["BAOA", "BAOAB", "OBABO", "BABO", "ABOBA", "OABAO", "UBU", "AEB", "BUB", "ABABO"])
@pytest.mark.swept_after(4)
def test_correlated_target_with_diagonal_mass(scheme):
    """Against letters composed as block matrices in NumPy, with a fresh gradient for each kick."""
    h, gamma, T, spread = 0.2, 1.5, 0.7, 1.3
    kernel = Splitting(
        scheme,
        NoisyQuadratic(jnp.asarray(PRECISION), jnp.asarray(spread)),
        h,
        gamma,
        mass=jnp.asarray(MASSES),
        temperature=T,
        reuse_gradient=False,
    )
    shipped = step_map(kernel, jnp.zeros(2))
    transition, covariance = compose(scheme, PRECISION, MASSES, h, gamma, T, spread)
    np.testing.assert_allclose(shipped.transition, transition, rtol=0, atol=1e-14)
    np.testing.assert_allclose(shipped.loading @ shipped.loading.T, covariance, rtol=0, atol=1e-14)


STEPS = (0.02, 0.01)
EXACT_ON_GAUSSIANS = ("BAOA", "BAOAB1", "BAOAB2", "ABOBA1", "ABOBA2")


@pytest.mark.parametrize("name", PRESETS)
def test_stationary_order_without_gradient_noise(name):
    lam, T = 2.0, 0.7
    settings = [{"h": h, "lam": lam, "gamma": 1.5, "T": T, "s2": 0.0} for h in STEPS]
    errors = [abs(c[0, 0] - T / lam) for c in covariances(name, settings)]
    if name in EXACT_ON_GAUSSIANS:
        assert max(errors) < 1e-12
    else:
        assert 1.95 < np.log2(errors[0] / errors[1]) < 2.05


@pytest.mark.parametrize("name", PRESETS)
def test_stationary_order_with_independent_gradient_noise_is_one(name):
    lam, T = 2.0, 0.7
    settings = [{"h": h, "lam": lam, "gamma": 1.5, "T": T, "s2": 3.0} for h in STEPS]
    errors = [abs(c[0, 0] - T / lam) for c in covariances(name, settings)]
    assert 0.97 < np.log2(errors[0] / errors[1]) < 1.05


WEAK_ORDERS = dict.fromkeys(("LieTrotter1", "LieTrotter2", "BAOA", "SGHMC"), 1) | dict.fromkeys(
    ("BAOAB1", "BAOAB2", "OBABO1", "OBABO2", "ABOBA1", "ABOBA2", "OABAO", "UBU"), 2
)


def second_moment_at(name, time, h, lam, gamma, T):
    """E theta^2 after a time, from theta = 1, p = 0: exact for the shipped kernel."""
    columns = {
        k: jnp.array([v]) for k, v in {"h": h, "lam": lam, "gamma": gamma, "T": T, "s2": 0.0, "mass": 1.0}.items()
    }
    maps = jax.tree.map(lambda x: np.asarray(x[0]), mapped_step(name)(**columns))
    mean = np.zeros(len(maps.transition))
    mean[0] = 1.0
    if len(mean) == 3:
        mean[2] = -lam  # the gradient carried at the start
    covariance = np.zeros((len(mean), len(mean)))
    for _ in range(round(time / h)):
        mean = maps.transition @ mean
        covariance = maps.transition @ covariance @ maps.transition.T + maps.loading @ maps.loading.T
    return mean[0] ** 2 + covariance[0, 0]


@pytest.mark.parametrize("name", WEAK_ORDERS)
def test_weak_order_at_finite_time(name):
    from scipy.linalg import expm

    lam, gamma, T = 2.0, 1.5, 0.7
    flow = expm(np.array([[0.0, 1.0], [-lam, -gamma]]))
    limit = np.diag([T / lam, T])
    exact = flow[0, 0] ** 2 + (limit - flow @ limit @ flow.T)[0, 0]
    errors = [abs(second_moment_at(name, 1.0, h, lam, gamma, T) - exact) for h in STEPS]
    assert abs(np.log2(errors[0] / errors[1]) - WEAK_ORDERS[name]) < 0.05


def test_sgld_closed_form():
    for setting in GRID:
        h, lam, T, s2 = (setting[k] for k in ("h", "lam", "T", "s2"))
        kernel = SGLD(NoisyQuadratic(jnp.full((1, 1), lam), jnp.sqrt(s2)), h, temperature=T)
        covariance = stationary_covariance(step_map(kernel, jnp.zeros(1)))
        np.testing.assert_allclose(covariance[0, 0], sgld_variance(h, lam, T, s2), rtol=1e-12)


def test_from_paper_halves_the_step():
    gradient = NoisyQuadratic(jnp.full((1, 1), 2.0), jnp.asarray(1.0))
    covariance = stationary_covariance(step_map(SGLD.from_paper(gradient, 0.2), jnp.zeros(1)))
    np.testing.assert_allclose(covariance[0, 0], (1 + 0.2 * 1.0 / 4) / (2.0 * (1 - 0.2 * 2.0 / 4)), rtol=1e-12)
