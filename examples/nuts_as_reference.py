"""An approximate sampler against BlackJAX's NUTS on the same NumPyro model, and which batch scheme does better."""

import blackjax
import jax

import ergodica as erg
from ergodica.models.zoo import doctor_visits, logistic_regression


def reference_run(key, posterior, start):
    key_adapt, key_run = jax.random.split(key)
    adaptation = blackjax.window_adaptation(blackjax.nuts, posterior.log_density)
    (state, parameters), _ = adaptation.run(key_adapt, start, num_steps=300)
    nuts = blackjax.nuts(posterior.log_density, **parameters)
    kernel = erg.from_blackjax(nuts, posterior=posterior, exact=True)
    return erg.sample(key_run, kernel, num_samples=500, num_warmup=50, initial=state.position)


def main():
    key_mode, key_nuts, key_run = jax.random.split(jax.random.key(0), 3)
    data = doctor_visits()
    posterior = erg.from_numpyro(logistic_regression, data={"x": data.x[:4000], "y": data.y[:4000]})
    mode = erg.find_mode(key_mode, posterior)
    reference = reference_run(key_nuts, posterior, mode.position)
    for scheme in ("uniform", "blocks"):
        gradient = erg.estimators.Minibatch(posterior, batch_size=400, scheme=scheme)
        sampler = erg.samplers.SGLD(gradient, step_size=2e-5)
        dt = erg.sample(key_run, sampler, num_samples=2000, thin=20, initial=mode.position)
        print(f"\nSGLD with batches of 400, scheme {scheme!r}")
        print(erg.diagnose(dt)["temperature"].sentence)
        print(erg.diagnostics.reference_table(dt, reference)[["mean_error", "sd_ratio", "b2"]].round(3))


if __name__ == "__main__":
    main()
