"""Data, training by SVI and evaluation, the same for all."""

import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax

from discrete_parts.methods import Method
from discrete_parts.programs import Task
from ergodica.estimators import IWELBO, StraightThrough
from ergodica.models.zoo import digits

BINARISATION_SEED, SPLIT_SEED = 2017, 0
RATES = (3e-3, 1e-2)


class Pictures(NamedTuple):
    """Pictures of zeros and ones, and sizes that go with them."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array
    units: int


def binarised(x: np.ndarray) -> jax.Array:
    """Draw each pixel once and for all, with its grey value as the probability."""
    uniform = np.random.default_rng(BINARISATION_SEED).random(x.shape, np.float32)
    return jnp.asarray(uniform < x, jnp.float32)


def load(name: str) -> Pictures:
    """MNIST: 50,000 to train, 10,000 to validate, its own test set. Digits of 8 x 8: 1,197, 200 and 400."""
    if name == "digits":
        x = binarised(digits().x[np.random.default_rng(SPLIT_SEED).permutation(1797)])
        return Pictures(x[:1197], x[1197:1397], x[1397:], 50)
    table = np.load(pathlib.Path(os.environ["ERGODICA_DATA"]) / "mnist.npz")
    x = np.concatenate([table["x_train"], table["x_test"]]).reshape(-1, 784).astype(np.float32) / np.float32(255)
    x = binarised(x)
    return Pictures(x[:50_000], x[50_000:60_000], x[60_000:], 200)


class Programs(NamedTuple):
    """Compiled functions of a task; a loss with another knob, or another rate, does not compile them again."""

    start: Callable
    epoch: Callable


def compiled(task: Task, first: dict | None = None) -> Programs:
    """Steps of SVI, a whole epoch in one call; from given parameters, if they are given."""

    def make(loss: Any, rate: Any) -> Any:
        return numpyro.infer.SVI(task.model, loss.guide(task.model, task.guide), optax.adam(rate), loss)

    @jax.jit
    def start(key: jax.Array, loss: Any, batch: jax.Array) -> Any:
        return make(loss, 1e-3).init(key, *task.split(batch), init_params=first)

    @jax.jit
    def epoch(state: Any, loss: Any, rates: jax.Array, pictures: jax.Array, order: jax.Array) -> Any:
        def step(state: Any, at: tuple[jax.Array, jax.Array]) -> Any:
            rate, rows = at
            svi, batch = make(loss, rate), task.split(pictures[rows])
            svi.init(jax.random.key(0), *batch)  # where SVI learns the constraints; XLA drops the rest
            return svi.update(state, *batch)

        state, losses = jax.lax.scan(step, state, (rates, order))
        return state, jnp.mean(losses)

    return Programs(start, epoch)


def parameters(state: Any) -> dict[str, jax.Array]:
    """Of model and guide, out of a state of SVI (they are unconstrained)."""
    return numpyro.optim.optax_to_numpyro(optax.adam(1e-3)).get_params(state.optim_state)


def make_bound(task: Task, num_particles: int) -> Callable:
    """Mean over pictures of the importance-weighted bound of ``num_particles`` hard draws, one after the other."""
    loss = IWELBO(num_particles, dict.fromkeys(task.sites, StraightThrough()), vectorize_particles=False)

    @jax.jit
    def bound(key: jax.Array, params: dict[str, jax.Array], pictures: jax.Array) -> jax.Array:
        return -loss.loss(key, params, task.model, task.guide, *task.split(pictures)) / pictures.shape[0]

    return bound


class Settings(NamedTuple):
    """Sizes of a run."""

    epochs: int
    batch_size: int = 100
    curve: tuple[int, int] = (10, 500)
    """Particles and pictures of the validation set after each epoch."""
    final: tuple[int, int] = (100, 1000)
    """Of the test set at the end."""
    choice: int = 1000
    """Pictures of the validation set that choose the rate."""


class Trainer:
    """A task and a method, compiled once for all rates and seeds."""

    def __init__(self, task: Task, method: Method, pictures: Pictures, settings: Settings, bounds: dict) -> None:
        self.task, self.method, self.pictures, self.settings = task, method, pictures, settings
        self.programs, self.bounds = compiled(task), bounds
        self.batches, self.seconds = pictures.train.shape[0] // settings.batch_size, []

    def bound(self, num_particles: int, key: jax.Array, state: Any, pictures: jax.Array) -> float:
        """Evaluate; compiled functions are shared by all methods of a task."""
        name = (self.task.name, num_particles)
        self.bounds.setdefault(name, make_bound(self.task, num_particles))
        return float(self.bounds[name](key, parameters(state), pictures))

    def fit(self, seed: int, rate: float, after: Callable[[int, Any, float], None] = lambda *_: None) -> Any:
        """Train; ``after(epoch, state, loss)``."""
        key_start, key_order = jax.random.split(jax.random.key(seed))
        data, size, epochs = self.pictures.train, self.settings.batch_size, self.settings.epochs
        loss, self.seconds = self.method.loss(self.task, self.knob(0)), []
        state = self.programs.start(key_start, loss, data[:size])
        rates = jnp.asarray(rate * decay(np.arange(epochs * self.batches) / (epochs * self.batches)), jnp.float32)
        for epoch, now in enumerate(rates.reshape(epochs, self.batches)):
            order = jax.random.permutation(jax.random.fold_in(key_order, epoch), data.shape[0])
            order = order[: self.batches * size].reshape(self.batches, size)
            loss = self.method.loss(self.task, self.knob(epoch))
            began = time.process_time()
            state, value = self.programs.epoch(state, loss, now, data, order)
            value = float(value) / size
            self.seconds.append(time.process_time() - began)
            after(epoch, state, value)
        return state

    def knob(self, epoch: int) -> jax.Array:
        """Temperature or slope during an epoch."""
        return jnp.asarray(self.method.knob(epoch / self.settings.epochs, self.task), jnp.float32)

    def run(self, seed: int, rate: float) -> tuple[dict[str, Any], Any]:
        """Train, with a bound on the validation set after each epoch, and at the end that which chooses the rate."""
        particles, number = self.settings.curve
        key, held_out = jax.random.key(1000 + seed), self.pictures.validation
        curve, training = [], []

        def after(epoch: int, state: Any, loss: float) -> None:
            curve.append(self.bound(particles, jax.random.fold_in(key, epoch), state, held_out[:number]))
            training.append(-loss)

        state = self.fit(seed, rate, after)
        chooses = self.bound(particles, key, state, held_out[: self.settings.choice])
        record = {"rate": rate, "validation": chooses, "curve": curve, "training": training, "step_ms": self.step_ms()}
        return record, state

    def test(self, seed: int, state: Any) -> float:
        """The bound that is reported."""
        particles, number = self.settings.final
        return self.bound(particles, jax.random.key(2000 + seed), state, self.pictures.test[:number])

    def best(self, seed: int) -> tuple[dict[str, Any], Any, dict[str, float]]:
        """Run at all rates; that with the best bound on the validation set, and these bounds."""
        found = [self.run(seed, rate) for rate in RATES]
        chosen = max(found, key=lambda pair: np.nan_to_num(pair[0]["validation"], nan=-np.inf))
        return *chosen, {f"{record['rate']:g}": record["validation"] for record, _ in found}

    def runs(self) -> int:
        """Runs of model and guide a step."""
        arguments = self.task.split(self.pictures.train[: self.settings.batch_size])
        rows = self.method.loss(self.task, 1.0).plan(self.task.model, self.task.guide, *arguments).rows
        return self.method.num_particles * math.prod(row.runs for row in rows)

    def step_ms(self) -> float:
        """Processor time of a step: median over the epochs of the last fit, the first left out where there are others."""
        return 1e3 * float(np.median(self.seconds[1:] or self.seconds)) / self.batches


def decay(progress: np.ndarray) -> np.ndarray:
    """Factor of the rate: 1 for a fifth of a run, then linearly to 0."""
    return np.minimum(1.0, (1.0 - progress) / 0.8)
