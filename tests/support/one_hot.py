"""A program with a one-hot vector for each of two data, and the exact gradient of its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from tests.support.exact_programs import Case


def one_hot_program():
    """The program, and the gradient of its evidence lower bound by summing over the categories."""
    means, prior = jnp.array([-1.0, 0.4, 1.5]), jnp.array([0.2, 0.3, 0.5])

    def model(x):
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Multinomial(1, probs=prior))
            numpyro.sample("x", dist.Normal(z @ means, 0.7), obs=x)

    def guide(x):
        logits = numpyro.param("logits", jnp.zeros((2, 3)))
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Multinomial(1, logits=logits))

    params = {"logits": jnp.array([[0.4, 0.0, -0.2], [-0.5, 0.3, 0.1]])}
    case = Case("one-hot", model, guide, (jnp.array([0.7, 1.9]),), params)

    def exact(logits):
        log_q = jax.nn.log_softmax(logits)
        likelihood = dist.Normal(means, 0.7).log_prob(case.args[0][:, None])
        return jnp.sum(jnp.exp(log_q) * (jnp.log(prior) + likelihood - log_q))

    return case, np.asarray(jax.grad(exact)(params["logits"])).ravel()
