"""Metrics of a flow against its target, to follow a fit with: effective sample sizes of both directions and divergences."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.flow import Flow, check_flow, flat_log_density
from ergodica.core.posterior import as_partial
from ergodica.core.types import Key, PyTree
from ergodica.diagnostics import flow_weights
from ergodica.diagnostics.flow_weights import Estimated

_LANES = 256


class FlowMetrics:
    r"""Metrics of a flow against its target, to follow a fit with.

    Parameters
    ----------
    flow : Flow
        Whose parameters vary; those that it holds are not used.
    target : callable or Posterior
        Log density up to a constant, as `ergodica.estimators.PathGradient` takes it.
    draws : array (N, D), optional
        Of the target, and not those that the flow is fitted to. Without them nothing can show that a mode was dropped.
    num_samples : int
        Draws of the flow at each call.
    log_z : float, optional
        Logarithm of the target's normalising constant, where it is known.

    Raises
    ------
    ValueError, TypeError
        For a target or draws of another dimension.

    Notes
    -----
    ``metrics(key, params)`` returns scalars by name:

    ====================  ==================================================================================
    ``ess_reverse``       effective sample size of the flow's draws, a fraction
    ``elbo``              mean log weight, :math:`\log Z - \mathrm{KL}(q\|p)`
    ``log_z``             by importance sampling
    ``kl_reverse``        :math:`\mathrm{KL}(q\|p)`
    ``acceptance_rate``   of independence Metropolis with the flow as proposal
    ``ess_forward``       with ``draws``: the same number as ``ess_reverse``, from the target's draws
    ``kl_forward``        with ``draws``: :math:`\mathrm{KL}(p\|q)`
    ``log_z_bridge``      with ``draws``: by bridge sampling
    ====================  ==================================================================================

    With ``draws``, divergences take :math:`\log Z` from the bridge and acceptance is over pairs of draws. An ``ess_forward``
    far below ``ess_reverse`` means that the flow dropped a mode. For intervals and a verdict see `flow_report`.

    Cost a call: ``num_samples`` draws of the flow and log densities of the target, one pass through the flow's inverse for
    each of ``draws``, some sorts. The target at ``draws`` is evaluated once.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=2)
    >>> metrics = FlowMetrics(flow, lambda x: -0.5 * jnp.sum(x**2), num_samples=500)
    >>> sorted(metrics(jax.random.key(1), flow.params))
    ['acceptance_rate', 'elbo', 'ess_reverse', 'kl_reverse', 'log_z']
    """

    references: ClassVar = ("nicoli2023", "meng1996")

    def __init__(
        self,
        flow: Flow,
        target: Any,
        draws: Array | None = None,
        num_samples: int = 1000,
        *,
        log_z: float | None = None,
    ) -> None:
        self.template = check_flow(flow)
        self.target = as_partial(flat_log_density(target, flow.dim))
        self.num_samples = check.integer("num_samples", num_samples, least=2)
        self.log_z = None if log_z is None else jnp.asarray(log_z, jnp.result_type(float))
        self.draws = self.log_density = None
        if draws is not None:
            self.draws = jnp.asarray(check_draws(draws, flow.dim), jnp.result_type(float))
            self.log_density = map_points(self.target, self.draws)

    def __call__(self, key: Key, params: PyTree) -> dict[str, Array]:
        """Evaluate at parameters of the flow's structure; compiled once."""
        return _metrics(
            key,
            self.template.with_params(params),
            self.target,
            self.draws,
            self.log_density,
            self.log_z,
            self.num_samples,
        )


@partial(jax.jit, static_argnames="num_samples")
def _metrics(
    key: Key,
    flow: Flow,
    target: Callable,
    draws: Array | None,
    log_density: Array | None,
    log_z: Array | None,
    num_samples: int,
) -> dict[str, Array]:
    log_p, log_q = weigh(key, flow, target, num_samples)
    of_flow = log_p.astype(log_q.dtype) - log_q
    of_target = None
    if draws is not None and log_density is not None:
        log_q = map_points(flow.log_prob, draws)
        of_target = log_density.astype(log_q.dtype) - log_q
    found = estimates(of_flow, of_target, log_z)
    return {"elbo": jnp.mean(of_flow)} | {name: estimate.value for name, estimate in found.items()}


def estimates(
    of_flow: Any, of_target: Any | None, log_z: Any | None = None, num_effective: float | None = None
) -> dict[str, Estimated]:
    """All estimates that can be had from log weights at draws of the flow, and at draws of the target.

    Parameters
    ----------
    of_flow : array (n,)
    of_target : array (m,) or None
    log_z : scalar, optional
        The normalising constant where it is known.
    num_effective : float, optional
        Independent draws that the target's are worth.
    """
    found = {
        "ess_reverse": flow_weights.reverse_ess(of_flow),
        "log_z": flow_weights.importance_log_z(of_flow),
    }
    best = found["log_z"]
    if of_target is None:
        found["acceptance_rate"] = flow_weights.acceptance_of_flow(of_flow)
    else:
        best = found["log_z_bridge"] = flow_weights.bridge_log_z(of_flow, of_target, num_effective)
        found["acceptance_rate"] = flow_weights.acceptance_of_pairs(of_flow, of_target)
        found["ess_forward"] = flow_weights.forward_ess(of_target)
    best = best if log_z is None else Estimated(log_z)
    found["kl_reverse"] = flow_weights.reverse_kl(of_flow, best)
    if of_target is not None:
        found["kl_forward"] = flow_weights.forward_kl(of_target, best)
    return found


@partial(jax.jit, static_argnames="num_samples")
def weigh(key: Key, flow: Flow, target: Callable, num_samples: int) -> tuple[Array, Array]:
    """Log densities of the target and of the flow at fresh draws of the flow, (num_samples,) each."""
    x, log_q = flow.sample_and_log_prob(key, num_samples)
    return map_points(target, x), log_q


@jax.jit
def map_points(function: Callable, points: Array) -> Array:
    """Values of a function of one point at many, some at a time."""
    return jax.lax.map(function, points, batch_size=_LANES)


def check_draws(draws: Any, dim: int, ndims: tuple[int, ...] = (2,)) -> np.ndarray:
    """Return draws as an array; raise for another shape, for fewer than two, or where they are not finite."""
    draws = np.asarray(draws)
    if draws.ndim not in ndims or draws.shape[-1] != dim or draws.size < 2 * dim:
        shapes = " or ".join({2: f"(N, {dim})", 3: f"(chain, draw, {dim})"}[n] for n in ndims)
        raise ValueError(f"draws must be an array {shapes}, of two draws or more; got shape {draws.shape}.")
    if not np.issubdtype(draws.dtype, np.floating):
        raise TypeError(f"draws must be of floating point; got dtype {draws.dtype}.")
    if not np.all(np.isfinite(draws)):
        raise ValueError("draws must be finite; some entries are NaN or infinite.")
    return draws
