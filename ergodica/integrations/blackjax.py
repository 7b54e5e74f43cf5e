"""BlackJAX both ways: its algorithms as kernels, and kernels as its algorithms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax import SamplingAlgorithm
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree

_NAMES = {
    "is_divergent": "diverging",
    "num_integration_steps": "n_steps",
    "num_trajectory_expansions": "tree_depth",
    "is_accepted": "accepted",
}


class BlackjaxState(NamedTuple):
    """A chain: its position, and the state that the algorithm keeps of its own."""

    position: Position
    inner: Any


class BlackjaxKernel(AbstractKernel):
    """A kernel around a BlackJAX sampling algorithm; made by `from_blackjax`.

    Notes
    -----
    Cost: that of the algorithm. What the algorithm's closures hold (data, a metric) becomes constants of the compiled
    program, so another algorithm object retraces.
    """

    inner_init: Callable = eqx.field(static=True)
    inner_step: Callable = eqx.field(static=True)
    target: Posterior | None
    is_exact: bool | None = eqx.field(static=True)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> BlackjaxState:
        """Start a chain at ``position``."""
        _refuse(batch)
        inner = _call_init(self.inner_init, position, key)
        if not hasattr(inner, "position"):
            raise TypeError(
                f"The algorithm's state, {type(inner).__name__}, has no field position; ergodica cannot read its draws."
            )
        return BlackjaxState(inner.position, inner)

    def step(
        self, key: Key, state: BlackjaxState, batch: Batch | None = None
    ) -> tuple[BlackjaxState, dict[str, Array]]:
        """Move by the algorithm's step; the info is a dict of its numbers, by ArviZ's names."""
        _refuse(batch)
        inner, info = self.inner_step(key, state.inner)
        stats = _flatten(info)
        stats["n_grad"] = stats.get("n_steps", jnp.ones((), jnp.int32))
        if hasattr(inner, "logdensity"):
            stats["lp"] = inner.logdensity
        return BlackjaxState(inner.position, inner), stats

    def probe(self, key: Key, state: BlackjaxState) -> Estimate | None:  # noqa: ARG002  (no randomness is needed)
        """Give the gradient that the state holds, which is exact; ``None`` where it holds none."""
        if not hasattr(state.inner, "logdensity_grad"):
            return None
        return Estimate(state.inner.logdensity_grad, state.inner.logdensity)

    @property
    def posterior(self) -> Posterior | None:
        """The posterior given to `from_blackjax`."""
        return self.target

    @property
    def exact(self) -> bool:
        """Whether the algorithm corrects its proposals, as told or as its info shows."""
        return bool(self.is_exact)

    @property
    def exact_gradient(self) -> bool:
        """Whether the gradient carries no noise: the log density of a BlackJAX algorithm is deterministic."""
        return True

    @property
    def n_grad_unit(self) -> int:
        """Gradients of single data in one gradient of the log density."""
        return max(1, self.target.num_data) if self.target is not None else 1


def from_blackjax(
    algorithm: SamplingAlgorithm, *, posterior: Posterior | None = None, exact: bool = False
) -> BlackjaxKernel:
    """Make a kernel of a BlackJAX sampling algorithm.

    Parameters
    ----------
    algorithm : blackjax.SamplingAlgorithm
        Such as ``blackjax.nuts(posterior.log_density, step_size, inverse_mass_matrix)``.
    posterior : Posterior, optional
        Constrains and names the draws, and says where chains start.
    exact : bool
        Whether the algorithm leaves the target invariant (NUTS, HMC, MALA do; unadjusted ones do not). It is recorded in
        the result and changes nothing else.

    Returns
    -------
    BlackjaxKernel
        For `ergodica.sample`, with probes where the algorithm's state holds the gradient.

    Raises
    ------
    TypeError
        If ``algorithm`` does not have BlackJAX's ``init`` and ``step``.

    Notes
    -----
    BlackJAX's own stochastic-gradient kernels (``blackjax.sgld`` and relatives) have another signature and are refused;
    use `ergodica.samplers` for them.

    Examples
    --------
    >>> import blackjax, jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> kernel = from_blackjax(blackjax.nuts(posterior.log_density, 0.5, jnp.ones(2)), posterior=posterior, exact=True)
    >>> dt = erg.sample(jax.random.key(0), kernel, num_samples=50, num_warmup=10, num_chains=2)
    >>> "tree_depth" in dt.sample_stats
    True
    """
    if not isinstance(algorithm, SamplingAlgorithm):
        raise TypeError(
            f"algorithm must be a blackjax.SamplingAlgorithm, such as blackjax.nuts(log_density, ...); got {algorithm!r}."
        )
    if "minibatch" in _parameters(algorithm.step):
        raise TypeError(
            "BlackJAX's stochastic-gradient algorithms step by (key, position, minibatch, step_size) and return no info; use "
            "ergodica.samplers.SGLD or Splitting instead."
        )
    if posterior is not None:
        posterior = check.instance("posterior", posterior, Posterior, "the one whose log_density the algorithm samples")
    return BlackjaxKernel(algorithm.init, algorithm.step, posterior, exact)


def to_blackjax(sampler: AbstractKernel) -> SamplingAlgorithm:
    """Make a BlackJAX sampling algorithm of a kernel.

    Parameters
    ----------
    sampler : AbstractKernel

    Returns
    -------
    blackjax.SamplingAlgorithm
        For `blackjax.util.run_inference_algorithm` and whatever else takes one. ``init`` needs a key, as its second
        argument ``rng_key``, since estimators and momenta are drawn at the start.

    Notes
    -----
    BlackJAX passes algorithms as closures, so the data that the sampler holds become constants of the compiled program:
    with large data, compilation is slow and takes memory. `ergodica.sample` passes them as arguments instead.
    """
    sampler = check.instance("sampler", sampler, AbstractKernel, "such as SGLD(gradient, step_size)")

    def init(position: Position, rng_key: Key | None = None) -> Any:
        if rng_key is None:
            raise ValueError(f"{type(sampler).__name__} draws at its start: give init(position, rng_key) a key.")
        return sampler.init(rng_key, position)

    def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
        return sampler.step(rng_key, state)

    return SamplingAlgorithm(init, step)


def _call_init(init: Callable, position: Position, key: Key) -> Any:
    return init(position, key) if "rng_key" in _parameters(init) else init(position)


def _parameters(function: Callable) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _flatten(info: PyTree) -> dict[str, Array]:
    """Scalar entries of an info by ArviZ's names; the rest (momenta, trajectories) is left out."""
    fields: dict[str, Any] = info._asdict() if hasattr(info, "_asdict") else {}
    scalars = {
        _NAMES.get(name, name): value
        for name, value in fields.items()
        if isinstance(value, jax.Array) and value.ndim == 0
    }
    return {
        name: value for name, value in scalars.items() if value.dtype == bool or jnp.issubdtype(value.dtype, jnp.number)
    }


def _refuse(batch: Batch | None) -> None:
    if batch is not None:
        raise ValueError("BlackJAX's algorithms take no batch: their log density is a closure over all the data.")
