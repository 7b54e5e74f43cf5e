"""The score function, with its baselines, and leave-one-out baselines from the other particles."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.leave_one_out import leave_one_out_logsumexp, leave_one_out_mean
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from ergodica.estimators.variational.sites.baselines import AbstractBaseline, Constant


def finite_baseline(x: Array) -> Array:
    """A baseline of the other particles; 0 where all of them have weight 0, and its logarithm is no number."""
    return jnp.where(jnp.isneginf(x), 0.0, x)


def vimco_baseline(log_weights: Array) -> Array:
    r"""The bound with particle :math:`k` replaced by the geometric mean of the others (Mnih and Rezende 2016, equation 8).

    .. math:: \hat L_{-k} = \log \frac1K \Big( \sum_{j \ne k} w_j + \exp \tfrac{1}{K-1} \sum_{j\ne k} \log w_j \Big)
    """
    impossible = jnp.isneginf(log_weights)
    others_impossible = leave_one_out_mean(impossible.astype(log_weights.dtype)) > 0
    fill_in = jnp.where(others_impossible, -jnp.inf, leave_one_out_mean(jnp.where(impossible, 0.0, log_weights)))
    return jnp.logaddexp(leave_one_out_logsumexp(log_weights), fill_in) - jnp.log(log_weights.shape[0])


class Score(AbstractSiteEstimator):
    r"""Score function (REINFORCE), with a baseline if one is given.

    .. math:: \nabla_\theta \mathrm{E}_{q_\theta} f = \mathrm{E}_{q_\theta} (f(z) - b)\, \nabla_\theta \log q_\theta(z)

    Of :math:`f` only the terms downstream of the site enter, found by following the value through the traced program, and along
    plates each element has its own: what a value cannot influence adds noise and nothing else.

    Parameters
    ----------
    baseline : float, MovingAverage or Network, optional
        What is subtracted; nothing unless given. From the other particles: `LeaveOneOut`.

    Notes
    -----
    Right for any model, at any site whose support does not move with the parameters. That of ``Uniform(0, theta)`` does, and what
    flows over its end is missing here; nothing checks it. Cost: one run of the program.

    When not to use it: without a baseline the variance grows with the square of the cost, which at an ELBO is far from zero:
    `LeaveOneOut` removes that for the price of a second particle.

    Elements of a plate are taken to be independent given what is outside of it, as NumPyro defines plates; what a site outside
    that depends on them hands back to each is counted. A program that mixes them by hand (a sum over the plate that goes into
    each element) breaks that, and cannot be seen.

    References
    ----------
    Williams (1992); downstream terms: Schulman et al. (2015), theorem 1; Ranganath, Gerrish and Blei (2014), section 3.1.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=8, sites={"z": erg.estimators.Score(baseline=-3.0)})
    """

    baseline: AbstractBaseline | None

    references: ClassVar = ("williams1992", "schulman2015", "ranganath2014")

    def __init__(self, baseline: float | AbstractBaseline | None = None) -> None:
        if baseline is None or isinstance(baseline, AbstractBaseline):
            self.baseline = baseline
            return
        try:
            self.baseline = Constant(jnp.asarray(baseline, jnp.result_type(float)))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"baseline must be a number, MovingAverage(), Network(…) or None; got {baseline!r}."
            ) from error

    def check(self, site: Site, context: Context) -> None:  # noqa: ARG002
        """Raise where the value has no density, or is out of reach."""
        check_has_score(self, site)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and stop derivatives."""
        return Draw(jax.lax.stop_gradient(fn(rng_key=key)))

    def parameters(self, key: Key, site: Site, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Those of the baseline."""
        return None if self.baseline is None else self.baseline.parameters(key, *args, **kwargs)

    def init(self, site: Site) -> PyTree:
        """What the baseline remembers."""
        return None if self.baseline is None else self.baseline.init(site)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:
        """Score times cost less baseline; and the baseline's fit."""
        if self.baseline is None:
            return score_surrogate(downstream.log_prob, downstream.cost)
        signal = downstream.cost - self.baseline.at(site, downstream)
        surrogate, fit = score_surrogate(downstream.log_prob, signal), self.baseline.fit(site, downstream)
        return surrogate if fit is None else jnp.sum(surrogate) + jnp.sum(fit)

    def update(self, site: Site, downstream: Downstream) -> PyTree:
        """What the baseline remembers for the next step."""
        return downstream.state if self.baseline is None else self.baseline.update(site, downstream)


class LeaveOneOut(AbstractSiteEstimator):
    r"""Score function with the mean of the other particles as the baseline.

    .. math::

        \hat g = \frac1K \sum_k \Big( f(z_k) - \frac{1}{K-1} \sum_{j \ne k} f(z_j) \Big) \nabla_\theta \log q_\theta(z_k)

    Element by element along plates, and with the terms downstream of the site alone. Under `ergodica.estimators.IWELBO` the
    baseline is the bound of the other :math:`K - 1` particles.

    Raises
    ------
    SiteError
        With a single particle.

    Notes
    -----
    Unbiased, since the other particles are independent of this one. Constants in the cost cancel exactly. The same
    estimator is known as RLOO, LOORF, and (as a loss) VarGrad. Cost: one run of the program a particle.

    References
    ----------
    Kool, van Hoof and Welling (2019), equation 8; Salimans and Knowles (2014).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=16, sites={"z": erg.estimators.LeaveOneOut()})
    """

    references: ClassVar = ("kool2019",)

    def check(self, site: Site, context: Context) -> None:
        """Raise where there are no others."""
        check_has_score(self, site)
        check_has_others(self, site, context)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and stop derivatives."""
        return Draw(jax.lax.stop_gradient(fn(rng_key=key)))

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Score times cost less that of the others."""
        assert downstream.others is not None
        return score_surrogate(downstream.log_prob, downstream.cost - downstream.others)


class VIMCO(AbstractSiteEstimator):
    r"""Score function for importance-weighted bounds, with the particle replaced by the geometric mean of the others.

    .. math::

        \hat g = \sum_k (\hat L - \hat L_{-k})\, \nabla_\theta \log q_\theta(z_k) + \sum_k \tilde w_k \nabla_\theta \log w_k,
        \qquad \tilde w_k = w_k \Big/ \sum_j w_j

    with :math:`\hat L_{-k}` of `vimco_baseline`.

    Raises
    ------
    SiteError
        Under an objective that is no function of weights, or with a single particle.

    Notes
    -----
    Unbiased for :math:`\mathrm{E} \log \frac1K \sum_k w_k`. Cost: one run of the program a particle.

    References
    ----------
    Mnih and Rezende (2016), equations 7 to 9.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.IWELBO(num_particles=8, sites={"z": erg.estimators.VIMCO()})
    """

    references: ClassVar = ("mnih2016",)

    def check(self, site: Site, context: Context) -> None:
        """Raise where there are no weights, or no others."""
        check_has_score(self, site)
        if context.linear:
            raise site.refuse(self, f"{context.objective} is a mean over particles and has no weights", "LeaveOneOut()")
        check_has_others(self, site, context)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and stop derivatives."""
        return Draw(jax.lax.stop_gradient(fn(rng_key=key)))

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Score times the bound less that without the particle."""
        assert downstream.log_weights is not None
        without = downstream.scale * finite_baseline(vimco_baseline(downstream.log_weights))
        return score_surrogate(downstream.log_prob, downstream.cost - without)


def check_has_score(estimator: AbstractSiteEstimator, site: Site) -> None:
    """Raise where a site has no density with parameters, or its value cannot be taken hold of."""
    if site.delta:
        raise site.refuse(estimator, "a point mass has no score", "Reparam()")
    if site.in_scan and not site.discrete:
        reason = "it is continuous inside a scan, where derivatives through its value cannot be stopped"
        raise site.refuse(estimator, reason, "Reparam() if it can be reparameterised, or a Python loop for the scan")


def check_has_others(estimator: AbstractSiteEstimator, site: Site, context: Context) -> None:
    """Raise with a single particle."""
    if context.num_particles < 2:
        raise site.refuse(
            estimator,
            "with num_particles=1 there are no other particles",
            "num_particles of at least 2, or Score(baseline=…)",
        )
