"""A variational autoencoder with categorical latents, trained by three gradient estimators. A few seconds.

Prints the importance-weighted bound on held-out digits, and how long a step takes. One-hot vectors are `Multinomial(1, …)`, which
the decoder multiplies: relaxations need a value that arithmetic is done with.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

from ergodica.estimators import ELBO, IWELBO, GumbelSoftmax, LeaveOneOut, StraightThrough
from ergodica.models.zoo import digits

VECTORS, CLASSES, HIDDEN, BATCH, STEPS = 6, 10, 60, 100, 1500

generator = np.random.default_rng(0)
grey = digits().x[generator.permutation(1797)]
pictures = jnp.asarray(generator.random(grey.shape) < grey, jnp.float32)  # each pixel is drawn once and for all
train, test = pictures[:1397], pictures[1397:]
mean = jnp.clip(train.mean(0), 0.01, 0.99)


def dense(name, x, size, bias=0.0):
    """Affine layer."""
    shape = (x.shape[-1], size)
    weight = numpyro.param(f"{name}.weight", lambda key: jax.random.normal(key, shape) / jnp.sqrt(shape[0]))
    return x @ weight + numpyro.param(f"{name}.bias", jnp.zeros(size) + bias)


def model(x):
    """Six draws of one in ten, a hidden layer, 64 pixels."""
    prior = numpyro.param("prior", jnp.zeros((VECTORS, CLASSES)))
    with numpyro.plate("pictures", x.shape[0]):
        z = numpyro.sample("z", dist.Multinomial(1, logits=prior).to_event(1))
        hidden = jnp.tanh(dense("hidden", z.reshape(-1, VECTORS * CLASSES).astype(x.dtype), HIDDEN))
        logits = dense("pixels", hidden, 64, jnp.log(mean / (1 - mean)))
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def guide(x):
    """The latents of a picture."""
    logits = dense("encode", x - mean, VECTORS * CLASSES).reshape(-1, VECTORS, CLASSES)
    with numpyro.plate("pictures", x.shape[0]):
        numpyro.sample("z", dist.Multinomial(1, logits=logits).to_event(1))


losses = {
    "leave-one-out": ELBO(num_particles=2, sites={"z": LeaveOneOut()}),
    "straight-through": ELBO(num_particles=1, sites={"z": StraightThrough()}),
    "Gumbel-Softmax": ELBO(num_particles=1, sites={"z": GumbelSoftmax(0.7)}),
}
losses["leave-one-out"].explain(model, guide, train[:BATCH])

bound_of = IWELBO(num_particles=100, sites={"z": StraightThrough()}, vectorize_particles=False)  # hard draws
bound = jax.jit(lambda key, params: -bound_of.loss(key, params, model, guide, test) / len(test))

print("\n                   bound (nats)   us a step")
for name, loss in losses.items():
    svi = numpyro.infer.SVI(model, guide, optax.adam(optax.linear_schedule(0.01, 0.0, STEPS)), loss)

    @jax.jit
    def run(state, rows, svi=svi):
        """Take all steps in one call: a loop in Python would cost more than the steps."""
        return jax.lax.scan(lambda state, rows: svi.update(state, train[rows]), state, rows)

    state = svi.init(jax.random.key(0), train[:BATCH])
    rows = jax.random.randint(jax.random.key(1), (STEPS, BATCH), 0, len(train))
    compiled = run.lower(state, rows).compile()
    began = time.perf_counter()
    state, _ = jax.block_until_ready(compiled(state, rows))
    seconds = time.perf_counter() - began
    print(f"{name:18s} {bound(jax.random.key(2), svi.get_params(state)):12.2f} {1e6 * seconds / STEPS:11.0f}")
