"""A fit under way: compiled chunks between evaluations, what is kept on the host, checkpoints, the end."""

import hashlib
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.result import Result
from ergodica.core.types import Key, PyTree
from ergodica.run import fit_loop
from ergodica.run.checkpoint import Checkpoint, Store, fingerprint
from ergodica.run.feed import Feed
from ergodica.run.fit_history import Table
from ergodica.run.fit_loop import NONFINITE, TAKEN
from ergodica.run.fit_monitor import OWN_COLUMNS, Best, Evaluator, Monitor, check_monitored
from ergodica.run.interrupt import interruptible
from ergodica.run.progress import Progress

_CHUNK_SECONDS = 0.25
_ADDRESS = re.compile(r"( at)? 0x[0-9a-f]+")


@dataclass(frozen=True)
class Job:
    """What shall be fitted, and how."""

    gradient: AbstractGradientEstimator
    optimiser: Any
    schedule: Callable | None
    guard: fit_loop.Guard
    evaluator: Evaluator
    monitor: Monitor
    num_steps: int
    evaluate_every: int
    max_seconds: float
    seed: str


@dataclass
class _At:
    """How far a fit is; goes into the checkpoint, with what `Best` holds."""

    step: int = 0
    num_gradients: int = 0
    wall_time: float = 0.0


@dataclass
class Run:
    """The carry on the device; history, best parameters and times on the host."""

    job: Job
    key: Key
    metric_key: Key
    carry: fit_loop.Carry
    feed: Feed | None = None
    at: _At = field(default_factory=_At)
    best: Best = field(default_factory=Best)
    store: Store | None = None
    resumed_from: int = 0
    compile_time: float = 0.0
    evaluation_time: float = 0.0

    def __post_init__(self) -> None:
        first = None if self.feed is None else self.feed.first
        self.held = fit_loop.Held.of(self.job.gradient, self.job.optimiser, self.job.guard, self.key)
        self.buffer = fit_loop.empty_buffer(self.held, self.carry, first)
        columns = [n for n, x in self.buffer._asdict().items() if x is not None]
        self.steps = Table([*columns, "wall_time"])
        self.evaluations: Table | None = None
        self.best_params = self._params()
        self.saved, self.last_save, self.every = (0, 0), time.monotonic(), np.inf
        self._seconds_a_step = np.inf

    def attach(self, checkpoint: Checkpoint) -> None:
        """Go on from what a checkpoint holds, and save there from now on."""
        self.store, self.every = Store(checkpoint.path, self._fingerprint()), checkpoint.every
        found = self.store.load()
        if found is None:
            return
        progress, arrays, shards = found
        if progress["step"] > self.job.num_steps:
            raise ValueError(
                f"The checkpoint holds {progress['step']} steps, more than num_steps={self.job.num_steps}."
            )
        self.job.evaluator.names = progress["metrics"]
        self._open_evaluations()
        assert self.evaluations is not None
        self.at = _At(progress["step"], progress["num_gradients"], progress["wall_time"])
        self.best = Best(**progress["best"])
        leaves, treedef = jax.tree.flatten((self.carry, self.best_params))
        self.carry, self.best_params = treedef.unflatten(map(_from_host, arrays, leaves))
        for shard in shards:
            self.steps.take(shard[: len(self.steps.names)])
            self.evaluations.take(shard[len(self.steps.names) :])
        self.saved, self.resumed_from = self._lengths(), self.at.step

    def execute(self, *, progress: bool) -> Result:
        """Run to the end, whichever it is."""
        if self.evaluations is None:
            self._evaluate_start()
        began = time.monotonic()
        self._advance(0)
        self.compile_time = time.monotonic() - began
        target = 1
        with Progress(self.job.num_steps, enabled=progress) as bar, interruptible() as interrupted:
            while (result := self._end(interrupted=interrupted())) is None:
                done = self._advance(self._chunk(target))
                if done == 0:
                    warnings.warn(f"The batches ended before step {self.at.step}; the fit ends there.", stacklevel=4)
                    result = Result.INTERRUPTED
                    break
                target = max(1, min(4 * target, int(_CHUNK_SECONDS / self._seconds_a_step)))
                if self.at.step % self.job.evaluate_every == 0 and not self.carry.stop:
                    self._evaluate()
                bar.update(self.at.step, "fitting", self._note())
                if self.store is not None and not self.carry.stop and time.monotonic() - self.last_save > self.every:
                    self.save()
        if self.store is not None and result is not Result.NONFINITE:
            self.save()
        # after the checkpoint, so that a fit that goes on from it knows nothing of an evaluation off the grid
        if result is not Result.INTERRUPTED and self.at.step % self.job.evaluate_every:
            self._evaluate()
        return result

    def save(self) -> None:
        """Write a checkpoint, with the history since the last one."""
        assert self.store is not None
        assert self.evaluations is not None
        progress = {**vars(self.at), "best": vars(self.best), "metrics": self.job.evaluator.names}
        new = [*self.steps.since(self.saved[0]), *self.evaluations.since(self.saved[1])]
        state = jax.tree.map(_to_host, (self.carry, self.best_params))
        self.store.save(progress, state, new if self._lengths() != self.saved else None)
        self.saved, self.last_save = self._lengths(), time.monotonic()

    def failure(self) -> str:
        """Say where and why the guard ended the run."""
        last = int(self.at.step) - 1
        in_a_row = int(self.carry.skipped_in_a_row)
        advice = (
            "The usual causes are a learning rate that is too large, and a density that is not finite where the parameters lead: "
            "try a tenth of the rate, or optax.clip_by_global_norm before the optimiser."
        )
        if bool(self.job.guard.stop_at_nonfinite) and self.steps["status"][last] == NONFINITE:
            norm = self.steps["grad_norm"][last]
            what = "gradient" if not np.isfinite(norm) else "optimiser's update"
            return (
                f"The {what} became NaN or infinite at step {last}; the parameters are those before it. {advice} "
                "on_nonfinite='skip' leaves out such steps."
            )
        return f"{in_a_row} steps in a row were skipped, the last at step {last}. {advice}"

    def _advance(self, num_steps: int) -> int:
        """Run a chunk of at most so many steps; return how many."""
        batches = None
        if self.feed is not None:
            num_steps, batches = self.feed.take(self.at.step, num_steps)
        began = time.monotonic()
        first, num = (np.asarray(n, np.int32) for n in (self.at.step, num_steps))
        self.carry, self.buffer, done = fit_loop.advance(self.held, first, num, batches, self.carry, self.buffer)
        if self.feed is not None:
            self.feed.prefetch(self.job.num_steps - self.at.step - num_steps)  # while the device is at work
        jax.block_until_ready(self.carry)
        seconds, done = time.monotonic() - began, int(done)
        if done:
            self._keep(done, seconds)
            self._seconds_a_step = max(1e-9, seconds / done)
        return done

    def _keep(self, done: int, seconds: float) -> None:
        at = self.at
        rows = {name: np.asarray(x)[:done] for name, x in self.buffer._asdict().items() if x is not None}
        rows["n_grad"] = at.num_gradients + np.cumsum(rows["n_grad"], dtype=np.int64)
        rows["wall_time"] = at.wall_time + seconds * np.arange(1, done + 1) / done
        self.steps.append(rows)
        at.step += done
        at.num_gradients, at.wall_time = int(rows["n_grad"][-1]), at.wall_time + seconds

    def _chunk(self, target: int) -> int:
        """How many steps the next chunk has: none goes beyond an evaluation, the end or the time."""
        job, step = self.job, self.at.step
        num = min(target, fit_loop.SLOTS, job.num_steps - step, job.evaluate_every - step % job.evaluate_every)
        left = job.max_seconds - self.at.wall_time
        return num if np.isinf(left) else min(num, max(1, int(left / self._seconds_a_step)))

    def _end(self, *, interrupted: bool) -> Result | None:
        """Whether the run is at its end, and which."""
        if self.carry.stop:
            return Result.NONFINITE
        if self.at.step >= self.job.num_steps:
            return Result.SUCCESSFUL
        if self.best.exhausted(self.job.monitor):
            return Result.STOPPED
        if self.at.wall_time >= self.job.max_seconds:
            return Result.TIMED_OUT
        return Result.INTERRUPTED if interrupted else None

    def _evaluate_start(self) -> None:
        """Evaluate the metrics once before the first step, so that those that cannot be used are known at once."""
        found = self._metrics()
        assert self.job.evaluator.names is not None
        check_monitored(self.job.monitor, self.job.evaluator.names)
        self._open_evaluations()
        if found:
            self._judge(found)

    def _open_evaluations(self) -> None:
        assert self.job.evaluator.names is not None
        self.evaluations = Table([*OWN_COLUMNS, *self.job.evaluator.names])

    def _evaluate(self) -> None:
        self._judge(self._metrics())

    def _metrics(self) -> dict[str, float]:
        began = time.monotonic()
        found = {}
        if self.job.evaluator.metrics:
            found = self.job.evaluator(jax.random.fold_in(self.metric_key, self.at.step), self._params())
        self.evaluation_time += time.monotonic() - began
        return found

    def _judge(self, metrics: dict[str, float]) -> None:
        """Write down an evaluation, and keep the parameters if they are the best."""
        assert self.evaluations is not None
        at, row = self.at, {**metrics, "value": self._mean_value()}
        own = {"step": at.step, "n_grad": at.num_gradients, "wall_time": at.wall_time}
        self.evaluations.append({name: np.asarray([x]) for name, x in (row | own).items()})
        if self.best.update(self.job.monitor, row[self.job.monitor.metric], at.step):
            self.best_params = self._params()

    def _mean_value(self) -> float:
        """Mean of the estimator's value over the steps taken since the evaluation before, or over as many."""
        last = slice(max(0, len(self.steps) - self.job.evaluate_every), None)
        values = self.steps["value"][last][self.steps["status"][last] == TAKEN]
        return float(np.mean(values, dtype=float)) if len(values) else float("nan")

    def _params(self) -> PyTree:
        """Copy the parameters, since the carry's memory is used again."""
        return _copy(self.carry.params)

    def _lengths(self) -> tuple[int, int]:
        return len(self.steps), 0 if self.evaluations is None else len(self.evaluations)

    def _note(self) -> str:
        """How the fit looks so far."""
        parts = [f"value {self.steps['value'][-1]:.4g}"]
        if self.evaluations is not None and len(self.evaluations):
            parts += [f"{name} {self.evaluations[name][-1]:.4g}" for name in (self.job.evaluator.names or [])[:3]]
        return ", ".join(parts)

    def _fingerprint(self) -> dict[str, str]:
        job = self.job
        arrays, rest = eqx.partition((job.gradient, self.carry.params), eqx.is_array)
        words = f"{jax.tree.structure(job.gradient)} {[repr(x) for x in jax.tree.leaves(rest)]}"
        monitor = f"{job.monitor.metric} {job.monitor.minimise} {job.monitor.least_gain}"
        guard = jax.tree.map(float, job.guard)
        return fingerprint(
            jax.tree.map(_to_host, arrays),
            "gradient, data and start",
            seed=job.seed,
            gradient=_hash(words),
            optimiser=_hash(_program(job.optimiser, self.carry)),
            evaluate_every=job.evaluate_every,
            monitor=monitor,
            metrics=sorted(job.evaluator.metrics),
            guard=str(tuple(guard)),
            **({} if self.feed is None else {"batches": self.feed.fingerprint}),
        )


@jax.jit
def _copy(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, params)


def _program(optimiser: Any, carry: fit_loop.Carry) -> str:
    """The optimiser's update as JAX traces it, with all its numbers; what functions are called does not matter."""
    import optax

    def update(carry: fit_loop.Carry) -> Any:
        extended = optax.with_extra_args_support(optimiser)
        return extended.update(carry.params, carry.optimiser, carry.params, value=carry.mean_norm, grad=carry.params)

    with jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(update)(carry)
    return f"{traced} {[np.asarray(x).tolist() for x in traced.consts]} {jax.tree.structure(carry.optimiser)}"


def _hash(words: str) -> str:
    return hashlib.sha256(_ADDRESS.sub("", words).encode()).hexdigest()


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if fit_loop.is_key(leaf) else leaf)


def _from_host(array: np.ndarray, like: Any) -> jax.Array:
    if fit_loop.is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array)
