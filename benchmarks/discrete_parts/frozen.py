"""Bias and noise of gradients at frozen points, and where each estimator ends up when noise has been averaged away.

On small networks for digits (8 bits; two one-hot vectors of ten; two layers of 5 bits) all latents are summed out, so that bias
is exact up to its Monte Carlo error. On the networks of full size for MNIST the reference is leave-one-out with many particles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from discrete_parts.exact import exact_bound
from discrete_parts.methods import METHODS, Method, everywhere
from discrete_parts.programs import Shape, Task, lower_half, make_tasks, vae
from discrete_parts.training import Settings, Trainer, binarised, compiled, decay, load, make_bound, parameters
from ergodica.estimators import ELBO, GumbelSoftmax, LeaveOneOut, Score
from ergodica.models.zoo import digits

BLOCKS = 20
RATE = 0.01
GUIDE = ("encode", "first", "second")
"""How the names of the guide's parameters begin."""


def fixed(make: Callable[[], Any]) -> Callable[[Task, Any], dict[str, Any]]:
    return everywhere(lambda _: make())


SOFT = {f"gumbel_{t}": Method(f"Gumbel-Softmax({t})", 1, fixed(lambda t=t: GumbelSoftmax(t))) for t in (1.0, 0.5)} | {
    f"gumbel_hard_{t}": Method(f"ST Gumbel-Softmax({t})", 1, fixed(lambda t=t: GumbelSoftmax(t, straight_through=True)))
    for t in (1.0, 0.5)
}


def frozen_methods(task: Task, bound: float) -> dict[str, Method]:
    """Those that can be held: the score function with the bound itself as a constant baseline."""
    score = Method("score function, constant", 1, fixed(lambda: Score(bound)))
    names = ["muprop", "straight_through", "reinmax", "leave_one_out"]
    names += ["darn", "disarm"] if task.name.endswith("bits") else []
    return {"score": score} | {name: METHODS[name] for name in names} | SOFT


class Moments(NamedTuple):
    """Means of blocks of replicates (B, D), and the variance summed over coordinates; D are the parameters of one part."""

    means: np.ndarray
    variance: float


def make_block(task: Task, arguments: tuple) -> Callable:
    """Compiled sum of gradients of the mean bound, and of their squared norms, over keys; for all losses and points."""

    def gradient(key: jax.Array, loss: Any, params: dict) -> dict[str, jax.Array]:
        def mean_bound(p: dict) -> jax.Array:
            return -loss.loss(key, p, task.model, task.guide, *arguments) / arguments[0].shape[0]

        return by_part(jax.grad(mean_bound)(params))

    @jax.jit
    def block(keys: jax.Array, loss: Any, params: dict) -> Any:
        def add(total: Any, key: jax.Array) -> tuple[Any, None]:
            g = gradient(key, loss, params)
            return jax.tree.map(jnp.add, total, (g, {name: jnp.sum(x**2) for name, x in g.items()})), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(by_part, params))
        return jax.lax.scan(add, (zero, dict.fromkeys(zero, jnp.zeros(()))), keys)[0]

    return block


def moments(key: jax.Array, block: Callable, loss: Any, params: dict, repeats: int) -> dict[str, Moments]:
    """Of the gradients for the guide's and the model's parameters."""
    each, sums, squares = repeats // BLOCKS, [], []
    for i in range(BLOCKS):
        total, square = block(jax.random.split(jax.random.fold_in(key, i), each), loss, params)
        sums.append(jax.tree.map(lambda x: np.asarray(x, np.float64) / each, total))
        squares.append(jax.tree.map(lambda x: float(x) / each, square))
    found = {}
    for part in sums[0]:
        means = np.stack([s[part] for s in sums])
        variance = np.mean([s[part] for s in squares]) - squared_norm(means)[0]
        found[part] = Moments(means, float(variance))
    return found


def by_part(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters of the guide and of the model, as vectors."""
    parts: dict[str, list] = {"guide": [], "model": []}
    for name in sorted(tree):
        parts["guide" if name.startswith(GUIDE) else "model"].append(jnp.ravel(tree[name]))
    return {name: jnp.concatenate(values) for name, values in parts.items()}


def squared_norm(rows: np.ndarray) -> tuple[float, float]:
    """Squared norm of the mean of independent rows (B, D), unbiased, and its jackknife standard error."""

    def u_statistic(rows: np.ndarray) -> float:
        n = len(rows)
        return float((np.sum(np.sum(rows, 0) ** 2) - np.sum(rows**2)) / (n * (n - 1)))

    without = [u_statistic(np.delete(rows, i, axis=0)) for i in range(len(rows))]
    n = len(rows)
    return u_statistic(rows), float(np.sqrt((n - 1) / n * np.sum((without - np.mean(without)) ** 2)))


def compare(found: Moments, reference: np.ndarray) -> dict[str, float]:
    """Bias and standard deviation over the norm of the reference, with an error; the cosine of the mean with the reference."""
    reference = np.broadcast_to(reference, found.means.shape)
    exact = np.ptp(reference, axis=0).max() == 0
    norm2 = float(np.sum(reference[0] ** 2)) if exact else squared_norm(reference)[0]
    bias2, error = squared_norm(found.means - reference)
    own2 = squared_norm(found.means)[0]
    inner = float(found.means.mean(0) @ reference.mean(0))
    return {
        "bias": float(np.sqrt(max(bias2, 0.0) / norm2)),
        "bias_below": float(np.sqrt(max(bias2 + 2 * error, 0.0) / norm2)),
        "sd": float(np.sqrt(max(found.variance, 0.0) / norm2)),
        "cosine": inner / float(np.sqrt(max(own2, 1e-300) * norm2)),
    }


# --- small networks, exact --------------------------------------------------------------------------------------------


def small_tasks(mean: jax.Array) -> dict[str, Task]:
    """Latents few enough to be summed out."""
    made = (vae(Shape("bits", 8, mean)), vae(Shape("categories", 20, mean)), lower_half(Shape("bits", 5, mean)))
    return {task.name: task for task in made}


def ascend(task: Task, params: dict, arguments: tuple, steps: int, rate: float) -> dict[str, Any]:
    """Adam on the exact bound; parameters after a tenth of the steps and at the end."""
    schedule = optax.linear_schedule(rate, 0.0, steps - steps // 5, steps // 5)
    optimiser = optax.adam(schedule)

    @jax.jit
    def run(params: dict, state: Any, number: jax.Array) -> Any:
        def step(_: int, carry: Any) -> Any:
            params, state = carry
            gradient = jax.grad(lambda p: -exact_bound(task, p, arguments))(params)
            updates, state = optimiser.update(gradient, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, number, step, (params, state))

    early, state = run(params, optimiser.init(params), steps // 10)
    late, _ = run(early, state, steps - steps // 10)
    return {"early": early, "late": late}


class Small(NamedTuple):
    """A small network, where its exact ascent starts, and where it comes to."""

    task: Task
    x: jax.Array
    first: dict
    points: dict[str, dict]
    bound: Callable


def climb(name: str, steps: int) -> Small:
    """Ascend the exact bound of 200 pictures."""
    x = binarised(digits().x)[:200]
    task = small_tasks(jnp.mean(x, axis=0))[name]
    first = parameters(compiled(task).start(jax.random.key(1), METHODS["leave_one_out"].loss(task, 1.0), x))
    bound = jax.jit(lambda p: exact_bound(task, p, task.split(x)))
    return Small(task, x, first, ascend(task, first, task.split(x), steps, RATE), bound)


def small(name: str, repeats: int = 1000, steps: int = 1000) -> dict[str, Any]:
    """Bias and noise at two points of the exact ascent."""
    task, x, _, points, bound = climb(name, steps)
    part = tuple(a[:50] for a in task.split(x))  # a batch, whose gradient is not zero at the end either
    gradient = jax.jit(jax.grad(lambda p: exact_bound(task, p, part)))
    block, found = make_block(task, part), {}
    for point, params in points.items():
        truth = {k: np.asarray(v, np.float64) for k, v in by_part(gradient(params)).items()}
        found[point] = {}
        for method, chosen in frozen_methods(task, float(bound(params))).items():
            taken = moments(jax.random.key(2), block, chosen.loss(task, jnp.ones(())), params, repeats)
            found[point][method] = {k: compare(m, truth[k]) for k, m in taken.items()}
    return {"repeats": repeats, "exact": {k: float(bound(v)) for k, v in points.items()}, "points": found}


def settled(name: str, steps: int = 1000) -> dict[str, Any]:
    """The exact bound at which each estimator ends."""
    task, x, first, points, bound = climb(name, steps)
    reached = {"exact": float(bound(points["late"]))} | ends(task, x, compiled(task, first), steps, bound)
    return {"steps": steps, "start": float(bound(first)), "ends": reached}


def ends(task: Task, x: jax.Array, programs: Any, steps: int, bound: Callable) -> dict[str, float]:
    """Exact bound after as many steps of each estimator from the same start, all pictures in every step."""
    order = jnp.broadcast_to(jnp.arange(len(x)), (steps, len(x)))
    rates = jnp.asarray(RATE * decay(np.arange(steps) / steps), jnp.float32)
    found = {}
    for name, method in frozen_methods(task, task.start).items():
        loss = method.loss(task, jnp.ones(()))
        state, _ = programs.epoch(programs.start(jax.random.key(3), loss, x), loss, rates, x, order)
        found[name] = float(bound(parameters(state)))
    return found


# --- full size --------------------------------------------------------------------------------------------------------


def full(name: str, repeats: int = 300, epochs: int = 2) -> dict[str, Any]:
    """Bias and noise on a batch of MNIST after epochs of leave-one-out; its mean with ten particles is the reference."""
    pictures = load("mnist")
    task = make_tasks(jnp.mean(pictures.train, axis=0), pictures.units)[name]
    trainer = Trainer(task, METHODS["leave_one_out"], pictures, Settings(epochs), {})
    params = parameters(trainer.fit(0, 0.01))
    batch = pictures.train[:100]
    block = make_block(task, task.split(batch))
    bound = float(make_bound(task, 1)(jax.random.key(4), params, batch))
    reference = ELBO(10, dict.fromkeys(task.sites, LeaveOneOut()))
    truth = moments(jax.random.key(5), block, reference, params, repeats)
    found = {}
    for method, chosen in frozen_methods(task, bound).items():
        taken = moments(jax.random.key(6), block, chosen.loss(task, jnp.ones(())), params, repeats)
        found[method] = {k: compare(m, truth[k].means) for k, m in taken.items()}
    return {"repeats": repeats, "epochs": epochs, "elbo": bound, "points": {"after training": found}}


SMALL, FULL = ("vae_categories", "vae_bits", "half_bits"), ("vae_categories", "vae_bits")


def parts(*, mnist: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Small networks; those of full size if there is MNIST."""
    made: dict[str, Callable] = {f"small {name}": functools.partial(small, name) for name in SMALL}
    made |= {f"ends {name}": functools.partial(settled, name) for name in SMALL}
    return made | ({f"full {name}": functools.partial(full, name) for name in FULL} if mnist else {})
