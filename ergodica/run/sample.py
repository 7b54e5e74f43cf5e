"""Run a sampler: many chains, one compiled program, and a result that ArviZ reads."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position
from ergodica.run.chains import run_chains
from ergodica.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    import xarray


def sample(
    key: Key,
    sampler: AbstractKernel,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    thin: int = 1,
    initial: Position | Callable[[Key], Position] | None = None,
    posterior: Posterior | None = None,
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
    throw: bool = True,
    probes: bool = True,
    shared_batches: bool = False,
    devices: Sequence[Any] | None = None,
) -> "xarray.DataTree":
    """Draw from a posterior by several chains of a sampler.

    Parameters
    ----------
    key : typed PRNG key
        From `jax.random.key`. The same key gives the same draws, whether or not the run was interrupted and resumed.
    sampler : AbstractKernel
        Such as ``SGLD(Minibatch(posterior, 128), step_size=1e-5)``.
    num_samples : int
        Stored draws a chain.
    num_warmup : int
        Steps a chain before the first stored draw; they are discarded. The mean of their second half is the centre of the
        configurational temperature.
    num_chains : int
        Chains, run side by side in one vectorised program.
    thin : int
        Steps a stored draw: a chain makes ``num_warmup + thin * num_samples`` steps. What is thinned away takes no memory.
    initial : position or callable, optional
        Where chains start: one position for all, a position whose leaves have a leading axis of ``num_chains``, or a
        function of a key, called once a chain. Unless given, the posterior's own start.
    posterior : Posterior, optional
        Constrains the draws and names them; the one that the sampler's estimator holds unless given.
    progress : bool
        Show a bar where the error stream is a terminal.
    checkpoint : path or Checkpoint, optional
        A directory in which the run is saved every minute (or as `Checkpoint` says), and from which it goes on when it is
        called again with the same arguments. ``num_samples`` may be larger then, which extends the run.
    throw : bool
        Raise where a chain becomes NaN or infinite. With ``False`` the run goes on with the other chains and the result
        says so in its attributes ``result`` and ``result_message``.
    probes : bool
        Evaluate two independent gradients at each stored draw (one where the gradient is exact), from which come
        ``t_conf``, ``grad_noise`` and the group ``probe``. `ergodica.diagnose` needs them to see bias.
    shared_batches : bool
        Draw one batch a step for all chains, instead of one for each: one read of the rows serves all, which is several times
        faster with many chains. Each chain's law is what it was, but the chains' gradient noise is common: they are no longer
        independent, so that R-hat and standard errors between chains do not see that part of the error. Probes stay
        independent. For estimators on `Minibatch` whose batches can be handed over.
    devices : sequence of jax.Device, optional
        Devices to spread the chains over, such as ``jax.devices()``: the same number of chains on each, and a copy of the
        data. They need not talk to each other. JAX's default device unless given.

    Returns
    -------
    xarray.DataTree
        ``posterior`` (constrained), ``sample_stats``, ``observed_data``, ``probe``, and ``unconstrained_posterior`` where
        that differs; how the run was made is in the attributes. `arviz.summary` and `ergodica.diagnose` take it as it is.

    Raises
    ------
    SamplingError
        If a chain became non-finite and ``throw`` is true; its attribute ``partial`` holds what was sampled.
    CheckpointError
        If the checkpoint is damaged or of another run.
    ValueError, TypeError
        For arguments of the wrong kind or size.

    Notes
    -----
    Control-C ends the run after the current chunk (about a quarter of a second), saves a checkpoint if there is one, and
    returns what was sampled, with the result code ``interrupted``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.5)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=100, num_warmup=50, num_chains=2)
    >>> dict(dt.posterior.sizes)
    {'chain': 2, 'draw': 100, 'position_dim_0': 2}
    """
    return run_chains(
        key,
        sampler,
        (num_samples, num_warmup, num_chains, thin),
        initial,
        posterior,
        progress=progress,
        checkpoint=checkpoint,
        throw=throw,
        probes=probes,
        shared_batches=shared_batches,
        devices=devices,
    )
