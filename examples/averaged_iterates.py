"""Find a hidden direction in noise: the last iterate of Langevin dynamics against the average of all. Under a minute.

Three problems on the unit sphere of R^d hide a direction v: a tensor of order 3, one of order 4, and a regression on one
projection of the data (a single-index model). Each chain runs hot, so that where it happens to be says little; its average,
kept by `Averaged` while it runs, says a lot. After arXiv:2603.06028.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import ergodica as erg
from ergodica.core import rng
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel

NUM_STEPS, NUM_PROBLEMS, NUM_CHAINS = 6_000, 3, 4
POWERS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


class SphereState(NamedTuple):
    position: jax.Array
    gradient: tuple


class SphereInfo(NamedTuple):
    n_grad: jax.Array


class SphericalLangevin(AbstractKernel):
    """A Langevin step along the tangent plane of the unit sphere, then back onto it."""

    gradient: AbstractGradientEstimator
    step_size: float

    @property
    def posterior(self):
        return self.gradient.posterior

    def init(self, key, position, batch=None):
        return SphereState(position / jnp.linalg.norm(position), self.gradient.init(key, position, batch))

    def step(self, key, state, batch=None):
        key_gradient, key_noise = jax.random.split(key)
        x = state.position
        estimate, gradient_state = self.gradient.estimate(key_gradient, x, state.gradient, batch)
        move = self.step_size * estimate.gradient + jnp.sqrt(2 * self.step_size) * rng.normal_like(key_noise, x)
        moved = x + move - x * jnp.vdot(x, move)
        info = SphereInfo(jnp.asarray(estimate.n_grad, jnp.int32))
        return SphereState(moved / jnp.linalg.norm(moved), gradient_state), info


def random_direction(key, dimension):
    v = jax.random.normal(key, (dimension,))
    return v / jnp.linalg.norm(v)


def form(tensor, x):
    """<Y, x ⊗ … ⊗ x>."""
    while tensor.ndim:
        tensor = tensor @ x
    return tensor


def spiked_tensor(key, order, dimension, n, beta):
    """Y = v ⊗ … ⊗ v + noise / sqrt(n), as an average of n noisy observations of the spike would be."""
    key_direction, key_noise = jax.random.split(key)
    v = random_direction(key_direction, dimension)
    spike = v
    for _ in range(order - 1):
        spike = spike[..., None] * v
    tensor = spike + jax.random.normal(key_noise, (dimension,) * order) / jnp.sqrt(n)
    # arrays inside a Partial are arguments of the compiled program: another tensor does not compile again
    posterior = erg.Posterior(jax.tree_util.Partial(tensor_log_density, beta, tensor))
    return v, erg.estimators.Minibatch(posterior, scheme="full")


def tensor_log_density(beta, tensor, x):
    return beta * form(tensor, x)


def hermite3(t):
    return (t**3 - 3 * t) / jnp.sqrt(6.0)


def single_index(key, dimension, n, beta):
    """y = He3(v · x) + noise / 2; the chain climbs the correlation of y with He3(theta · x), a minibatch at a time."""
    key_direction, key_x, key_noise = jax.random.split(key, 3)
    v = random_direction(key_direction, dimension)
    x = jax.random.normal(key_x, (n, dimension))
    y = hermite3(x @ v) + 0.5 * jax.random.normal(key_noise, (n,))
    posterior = erg.Posterior(flat_prior, jax.tree_util.Partial(correlation, beta / n), {"x": x, "y": y})
    return v, erg.estimators.Minibatch(posterior, min(n, 100))


def flat_prior(theta):
    return jnp.zeros_like(theta[0])


def correlation(scale, theta, rows):
    return scale * rows["y"] * hermite3(rows["x"] @ theta)


def overlaps(key, v, gradient, step_size):
    """|<direction, v>| of the last iterate, the mean, and the leading eigenvector of the second moment, by chain."""
    kernel = erg.samplers.Averaged(SphericalLangevin(gradient, step_size), start=NUM_STEPS // 10, covariance="full")
    dt = erg.sample(
        key,
        kernel,
        num_samples=1,
        num_warmup=0,
        num_chains=NUM_CHAINS,
        thin=NUM_STEPS,
        initial=lambda key: jax.random.normal(key, v.shape),
        probes=False,
    )
    last, mean = dt.posterior["position"].values[:, -1], dt["summary/mean"]["position"].values
    second_moment = dt["summary"]["covariance"].values + mean[:, :, None] * mean[:, None, :]
    leading = np.linalg.eigh(second_moment)[1][:, :, -1]
    directions = np.stack([last, mean / np.linalg.norm(mean, axis=1, keepdims=True), leading])
    return np.abs(directions @ np.asarray(v))


PROBLEMS = {
    "spiked tensor, order 3, d = 40": (40, lambda key, n: spiked_tensor(key, 3, 40, n, beta=30.0)),
    "spiked tensor, order 4, d = 16": (16, lambda key, n: spiked_tensor(key, 4, 16, n, beta=14.0)),
    "single index, cubic link, d = 40": (40, lambda key, n: single_index(key, 40, n, beta=30.0)),
}
ESTIMATES = ("last iterate", "average", "leading eigenvector of the running second moment")

figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
for axis, (title, (dimension, make)) in zip(axes, PROBLEMS.items(), strict=True):
    sizes = [round(dimension**power) for power in POWERS]
    table = []
    for i, n in enumerate(sizes):
        found = []
        for key in jax.random.split(jax.random.fold_in(jax.random.key(0), i), NUM_PROBLEMS):
            key_problem, key_chain = jax.random.split(key)
            v, gradient = make(key_problem, n)
            found.append(overlaps(key_chain, v, gradient, 0.05 / dimension).mean(axis=1))
        table.append(np.mean(found, axis=0))
    print(f"\n{title}\n{'n':>6}  last  average  eigenvector")
    for n, (last, average, leading) in zip(sizes, table, strict=True):
        print(f"{n:6d}  {last:.2f}  {average:.2f}     {leading:.2f}")
    for values, label, marker in zip(np.transpose(table), ESTIMATES, "o^s", strict=True):
        axis.plot(sizes, values, marker + "-", label=label)
    axis.axhline(np.sqrt(2 / (np.pi * dimension)), color="grey", linestyle=":", label="random direction")
    axis.set(xscale="log", xlabel="n (observations)", title=title, ylim=(0, 1))
axes[0].set_ylabel("overlap with the hidden direction")
axes[0].legend()
figure.savefig("averaged_iterates.png", dpi=120)
print("\nfigure: averaged_iterates.png")
