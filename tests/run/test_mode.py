"""The search for a mode, against normal equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(400, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5]) + np.random.default_rng(2).normal(size=400)).astype(np.float32)
MODE = np.linalg.solve(X.T @ X + np.eye(3), X.T @ Y)


@pytest.fixture
def posterior():
    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta["beta"] ** 2),
        lambda theta, rows: -0.5 * (rows["y"] - rows["x"] @ theta["beta"]) ** 2,
        {"x": jnp.asarray(X), "y": jnp.asarray(Y)},
        initial={"beta": jnp.zeros(3)},
    )


def test_lbfgs_solves_the_normal_equations(posterior):
    mode = erg.find_mode(KEY, posterior)
    assert mode.converged
    np.testing.assert_allclose(mode.position["beta"], MODE, rtol=1e-4)
    np.testing.assert_allclose(mode.value, posterior.log_density(mode.position), rtol=1e-5)


def test_adam_with_all_the_data(posterior):
    mode = erg.find_mode(KEY, posterior, method="adam", num_steps=3000)
    np.testing.assert_allclose(mode.position["beta"], MODE, atol=1e-3)
    assert not mode.converged


def test_adam_on_minibatches_ends_within_a_posterior_sd(posterior):
    gradient = erg.estimators.Minibatch(posterior, 32)
    mode = erg.find_mode(KEY, posterior, method="adam", gradient=gradient, num_steps=3000)
    sd = np.sqrt(np.diag(np.linalg.inv(X.T @ X + np.eye(3))))
    assert np.all(np.abs(mode.position["beta"] - MODE) < sd)


def test_says_when_it_has_not_converged():
    slow = erg.Posterior(lambda t: -((1 - t[0]) ** 2) - 100 * (t[1] - t[0] ** 2) ** 2, initial=jnp.array([-1.2, 1.0]))
    assert not erg.find_mode(KEY, slow, num_steps=10).converged
    long = erg.find_mode(KEY, slow, tolerance=1e-4)
    assert long.converged
    np.testing.assert_allclose(long.position, [1.0, 1.0], atol=1e-3)


def test_errors(posterior):
    with pytest.raises(ValueError, match="method must be one of"):
        erg.find_mode(KEY, posterior, method="newton")
    with pytest.raises(ValueError, match="give method='adam'"):
        erg.find_mode(KEY, posterior, gradient=erg.estimators.Minibatch(posterior, 32))
    with pytest.raises(ValueError, match="structure"):
        erg.find_mode(KEY, posterior, initial={"gamma": jnp.zeros(3)})
    improper = erg.Posterior(lambda t: jnp.sum(jnp.log(t)), initial=jnp.array([-1.0]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        erg.find_mode(KEY, improper)
