"""A NumPyro model, a minibatch sampler, and whether to believe its draws. Under a minute on two cores.

The model and 20,190 rows of real data come with the package; put your own in their place.
"""

import jax
import numpyro
import numpyro.distributions as dist

import ergodica as erg
from ergodica.models import zoo

data = zoo.doctor_visits()


def model(x, y):
    """Give the probability of a visit to a doctor, by the insurance plan and health of a person."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    with numpyro.plate("feature", x.shape[1]):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.5))
    numpyro.sample("visit", dist.Bernoulli(logits=intercept + x @ slope), obs=y)


key_mode, key_compare, key_sample = jax.random.split(jax.random.key(0), 3)

# the arguments of the model that have one row a datum go into data=
posterior = erg.from_numpyro(model, data={"x": data.x, "y": data.y}, coords={"feature": data.columns})
mode = erg.find_mode(key_mode, posterior)

# which gradient? compare bias, variance and cost at points that matter
minibatch = erg.estimators.Minibatch(posterior, batch_size=500)
centred = erg.estimators.ControlVariate(minibatch, centre=mode.position)
start = jax.tree.map(lambda x: x + 0.05, mode.position)
table = erg.compare_gradients(key_compare, {"minibatch": minibatch, "control variate": centred}, start)
print(table.summary.to_string())

# sample; the step is a time, and the curvature of the log posterior grows with the number of data
sampler = erg.samplers.SGLD(centred, step_size=0.2 / posterior.num_data)
dt = erg.sample(key_sample, sampler, num_samples=2000, num_warmup=2000, thin=20, initial=mode.position)

# believe it? R-hat and ESS compare the chains with each other, the temperature compares them with the posterior
print(erg.diagnose(dt))
erg.report(dt, "report.html")
