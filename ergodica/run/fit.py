"""Fit parameters by a gradient estimator and an optimiser of Optax."""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check, rng
from ergodica.core.cite import cite
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.result import Outcome, Result
from ergodica.core.types import Key, PyTree
from ergodica.run import fit_loop
from ergodica.run.checkpoint import Checkpoint
from ergodica.run.export import describe
from ergodica.run.feed import Batches, Feed
from ergodica.run.fit_history import to_datatree
from ergodica.run.fit_monitor import Evaluator, Metrics, Monitor
from ergodica.run.fit_run import Job, Run

if TYPE_CHECKING:
    import xarray

_LEARNING_RATE = 1e-3


class Fit(NamedTuple):
    """Where a fit ended, and how it got there.

    Attributes
    ----------
    params : pytree
        After the last step.
    best_params : pytree
        At the best evaluation of what is monitored; the start where there was none.
    best_step : int
        Steps made until then.
    state : pytree
        Of the estimator.
    optimiser_state : pytree
    result : Result
        ``successful``; ``stopped`` where the patience or ``timed_out`` where the time was at its end; ``nonfinite`` where
        the guard ended the fit; ``interrupted``.
    history : xarray.DataTree
        Group ``steps``: ``value``, ``grad_norm``, ``update_norm``, ``n_grad`` and ``wall_time`` (sums up to and with the step),
        ``status`` (0: taken), ``learning_rate`` where it is known. Group ``evaluations``: the metrics, ``value`` (a mean over
        ``evaluate_every`` steps), ``n_grad`` and ``wall_time``. How the fit was made is in the attributes. It can be written by
        ``to_netcdf``; `ergodica.diagnostics.plot_fit` draws it.
    """

    params: PyTree
    best_params: PyTree
    best_step: int
    state: Any
    optimiser_state: Any
    result: Result
    history: "xarray.DataTree"


class FitError(RuntimeError):
    """A fit that ran into NaN or infinity.

    Attributes
    ----------
    partial : Fit
        What was reached before.
    """

    def __init__(self, message: str, partial: Fit) -> None:
        super().__init__(message)
        self.partial = partial


def fit(
    key: Key,
    gradient: AbstractGradientEstimator,
    params: PyTree | None = None,
    *,
    num_steps: int = 1000,
    optimiser: Any = None,
    metrics: Metrics | None = None,
    evaluate_every: int = 100,
    monitor: str | Monitor = "value",
    max_seconds: float | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    spike: float | None = None,
    max_skipped: int = 10,
    batches: Batches | None = None,
    batches_per_epoch: int | None = None,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    progress: bool = True,
    throw: bool = True,
) -> Fit:
    r"""Ascend an objective with estimates of its gradient.

    .. math:: \theta_{i+1} = \theta_i + u_i(-\hat g_i), \qquad \hat g_i \approx \nabla_\theta F(\theta_i)

    with the updates :math:`u` of an optimiser that descends: estimators ascend, and the sign is turned here alone.

    Parameters
    ----------
    key : typed PRNG key
        The same key gives the same fit, whether or not it was interrupted and resumed.
    gradient : AbstractGradientEstimator
        Any: of a log density, a variational objective, an expected reward.
    params : pytree of floating point arrays, optional
        Where to start. Unless given: the estimator's own ``params``, what its ``start(key)`` makes, or a start of its posterior.
    num_steps : int
        At most so many.
    optimiser : optax.GradientTransformation, float or callable, optional
        A number or a schedule (a function of the count of steps taken) is the learning rate of Adam. By default Adam with
        0.001. Clipping, weight decay, averages and the like come from Optax: ``optax.chain(optax.clip_by_global_norm(1.0),
        optax.adam(1e-3))``.
    metrics : callable or dict of callables, optional
        ``metric(key, params)`` returns a dictionary of numbers by name; in a dictionary by name it may return one number. Called
        as they are, from the host: wrap them in `jax.jit`. Their keys differ from evaluation to evaluation.
    evaluate_every : int
        Steps between evaluations. There is one after the last step and, of metrics, one before the first, too.
    monitor : str or Monitor
        Which metric says which parameters are best, and ends the fit where it no longer improves: ``Monitor("ess", patience=5)``.
        By default the mean of the estimator's value over ``evaluate_every`` steps, which never ends it.
    max_seconds : float, optional
        Seconds of steps, without compilation and metrics, over all parts of a fit that was interrupted and resumed. What is
        reached in that time depends on the machine.
    on_nonfinite : {"raise", "skip"}
        What to do with a step whose gradient or update has a norm that is NaN or infinite: end the fit, with the parameters
        before it, or leave it out. Then the optimiser and the estimator stay as they were, too, and the next step has other
        random numbers.
    spike : float, optional
        Leave out steps whose gradient is longer than so many times the mean over the last 100 or so. This biases the fit.
    max_skipped : int
        So many steps left out in a row end the fit.
    batches : iterable or callable, optional
        Data to stream, as for `ergodica.run.stream`: ``RowBlocks``, ``batches(start_step)``, or an iterable. Step ``i`` uses
        batch ``i``.
    batches_per_epoch : int, optional
        As for `ergodica.run.stream`.
    checkpoint : path or Checkpoint, optional
        A directory in which the fit is saved every minute (or as `Checkpoint` says), and from which it goes on when it is called
        again with the same arguments. ``num_steps``, ``max_seconds`` and the patience may be larger then.
    progress : bool
        Show a bar where the error stream is a terminal.
    throw : bool
        Raise where the guard ends the fit. With ``False`` the result says so.

    Returns
    -------
    Fit

    Raises
    ------
    FitError
        If the guard ended the fit and ``throw`` is true; its attribute ``partial`` holds what was reached.
    CheckpointError
        If the checkpoint is damaged or of another fit.
    ValueError, TypeError
        For arguments of the wrong kind or size, a gradient that is not of the structure of ``params``, metrics that are not
        numbers, an optimiser that calls the objective itself (line searches), or no start.

    Notes
    -----
    Step ``i`` uses ``fold_in(run_key, i)``, and steps run in compiled chunks of about a quarter of a second, which end at
    evaluations. A resumed fit is bit-identical to an unbroken one on the same machine, but for times.

    Steps that were left out are counted in the history and reported by a warning. Control-C ends the fit after the current chunk,
    saves a checkpoint if there is one, and returns what was reached, with the result code ``interrupted``.

    A checkpoint knows an optimiser by the program of its update; the functions that an estimator holds, and metrics, by name
    alone: that one was edited between two runs is not noticed.

    Cost a step: one call of the estimator, one update, and two norms. With ``on_nonfinite="skip"`` or ``spike=``, a copy of the
    estimator's state.

    Not for objectives without noise, where `ergodica.find_mode` or another quasi-Newton method is faster by far.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum((t - 2.0) ** 2), initial=jnp.zeros(2))
    >>> gradient = erg.estimators.Minibatch(posterior, scheme="full")
    >>> done = erg.run.fit(jax.random.key(0), gradient, num_steps=300, optimiser=0.1)
    >>> done.params.round(3).tolist(), str(done.result)
    ([2.0, 2.0], 'successful')
    """
    rng.check_key(key)
    gradient = check.instance("gradient", gradient, AbstractGradientEstimator, "such as Minibatch(posterior, 128)")
    check.one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
    transformation, schedule = _optimiser(optimiser)
    watch = monitor if isinstance(monitor, Monitor) else Monitor(monitor)
    if spike is not None and not float(check.positive("spike", spike)) > 1:
        raise ValueError(f"spike must be above 1, a multiple of the usual length of the gradient; got {spike}.")
    guard = fit_loop.Guard(
        jnp.asarray(math.inf if spike is None else float(spike)),
        jnp.asarray(check.integer("max_skipped", max_skipped), jnp.int32),
        jnp.asarray(on_nonfinite == "raise"),
        roll_back=on_nonfinite == "skip" or spike is not None,
    )
    job = Job(
        gradient=gradient,
        optimiser=transformation,
        schedule=schedule,
        guard=guard,
        evaluator=Evaluator.of(metrics),
        monitor=watch,
        num_steps=check.integer("num_steps", num_steps, most=2**31 - 1),
        evaluate_every=check.integer("evaluate_every", evaluate_every),
        max_seconds=math.inf if max_seconds is None else float(check.positive("max_seconds", max_seconds)),
        seed=rng.describe(key),
    )
    key_start, key_init, key_run, key_metrics = jax.random.split(key, 4)
    feed = _feed(batches, batches_per_epoch, gradient, resumable=checkpoint is not None)
    start = check.position("params", _start(key_start, gradient) if params is None else params)
    carry = fit_loop.start(gradient, transformation, key_init, start, None if feed is None else feed.first)
    run = Run(job, key_run, key_metrics, carry, feed)
    if checkpoint is not None:
        run.attach(checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint))
    result = run.execute(progress=progress)
    done = _finish(run, result)
    if throw and result is Result.NONFINITE:
        raise FitError(run.failure(), done)
    return done


def _start(key: Key, gradient: AbstractGradientEstimator) -> PyTree:
    own = getattr(gradient, "params", None)
    if own is not None:
        return own
    if callable(getattr(gradient, "start", None)):
        return gradient.start(key)  # pyright: ignore[reportAttributeAccessIssue]
    if gradient.posterior is not None and gradient.posterior.initial is not None:
        return gradient.posterior.start(key)
    raise ValueError(
        f"{type(gradient).__name__} does not say where to start; give params=, a pytree of floating point arrays."
    )


def _feed(
    batches: Batches | None, batches_per_epoch: int | None, gradient: AbstractGradientEstimator, *, resumable: bool
) -> Feed | None:
    if batches is None:
        if batches_per_epoch is not None:
            raise ValueError("batches_per_epoch says how to weigh the rows of batches=, of which there are none.")
        return None
    target = gradient.posterior
    num_data = 0 if target is None else target.num_data
    if batches_per_epoch is not None:
        if not num_data:
            raise ValueError("batches_per_epoch needs an estimator whose posterior knows num_data; give Batch objects.")
        check.integer("batches_per_epoch", batches_per_epoch, most=num_data, hint=f"There are {num_data} data.")
    of_source = getattr(batches, "num_data", None)
    if of_source is not None and num_data and of_source != num_data:
        raise ValueError(f"The batches are of {of_source} rows, and the posterior has num_data={num_data}.")
    feed = Feed(batches, num_data, batches_per_epoch)
    if resumable and not feed.can_seek:
        raise ValueError(
            "A checkpoint needs batches that can be read from any step: RowBlocks(arrays, batch_size), or a function "
            f"batches(start_step); got {type(batches).__name__}."
        )
    return feed


def _optimiser(optimiser: Any) -> tuple[Any, Callable | None]:
    """The transformation, and its learning rate as a function of the steps taken, where that is known."""
    if optimiser is None:
        optimiser = _LEARNING_RATE
    if callable(getattr(optimiser, "init", None)) and callable(getattr(optimiser, "update", None)):
        return optimiser, None
    if callable(optimiser):
        return _adam(optimiser), optimiser
    hint = "A schedule, or an optimiser of Optax such as optax.adam(1e-3), is taken too."
    rate = float(check.positive("optimiser", optimiser, hint=hint))
    return _adam(rate), lambda count: jnp.full(jnp.shape(count), rate)


@lru_cache(maxsize=32)
def _adam(learning_rate: Any) -> Any:
    """Adam; the same object for the same rate, so that a second fit does not compile anew."""
    import optax

    return optax.adam(learning_rate)


def _finish(run: Run, result: Result) -> Fit:
    """Put the result together, and report what was left out."""
    job, at = run.job, run.at
    assert run.evaluations is not None
    status = run.steps["status"]
    skipped = {"num_nonfinite": int((status == 1).sum()), "num_spikes": int((status == 2).sum())}
    if sum(skipped.values()) and result is not Result.NONFINITE:
        warnings.warn(
            f"{sum(skipped.values())} of {at.step} steps were skipped ({skipped['num_nonfinite']} with NaN or infinity, "
            f"{skipped['num_spikes']} spikes): see 'status' in the history.",
            stacklevel=3,
        )
    message = run.failure() if result is Result.NONFINITE else Outcome(result).message()
    attributes = {
        "gradient": type(job.gradient).__name__,
        "settings": json.dumps(describe(job.gradient)),
        "monitored": job.monitor.metric,
        "monitor": json.dumps(dataclasses.asdict(job.monitor)),
        "evaluate_every": job.evaluate_every,
        "seed": job.seed,
        "num_steps": at.step,
        "best_step": run.best.step,
        **skipped,
        "num_gradients": at.num_gradients,
        "wall_time": at.wall_time,
        "compile_time": run.compile_time,
        "evaluation_time": run.evaluation_time,
        "resumed_from": run.resumed_from,
        "references": json.dumps([entry for entry in cite(job.gradient).split("\n\n") if entry]),
        "result": str(result),
        "result_message": message,
    }
    rates = None if job.schedule is None else _rates(job.schedule, status == fit_loop.TAKEN)
    history = to_datatree(run.steps, run.evaluations, attributes, rates)
    carry = run.carry
    return Fit(carry.params, run.best_params, run.best.step, carry.estimator, carry.optimiser, result, history)


def _rates(schedule: Callable, taken: np.ndarray) -> np.ndarray:
    """Learning rate of each step; steps that were not taken do not count."""
    counts = jnp.asarray(np.cumsum(taken) - taken, jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.vmap(schedule)(counts))
