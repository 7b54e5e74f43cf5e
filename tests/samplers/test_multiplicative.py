"""Multiplicative Langevin: affine in log x on a log-normal target, so its law is exact; signs never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.samplers import MultiplicativeLangevin, multiplicative
from tests.support.affine import as_function, stationary_covariance, step_map

M, VARIANCE = 0.3, 0.5


def log_normal(sign=1.0):
    def log_density(x):
        y = jnp.log(sign * x)
        return jnp.sum(-y - 0.5 * (y - M) ** 2 / VARIANCE)

    return erg.estimators.Minibatch(erg.Posterior(log_density, initial=jnp.full(1, sign)), scheme="full")


class OnLogScale:
    """The kernel as it moves log |x|."""

    def __init__(self, kernel, sign):
        self.kernel, self.sign = kernel, sign

    def init(self, key, position, batch=None):
        return self.kernel.init(key, position, batch)

    def step(self, key, state, batch=None):
        state, info = self.kernel.step(key, state._replace(position=self.sign * jnp.exp(state.position)), batch)
        return state._replace(position=jnp.log(self.sign * state.position)), info


def law(h, temperature, sign=1.0):
    """Mean and variance of log |x| under the shipped step."""
    kernel = OnLogScale(MultiplicativeLangevin(log_normal(sign), h, temperature=temperature), sign)
    maps = step_map(kernel, jnp.ones(1))
    mean = np.linalg.solve(np.eye(1) - np.asarray(maps.transition), np.asarray(maps.offset))
    return mean[0], stationary_covariance(maps)[0, 0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("h", "temperature"), [(0.1, 1.0), (0.4, 1.0), (0.1, 0.25)])
def test_law_on_a_log_normal(h, temperature, sign):
    """In y the target at temperature T is exp(-(y - m)^2 / (2 v T) - y / T + y): its mean is m + v (T - 1)."""
    mean, variance = law(h, temperature, sign)
    np.testing.assert_allclose(mean, M + VARIANCE * (temperature - 1), rtol=1e-12)
    np.testing.assert_allclose(variance, temperature * VARIANCE / (1 - h / (2 * VARIANCE)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_published_value():
    np.testing.assert_allclose(law(0.1, 1.0)[1], 0.55556, atol=5e-6)


@pytest.mark.usefixtures("x64")
def test_the_step_is_affine_in_the_logarithm():
    kernel = OnLogScale(MultiplicativeLangevin(log_normal(), 0.3, temperature=0.7), 1.0)
    maps = step_map(kernel, jnp.ones(1))
    step, _, _ = as_function(kernel, jnp.ones(1))
    z, noise = jnp.array([-2.0]), jnp.array([1.7])
    np.testing.assert_allclose(step(z, noise), maps.transition @ z + maps.loading @ noise + maps.offset, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_forgotten_jacobian_is_rejected(monkeypatch):
    def mutant(x, g, xi, h, T):
        return x * jnp.exp(h * x * g + jnp.sqrt(2 * h * T) * xi)

    monkeypatch.setattr(multiplicative, "multiplicative_step", mutant)
    assert abs(law(0.1, 1.0)[0] - M) > 0.4


def crossings(**options):
    """Share of chains that changed sign in 400 steps."""
    kernel = MultiplicativeLangevin(log_normal(), 0.1, **options)

    def chain(key):
        key_start, key_init, key_run = jax.random.split(key, 3)
        start = kernel.init(key_init, jnp.exp(M + jnp.sqrt(VARIANCE) * jax.random.normal(key_start, (1,))))

        def body(state, i):
            state, _ = kernel.step(jax.random.fold_in(key_run, i), state)
            return state, state.position[0] <= 0

        return jnp.any(jax.lax.scan(body, start, jnp.arange(400))[1])

    return float(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), 256)).mean())


def test_signs_never_change_unless_allowed():
    assert crossings() == 0.0
    assert crossings(allow_sign_changes=True) > 0.5


@pytest.mark.usefixtures("x64")
def test_ambient_step_is_the_same_dynamics():
    """Both steps agree to first order in h: in the drift of log x by Itô, which is where a factor would hide."""
    x, g = jnp.array(1.3), jnp.array(-0.4)
    xi = jnp.array([1.0, -1.0])  # a noise of mean 0 and variance 1

    def drift_of_log(step, h):
        return jnp.mean(jax.vmap(lambda xi: jnp.log(step(x, g, xi, h, jnp.asarray(0.7)) / x))(xi)) / h

    exact = 0.7 + x * g
    for step, order in ((multiplicative.multiplicative_step, None), (multiplicative.ambient_step, 1)):
        errors = [abs(float(drift_of_log(step, jnp.asarray(h)) - exact)) for h in (1e-3, 5e-4)]
        assert errors[0] < (1e-9 if order is None else 5e-3)
        if order is not None:
            assert abs(np.log2(errors[0] / errors[1]) - order) < 0.1


def test_bad_starts_raise_and_underflow_is_flagged():
    kernel = MultiplicativeLangevin(log_normal(), 0.1)
    with pytest.raises(ValueError, match="position must have no coordinate at 0"):
        kernel.init(jax.random.key(0), jnp.array([1.0, 0.0]))
    state = kernel.init(jax.random.key(0), jnp.array([1.0]))
    state, info = MultiplicativeLangevin(log_normal(), 1e6).step(
        jax.random.key(1), state._replace(position=jnp.array([50.0]))
    )
    assert state.position == 0.0
    assert info.diverging
