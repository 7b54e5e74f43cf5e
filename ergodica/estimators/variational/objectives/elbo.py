"""The evidence lower bound."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.leave_one_out import leave_one_out_mean
from ergodica.estimators.variational.lanes import downstream_cost
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from ergodica.estimators.variational.particles import Run
from ergodica.estimators.variational.structure import GUIDE


class ELBO(AbstractObjective):
    r"""Evidence lower bound, with a gradient estimator of its own at each site of the guide.

    .. math:: \mathcal L = \mathrm{E}_{q_\phi(z)} \left[ \log p_\theta(x, z) - \log q_\phi(z) \right]

    It stands where NumPyro's ``Trace_ELBO`` stands: ``SVI(model, guide, optimiser, loss=ELBO(...))``. Model and guide stay as
    they are.

    Parameters
    ----------
    num_particles : int
        Independent runs of guide and model a step.
    sites : mapping of str to AbstractSiteEstimator or "auto", optional
        By the name of the guide's site; ``"*"`` stands for all others. A site can also say it itself, in
        ``infer={"gradient": estimator}``; ``sites`` by name comes first. What is left is chosen by rule: reparameterise where
        NumPyro can, and mixtures implicitly; enumerate few values; else the score function with the other particles as
        baseline. `explain` says what was chosen.
    vectorize_particles : bool or callable
        As in NumPyro: `jax.vmap` if true, `jax.lax.map` if false, or a function that maps.

    Raises
    ------
    SiteError
        Where an estimator cannot be right at a site; it names the site, the reason and the alternatives.
    ValueError
        For names that the guide does not draw, and models and guides that do not belong together.

    Notes
    -----
    With `Score` at every site that NumPyro cannot reparameterise, the gradient is that of ``numpyro.infer.TraceGraph_ELBO``,
    number by number, apart from what is wrong there: under a subsampled plate NumPyro multiplies the score function by the
    plate's scale twice. Subsamples are shared by all particles of a step.

    The loss is the negative ELBO's estimate; nothing is added to its value. Cost: ``num_particles`` runs of model and guide
    times the branches of enumerated sites, and their derivative.

    References
    ----------
    Ranganath, Gerrish and Blei (2014); Schulman et al. (2015).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ergodica as erg
    >>> def model(x):
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("x", dist.Normal(w + z, 1.0), obs=x)
    >>> def guide(x):
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.zeros(()))))
    ...     numpyro.sample("w", dist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))
    >>> loss = erg.estimators.ELBO(num_particles=8, sites={"z": erg.estimators.LeaveOneOut()})
    >>> svi = numpyro.infer.SVI(model, guide, optax.adam(0.1), loss)
    >>> result = svi.run(jax.random.key(0), 100, jnp.array(2.0), progress_bar=False)
    >>> bool(result.losses[-1] < result.losses[0])
    True
    """

    references: ClassVar = ("ranganath2014", "schulman2015")
    estimates_elbo: ClassVar[bool] = True

    def combine(self, run: Run) -> Array:
        """Mean over particles of the weighted terms."""
        total = jnp.zeros(())
        for term, x in run.particles.terms.items():
            x = self._with_derivatives(run, term, x)
            x = run.lanes.weigh(term, run.lanes.on_branches(term, x))
            total = total + jnp.sum(x).astype(total.dtype)
        return total / self.num_particles

    def cost(self, run: Run, name: str) -> tuple[Array, Array | None]:
        """A particle's terms downstream of the site; the mean of the other particles'."""
        cost = downstream_cost(run.lanes, name, run.particles.terms)
        if self.num_particles == 1:
            return cost, None
        main = cost
        if name in run.lanes.branching:
            main = jax.lax.slice_in_dim(cost, 0, 1, axis=run.lanes.axis(name))
        return cost, jax.lax.stop_gradient(leave_one_out_mean(main))

    def _with_derivatives(self, run: Run, term: str, x: Array) -> Array:
        """A site's own term, with the derivatives that its estimator wants."""
        for name, estimator in run.estimators.items():
            if term == GUIDE.format(name):
                if estimator.landing == "stick":
                    return run.particles.held[term]
                return jax.lax.stop_gradient(x) if estimator.landing == "stop" else x
        return x
