"""The inclusive divergence: wake and sleep phases, in which the guide learns from draws that are held."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.choose import Choice
from ergodica.estimators.variational.facts import Distribution, Draw, Site, SiteError
from ergodica.estimators.variational.objectives.dreams import Observed, check_dreams, check_observed, dream_log_density
from ergodica.estimators.variational.objectives.loss import Evaluation
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from ergodica.estimators.variational.objectives.weighted import AbstractWeighted, weigh
from ergodica.estimators.variational.particles import Run, over_particles
from ergodica.estimators.variational.run import Estimators
from ergodica.estimators.variational.site import AbstractSiteEstimator, only_gradient
from ergodica.estimators.variational.structure import GUIDE, Program, Structure

HELD = "Draws are held: estimators of sites are not used. The loss's value is that of IWELBO, whose gradient the guide's is not."


class Held(AbstractSiteEstimator):
    """What stands at every site here: the draw is held, and the guide's density is raised or lowered there."""

    label: str = eqx.field(static=True)
    exact: bool = eqx.field(static=True)
    in_scan: bool = eqx.field(static=True)

    @property
    def unbiased(self) -> bool:
        """Whether draws are from the law that the guide is fitted to."""
        return self.exact

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:  # noqa: ARG002
        """Draw, and hold it."""
        return Draw(jax.lax.stop_gradient(fn(rng_key=key)))


class AbstractWakePhase(AbstractWeighted):
    r"""The model by :math:`\sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k)`; the guide by the same weights, or otherwise."""

    @property
    @abc.abstractmethod
    def wake_share(self) -> float:
        """How much of the guide's gradient is that of the wake phase."""

    @abc.abstractmethod
    def held(self, *, in_scan: bool) -> Choice:
        """What is done at every site, and why."""

    def choose(self, structure: Structure) -> dict[str, Choice]:
        """Hold all draws: estimators of sites are not used."""
        in_scan = any(site.in_scan for site in structure.sites.values())
        return dict.fromkeys(structure.sites, self.held(in_scan=in_scan))

    def power(self, dtype: Any) -> float:  # noqa: ARG002
        """The weights themselves."""
        return 1.0

    def splits(self, estimators: Estimators) -> bool:
        """Values inside a scan cannot be taken hold of when they are drawn, and the guide is run at them again."""
        return any(isinstance(estimator, Held) and estimator.in_scan for estimator in estimators.values())

    def combine(self, run: Run) -> Array:
        """The importance-weighted bound's value, with the derivatives of the phases."""
        log_weights, scale = self.weights(run)
        normalised = jax.lax.stop_gradient(normalised_weights(log_weights))
        own = {GUIDE.format(name) for name in run.structure.sites}
        guide = {term: x for term, x in run.particles.terms.items() if term in own}
        model = {term: x for term, x in run.particles.terms.items() if term not in own}
        up, down = (only_gradient(weigh(normalised, self._reduce(run, terms))) for terms in (model, guide))
        bound = jnp.sum(jax.nn.logsumexp(log_weights, axis=0) - jnp.log(self.num_particles))
        return jax.lax.stop_gradient(scale * bound) + scale * (up - self.wake_share * down)


def normalised_weights(log_weights: Array) -> Array:
    """Shares of the particles in the sum of the weights; 0 where all weights are 0, so that nothing is learned from them."""
    possible = jnp.any(log_weights > -jnp.inf, axis=0, keepdims=True)
    return jnp.where(possible, jax.nn.softmax(jnp.where(possible, log_weights, 0.0), axis=0), 0.0)


class ForwardKL(AbstractWakePhase):
    r"""Inclusive divergence :math:`\mathrm{KL}(p(z \mid x) \,\|\, q_\phi(z))`, by self-normalised weights: reweighted wake-sleep.

    .. math::

        \hat g_\phi = \sum_{k=1}^K \tilde w_k \nabla_\phi \log q_\phi(z_k), \qquad
        \hat g_\theta = \sum_{k=1}^K \tilde w_k \nabla_\theta \log p_\theta(x, z_k), \qquad
        \tilde w_k = \frac{w_k}{\sum_j w_j},\ w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    Draws come from the guide, and no derivative flows through them: discrete, mixed and continuous guides are all alike. The guide
    covers the posterior's mass, where the ELBO seeks a mode. Plates that all sites of model and guide are inside of have
    weights for each element.

    Parameters
    ----------
    num_particles : int
        :math:`K`, at least 2: one particle alone has weight 1, and the guide's gradient has mean zero.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`. There is no ``sites``: estimators of sites are not used, nor what sites say
        in ``infer``.

    Raises
    ------
    ValueError
        For a single particle; for subsampled plates that do not enclose every site.
    SiteError
        At a point mass that parameters place: its density at the posterior's draws is zero.

    Notes
    -----
    The guide's gradient is biased, by :math:`O(1/K)`: a ratio of means is no mean of ratios. The bias is towards the guide
    itself (at :math:`K = 1` nothing is learnt), so that a guide which is too narrow widens slowly, and mass that it never draws
    from is not found at all. The model's gradient is unbiased for the importance-weighted bound of :math:`K` particles.

    The loss that SVI shows is the negative importance-weighted bound, as `ergodica.estimators.IWELBO`'s. It is there to be watched:
    the guide's gradient is not its gradient, and it may rise while the divergence falls.

    Cost: ``num_particles`` runs of model and guide, and the derivative of their densities.

    When not to use it: with one weight that holds nearly all, as in many dimensions, the gradient is that of one draw. Local
    latents in a plate that encloses everything are no such case; a global latent beside many data is.

    References
    ----------
    Bornschein and Bengio (2015), equations 7 and 11; Le, Kosiorek, Siddharth, Teh and Wood (2019).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ForwardKL(num_particles=32)
    """

    references: ClassVar = ("bornschein2015", "le2019")

    def __init__(self, num_particles: int = 16, *, vectorize_particles: bool | Callable = True) -> None:
        hint = "With one particle the guide's gradient has mean zero."
        num_particles = check.integer("num_particles", num_particles, least=2, hint=hint)
        AbstractObjective.__init__(self, num_particles, vectorize_particles=vectorize_particles)

    @property
    def unbiased(self) -> bool:
        """Self-normalised weights are not."""
        return False

    @property
    def wake_share(self) -> float:
        """All of it."""
        return 1.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the phases do."""
        return (
            "The guide follows the inclusive divergence, with a bias of order 1 / num_particles; the model follows IWELBO.",
            HELD,
        )

    def held(self, *, in_scan: bool) -> Choice:
        """Draws of the guide."""
        return Choice(Held("self-normalised weights", exact=False, in_scan=in_scan), "drawn from the guide")

    def check(self, program: Program, structure: Structure, estimators: Estimators) -> None:
        """Raise for plates, and for point masses."""
        super().check(program, structure, estimators)
        for name in sorted(structure.moved_by_parameters):
            raise SiteError(
                f"ForwardKL cannot be used with the point mass {name!r} of the guide, which parameters place: the posterior's "
                "draws have no density there. Use ELBO, or a guide with a spread."
            )


class WakeSleep(AbstractWakePhase):
    r"""Wake-sleep: the guide learns from latents and data that the model draws, and the model from the data.

    .. math::

        \hat g_\phi = \frac1M \sum_{m=1}^M \nabla_\phi \log q_\phi(z_m \mid x_m), \quad (z_m, x_m) \sim p_\theta(z, x), \qquad
        \hat g_\theta = \sum_{k=1}^K \tilde w_k \nabla_\theta \log p_\theta(x, z_k), \quad z_k \sim q_\phi(z \mid x)

    The guide descends :math:`\mathrm{E}_{p_\theta(z, x)} [-\log q_\phi(z \mid x)]`: the inclusive divergence, averaged over the
    data that the model makes. It must read the data (an amortised guide).

    Parameters
    ----------
    num_particles : int
        :math:`K` of the model's gradient: 1 is the ELBO's (wake-sleep), more are IWELBO's (reweighted). If the model has no
        parameters, 1 will do.
    observed : mapping of str to str, or callable
        Where simulated data go: ``{"x": "data"}`` hands the draw at the model's observed site ``"x"`` to the guide as its
        argument ``data``, in place of the data. All observed sites must be named; all other arguments are left as they are. A
        function ``(draws, *args, **kwargs) -> (args, kwargs)`` does it for data that are kept otherwise.
    phase : {"sleep", "both"}
        ``"both"`` takes half of the guide's gradient from the wake phase, that of `ergodica.estimators.ForwardKL`.
    num_dreams : int, optional
        :math:`M`, joint draws of the model a step, each with data for all plates; ``num_particles`` unless given.
    vectorize_particles
        As for `ergodica.estimators.ELBO`. There is no ``sites``: estimators of sites are not used.

    Raises
    ------
    ValueError
        If a model cannot be simulated (factors, improper laws, observations inside a scan), observed sites are not named, or the
        arguments do not fit; if the guide reads no data, or has sites without a density at the model's draws (auxiliary
        ones, point masses). For subsampled plates that do not enclose every site, if there are several particles.

    Notes
    -----
    With ``phase="sleep"`` both gradients are unbiased, each for its own objective; there is no single one that both descend. Under
    a subsampled plate, simulated rows go to their places among the data; elements that the model masks keep their data.

    The loss that SVI shows is the negative importance-weighted bound at the data, to be watched: it is neither's objective.

    Cost: ``num_particles`` runs of model and guide, and ``num_dreams`` of both, where the model's is a draw without a derivative.

    When not to use it: where the model's data are unlike the data at hand, as at the start of learning a model, the guide is
    trained elsewhere (``phase="both"`` helps). For one data set and no parameters of the model it is neural posterior estimation.

    References
    ----------
    Hinton, Dayan, Frey and Neal (1995); Bornschein and Bengio (2015), section 2.3; for a fixed model Le, Baydin and Wood (2017).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.WakeSleep(num_particles=8, observed={"x": "x"})
    """

    observed: Observed = eqx.field(static=True)
    phase: Literal["sleep", "both"] = eqx.field(static=True)
    num_dreams: int = eqx.field(static=True)

    references: ClassVar = ("hinton1995", "bornschein2015", "le2017")

    def __init__(
        self,
        num_particles: int = 16,
        observed: Observed | None = None,
        *,
        phase: Literal["sleep", "both"] = "sleep",
        num_dreams: int | None = None,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        AbstractObjective.__init__(self, num_particles, vectorize_particles=vectorize_particles)
        if phase == "wake":
            raise ValueError("phase='wake' draws nothing from the model: that is ForwardKL(num_particles).")
        self.observed = check_observed(observed)
        check.one_of("phase", phase, ("sleep", "both"))
        self.phase = phase
        if phase == "both":
            check.integer("num_particles", num_particles, least=2, hint="One particle has no weights to learn from.")
        self.num_dreams = self.num_particles if num_dreams is None else check.integer("num_dreams", num_dreams)

    @property
    def unbiased(self) -> bool:
        """Unless the wake phase has a share in it."""
        return self.phase == "sleep"

    @property
    def wake_share(self) -> float:
        """None, or half."""
        return 0.5 if self.phase == "both" else 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the phases do."""
        half = ", and by half from its own weighted draws" if self.phase == "both" else ""
        dreams = f"{self.num_dreams} joint draw{'s' * (self.num_dreams != 1)} of the model a step"
        model = "ELBO" if self.num_particles == 1 else "IWELBO"
        return (f"The guide learns from {dreams}{half}; the model follows {model} at the data.", HELD)

    def held(self, *, in_scan: bool) -> Choice:
        """Draws of the model."""
        if self.phase == "both":
            return Choice(Held("both phases", exact=False, in_scan=in_scan), "drawn from the model, and from the guide")
        return Choice(Held("sleep phase", exact=True, in_scan=in_scan), "drawn from the model")

    def check(self, program: Program, structure: Structure, estimators: Estimators) -> None:
        """Raise for plates that weights would be wrong for."""
        super().check(program, structure, estimators)
        check_dreams(self.observed, program, {}, structure)

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:
        """Add the sleep phase."""
        key_wake, key_sleep = jax.random.split(key)
        done = super().evaluate(key_wake, params, program, state, learned)

        def dream(key: Key) -> Array:
            return dream_log_density(key, params, program, self.observed)

        keys = jax.random.split(key_sleep, self.num_dreams)
        dreamt = jnp.mean(over_particles(dream, keys, self.num_dreams, self.vectorize_particles))
        value = done.value + (1 - self.wake_share) * only_gradient(dreamt).astype(done.value.dtype)
        return done._replace(value=value, num_runs=done.num_runs + self.num_dreams)
