"""The run of many chains: compiled chunks, what is kept on the host, checkpoints, the result."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng, tree
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.result import Outcome, Result, SamplingError
from ergodica.core.types import Key, Position
from ergodica.run import export, loop
from ergodica.run.checkpoint import Checkpoint, Store, fingerprint
from ergodica.run.feed import Feed
from ergodica.run.interrupt import interruptible
from ergodica.run.placement import Placement, placement_over, put
from ergodica.run.progress import Progress
from ergodica.run.start import starts

if TYPE_CHECKING:
    import xarray

_CHUNK_SECONDS = 0.25
_BUFFER_BYTES = 1 << 25
_WARMUP_DRAWS = 200


def run_chains(
    key: Key,
    sampler: AbstractKernel,
    sizes: tuple[int, int, int, int],
    initial: Position | Callable[[Key], Position] | None,
    posterior: Posterior | None,
    *,
    progress: bool,
    checkpoint: str | os.PathLike | Checkpoint | None,
    throw: bool,
    probes: bool,
    shared_batches: bool = False,
    devices: Sequence[Any] | None = None,
    feed: Feed | None = None,
) -> "xarray.DataTree":
    """Do what `sample` and `ergodica.run.stream` do; ``feed`` is where the batches of the latter come from."""
    rng.check_key(key)
    sampler = check.instance("sampler", sampler, AbstractKernel, "such as SGLD(gradient, step_size)")
    num_samples, num_warmup, num_chains, thin = sizes
    job = _Job(
        kernel=sampler,
        posterior=sampler.posterior if posterior is None else posterior,
        num_samples=check.integer("num_samples", num_samples),
        num_warmup=check.integer("num_warmup", num_warmup, least=0),
        num_chains=check.integer("num_chains", num_chains),
        thin=check.integer("thin", thin),
        seed=rng.describe(key),
        probes=bool(probes),
        shared_batches=bool(shared_batches),
    )
    if shared_batches and sampler.batch_source is None:
        raise ValueError(
            f"shared_batches=True needs a sampler whose gradient draws batches from data that it holds; this "
            f"{type(sampler).__name__} has none to share. Use Minibatch(posterior, batch_size), or leave it out."
        )
    if job.num_steps >= 2**31:
        raise ValueError(
            f"A chain can make at most 2**31 - 1 steps; num_warmup + thin * num_samples is {job.num_steps}."
        )
    key_start, key_init, key_run, key_probe, key_shared = jax.random.split(key, 5)
    positions = starts(key_start, job.num_chains, initial, job.posterior)
    keys = (jax.random.split(key_run, job.num_chains), jax.random.split(key_probe, job.num_chains))
    first = None if feed is None else feed.first
    key_order, key_draws = jax.random.split(key_shared) if shared_batches else (None, None)
    placement = Placement() if devices is None else placement_over(devices, job.num_chains)
    carry = loop.start(sampler, jax.random.split(key_init, job.num_chains), positions, first, key_order)
    run = _Run(job, keys, carry, placement, feed, key_draws)
    if checkpoint is not None:
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        run.attach(checkpoint, positions)
    outcome = run.execute(progress=progress, stop_at_nonfinite=throw)
    datatree = run.result(outcome)
    if throw and outcome.result is Result.NONFINITE:
        raise SamplingError(outcome, datatree)
    return datatree


@dataclass(frozen=True)
class _Job:
    """What shall be run."""

    kernel: AbstractKernel
    posterior: Posterior | None
    num_samples: int
    num_warmup: int
    num_chains: int
    thin: int
    seed: str
    probes: bool
    shared_batches: bool

    @property
    def num_steps(self) -> int:
        return self.num_warmup + self.thin * self.num_samples

    @property
    def warmup_thin(self) -> int:
        return max(1, self.num_warmup // _WARMUP_DRAWS)


@dataclass
class _Progress:
    """How far a run is; all of it goes into the checkpoint."""

    step: int = 0
    stored: int = 0
    warmup_stored: int = 0
    centre_count: int = 0
    num_gradients: int = 0
    num_probe_gradients: int = 0
    wall_time: float = 0.0


@dataclass
class _Run:
    """A run under way: the carry on the device, the draws on the host."""

    job: _Job
    keys: tuple[Key, Key]
    carry: loop.Carry
    placement: Placement = field(default_factory=Placement)
    feed: Feed | None = None
    shared_key: Key | None = None
    at: _Progress = field(default_factory=_Progress)
    store: Store | None = None
    resumed_from: int = 0
    compile_time: float = 0.0

    def __post_init__(self) -> None:
        first = None if self.feed is None else self.feed.first
        shape = loop.record_shape(self.job.kernel, self.carry, first, probes=self.job.probes)
        self.draws = export.allocate(shape, self.job.num_samples)
        one = tree.size(shape.position) // self.job.num_chains
        self.centre = np.zeros(one)
        bytes_a_draw = sum(s.dtype.itemsize * int(np.prod(s.shape)) for s in jax.tree.leaves(shape))
        self.num_slots = max(1, min(4096, self.job.num_samples, _BUFFER_BYTES // max(1, bytes_a_draw)))
        self.buffer = jax.tree.map(lambda s: jnp.zeros((self.num_slots, *s.shape), s.dtype), shape)
        self.buffer, self.keys = put(self.buffer, self.placement.draws), put(self.keys, self.placement.chains)
        self.kernel, self.carry = put(self.job.kernel, self.placement.copies), self._placed(self.carry)
        self.saved, self.last_save, self.every = 0, time.monotonic(), np.inf

    def _placed(self, carry: loop.Carry) -> loop.Carry:
        """Bring chains to their devices."""
        chains = carry._replace(since=None, shared=None)
        since, shared = put((carry.since, carry.shared), self.placement.copies)
        return put(chains, self.placement.chains)._replace(since=since, shared=shared)

    def attach(self, checkpoint: Checkpoint, positions: Position) -> None:
        """Go on from what a checkpoint holds, and save there from now on."""
        job = self.job
        mark = fingerprint(
            (job.kernel, positions),
            seed=job.seed,
            sampler=export.describe(job.kernel),
            num_warmup=job.num_warmup,
            num_chains=job.num_chains,
            thin=job.thin,
            probes=job.probes,
            **({"shared_batches": True} if job.shared_batches else {}),
            **({} if self.feed is None else {"batches": self.feed.fingerprint}),
        )
        self.store, self.every = Store(checkpoint.path, mark), checkpoint.every
        found = self.store.load()
        if found is None:
            return
        progress, arrays, shards = found
        self.at = _Progress(**progress)
        if self.at.stored > job.num_samples:
            raise ValueError(
                f"The checkpoint holds {self.at.stored} draws a chain, more than num_samples={job.num_samples}."
            )
        treedef = jax.tree.structure((self.carry, self.centre))
        carry, self.centre = jax.tree.unflatten(treedef, arrays)
        self.carry = self._placed(jax.tree.map(jnp.asarray, carry))
        first = 0
        for shard in shards:
            draws = jax.tree.unflatten(jax.tree.structure(self.draws), shard)
            export.write(self.draws, first, draws)
            first += jax.tree.leaves(draws)[0].shape[1]
        self.saved = self.resumed_from = first

    def execute(self, *, progress: bool, stop_at_nonfinite: bool) -> Outcome:
        """Run to the end, to the first bad chain, or to an interruption."""
        began, before = time.monotonic(), self.at.wall_time
        self._advance(0)
        self.compile_time = time.monotonic() - began
        target = 1
        with (
            Progress(self.job.num_steps * self.job.num_chains, enabled=progress) as bar,
            interruptible() as interrupted,
        ):
            while self.at.step < self.job.num_steps and not interrupted():
                chunk_began = time.monotonic()
                done = self._advance(target)
                if done == 0:
                    warnings.warn(f"The batches ended before step {self.at.step}; the run ends there.", stacklevel=4)
                    break
                seconds = max(1e-6, time.monotonic() - chunk_began)
                target = max(1, min(4 * target, int(done * _CHUNK_SECONDS / seconds)))
                self.at.wall_time = before + time.monotonic() - began - self.compile_time
                self._report(bar)
                if stop_at_nonfinite and self._first_bad() is not None:
                    break
                if self.store is not None and time.monotonic() - self.last_save > self.every:
                    self.save()
        bad = self._first_bad()
        if self.store is not None and bad is None:
            self.save()
        if bad is not None:
            return Outcome(Result.NONFINITE, *bad)
        return Outcome(Result.SUCCESSFUL if self.at.step == self.job.num_steps else Result.INTERRUPTED)

    def _advance(self, num_steps: int) -> int:
        """Run a chunk of at most so many steps; return how many."""
        job, at = self.job, self.at
        warming = at.step < job.num_warmup
        thin = job.warmup_thin if warming else job.thin
        since = int(self.carry.since)
        end = job.num_warmup if warming else job.num_steps
        num_steps = min(num_steps, end - at.step, self.num_slots * thin - since)
        batches = None
        if self.feed is not None:
            num_steps, batches = self.feed.take(at.step, num_steps)
        plan = (at.step, at.warmup_stored if warming else job.num_warmup + at.stored, num_steps, thin)
        self.carry, self.buffer = loop.advance(
            self.kernel,
            self.carry,
            self.buffer,
            *self.keys,
            jnp.asarray(self.centre, jnp.result_type(float)),
            loop.Plan(*(jnp.asarray(n, jnp.int32) for n in plan)),
            batches,
            self.shared_key,
            probes=job.probes,
        )
        if self.feed is not None:
            self.feed.prefetch(job.num_steps - at.step - num_steps)  # while the device is at work
        jax.block_until_ready(self.carry)
        num_draws = (since + num_steps) // thin
        at.step += num_steps
        if num_draws:
            self._keep(export.chain_major(self.buffer, num_draws), warming=warming)
        if warming and at.step == job.num_warmup:
            self._end_warmup()
        return num_steps

    def _keep(self, draws: loop.Record, *, warming: bool) -> None:
        at = self.at
        at.num_gradients += int(export.num_gradients(draws, self.job.kernel).sum())
        if draws.probe is not None:
            at.num_probe_gradients += int(draws.probe.n_grad.astype(np.int64).sum())
        num = jax.tree.leaves(draws)[0].shape[1]
        if not warming:
            export.write(self.draws, at.stored, draws)
            at.stored += num
            return
        for i in range(num):  # one by one, so that the sum does not depend on how the run was cut into chunks
            at.warmup_stored += 1
            if 2 * at.warmup_stored * self.job.warmup_thin > self.job.num_warmup:
                leaves = jax.tree.leaves(draws.position)
                self.centre = self.centre + np.concatenate([x[:, i].mean(0, dtype=float).ravel() for x in leaves])
                at.centre_count += 1

    def _end_warmup(self) -> None:
        """Fix the centre, and count steps and gradients of the sampling phase from zero."""
        self.centre = self.centre / max(1, self.at.centre_count)
        self.at.num_gradients += int(export.count(self.carry.n_grad).sum()) * self.job.kernel.n_grad_unit
        nothing = jax.tree.map(jnp.zeros_like, self.carry.n_grad)
        self.carry = self._placed(self.carry._replace(since=jnp.zeros((), jnp.int32), n_grad=nothing))

    def save(self) -> None:
        """Write a checkpoint with the draws since the last one."""
        assert self.store is not None
        new = (
            jax.tree.map(lambda x: x[:, self.saved : self.at.stored], self.draws)
            if self.at.stored > self.saved
            else None
        )
        self.store.save(vars(self.at), jax.device_get((self.carry, self.centre)), new)
        self.saved, self.last_save = self.at.stored, time.monotonic()

    def _first_bad(self) -> tuple[int, int] | None:
        first_bad = np.asarray(self.carry.first_bad)
        if np.all(first_bad < 0):
            return None
        chain = int(np.argmin(np.where(first_bad < 0, np.iinfo(np.int32).max, first_bad)))
        return chain, int(first_bad[chain])

    def _report(self, bar: Progress) -> None:
        phase = "warm-up" if self.at.step < self.job.num_warmup else "sampling"
        bar.update(self.at.step * self.job.num_chains, phase, self._note())

    def _note(self) -> str:
        """How the run looks so far: acceptance where there is one, else the temperature."""
        stored = self.at.stored
        if not stored:
            return ""
        if "acceptance_rate" in self.draws.info:
            return f"acceptance {self.draws.info['acceptance_rate'][:, :stored].mean():.2f}"
        if self.draws.probe is not None:
            return f"temperature {self.draws.probe.temperature[:, :stored].mean():.3f}"
        return ""

    def result(self, outcome: Outcome) -> "xarray.DataTree":
        """Export what was sampled."""
        job, at = self.job, self.at
        draws = jax.tree.map(lambda x: x[:, : at.stored], self.draws)
        attributes = {
            "seed": job.seed,
            "num_chains": job.num_chains,
            "num_warmup": job.num_warmup,
            "thin": job.thin,
            "shared_batches": int(job.shared_batches or self.feed is not None),
            "num_data": 0 if job.posterior is None else job.posterior.num_data,
            "wall_time": at.wall_time,
            "compile_time": self.compile_time,
            "num_gradients": at.num_gradients,
            "num_probe_gradients": at.num_probe_gradients,
            "resumed_from": self.resumed_from,
            "result": str(outcome.result),
            "result_message": outcome.message(),
        }
        summary = export.summarise(self.kernel, self.carry.state)
        return export.to_datatree(draws, job.kernel, job.posterior, self.centre, summary, attributes)
