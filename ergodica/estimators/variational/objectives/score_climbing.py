"""Inclusive Kullback-Leibler divergence and maximum likelihood, with a Markov chain on the posterior in the place of its draws."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key
from ergodica.estimators.em.independence import Selection, conditional_importance, metropolis_independence
from ergodica.estimators.variational.objectives.chains import Chains
from ergodica.estimators.variational.objectives.climbing import AbstractScoreClimbing


class MarkovianScoreClimbing(AbstractScoreClimbing):
    r"""Inclusive KL divergence for the guide and maximum likelihood for the model, by conditional importance sampling.

    .. math::

        \tilde w_k &\propto p_\theta(x, z_k) / q_\phi(z_k), \qquad z_0 = z^{(t-1)}, \quad z_1, \dots, z_K \sim q_\phi \\
        \hat g &= \sum_{k=0}^K \tilde w_k \nabla_{\theta,\phi} \left[ \log p_\theta(x, z_k) + \log q_\phi(z_k) \right],
        \qquad z^{(t)} = z_k \text{ with probability } \tilde w_k

    The chain's state :math:`z^{(t-1)}` of the step before takes part as a particle, and is remembered. That is what makes the
    posterior invariant for every K, so that the bias of self-normalised importance sampling, of order 1/K at every step, is
    replaced by one that fades while the chain runs.

    Parameters
    ----------
    num_particles : int
        :math:`K`, the guide's draws a step; 1 is allowed.
    rao_blackwell : bool
        Whether all particles enter the gradient by their weights, as above, or the chain's new state alone (the paper's
        algorithm). The former has no more variance, given the particles, for the same runs of the program.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`.

    Raises
    ------
    ValueError, SiteError
        For subsampled plates that do not enclose every site, for sites inside of a scan, for point masses placed by parameters,
        and in SVI where the guide is not that of ``loss.guide(model, guide)``.

    Notes
    -----
    Plates that enclose every site of model and guide have a chain for each element. If such a plate is subsampled, the
    chains are those of the *whole* plate, found by the indices that the plate gives out, and those outside of the batch stand
    still. Data of a batch handed over as an argument are not seen by the indices: hand over all the data and index them
    by the plate, or set the plate by ``numpyro.handlers.substitute(model, {"data": rows})`` in model and guide.

    The loss is minus the importance-weighted bound of the K fresh draws; its derivative is that of no loss, but the
    estimate above. The gradient is biased while chains have not settled, and lags where parameters move fast. Each
    chain starts at its first visit from the draws of that step.

    Not where chains do not move: `chains` gives the acceptance rate of each. Near zero, draws of the guide hardly ever hit the
    posterior, and the gradient says the same thing every step; K of the order of :math:`\exp \mathrm{KL}(p \| q)` is what
    importance sampling needs, and the chain, too. A mode that the guide never draws from is *not* seen there: the chain
    moves well, in the wrong place. Start guides wide; `ergodica.diagnostics.check_guide` judges the tail of the weights.

    `ergodica.compare_gradients` in the state ``"fresh"`` sees the first step, which is importance sampling without a chain.
    What chains do is seen by estimates in a row, as ``benchmarks/posterior_gradients.py`` takes them.

    Cost: ``1 + num_particles`` runs of model and guide, and their derivative. Memory: the latents of all elements of the plates.

    References
    ----------
    Naesseth, Lindsten and Blei (2020), algorithms 1 and 2; after Andrieu, Doucet and Holenstein (2010).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ergodica as erg
    >>> def model(x):
    ...     with numpyro.plate("data", 4):
    ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
    >>> def guide(x):
    ...     logits = numpyro.param("logits", jnp.zeros(4))
    ...     with numpyro.plate("data", 4):
    ...         numpyro.sample("z", dist.Bernoulli(logits=logits))
    >>> loss = erg.estimators.MarkovianScoreClimbing(num_particles=4)
    >>> svi = numpyro.infer.SVI(model, loss.guide(model, guide), optax.adam(0.05), loss)
    >>> result = svi.run(jax.random.key(0), 200, jnp.array([-1.0, 3.0, 2.5, 0.0]), progress_bar=False)
    >>> (result.params["logits"] > 0).tolist(), loss.chains(result).acceptance_rate.shape
    ([False, True, True, False], (4,))
    """

    rao_blackwell: bool = eqx.field(static=True)

    references: ClassVar = ("naesseth2020", "andrieu2010")

    def __init__(
        self, num_particles: int = 1, *, rao_blackwell: bool = True, vectorize_particles: bool | Callable = True
    ) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.rao_blackwell = bool(rao_blackwell)
        self.vectorize_particles = vectorize_particles

    def select(self, key: Key, log_weights: Array) -> Selection:
        """Draw by the normalised weights."""
        return conditional_importance(key, log_weights, rao_blackwell=self.rao_blackwell)


class JointStochasticApproximation(AbstractScoreClimbing):
    r"""Inclusive KL divergence for the guide and maximum likelihood for the model, by a Metropolis independence sampler.

    .. math::

        z' \sim q_\phi, \qquad \text{accept with probability } \min(1, w' / w), \quad w = p_\theta(x, z) / q_\phi(z), \qquad
        \hat g = \frac1K \sum_{t=1}^K \nabla_{\theta,\phi} \left[ \log p_\theta(x, z^{(t)}) + \log q_\phi(z^{(t)}) \right]

    over the states after K Metropolis steps, which go on from the state of the step before. Its weight is evaluated again under
    the present parameters, and after an acceptance the weight compared with is that of the state accepted.

    Parameters
    ----------
    num_particles : int
        :math:`K`, proposals a step.
    num_warmup : int
        Steps of SVI that forget the chains and start from their first proposal, as long as the guide is of no use as
        a proposal and remembered states would hold on to early parameters.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`.

    Raises
    ------
    ValueError, SiteError
        As `MarkovianScoreClimbing`.

    Notes
    -----
    Plates, the cache of each datum's state, subsampled plates and the loss are as for `MarkovianScoreClimbing`. At one proposal the
    chain moves more often than there, with probability :math:`\min(1, w'/w)` instead of :math:`w'/(w + w')`; but what is not
    accepted is lost, while the weights of the other take all draws into account.

    Not where chains do not move: a state whose weight is large is left once in about :math:`w_{\max}` proposals. See `chains`.

    Cost: ``1 + num_particles`` runs of model and guide, and their derivative. Memory: the latents of all elements of the plates.

    References
    ----------
    Ou and Song (2020), algorithm 1; the kernel: Tierney (1994).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.JointStochasticApproximation(num_particles=2, num_warmup=100)
    """

    num_warmup: int = eqx.field(static=True)

    references: ClassVar = ("ou2020", "tierney1994")

    def __init__(
        self, num_particles: int = 1, *, num_warmup: int = 0, vectorize_particles: bool | Callable = True
    ) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.num_warmup = check.integer("num_warmup", num_warmup, least=0)
        self.vectorize_particles = vectorize_particles

    def select(self, key: Key, log_weights: Array) -> Selection:
        """Visit the proposals in turn."""
        return metropolis_independence(key, log_weights)

    def continues(self, chains: Chains, started: Array) -> Array:
        """None of them during warm-up."""
        return started & (chains.step >= self.num_warmup)
