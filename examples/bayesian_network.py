"""A Bayesian neural network for the consumption of cars: temperature 1, a cold posterior, and a deep ensemble. Under half a minute.

Prints scores of held-out predictions, and how far four chains disagree about the function and about the weights; draws the
predictions for a car of which the weight alone is changed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import ergodica as erg
from ergodica.diagnostics import calibration, chain_disagreement, function_draws
from ergodica.models.zoo import auto_mpg

data = auto_mpg()
order = np.random.default_rng(0).permutation(len(data.y))
train, test = order[:313], order[313:]
centre, scale = data.y[train].mean(), data.y[train].std()
y = (data.y - centre) / scale


class Network(eqx.Module):
    """Two layers and the noise, which is learnt."""

    net: eqx.nn.MLP
    log_sd: jax.Array


def make(key):
    return Network(eqx.nn.MLP(8, "scalar", width_size=20, depth=1, activation=jnp.tanh, key=key), jnp.array(-1.0))


def law(network, x):
    return dist.Normal(jax.vmap(network.net)(x), jnp.exp(network.log_sd))


posterior = erg.models.from_equinox(make(jax.random.key(0)), law, data.x[train], y[train], initial=make)
gradient = erg.estimators.Minibatch(posterior, 64)
held_out = {"x": data.x[test], "y": y[test]}

weight = data.columns.index("weight")
grid = np.linspace(-3.5, 3.5, 60, dtype=np.float32)  # standard deviations; the data reach from -1.6 to 2.5
cars = np.zeros((60, 8), np.float32)
cars[:, weight] = grid

figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), sharey=True, layout="constrained")
print("                 NLL    CRPS   in 90%   R-hat: function  weights")
for axis, (name, temperature) in zip(axes, {"T = 1": 1.0, "T = 0.1": 0.1, "deep ensemble": 0.0}.items(), strict=True):
    sampler = erg.samplers.BAOAB(gradient, 0.005, friction=20.0, temperature=temperature)
    dt = erg.sample(jax.random.key(1), sampler, num_samples=50, num_warmup=2000, thin=40, progress=False)
    if temperature == 0:
        dt = dt.isel(draw=slice(-1, None))  # four networks
    outputs = function_draws(dt, posterior, lambda network, x: jax.vmap(network.net)(x), held_out["x"])
    sd = np.exp(dt.posterior["log_sd"].values).reshape(-1, 1)
    means = outputs.values.reshape(-1, len(test))
    table = calibration(observed=held_out["y"], gaussians=(means, np.broadcast_to(sd, means.shape))).value
    numbers = [table.sel(score=score).item() for score in ("nll", "crps", "coverage90")]
    print(f"{name:14s} {numbers[0]:6.3f}  {numbers[1]:6.3f}  {numbers[2]:6.1%}", end="")
    if temperature > 0:
        function = float(chain_disagreement(outputs).rhat.median())
        weights = float(chain_disagreement(dt.posterior["net.layers.0.weight"]).rhat.median())
        print(f"   {function:15.2f}  {weights:7.2f}", end="")
    print()
    curves = function_draws(dt, posterior, lambda network, x: jax.vmap(network.net)(x), cars) * scale + centre
    for chain in range(4):
        axis.plot(grid, curves[chain].mean("draw"), color=f"C{chain}", lw=1)
    low, high = curves.quantile([0.05, 0.95], ("chain", "draw"))
    axis.fill_between(grid, low, high, color="0.85")
    axis.set(title=name, xlabel="weight (standard deviations)", ylim=(0, 55))
axes[0].set_ylabel("mean consumption (miles per gallon)")
figure.savefig("bayesian_network.png", dpi=110)
print("\nfigure: bayesian_network.png (lines: means of the chains; band: 5% to 95% of all draws)")
