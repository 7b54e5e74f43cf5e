"""Path gradients for NumPyro's flow guides, in one pass."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.handlers import replay, seed, substitute, trace

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.flows.numpyro_rules import carry
from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.explain import Explanation, Row
from ergodica.estimators.variational.facts import Site, base
from ergodica.estimators.variational.objectives.loss import AbstractLoss, Evaluation
from ergodica.estimators.variational.particles import mean_of_particles, over_particles
from ergodica.estimators.variational.structure import GUIDE, Program, Structure, inspect


class PathELBO(AbstractLoss):
    r"""Evidence lower bound with the path gradient, for guides that are flows.

    .. math::

        \nabla_\phi \mathcal L = \mathrm{E}_\varepsilon\left[
        \left(\frac{\partial z_\phi}{\partial\phi}\right)^{\!\top} \nabla_z\left(\log p_\theta(x, z) - \log q_\phi(z)\right)
        \right], \qquad z_\phi = T_\phi(\varepsilon)

    The score :math:`\nabla_z \log q_\phi(z)` is carried along while the guide draws, so that no transformation is inverted.
    ``SVI(model, guide, optimiser, loss=PathELBO(...))``; :math:`\nabla_\theta` is what it always is.

    Parameters
    ----------
    num_particles : int
        Independent runs of guide and model a step.
    vectorize_particles : bool or callable
        As in NumPyro: `jax.vmap` if true, `jax.lax.map` if false, or a function that maps.

    Raises
    ------
    SiteError
        At the first trace, for guides whose sites are discrete, cannot be reparameterised, or depend on one another. There,
        take ``ELBO(sites={"*": Reparam(stl=True)})``, which needs the guide's densities at given values.
    ValueError
        For guides of point masses alone, and models and guides that do not belong together.

    Notes
    -----
    Any guide will do that draws from reparameterised laws, each independent of the other draws: ``AutoIAFNormal``,
    ``AutoBNAFNormal``, whose density NumPyro cannot evaluate at a given value, ``AutoNormal``, ``AutoDiagonalNormal``,
    ``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal`` and their batched kin, guides of one's own with a
    ``TransformedDistribution``. The change of variables to constrained values is a part of the model's density.

    It is unbiased unless the support of a draw moves with the parameters (not checked), and where NumPyro's own derivatives are:
    it differentiates the cut of log scales in ``InverseAutoregressiveTransform`` as if there were none.

    The noise vanishes where the guide is exact. Far from there it may be larger than that of `ergodica.estimators.ELBO`; see there
    how to compare. The loss is the negative ELBO's estimate; nothing is added to its value.

    Cost: ``num_particles`` runs of guide and model and their derivative; and for the score, per transformation: a derivative for
    elementwise ones, a triangular solve for affine ones, D derivatives of the net and a solve for autoregressive ones, the
    derivative of the inverse for others. A law that is no ``TransformedDistribution`` costs a derivative of its density.

    References
    ----------
    Vaitl, Winkler, Richter and Kessel (2024), equation 12; Roeder, Wu and Duvenaud (2017).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ergodica as erg
    >>> def model(x):
    ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     numpyro.sample("x", dist.Normal(w[0] * w[1], 1.0), obs=x)
    >>> def guide(x):
    ...     loc, scale = numpyro.param("loc", jnp.zeros(2)), numpyro.param("scale", jnp.eye(2))
    ...     flow = dist.transforms.LowerCholeskyAffine(loc, scale)
    ...     base = dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)
    ...     numpyro.sample("w", dist.TransformedDistribution(base, [flow]))
    >>> svi = numpyro.infer.SVI(model, guide, optax.adam(0.01), loss=erg.estimators.PathELBO(num_particles=8))
    >>> result = svi.run(jax.random.key(0), 100, jnp.array(2.0), progress_bar=False)
    >>> bool(result.losses[-10:].mean() < result.losses[:10].mean())
    True
    """

    num_particles: int = eqx.field(static=True)
    vectorize_particles: bool | Callable = eqx.field(static=True)

    references: ClassVar = ("vaitl2024", "roeder2017")
    can_infer_discrete: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    estimates_elbo: ClassVar[bool] = True

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool | Callable = True) -> None:
        self.num_particles = check.integer("num_particles", num_particles)
        self.vectorize_particles = vectorize_particles

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:  # noqa: ARG002
        """Estimate the objective; ascends."""
        structure = inspect(program, params)
        self._sites(structure)
        plate_key = None
        if structure.subsampled:
            plate_key, key = jax.random.split(key)
        keys = key[None] if self.num_particles == 1 else jax.random.split(key, self.num_particles)

        def one(key: Key) -> tuple[Array, dict]:
            key_model, key_guide = jax.random.split(key)
            return run_particle(program, params, key_model, key_guide, plate_key)

        terms, mutable = over_particles(one, keys, self.num_particles, self.vectorize_particles)
        return Evaluation(jnp.mean(terms), {}, mean_of_particles(mutable, 1), self.num_particles)

    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:  # noqa: ARG002
        """Nothing is remembered."""
        return {}

    def guide(self, model: Callable, guide: Callable) -> Callable:  # noqa: ARG002
        """The guide itself."""
        return guide

    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """What `explain` prints, as rows."""
        structure = inspect(Program(model, guide, args, kwargs), {})
        why = "the score is carried along with the draw"
        rows = [
            Row(s.name, f"{s.distribution} {s.batch_shape + s.event_shape}", "path", why, True, 1, s.terms)  # noqa: FBT003
            for s in self._sites(structure)
        ]
        plural = "s" * (self.num_particles != 1)
        title = (
            f"PathELBO, {self.num_particles} particle{plural}: {self.num_particles} run{plural} of model and guide a step; "
            "the gradient is unbiased."
        )
        return Explanation(title, tuple(rows))

    def _sites(self, structure: Structure) -> list[Site]:
        """The sites that draw; raise where one of them is none of a flow."""
        drawn = [site for site in structure.sites.values() if not site.delta]
        if not drawn:
            raise ValueError(
                "The guide has point masses alone (as AutoDelta and AutoLaplaceApproximation have): there is no density whose "
                "score could be carried. Use ergodica.estimators.ELBO or numpyro.infer.Trace_ELBO."
            )
        names = {site.name for site in drawn}
        for site in drawn:
            if site.discrete or not site.reparameterised:
                why = "its values are discrete" if site.discrete else "NumPyro has no reparameterisation of it"
                raise site.refuse(
                    self, f"{why}, so that it is no flow", "ELBO(num_particles=8), which picks an estimator"
                )
            if site.in_scan:
                raise site.refuse(self, "it is inside a scan", "ELBO(sites={'*': Reparam(stl=True)})")
            upstream = sorted(structure.upstream[GUIDE.format(site.name)] & names - {site.name})
            if upstream:
                reason = f"its law depends on {', '.join(map(repr, upstream))}, and the sites of a flow are drawn independently"
                raise site.refuse(self, reason, "ELBO(sites={'*': Reparam(stl=True)})")
        return drawn


class Landed(NamedTuple):
    """A draw where its flow ends: the point (differentiable), what follows it, and constants: log density and score.

    ``after`` is the log determinant (differentiable) of transformations that are left to the model's side.
    """

    point: Array
    after: Array
    log_density: Array
    score: Array


def run_particle(
    program: Program, params: dict, key_model: Key, key_guide: Key, plate_key: Key | None
) -> tuple[Array, dict]:
    """ELBO of one draw, whose derivative is the path gradient, and mutable values."""
    guide, model = _seeded(program.guide, key_guide, plate_key), _seeded(program.model, key_model, plate_key)

    drawn = trace(substitute(guide, data=params)).get_trace(*program.args, **program.kwargs)
    sites = trace(substitute(replay(model, drawn), data=params)).get_trace(*program.args, **program.kwargs)
    total = sum((_log_prob(site) for site in sites.values() if site["type"] == "sample"), jnp.zeros(()))
    for site in drawn.values():
        if site["type"] != "sample":
            continue
        given = site.get("is_observed", False) or isinstance(base(site["fn"]), dist.Delta)
        total = total - (_log_prob(site) if given else path_log_density(site))
    mutable = {n: s["value"] for t in (drawn, sites) for n, s in t.items() if s["type"] == "mutable"}
    return total, mutable


def path_log_density(site: dict) -> Array:
    r"""Log density of a guide's draw, whose derivative is :math:`(\partial z/\partial\phi)^\top \nabla_z \log q_\phi(z)`.

    Parameters
    ----------
    site : dict
        Of a trace of the guide.
    """
    landed = land(site)
    path = jnp.sum(landed.score * (landed.point - jax.lax.stop_gradient(landed.point)))
    return landed.log_density + path - landed.after


def land(site: dict) -> Landed:
    """Carry the score of a draw to where its flow ends."""
    fn, intermediates, value = site["fn"], site.get("intermediates"), site["value"]
    scale = jnp.asarray(1.0 if site["scale"] is None else site["scale"], value.dtype)
    if not (isinstance(fn, dist.TransformedDistribution) and intermediates and scale.ndim == 0):
        value_held = jax.lax.stop_gradient(value)
        log_q, score = jax.value_and_grad(lambda x: jnp.sum(scale * fn.log_prob(x)))(value_held)
        return Landed(value, jnp.zeros((), value.dtype), *jax.lax.stop_gradient((log_q, score)))
    moving, extras = [*(x for x, _ in intermediates), value], [extra for _, extra in intermediates]
    points = jax.lax.stop_gradient(moving)
    last = next((i for i, x in enumerate(points) if x.size != points[0].size), len(points)) - 1
    log_q, score = jax.value_and_grad(lambda x: jnp.sum(fn.base_dist.log_prob(x)))(points[0])
    for i, transform in enumerate(fn.transforms[:last]):
        log_q -= jnp.sum(transform.log_abs_det_jacobian(points[i], points[i + 1], extras[i]))
        score = carry(transform, points[i], points[i + 1], score)
    after = jnp.zeros((), value.dtype)
    for i, transform in enumerate(fn.transforms[last:], last):
        after += jnp.sum(transform.log_abs_det_jacobian(moving[i], moving[i + 1], extras[i]))
    return Landed(moving[last], scale * after, *jax.lax.stop_gradient((scale * log_q, scale * score)))


def _log_prob(site: dict) -> Array:
    """Sum of a site's log probabilities, scaled."""
    log_prob = log_density(site["fn"], site["value"], site.get("intermediates"))
    return jnp.sum(log_prob if site["scale"] is None else jnp.asarray(site["scale"], log_prob.dtype) * log_prob)


def _seeded(function: Any, key: Key, plate_key: Key | None) -> Any:
    if plate_key is not None:
        function = seed(function, plate_key, hide_types=["sample", "prng_key", "control_flow"])
    return seed(function, key)
