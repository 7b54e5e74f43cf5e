"""Programs with discrete latents, in NumPyro: variational autoencoders and sigmoid belief networks.

Sizes are those of Jang, Gu and Poole (2017) where ``units`` is 200; categories are ``units / 10`` one-hot vectors of ten. Every
model and guide is for a batch of pictures of zeros and ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

CLASSES = 10


class Task(NamedTuple):
    """Model, guide, their latent sites, and ``split``: the arguments of both that a batch of pictures becomes."""

    name: str
    title: str
    model: Callable
    guide: Callable
    sites: tuple[str, ...]
    split: Callable[[Array], tuple[Array, ...]]
    start: float
    """Log likelihood of a picture under the mean of each pixel: what a network that knows nothing has."""


class Shape(NamedTuple):
    """Kind of the latents (bits or categories), their units, and the mean of each pixel of the training set."""

    kind: str
    units: int
    mean: Array


def dense(name: str, x: Array, size: int, bias: Array | None = None) -> Array:
    """Affine layer with parameters of its own; the bias starts at zero unless given."""
    fan_in = x.shape[-1]
    weight = numpyro.param(f"{name}.weight", lambda key: jax.random.normal(key, (fan_in, size)) / math.sqrt(fan_in))
    return x @ weight + numpyro.param(f"{name}.bias", jnp.zeros(size) if bias is None else bias)


def latent(shape: Shape, logits: Array) -> Any:
    """The law of a layer: bits, or one-hot vectors."""
    if shape.kind == "bits":
        return dist.Bernoulli(logits=logits).to_event(1)
    return dist.Multinomial(1, logits=logits.reshape(*logits.shape[:-1], -1, CLASSES)).to_event(1)


def flat(shape: Shape, z: Array) -> Array:
    """A layer's value as one vector of numbers for each picture."""
    z = z.astype(jnp.result_type(float))
    return z if shape.kind == "bits" else z.reshape(*z.shape[:-2], -1)


def log_odds(mean: Array) -> Array:
    inside = jnp.clip(mean, 1e-3, 1 - 1e-3)
    return jnp.log(inside) - jnp.log1p(-inside)


def pixel_log_likelihood(mean: Array) -> float:
    inside = jnp.clip(mean, 1e-3, 1 - 1e-3)
    return float(jnp.sum(mean * jnp.log(inside) + (1 - mean) * jnp.log1p(-inside)))


def vae(shape: Shape) -> Task:
    """One layer of latents with a learnt prior; categories have a hidden layer in the decoder, as in the paper."""
    pixels = shape.mean.shape[0]

    def model(x: Array) -> None:
        prior = numpyro.param("prior", jnp.zeros(shape.units))
        with numpyro.plate("pictures", x.shape[0]):
            h = flat(shape, numpyro.sample("z", latent(shape, prior)))
            if shape.kind == "categories":
                h = jnp.tanh(dense("decode_hidden", h, shape.units))
            logits = dense("decode", h, pixels, log_odds(shape.mean))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        with numpyro.plate("pictures", x.shape[0]):
            numpyro.sample("z", latent(shape, dense("encode", x - shape.mean, shape.units)))

    title = {"bits": "VAE, bits", "categories": "VAE, categories"}[shape.kind]
    return Task(f"vae_{shape.kind}", title, model, guide, ("z",), lambda x: (x,), pixel_log_likelihood(shape.mean))


def lower_half(shape: Shape) -> Task:
    """Predict the lower half of a picture from the upper: a sigmoid belief network of two layers, given its input.

    The guide draws the layers from the network itself, so that both their terms, masked here, would cancel: the objective is
    the log likelihood of the lower half at the draws.
    """
    half = shape.mean.shape[0] // 2

    def model(upper: Array, lower: Array) -> None:
        with numpyro.plate("pictures", upper.shape[0]):
            with numpyro.handlers.mask(mask=False):
                numpyro.sample("z1", latent(shape, jnp.zeros(shape.units)))
                z2 = numpyro.sample("z2", latent(shape, jnp.zeros(shape.units)))
            logits = dense("decode", flat(shape, z2), half, log_odds(shape.mean[half:]))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=lower)

    def guide(upper: Array, lower: Array) -> None:  # noqa: ARG001  (NumPyro calls it as the model)
        with numpyro.plate("pictures", upper.shape[0]), numpyro.handlers.mask(mask=False):
            z1 = numpyro.sample("z1", latent(shape, dense("first", upper - shape.mean[:half], shape.units)))
            numpyro.sample("z2", latent(shape, dense("second", flat(shape, z1), shape.units)))

    title = {"bits": "lower half, bits", "categories": "lower half, categories"}[shape.kind]
    start = pixel_log_likelihood(shape.mean[half:])
    return Task(f"half_{shape.kind}", title, model, guide, ("z1", "z2"), lambda x: (x[:, :half], x[:, half:]), start)


def belief_network(shape: Shape) -> Task:
    """Generative sigmoid belief network of two layers, and the guide that goes up."""
    pixels = shape.mean.shape[0]

    def model(x: Array) -> None:
        prior = numpyro.param("prior", jnp.zeros(shape.units))
        with numpyro.plate("pictures", x.shape[0]):
            z2 = numpyro.sample("z2", latent(shape, prior))
            z1 = numpyro.sample("z1", latent(shape, dense("decode2", flat(shape, z2), shape.units)))
            logits = dense("decode1", flat(shape, z1), pixels, log_odds(shape.mean))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        with numpyro.plate("pictures", x.shape[0]):
            z1 = numpyro.sample("z1", latent(shape, dense("encode1", x - shape.mean, shape.units)))
            numpyro.sample("z2", latent(shape, dense("encode2", flat(shape, z1), shape.units)))

    return Task(
        f"deep_{shape.kind}",
        "belief network, two layers",
        model,
        guide,
        ("z1", "z2"),
        lambda x: (x,),
        pixel_log_likelihood(shape.mean),
    )


def make_tasks(mean: Array, units: int) -> dict[str, Task]:
    """All tasks, by name, in the order in which they are run."""
    bits, categories = Shape("bits", units, mean), Shape("categories", units, mean)
    made = [vae(categories), vae(bits), lower_half(bits), lower_half(categories), belief_network(bits)]
    return {task.name: task for task in made}
