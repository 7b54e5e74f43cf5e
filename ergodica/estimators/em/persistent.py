"""Gradients of a marginal likelihood by any Markov kernel on the latents, whose chains are kept."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Estimate, Key, Position, PyTree


class PersistentChainsState(NamedTuple):
    """Where the chains are: positions with a leading axis ``num_chains``. Nothing that depends on the parameters is kept."""

    position: Position


class ChainStep(NamedTuple):
    """How far the chains moved in the steps of one gradient.

    Attributes
    ----------
    acceptance_rate : scalar
        Mean of what the kernel reports under that name; NaN if it does not.
    moved : scalar
        Share of the chains that are elsewhere than before.
    renewal : scalar
        Mean squared distance between before and after, over twice the variance between the chains: 1 minus the
        autocorrelation, so 1 for independent draws and 0 for chains that stand still. NaN for a single chain.
    """

    acceptance_rate: Array
    moved: Array
    renewal: Array


class PersistentChains(AbstractGradientEstimator):
    r"""Gradient of a marginal likelihood by Fisher's identity, with chains on the latents that go on where they stood.

    .. math::

        \nabla_\theta \log p_\theta(x) = \mathrm{E}_{p_\theta(z \mid x)} \nabla_\theta \log p_\theta(x, z), \qquad
        \hat g = \frac1C \sum_{c=1}^C \nabla_\theta \log p_\theta(x, z_c), \quad z_c \leftarrow K_\theta^m(z_c, \cdot)

    Parameters
    ----------
    log_joint : callable
        ``log_joint(params, latents) -> scalar``, or ``log_joint(params, latents, data)`` if there are data;
        :math:`\log p_\theta(x, z)` with latents in unconstrained space.
    kernel : callable
        ``kernel(log_density)``: makes an `AbstractKernel` for a log density of the latents, such as
        ``lambda f: erg.from_blackjax(blackjax.nuts(f, step_size=0.5, inverse_mass_matrix=jnp.ones(2)))``.
    initial : pytree of arrays, or callable
        Latents that every chain starts from, or a function of a key.
    num_steps : int
        :math:`m`, steps of each chain a gradient.
    num_chains : int
        :math:`C`.
    num_warmup : int
        Steps of each chain when the estimator is initialised.
    data : pytree of arrays, optional

    Raises
    ------
    ValueError, TypeError
        For latents that are not of floating point, settings out of range, or a ``kernel`` that makes none.

    Notes
    -----
    The kernel is made anew, and started at the chains' positions, at every gradient: its log density and gradients are of the
    present parameters. (A kernel's state that is carried over holds those of the parameters before, and its accept test is
    then against the wrong weight.) Momenta are drawn anew.

    Unbiased at rest if the kernel leaves its target invariant; SGLD and other kernels that do not add their own bias.
    While the parameters move the chains lag behind: with small steps of the optimiser little (stochastic approximation), with
    large ones they chase a posterior that is gone. Look at ``aux.renewal``: how much of a chain is new at each gradient.

    Not where the posterior of the latents has modes that the kernel does not cross between: the chains stay where they started and
    every number looks well. Not for latents of single data in large data sets: see `LocalLatents`.

    Cost: ``num_chains * (num_steps + 1)`` gradients of ``log_joint`` for a kernel that takes one a step.

    References
    ----------
    The identity: Louis (1982), equation 3.1; chains kept from step to step: Younes (1989); Gu and Kong (1998).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> def log_joint(theta, z, x):
    ...     return -0.5 * (z - theta) ** 2 - 0.5 * jnp.sum((x - z) ** 2)
    >>> def kernel(log_density):
    ...     posterior = erg.Posterior(log_density)
    ...     return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.02)
    >>> gradient = PersistentChains(log_joint, kernel, jnp.array(0.0), num_chains=500, num_steps=30, data=jnp.ones(3))
    >>> state = gradient.init(jax.random.key(0), jnp.array(0.0))
    >>> for i in range(5):
    ...     estimate, state = gradient.estimate(jax.random.key(i), jnp.array(0.0), state)
    >>> bool(abs(estimate.gradient - 0.75) < 0.1)  # exact: (mean of x - theta) / (1 + 1/3)
    True
    """

    log_joint: Callable
    kernel: Callable
    initial: Any
    data: PyTree
    num_steps: int = eqx.field(static=True)
    num_chains: int = eqx.field(static=True)
    num_warmup: int = eqx.field(static=True)

    references: ClassVar = ("louis1982", "younes1989", "gu1998")

    def __init__(
        self,
        log_joint: Callable[..., Array],
        kernel: Callable[[Callable[[Position], Array]], AbstractKernel],
        initial: Position | Callable[[Key], Position],
        *,
        num_steps: int = 1,
        num_chains: int = 1,
        num_warmup: int = 0,
        data: PyTree = None,
    ) -> None:
        self.log_joint = as_partial(check.function("log_joint", log_joint))
        self.kernel = as_partial(check.function("kernel", kernel))
        self.initial = as_partial(initial) if callable(initial) else check.position("initial", initial)
        self.data = None if data is None else jax.tree.map(jnp.asarray, data)
        self.num_steps = check.integer("num_steps", num_steps)
        self.num_chains = check.integer("num_chains", num_chains)
        self.num_warmup = check.integer("num_warmup", num_warmup, least=0)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> PersistentChainsState:
        """Start the chains, and run ``num_warmup`` steps of each."""
        _refuse_batch(batch)
        key_start, key_warmup = jax.random.split(key)
        starts = jax.random.split(key_start, self.num_chains)
        position = jax.vmap(
            lambda k: check.position("initial", self.initial(k) if callable(self.initial) else self.initial)
        )(starts)
        if self.num_warmup:
            position, _ = self._run(key_warmup, params, position, self.num_warmup)
        return PersistentChainsState(position)

    def estimate(
        self, key: Key, params: PyTree, state: PersistentChainsState, batch: Batch | None = None
    ) -> tuple[Estimate, PersistentChainsState]:
        """Move the chains on under the present parameters, and differentiate where they are."""
        _refuse_batch(batch)
        position, acceptance_rate = self._run(key, params, state.position, self.num_steps)

        def mean(params: PyTree) -> Array:
            return jnp.mean(jax.vmap(lambda z: self._log_joint(params, z))(position))

        value, gradient = jax.value_and_grad(mean)(params)
        info = ChainStep(acceptance_rate, *distances(state.position, position))
        cost = self.num_chains * (self.num_steps + 1)
        return Estimate(gradient, value, aux=info, n_grad=cost), PersistentChainsState(position)

    def probe(self, key: Key, params: PyTree, state: PersistentChainsState) -> Estimate:
        """Estimate from other steps of the same chains, which stay where they are."""
        return self.estimate(key, params, state)[0]

    def _log_joint(self, params: PyTree, latents: Position) -> Array:
        return self.log_joint(params, latents) if self.data is None else self.log_joint(params, latents, self.data)

    def _run(self, key: Key, params: PyTree, position: Position, num_steps: int) -> tuple[Position, Array]:
        """Make a kernel for the present parameters, and move all chains."""
        kernel = self.kernel(Partial(self._log_joint, jax.lax.stop_gradient(params)))
        check.instance(
            "kernel(log_density)", kernel, AbstractKernel, "such as from_blackjax(blackjax.nuts(log_density, …))"
        )

        def one(key: Key, position: Position) -> tuple[Position, Array]:
            key_init, key_steps = jax.random.split(key)

            def body(state: Any, i: Array) -> tuple[Any, Array]:
                state, info = kernel.step(jax.random.fold_in(key_steps, i), state)
                return state, _acceptance_rate(info)

            state, rates = jax.lax.scan(body, kernel.init(key_init, position), jnp.arange(num_steps))
            return state.position, jnp.mean(rates)

        position, rates = jax.vmap(one)(jax.random.split(key, self.num_chains), position)
        return position, jnp.mean(rates)


def distances(before: Position, after: Position) -> tuple[Array, Array]:
    """Share of the chains that moved, and the mean squared jump over twice the variance between chains (see `ChainStep`)."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    number = pairs[0][0].shape[0]
    flat = [(x.reshape(number, -1), y.reshape(number, -1)) for x, y in pairs]
    moved = jnp.any(jnp.stack([jnp.any(x != y, axis=1) for x, y in flat]), axis=0)
    jumps = jnp.sum(jnp.stack([jnp.sum((y - x) ** 2) for x, y in flat]))
    spread = jnp.sum(jnp.stack([jnp.sum((y - jnp.mean(y, axis=0, keepdims=True)) ** 2) for _, y in flat]))
    renewal = jumps / (2 * spread) * ((number - 1) / number) if number > 1 else jnp.full_like(jumps, jnp.nan)
    return jnp.mean(moved.astype(jnp.result_type(float))), renewal


def _acceptance_rate(info: Any) -> Array:
    values = info if isinstance(info, dict) else info._asdict()
    return jnp.asarray(values.get("acceptance_rate", jnp.nan), jnp.result_type(float))


def _refuse_batch(batch: Any) -> None:
    if batch is not None:
        raise ValueError("PersistentChains takes no batch that is handed over; give it all the data.")
