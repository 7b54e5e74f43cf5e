"""Chains that travel over the owners of the data."""

import functools
from collections import namedtuple
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.federated import AbstractFederatedGradient
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Batch, Estimate, Key, Position
from ergodica.samplers.gradient_kernel import AbstractGradientKernel
from ergodica.samplers.noise_corrected import NoiseCorrectedSGLD
from ergodica.samplers.replica_exchange import ReplicaExchange
from ergodica.samplers.visits import AbstractVisits, make_visits


class FederatedState(NamedTuple):
    """A chain and where it is; ``position`` is the inner chain's.

    Attributes
    ----------
    inner : NamedTuple
        State of the kernel that moves; its estimator's state is at ``client``.
    client : int32 scalar
        Where the chain is.
    visit : int32 scalar
        Visits that were ended before this one.
    step : int32 scalar
        Steps made in this visit.
    words : uint32 array (2,)
        From which the order of visits is computed.
    chain : int32 scalar
        The chain's number, among those that share the words.
    """

    inner: Any
    client: Array
    visit: Array
    step: Array
    words: Array
    chain: Array

    @property
    def position(self) -> Position:
        """Where the chain is in the space of the parameters."""
        return self.inner.position


class Federated(AbstractKernel):
    r"""A Langevin kernel whose chains travel from client to client, with some steps at each.

    .. math:: s \sim p, \qquad \text{then } \tau_s \text{ times}\quad \theta \leftarrow K_s(\theta)

    with :math:`K_s` the inner kernel with the gradient of client :math:`s`, and :math:`p_s \propto f_s / \tau_s`, so that a share
    :math:`f_s` of all steps is made at client :math:`s`.

    Parameters
    ----------
    kernel : AbstractGradientKernel
        With a gradient that knows clients: ``SGLD(Conducive(shards, surrogates), 1e-4)``. Preconditioned and splitting
        kernels do as well.
    local_steps : int or int array (S,)
        :math:`\tau`, steps of a visit, for all clients or for each: so many times fewer messages than steps. See
        `ergodica.samplers.visits.balanced_local_steps` for clients of different speed.
    schedule : {"independent", "permutation"} or AbstractVisits
        Each visit drawn anew; or all chains through common random orders of the clients, without two of them at one client, for
        equal probabilities of visits and at most as many chains as clients.

    Raises
    ------
    ValueError, TypeError
        For a kernel whose gradient knows no clients, that accepts or rejects, or that holds several chains; and for steps or
        schedules that are none.

    Notes
    -----
    Cost: a step of the inner kernel, whatever the number of clients. What travels is the state of the inner kernel without its
    estimator's. A gradient that the next step reuses (`BAOAB`, `OBABO`) travels too: the first half kick of a visit is by the
    gradient that the client before has given at the same point.

    On Gaussian posteriors with constant gradient noise the law is known for any surrogates, probabilities and steps
    (`ergodica.run.federated_law`); `ergodica.predict_federated` evaluates it for a posterior at hand. With exact surrogates and
    ``strength=1`` it is that of `SGLD` with the mean of the noise, however long the visits. Without surrogates the law tends to the
    mixture of the clients' own posteriors as :math:`\tau` grows. The law of ``"permutation"`` is not that of independent visits:
    what successive visits have in common cancels over a round.

    Stored draws are of all steps, within visits too. The probes by which `ergodica.diagnose` measures the temperature are at
    clients drawn anew, so they see the drift of a long visit.

    Under ``"permutation"`` chains whose ``init`` is vectorised by one `jax.vmap` (the innermost, as in `ergodica.sample`) share the
    order, and their places in it are their places along its axis; a chain by itself has an order of its own.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), Algorithm 1; Ahn, Shahbaba and Welling (2014) for permutations and lengths.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> gradient = erg.estimators.Conducive(erg.Shards(posterior, [0, 0, 1, 1, 1, 2]), batch_size=2)
    >>> sampler = Federated(erg.samplers.SGLD(gradient, 0.01), local_steps=5)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=100, num_warmup=0, num_chains=2)
    >>> dt.sample_stats["visit_index"].values[0, [0, 4, 5, 99]].tolist()
    [0, 0, 1, 19]
    """

    kernel: AbstractGradientKernel
    local_steps: Array
    visits: AbstractVisits

    references: ClassVar = ("elmekkaoui2021", "ahn2014")

    def __init__(
        self,
        kernel: AbstractGradientKernel,
        local_steps: Any = 1,
        schedule: Literal["independent", "permutation"] | AbstractVisits = "independent",
    ) -> None:
        self.kernel = check_kernel(kernel)
        count = self.gradient.shards.num_clients
        self.local_steps = jnp.asarray(check_local_steps(local_steps, count), jnp.int32)
        self.visits = make_visits(schedule, self.gradient.probabilities, self.local_steps)

    def init(self, key: Key, position: Position, batch: Batch | None = None) -> FederatedState:
        """Start a chain at ``position``, at the first client of its order."""
        key_inner, key_words = jax.random.split(key)
        inner = self.kernel.init(key_inner, position, batch)
        words, chain = self.visits.begin(jax.random.bits(key_words, (2,), jnp.uint32))
        zero = jnp.zeros((), jnp.int32)
        client = self.visits.client(words, chain, zero)
        inner = inner._replace(gradient=self.gradient.visit(inner.gradient, client))
        return FederatedState(inner, client, zero, zero, words, chain)

    def step(self, key: Key, state: FederatedState, batch: Batch | None = None) -> tuple[FederatedState, Any]:
        """Move on to the next client if the visit is over, and make a step there."""
        over = state.step == self._length(state.client)
        visit = state.visit + over.astype(jnp.int32)
        client = jnp.where(over, self.visits.client(state.words, state.chain, visit), state.client)
        at_next = self.gradient.visit(state.inner.gradient, client)
        inner = state.inner._replace(gradient=tree.select(over, at_next, state.inner.gradient))
        inner, info = self.kernel.step(key, inner, batch)
        step = jnp.where(over, 0, state.step) + 1
        report = _report(type(info)._fields)(*info, client_index=client, visit_index=visit)
        return FederatedState(inner, client, visit, step, state.words, state.chain), report

    def probe(self, key: Key, state: FederatedState) -> Estimate | None:
        """Estimate the gradient at the chain's position, at a client drawn anew."""
        return self.kernel.probe(key, state.inner)

    def only(self, client: int) -> AbstractGradientKernel:
        """Take the inner kernel with what one client holds: what runs at the client's own site (see `local_run`)."""
        return eqx.tree_at(lambda k: k.gradient, self.kernel, self.gradient.only(client))

    @property
    def gradient(self) -> AbstractFederatedGradient:
        """The inner kernel's gradient."""
        return self.kernel.gradient  # pyright: ignore[reportReturnType]

    @property
    def posterior(self) -> Any:
        """The posterior of all the data."""
        return self.kernel.posterior

    @property
    def exact_gradient(self) -> bool:
        """Whether the inner kernel's probe carries no noise."""
        return self.kernel.exact_gradient

    def _length(self, client: Array) -> Array:
        return self.local_steps if self.local_steps.ndim == 0 else self.local_steps[client]


@functools.partial(jax.jit, static_argnames="num_steps")
def local_run(
    kernel: AbstractGradientKernel, key: Key, state: Any, first_step: Array, num_steps: int
) -> tuple[Any, Position]:
    """Make the steps of one visit, as a site does that has a client's data alone.

    Parameters
    ----------
    kernel : AbstractGradientKernel
        ``Federated.only(client)``, or made at the site.
    key : typed PRNG key
        The chain's; step ``i`` of the chain uses ``fold_in(key, i)``, as in `ergodica.sample`.
    state : NamedTuple
        Of the inner kernel, from the client before, with its ``gradient`` at client 0 of ``kernel`` (`arrive`).
    first_step : int32 scalar
        Steps that the chain has made before.
    num_steps : int

    Returns
    -------
    state : NamedTuple
    positions : pytree
        After each step, along the leading axis.
    """

    def body(state: Any, i: Array) -> tuple[Any, Position]:
        state, _ = kernel.step(jax.random.fold_in(key, first_step + i), state)
        return state, state.position

    return jax.lax.scan(body, state, jnp.arange(num_steps, dtype=jnp.int32))


def arrive(kernel: AbstractGradientKernel, state: Any) -> Any:
    """Put a chain that comes from another site at the one client of ``kernel``."""
    here = jnp.zeros((), jnp.int32)
    return state._replace(gradient=kernel.gradient.visit(state.gradient, here))  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _report(fields: tuple[str, ...]) -> type:
    """The info of a kernel, with where its chain was."""
    return namedtuple("FederatedInfo", (*fields, "client_index", "visit_index"))


def check_kernel(kernel: Any) -> AbstractGradientKernel:
    """Return a kernel whose chains can travel; raise where it is none."""
    if not isinstance(kernel, AbstractGradientKernel):
        raise TypeError(
            f"kernel must hold one gradient estimator, as SGLD and Splitting do; got {type(kernel).__name__}. Wrap Averaged "
            "around Federated, not inside."
        )
    if not isinstance(kernel.gradient, AbstractFederatedGradient):
        raise TypeError(
            f"kernel must have a gradient that knows clients, such as Conducive(shards, surrogates); got "
            f"{type(kernel.gradient).__name__}."
        )
    if kernel.exact:
        raise ValueError(
            f"{type(kernel).__name__} accepts or rejects by the density of all the data, which no client has; "
            "use SGLD or Splitting."
        )
    if isinstance(kernel, ReplicaExchange):
        raise ValueError("ReplicaExchange holds several chains, which Federated cannot send to one client each.")
    if isinstance(kernel, NoiseCorrectedSGLD) and kernel.noise is None:
        raise ValueError(
            "NoiseCorrectedSGLD would measure its noise by probes, which are at other clients; give noise=, the variance of a "
            "gradient within a visit."
        )
    return kernel


def check_local_steps(local_steps: Any, num_clients: int) -> np.ndarray:
    """Return steps of a visit, one number or one a client."""
    steps = np.asarray(local_steps)
    if not np.issubdtype(steps.dtype, np.integer) or steps.shape not in ((), (num_clients,)):
        raise TypeError(f"local_steps must be an integer, or {num_clients} of them, one a client; got {local_steps!r}.")
    if steps.min() < 1:
        raise ValueError(f"local_steps must be at least 1; got {steps.min()}.")
    return steps
