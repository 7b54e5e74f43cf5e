"""Gradients at clients that are clipped datum by datum and noised, and what they give away of one datum."""

import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.federated import AbstractFederatedGradient
from ergodica.core.shards import Shards
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.federated.conducive import Conducive, ConduciveState


class PrivateConducive(AbstractFederatedGradient):
    r"""The gradient of `Conducive` with clipped data and Gaussian noise. Biased.

    .. math::

        \hat g_s(\theta) = \nabla\log p(\theta)
            + \frac{1}{f_s} \Big[ \sum_{i=1}^{N_s} \min\!\Big(1, \frac{C}{\lVert g_i \rVert}\Big) g_i + z C \zeta \Big]
            + \alpha \Big[ \nabla\log q(\theta) - \frac{1}{f_s} \nabla\log q_s(\theta) \Big],
        \qquad g_i = \nabla\log p(x_i \mid \theta), \quad \zeta \sim N(0, I)

    Parameters
    ----------
    gradient : Conducive
        Without ``batch_size``: all rows of the client are used.
    max_norm : float
        :math:`C`, in the units of one datum's gradient.
    noise_multiplier : float
        :math:`z`; 0 clips without noise.

    Raises
    ------
    ValueError, TypeError
        For a gradient of batches, a norm that is not positive, or a negative multiplier.

    Notes
    -----
    One datum more or less changes the sum by at most ``C``, so one gradient at a fixed position is a Gaussian mechanism with
    :math:`\mu = 1/z`; `gaussian_privacy` counts many. The surrogates are **not** covered: they are computed from the data
    without noise, and go to the server and, summed, to all clients. So is every setting that was chosen by looking at the
    data. For a guarantee, make the surrogates from public data, or go without (``Conducive(shards, None)``).

    Batches are refused, since a batch drawn with replacement may hold a datum several times, and the amplification by
    subsampling that would make up for it is not counted here.

    The posterior is changed: by the clipping (see `ergodica.estimators.Clipped`; no error estimate sees it), and by the noise,
    which acts as gradient noise of variance :math:`(zC/f_s)^2` and inflates variances as `ergodica.samplers.SGLD` says, by
    :math:`1 + h (zC/f_s)^2 / 2` for small steps.

    Cost: as many likelihood gradients as the largest client has rows, one by one: memory of so many times the parameters. The value
    is that of the gradient without clipping and noise; do not send it on.

    References
    ----------
    Abadi et al. (2016), Algorithm 1; Dong, Roth and Su (2022) for the counting.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: 0.0 * t, lambda t, x: x * t, jnp.array([1.0, 9.0, 2.0]), initial=jnp.array(0.0))
    >>> gradient = PrivateConducive(erg.estimators.Conducive(erg.Shards(posterior, [0, 0, 1])), max_norm=4.0, noise_multiplier=0.0)
    >>> state = gradient.visit(gradient.init(jax.random.key(0), posterior.initial), jnp.array(0))
    >>> round(float(gradient.estimate(jax.random.key(1), jnp.array(0.0), state)[0].gradient), 3)  # (1 + 4) / (2/3)
    7.5
    """

    conducive: Conducive
    max_norm: Array
    noise_multiplier: Array

    references: ClassVar = ("elmekkaoui2021", "abadi2016", "dong2022")

    def __init__(self, gradient: Conducive, max_norm: Any, noise_multiplier: Any) -> None:
        self.conducive = check.instance("gradient", gradient, Conducive, "such as Conducive(shards, surrogates)")
        if gradient.batch_size is not None:
            raise ValueError(
                f"gradient must use all rows of a client; got batch_size={gradient.batch_size}. A batch drawn with replacement may "
                "hold one datum several times, for which clipping is no bound."
            )
        self.max_norm = check.positive("max_norm", max_norm)
        self.noise_multiplier = check.positive("noise_multiplier", noise_multiplier, allow_zero=True)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> ConduciveState:
        """Start at no client: each estimate draws one until `visit` puts the chain at one."""
        return self.conducive.init(key, params, batch)

    def visit(self, state: ConduciveState, client: Array, share: Array | None = None) -> ConduciveState:
        """Put a chain at a client."""
        return self.conducive.visit(state, client, share)

    def estimate(
        self, key: Key, params: PyTree, state: ConduciveState, batch: Batch | None = None
    ) -> tuple[Estimate, ConduciveState]:
        """Estimate the gradient at the client where the chain is."""
        key_client, key_noise = jax.random.split(key)
        self.conducive.init(key_client, params, batch)  # refuses a batch
        if state.client is None:
            client = self.conducive.table.draw(jax.random.bits(key_client, (2,), jnp.uint32))
            return self._at(key_noise, params, self.visit(state, client)), state
        return self._at(key_noise, params, state), state

    def probe(self, key: Key, params: PyTree, state: ConduciveState) -> Estimate:  # noqa: ARG002
        """Estimate at a client that is drawn anew; as biased by the clipping as the others."""
        return self.estimate(key, params, ConduciveState(None, None))[0]

    def _at(self, key: Key, params: PyTree, state: ConduciveState) -> Estimate:
        shards, (client, share) = self.shards, state
        assert client is not None
        batch = shards.whole(client)
        exact = self.conducive.at(params, state, batch)
        clipped, plain = self._sums(params, batch)
        noise = tree.scale(rng.normal_like(key, params), self.noise_multiplier * self.max_norm)
        change = tree.subtract(tree.add(clipped, noise), plain)
        if share is not None:
            change = jax.tree.map(lambda x: x / tree.cast_like(share, x), change)
        return Estimate(tree.add(exact.gradient, change), exact.value, n_grad=batch.weight.shape[0])

    def _sums(self, params: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
        """Sums over a client's data of the gradients, clipped and as they are."""

        def of_one(row: PyTree) -> PyTree:
            one = jax.tree.map(lambda x: x[None], row)
            return jax.grad(lambda theta: self.posterior.log_likelihood(theta, one)[0])(params)

        each = jax.vmap(of_one)(batch.data)
        counts = (batch.weight > 0).astype(jnp.result_type(float))
        norms = jax.vmap(tree.norm)(each)
        kept = jnp.minimum(1, tree.cast_like(self.max_norm, norms) / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))

        def total(weight: Array) -> PyTree:
            return jax.tree.map(lambda g: jnp.tensordot(weight.astype(g.dtype), g, 1), each)

        return total(counts.astype(kept.dtype) * kept), total(counts)

    def mean_log_density(self, params: PyTree, client: Array) -> Array:
        """Evaluate the client's log density without clipping; clipped gradients are in general not the gradient of any."""
        return self.conducive.mean_log_density(params, client)

    def surrogate_log_density(self, params: PyTree, client: Array) -> Array:
        """Log density of a client's surrogate, up to a constant; 0 where there is none."""
        return self.conducive.surrogate_log_density(params, client)

    def covariance(self, params: PyTree, client: Array) -> Array:
        r"""Covariance (D, D) of one gradient at a client: :math:`(zC/f_s)^2 I`."""
        size = tree.size(params)
        scale = self.noise_multiplier * self.max_norm / self.probabilities[client]
        return jnp.eye(size) * (scale * scale)

    def only(self, client: int) -> "PrivateConducive":
        """Take what one client needs."""
        return eqx.tree_at(lambda g: g.conducive, self, self.conducive.only(client))

    @property
    def shards(self) -> Shards:
        """The data, by client."""
        return self.conducive.shards

    @property
    def probabilities(self) -> Array:
        """Share of the steps made at each client."""
        return self.conducive.probabilities


class GaussianPrivacy(NamedTuple):
    r"""What a number of Gaussian mechanisms give away of one datum.

    Attributes
    ----------
    mu : float
        Of Gaussian differential privacy: telling the datum's presence is as hard as telling N(0, 1) from N(mu, 1).
    epsilon : float
        For ``delta``: the least with :math:`\delta(\varepsilon) \le \delta`.
    delta : float
    """

    mu: float
    epsilon: float
    delta: float


def gaussian_privacy(
    num_steps: int,
    noise_multiplier: float,
    delta: float = 1e-5,
    *,
    max_norm: float | None = None,
    share: float = 1.0,
    step_size: float | None = None,
    temperature: float = 1.0,
) -> GaussianPrivacy:
    r"""Count the privacy loss of steps with `PrivateConducive`, for one datum more or less at one client.

    .. math::

        \mu = \sqrt{K}\, \frac{C / f_s}{\sqrt{(z C / f_s)^2 + 2T/h}}, \qquad
        \delta(\varepsilon) = \Phi\!\Big(-\frac{\varepsilon}{\mu} + \frac{\mu}{2}\Big)
            - e^{\varepsilon}\, \Phi\!\Big(-\frac{\varepsilon}{\mu} - \frac{\mu}{2}\Big)

    Parameters
    ----------
    num_steps : int
        :math:`K`, *all* the steps that are made at the client over the whole run, by all chains, warm-up included.
    noise_multiplier : float
        :math:`z`.
    delta : float
    max_norm, share, step_size, temperature : float
        :math:`C`, :math:`f_s`, :math:`h` and :math:`T`: given with ``step_size``, the noise of the Langevin step is counted as
        well. Only if nobody else knows it: the site must draw it from a secret (``secret`` of the SuperNode).

    Returns
    -------
    GaussianPrivacy

    Notes
    -----
    The composition of Gaussian mechanisms, chosen one after the other with knowledge of all before, is exactly one Gaussian
    mechanism with the root of the sum of the squares of their :math:`\mu` (Dong, Roth and Su 2022, corollary 3.3), so
    nothing is lost in the counting and no accountant is needed. It holds for the release of every iterate; that fewer are
    sent gains nothing here. As zero-concentrated privacy it is :math:`\rho = \mu^2/2`.

    References
    ----------
    Dong, Roth and Su (2022), corollaries 2.13 and 3.3; Balle and Wang (2018), theorem 8.

    Examples
    --------
    >>> loss = gaussian_privacy(num_steps=1000, noise_multiplier=30.0, delta=1e-5)
    >>> round(loss.mu, 3), round(loss.epsilon, 2)
    (1.054, 4.65)
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    count = check.integer("num_steps", num_steps)
    z = float(check.positive("noise_multiplier", noise_multiplier, allow_zero=step_size is not None))
    delta = float(delta)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1; got {delta}.")
    variance = z * z
    if step_size is not None:
        if max_norm is None:
            raise ValueError("max_norm must be given with step_size: the step's noise is measured by it.")
        C, h, T = (
            float(check.positive(n, x))
            for n, x in (("max_norm", max_norm), ("step_size", step_size), ("temperature", temperature))
        )
        variance += 2 * T / h * (float(check.positive("share", share)) / C) ** 2
    mu = math.sqrt(count / variance)

    def log_excess(epsilon: float) -> float:
        first, second = log_ndtr(-epsilon / mu + mu / 2), epsilon + log_ndtr(-epsilon / mu - mu / 2)
        return first + math.log1p(-math.exp(min(second - first, -1e-300))) - math.log(delta)

    if log_excess(0.0) <= 0:
        return GaussianPrivacy(mu, 0.0, delta)
    largest = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # that of zero-concentrated privacy
    epsilon: Any = brentq(log_excess, 0.0, largest, xtol=1e-10)
    return GaussianPrivacy(mu, float(epsilon), delta)
