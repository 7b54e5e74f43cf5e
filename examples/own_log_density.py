"""Robust regression from functions in plain JAX: a posterior, a mode, a control variate, a diagnosis."""

import arviz
import jax
import jax.numpy as jnp
from jax.scipy import stats

import ergodica as erg


def log_prior(position):
    sigma = jnp.exp(position["log_sigma"])
    jacobian = position["log_sigma"]
    return stats.norm.logpdf(position["beta"], 0.0, 2.0).sum() + stats.gamma.logpdf(sigma, 2.0) + jacobian


def log_likelihood(position, rows):
    """One value a datum: errors follow Student's t with 4 degrees of freedom."""
    return stats.t.logpdf(rows["y"], 4.0, rows["x"] @ position["beta"], jnp.exp(position["log_sigma"]))


def make_posterior(key):
    key_x, key_noise = jax.random.split(key)
    x = jax.random.normal(key_x, (5000, 3))
    y = x @ jnp.array([1.0, 0.0, -0.5]) + 0.5 * jax.random.t(key_noise, 4.0, (5000,))
    return erg.Posterior(
        log_prior,
        log_likelihood,
        data={"x": x, "y": y},
        initial={"beta": jnp.zeros(3), "log_sigma": jnp.zeros(())},
        constrain=lambda position: {"beta": position["beta"], "sigma": jnp.exp(position["log_sigma"])},
    )


def main():
    key_data, key_mode, key_run = jax.random.split(jax.random.key(0), 3)
    posterior = make_posterior(key_data)
    mode = erg.find_mode(key_mode, posterior)
    minibatch = erg.estimators.Minibatch(posterior, batch_size=250)
    gradient = erg.estimators.ControlVariate(minibatch, centre=mode.position)
    sampler = erg.samplers.BAOAB(gradient, step_size=0.01, friction=100.0)
    dt = erg.sample(key_run, sampler, num_samples=2000, thin=10, initial=mode.position)
    print(arviz.summary(dt))
    print(erg.diagnose(dt))
    print(erg.cite(sampler))


if __name__ == "__main__":
    main()
