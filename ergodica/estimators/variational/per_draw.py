"""The draws of an evidence lower bound one by one, with the standard normal noise that its Gaussian sites are made of."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions import transforms

from ergodica.core import tree
from ergodica.core.types import Draws, Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Draw, Site, SiteError, base
from ergodica.estimators.variational.objectives.elbo import ELBO
from ergodica.estimators.variational.particles import over_particles
from ergodica.estimators.variational.run import Estimators
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.reparam import Reparam
from ergodica.estimators.variational.structure import Program, Structure, inspect
from ergodica.estimators.variational.wrap import LEARNED

ELEMENTWISE = (
    transforms.AffineTransform,
    transforms.ExpTransform,
    transforms.SigmoidTransform,
    transforms.SoftplusTransform,
)


class RememberedNoise(AbstractSiteEstimator):
    r"""`Reparam`, which keeps the noise :math:`\varepsilon` of Gaussian laws, and multiplies it by a factor."""

    inner: Reparam
    factor: Array

    @property
    def landing(self) -> Literal["keep", "stop", "stick"]:
        """As `Reparam` does."""
        return self.inner.landing

    def check(self, site: Site, context: Context) -> None:
        """As `Reparam` does."""
        self.inner.check(site, context)

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw | None:
        """Make the value from noise where the law is Gaussian; elsewhere as `Reparam` does."""
        shape = noise_shape(fn)
        if shape is None:
            return self.inner.draw(key, fn, branch, site, noise)
        own = jax.random.normal(key, shape, jnp.result_type(float))
        return Draw(value_of_noise(fn, tree.cast_like(self.factor, own) * own), own)

    def surrogate(self, site: Site, downstream: Any) -> None:  # noqa: ARG002
        """None; overridden so that `update` is called."""
        return

    def update(self, site: Site, downstream: Any) -> PyTree:  # noqa: ARG002
        """The noise, if it was recorded."""
        return downstream.record


def noise_shape(fn: Distribution) -> tuple[int, ...] | None:
    """Shape of the standard normal noise that a law's value is an explicit function of; ``None`` for other laws."""
    law, _ = _split(fn)
    if isinstance(law, dist.LowRankMultivariateNormal):
        return (*fn.batch_shape, jnp.shape(law.cov_factor)[-1] + law.event_shape[0])
    if isinstance(law, dist.Normal | dist.MultivariateNormal):
        return fn.batch_shape + fn.event_shape
    return None


def value_of_noise(fn: Distribution, noise: Array) -> Array:
    """Value of a law made from normals, one of `noise_shape`, as NumPyro makes it."""
    law, outer = _split(fn)
    own: Any = law
    shape = fn.batch_shape + fn.event_shape
    loc = jnp.broadcast_to(law.loc, shape)
    if isinstance(law, dist.LowRankMultivariateNormal):
        rank = own.cov_factor.shape[-1]
        value = loc + _times(own.cov_factor, noise[..., :rank], shape)
        value = value + jnp.sqrt(jnp.broadcast_to(law.cov_diag, shape)) * noise[..., rank:]
    elif isinstance(law, dist.MultivariateNormal):
        value = loc + _times(own.scale_tril, noise, shape)
    else:
        value = loc + jnp.broadcast_to(law.scale, shape) * noise
    for transform in outer:
        value = transform(value)
    return value


def per_draw(
    gradient: Any,
    program: Program,
    key: Key,
    params: dict[str, PyTree],
    *,
    linearise: bool,
) -> Draws | None:
    """Run the program once for each particle, and differentiate each; see `AbstractGradientEstimator.per_draw`."""
    loss: Any = gradient.loss
    if type(loss) is not ELBO:
        return None
    constrained = gradient.constrain(params)
    structure = inspect(program, constrained)
    estimators = {name: choice.estimator for name, choice in loss.choose(structure).items()}
    if not _independent(structure, estimators):
        return None
    learned = {n.removesuffix(LEARNED): v for n, v in params.items() if n.endswith(LEARNED)}
    remembering = {name: None for name, estimator in estimators.items() if isinstance(estimator, Reparam)}
    runs: list[int] = []

    def one_draw(factor: Array, key: Key) -> tuple[PyTree, tuple[Array, Array]]:
        sites = {n: RememberedNoise(e, factor) if isinstance(e, Reparam) else e for n, e in estimators.items()}

        def value(params: PyTree) -> tuple[Array, Array]:
            done = ELBO(1, sites, vectorize_particles=True).evaluate(
                key, gradient.constrain(params), program, dict(remembering), learned
            )
            runs.append(done.num_runs)
            return done.value, _ravelled(structure, done.state)

        (objective, points), slope = jax.value_and_grad(value, has_aux=True)(params)
        return slope, (objective, points)

    def both(key: Key) -> tuple[PyTree, Array, Array, PyTree]:
        slope, (objective, points) = one_draw(jnp.ones(()), key)
        if not linearise:
            return slope, objective, points, None
        zero, one = jnp.zeros(()), jnp.ones(())
        return slope, objective, points, jax.jvp(lambda t: one_draw(t, key)[0], (zero,), (one,))[1]

    num = loss.num_particles
    if jax.eval_shape(lambda k: one_draw(jnp.ones(()), k)[1][1], key).shape == (0,):
        return None
    keys = key[None] if num == 1 else jax.random.split(key, num)
    slopes, values, points, linearised = over_particles(both, keys, num, loss.vectorize_particles)
    return Draws(slopes, values, points, -points, runs[0] * num * (2 if linearise else 1), linearised)


def _independent(structure: Structure, estimators: Estimators) -> bool:
    """Whether no estimator looks at other particles, or at what earlier steps have left."""
    for name, site in structure.sites.items():
        estimator = estimators[name]
        try:
            estimator.check(site, Context("ELBO", 1, linear=True))
        except SiteError:  # it needs others
            return False
        coupled = jax.eval_shape(lambda k, e=estimator, s=site: e.noise(k, s, 1), jax.random.key(0))
        if coupled is not None or estimator.init(site) is not None:
            return False
    return True


def _ravelled(structure: Structure, recorded: dict[str, Array | None]) -> Array:
    """Noise of all sites as one vector; it is the same on all branches of other sites."""
    parts = []
    for name, noise in recorded.items():
        if noise is not None:
            own = structure.rank + len(structure.sites[name].event_shape)
            parts.append(jnp.ravel(noise[(0,) * (noise.ndim - own)]))
    return jnp.concatenate(parts) if parts else jnp.zeros(0)


def _split(fn: Distribution) -> tuple[Distribution, list[Callable]]:
    """The law inside of elementwise transformations, and these, the first one first."""
    law, outer = base(fn), []
    while isinstance(law, dist.TransformedDistribution) and all(isinstance(t, ELEMENTWISE) for t in law.transforms):
        outer = [*law.transforms, *outer]
        law = base(law.base_dist)
    return law, outer


def _times(matrix: Array, noise: Array, shape: tuple[int, ...]) -> Array:
    matrix = jnp.broadcast_to(matrix, (*shape[:-1], *matrix.shape[-2:]))
    return (matrix @ noise[..., None])[..., 0]
