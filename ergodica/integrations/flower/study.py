"""What a federated study is: the same at the server and at every site, except for the data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ergodica.core import check, tree
from ergodica.core.posterior import Posterior
from ergodica.core.shards import Shards
from ergodica.core.types import Position, PyTree
from ergodica.estimators.federated.conducive import Conducive
from ergodica.estimators.federated.fit import laplace_surrogates
from ergodica.estimators.federated.private import PrivateConducive
from ergodica.estimators.federated.surrogates import GaussianSurrogates, Natural
from ergodica.run.admission import DisplacementBound
from ergodica.run.federated_law import client_steps
from ergodica.run.orders import Plan
from ergodica.samplers.site import Site
from ergodica.samplers.visits import visit_probabilities


class Expansion(NamedTuple):
    """What a site says of its data: a Gaussian surrogate about a centre, and the noise of its batches.

    Attributes
    ----------
    linear : array (D,)
        Gradient at the centre.
    precision : array (D, D) or (D,)
    noise : array, of the shape of ``precision``
        Covariance of the estimated gradient of the site's log likelihood, over batches.
    """

    linear: np.ndarray
    precision: np.ndarray
    noise: np.ndarray


@dataclass(frozen=True)
class Study:
    r"""A federated run: model, kernel, clients and visits.

    Parameters
    ----------
    make : callable
        ``make(rows) -> Posterior`` with the whole prior, for the rows of any one site.
    example : pytree
        A row or two in the form of the data, from which shapes are read. Not real data: the server has it.
    kernel : callable
        ``kernel(gradient) -> kernel``: ``lambda g: SGLD(g, 1e-3)``.
    names : tuple of str
        Of the clients; a SuperNode says which it is by ``name`` in its ``--node-config``, or by its key.
    num_visits, num_warmup, num_chains, stride, seed, absent, estimate_shares, patience, max_refusals
        As for `ergodica.run.orders.Plan`.
    local_steps : int or int array (S,)
        Steps of a visit. Every visit is a message, whatever its length.
    shares : {"uniform"} or array (S,)
        :math:`f_s`, the share of steps made at each client.
    batch_size : int, optional
        Rows a gradient; all of the site's unless given.
    strength : float
        Of the conducive gradient: 1 is FSGLD, 0 is DSGLD.
    max_norm, noise_multiplier : float
        Given ``max_norm``, gradients are clipped and noised (`ergodica.estimators.PrivateConducive`), which needs all rows:
        ``batch_size=None``. Surrogates are not covered.
    covariance : {"full", "diagonal"}
        Precision matrices of the surrogates, or their diagonals.
    initial : position, optional
        Where the search for the mode begins; the posterior's start unless given. Chains start at the mode.
    newton : int
        Most rounds of Newton's method, in which all sites expand their log likelihood about one point.
    false_rejection, slack : float
        As for `ergodica.run.admission.DisplacementBound`; ``false_rejection=0`` is no bound.
    largest_precision, largest_noise : float
        As for `ergodica.run.admission.check_surrogate`.
    keys : dict, optional
        Public key (PEM) of each client's SuperNode. Left out, the first SuperNode that claims a name has it while it is online.

    Raises
    ------
    ValueError, TypeError
        For settings that do not fit.

    Notes
    -----
    Surrogates contain the share :math:`f_s` of the prior, so that improper likelihoods are no obstacle, unless shares are
    estimated, where this would not cancel. They are Laplace's at the mode of the posterior, which is found first: two
    rounds of messages for a Gaussian likelihood, a few more for others.
    """

    make: Callable[[PyTree], Posterior]
    example: PyTree
    kernel: Callable[[Any], Any]
    names: tuple[str, ...]
    num_visits: int
    local_steps: Any = 100
    num_warmup: int = 0
    num_chains: int = 4
    stride: int = 1
    batch_size: int | None = None
    shares: Any = "uniform"
    strength: float = 1.0
    covariance: Literal["full", "diagonal"] = "full"
    initial: Position | None = None
    newton: int = 10
    seed: int = 0
    absent: Literal["wait", "redraw"] = "wait"
    estimate_shares: Literal["never", "warmup", "always"] = "never"
    patience: float = 600.0
    max_refusals: int = 3
    max_norm: float | None = None
    noise_multiplier: float = 0.0
    false_rejection: float = 1e-6
    slack: float = 1.0
    largest_precision: float = np.inf
    largest_noise: float = np.inf
    keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check.function("make", self.make)
        check.function("kernel", self.kernel)
        check.one_of("covariance", self.covariance, ("full", "diagonal"))
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be of two clients or more, and differ; got {self.names}.")
        if unknown := set(self.keys) - set(self.names):
            raise ValueError(f"keys must be those of clients, {self.names}; got some of {sorted(unknown)}.")
        if self.max_norm is not None and self.batch_size is not None:
            raise ValueError(f"max_norm needs all rows of a site at each step, batch_size=None; got {self.batch_size}.")
        if self.max_norm is None and self.noise_multiplier:
            raise ValueError("noise_multiplier needs max_norm: noise hides only what is bounded.")
        self.plan()  # raises where the rest does not fit

    def plan(self) -> Plan:
        """The visits."""
        count = len(self.names)
        shares = np.full(count, 1 / count) if isinstance(self.shares, str) else np.asarray(self.shares, np.float64)
        if isinstance(self.shares, str):
            check.one_of("shares", self.shares, ("uniform",))
        steps = np.broadcast_to(np.asarray(self.local_steps), (count,))
        return Plan(
            visit_probabilities(shares, steps),
            shares,
            steps,
            self.num_visits,
            self.num_warmup,
            self.num_chains,
            self.stride,
            self.seed,
            absent=self.absent,
            estimate_shares=self.estimate_shares,
            patience=self.patience,
            max_refusals=self.max_refusals,
        )

    @property
    def prior_share(self) -> bool:
        """Whether surrogates contain a share of the prior."""
        return self.estimate_shares == "never"

    def posterior(self) -> Posterior:
        """The posterior of the example: prior, start and shapes are right, data are not."""
        return self.make(self.example)

    def start(self) -> Position:
        """Where the search for the mode begins."""
        found = self.posterior().start(jax.random.key(self.seed)) if self.initial is None else self.initial
        return check.position("initial", found)

    def expand(self, posterior: Posterior, client: int, centre: Position) -> Expansion:
        """Expand a site's log likelihood; runs at the site."""
        shards = Shards(posterior, np.zeros(posterior.num_data, int))
        share = float(self.plan().shares[client])
        likelihood = laplace_surrogates(shards, centre, covariance=self.covariance, prior_share=False).natural
        linear, precision = (np.asarray(x[0], np.float64) for x in likelihood[:2])
        if self.prior_share:
            of_prior = laplace_surrogates(shards, centre, covariance=self.covariance, prior_share=True).natural
            linear += share * (np.asarray(of_prior.linear[0], np.float64) - linear)
            precision += share * (np.asarray(of_prior.precision[0], np.float64) - precision)
        _, spread = shards.gradient_moments(centre, 0)
        noise = np.asarray(spread, np.float64) * (posterior.num_data**2 / (self.batch_size or np.inf))
        return Expansion(linear, precision, noise if self.covariance == "full" else np.diag(noise))

    def gradient(
        self, posterior: Posterior, share: float, centre: Position, own: Natural, total: Natural
    ) -> Conducive | PrivateConducive:
        """The gradient of a site, from its own data, its surrogate and the sum of all."""
        shards = Shards(posterior, np.zeros(posterior.num_data, int))
        of_one = GaussianSurrogates.expansion(centre, own.linear[None], own.precision[None])
        dtype = jnp.result_type(float)
        total = jax.tree.map(lambda x: jnp.asarray(x, dtype), total)
        surrogates = eqx.tree_at(lambda q: q.total, of_one, total, is_leaf=lambda x: isinstance(x, Natural))
        gradient = Conducive(shards, surrogates, self.batch_size, strength=self.strength)
        object.__setattr__(gradient, "probabilities", jnp.full((1,), share, dtype))  # as `Conducive.only` leaves it
        object.__setattr__(gradient, "sole", False)
        return gradient if self.max_norm is None else PrivateConducive(gradient, self.max_norm, self.noise_multiplier)

    def site(self, posterior: Posterior, share: float, centre: Position, own: Natural, total: Natural) -> Site:
        """What makes the visits to a client."""
        return Site(self.kernel(self.gradient(posterior, share, centre, own, total)), centre)

    def prior(self, centre: Position) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (D,) and negative Hessian (D, D) of the log prior."""
        flat, unravel = ravel_pytree(centre)
        log_prior = self.posterior().log_prior
        gradient = jax.grad(lambda x: log_prior(unravel(x)))
        hessian = jax.jacfwd(gradient)(flat)
        return np.asarray(gradient(flat), np.float64), -np.asarray(hessian, np.float64)

    def newton_step(self, centre: Position, expansions: list[Expansion]) -> tuple[Position, float]:
        """Go to the mode of what the expansions say of the posterior; also give the length of the way, in its deviations."""
        gradient, curvature = self.prior(centre)
        if self.prior_share:  # the surrogates contain the prior
            gradient, curvature = 0 * gradient, 0 * curvature
        curvature = curvature + sum(_matrix(e.precision) for e in expansions)
        way = np.linalg.solve(curvature, gradient + sum(e.linear for e in expansions))
        flat, unravel = ravel_pytree(centre)
        return unravel(jnp.asarray(np.asarray(flat, np.float64) + way, flat.dtype)), float(
            np.sqrt(way @ curvature @ way)
        )

    def bound(self, centre: Position, expansions: list[Expansion], example: Site) -> DisplacementBound | None:
        r"""What visits may do, computed from surrogates: with :math:`\log p(x_s \mid \theta)` replaced by them."""
        if self.false_rejection == 0:
            return None
        plan, size = self.plan(), tree.size(centre)
        gradient, curvature = self.prior(centre)
        left, alpha = 0.0 if self.prior_share else 1.0, float(self.strength)
        P = np.stack([_matrix(e.precision) for e in expansions])
        b = np.stack([e.linear for e in expansions])
        f = plan.shares[:, None]
        of_client = (1 - alpha) * b / f + alpha * b.sum(0) + left * gradient
        curvatures = (1 - alpha) * P / f[..., None] + alpha * P.sum(0) + left * curvature
        added = (self.noise_multiplier * (self.max_norm or 0.0)) ** 2 * np.eye(size)
        noise = (np.stack([_matrix(e.noise) for e in expansions]) + added) / f[..., None] ** 2
        at = np.asarray(ravel_pytree(centre)[0], np.float64)
        steps = client_steps(example.kernel, centre, curvatures, of_client + curvatures @ at, noise)
        return DisplacementBound(
            steps, plan.local_steps, self.stride, size, false_rejection=self.false_rejection, slack=self.slack
        )


def _matrix(x: np.ndarray) -> np.ndarray:
    return np.diag(x) if x.ndim == 1 else x
