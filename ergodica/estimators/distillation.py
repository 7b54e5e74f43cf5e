"""Distillation of a diffusion model's score into the parameters of a renderer, with control variates from Stein's identity."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Estimate, Key, Name, PyTree

type Image = Array
type View = Any
type Feature = Callable[[Image, Array, View], Array]
"""From a noisy picture, its time and its view to a scalar."""

BASELINES = ("none", "noise")
_RIDGE = 1e-6


class Noised(NamedTuple):
    r"""A picture that is partly noise, :math:`x = \alpha g + \sigma\varepsilon`, and where it is from."""

    x: Image
    noise: Image
    time: Array
    view: View


class Moments(NamedTuple):
    """Sums over earlier draws, by time and pixel, with older ones forgotten.

    Attributes
    ----------
    inner : array (num_bins, m, m, *shape)
        Products of the controls with each other.
    outer : array (num_bins, m, *shape)
        Products of the controls with what they are to take away.
    """

    inner: Array
    outer: Array


def cosine_schedule(time: Array) -> tuple[Array, Array]:
    r"""Signal and noise at a time in (0, 1): :math:`\alpha = \cos(\pi t/2)`, :math:`\sigma = \sin(\pi t/2)`."""
    return jnp.cos(0.5 * jnp.pi * time), jnp.sin(0.5 * jnp.pi * time)


def noise_variance(time: Array) -> Array:
    r"""Weight of a time: :math:`\omega = \sigma^2` of `cosine_schedule`."""
    return cosine_schedule(time)[1] ** 2


class ScoreDistillation(AbstractGradientEstimator):
    r"""Gradient that moves the renders of a scene towards the law of pictures of a diffusion model.

    .. math:: \nabla_\theta \Big({-}\mathrm{E}_{t,c}\, \omega(t)\, \mathrm{KL}\big(N(\alpha g(\theta, c), \sigma^2 I)\,\big\|\,
              p_t\big)\Big)
              = \mathrm{E}_{t, c, \varepsilon}\Big[\tfrac{\omega\alpha}{\sigma}
              \Big(\tfrac{\partial g}{\partial\theta}\Big)^{\!\top}
              \Big(\sigma\nabla\log p_t(x) + a\,\varepsilon + \sum_j \mu_j \odot \big(\varepsilon\,\varphi_j(x)
              - \sigma\nabla\varphi_j(x)\big)\Big)\Big]

    with :math:`x = \alpha g(\theta, c) + \sigma\varepsilon`. What stands beside the score has mean zero, by Stein's identity. Score
    distillation sampling (SDS) is :math:`a = 1` without controls; Stein score distillation (SSD) has features
    :math:`\varphi_j` with fitted weights :math:`\mu_j`, one for each pixel.

    Parameters
    ----------
    render : callable
        ``render(params, view) -> picture``, an array of any shape, differentiable.
    score : callable
        ``score(x, time, view)``: gradient of the log density of noisy pictures :math:`p_t`, of the shape of ``x``. A network that
        predicts the noise gives it as ``-predicted / sigma``.
    views : callable
        ``views(key)`` draws a view (a camera), a pytree of arrays.
    baseline : {"noise", "none"} or callable
        "noise": :math:`a = 1`; "none": :math:`a = 0`. A function of (x, time, view) that estimates the score of the *renders*'
        noisy pictures takes the place of :math:`-\varepsilon/\sigma` (variational score distillation).
    controls : sequence of callable
        Features :math:`\varphi(x, t, c)`, scalars. A constant makes the weight of the noise itself a matter of the fit.
    num_samples : int
        Draws of time, view and noise a call.
    times : (float, float)
        Times are uniform between them.
    schedule, weight : callable
        ``schedule(time) -> (alpha, sigma)`` and :math:`\omega(t)`.
    num_bins : int
        The weights :math:`\mu` are fitted apart in so many equal parts of the time.
    decay : float
        Part of the moments that is kept from call to call: they reach back about ``1 / (1 - decay)`` calls.

    Raises
    ------
    ValueError, TypeError
        For functions that are none, times out of (0, 1), features that are no scalars (at the first trace).

    Notes
    -----
    Weights come from *earlier* calls, which the state remembers, by least squares on second moments pixel by pixel; so they bring
    no bias. At the first call, and in bins that were never visited, they are zero. Fitted to the same draws they would be
    biased.

    A baseline that is a function is a control variate only where it is the score of the law of *that* draw. For one
    render a view that law is normal and its score :math:`-\varepsilon/\sigma`, so that variational score distillation is SDS.
    Any other function moves the fixed point: it repels renders of several scenes from each other, which is what it is for there.

    Linear scores (normal :math:`p_t` with independent pixels) and a constant feature leave no noise at all. The gain is less the
    further the score is from linear in each pixel.

    ``value`` is minus the weighted denoising error :math:`\tfrac12\omega\lVert\sigma\nabla\log p_t + \varepsilon\rVert^2`:
    a sign of life, and not the objective, whose value is not known from scores.

    Cost: ``num_samples`` scores, and as many renders and their derivative; each feature a value and its derivative, which
    ``n_grad`` does not count.

    References
    ----------
    Poole et al. (2023), SDS; Wang et al. (2023), VSD; Wang et al. (2024), SSD, whose equation 8 has the sign and scale of another
    parameterisation: as printed its control has a mean in this one.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> distil = ScoreDistillation(
    ...     render=lambda params, view: params * view,
    ...     score=lambda x, time, view: view - x,
    ...     views=lambda key: jax.random.uniform(key, (3,), minval=0.5, maxval=1.5),
    ...     controls=(lambda x, time, view: 1.0,),
    ... )
    >>> params = jnp.zeros(3)
    >>> estimate, state = distil.estimate(jax.random.key(0), params, distil.init(jax.random.key(1), params))
    >>> estimate.gradient.shape
    (3,)
    """

    render: Callable[[PyTree, View], Image]
    score: Callable[[Image, Array, View], Image]
    views: Callable[[Key], View]
    baseline: Any
    controls: tuple[Feature, ...]
    schedule: Callable[[Array], tuple[Array, Array]]
    weight: Callable[[Array], Array]
    num_samples: int = eqx.field(static=True)
    times: tuple[float, float] = eqx.field(static=True)
    num_bins: int = eqx.field(static=True)
    decay: float = eqx.field(static=True)

    references: ClassVar = ("poole2023", "wang2024stein")

    def __init__(
        self,
        render: Callable[[PyTree, View], Image],
        score: Callable[[Image, Array, View], Image],
        views: Callable[[Key], View],
        *,
        baseline: Literal["noise", "none"] | Callable[[Image, Array, View], Image] = "noise",
        controls: Sequence[Feature] = (),
        num_samples: int = 16,
        times: tuple[float, float] = (0.02, 0.98),
        schedule: Callable[[Array], tuple[Array, Array]] = cosine_schedule,
        weight: Callable[[Array], Array] = noise_variance,
        num_bins: int = 8,
        decay: float = 0.95,
    ) -> None:
        self.render = as_partial(check.function("render", render))
        self.score = as_partial(check.function("score", score))
        self.views = as_partial(check.function("views", views))
        self.baseline = (
            as_partial(baseline) if callable(baseline) else Name(check.one_of("baseline", baseline, BASELINES))
        )
        self.controls = tuple(as_partial(check.function("a member of controls", f)) for f in controls)
        self.schedule = as_partial(check.function("schedule", schedule))
        self.weight = as_partial(check.function("weight", weight))
        self.num_samples = check.integer("num_samples", num_samples)
        self.num_bins = check.integer("num_bins", num_bins)
        first, last = (float(t) for t in times)
        if not 0 < first < last < 1:
            raise ValueError(f"times must be two numbers with 0 < first < last < 1; got {times}.")
        self.times = (first, last)
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1; got {decay}.")
        self.decay = float(decay)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> Moments:  # noqa: ARG002
        """No moments yet."""
        picture = jax.eval_shape(lambda key: self.render(params, self.views(key)), key)
        num, shape = len(self.controls), picture.shape
        return Moments(
            jnp.zeros((self.num_bins, num, num, *shape), picture.dtype),
            jnp.zeros((self.num_bins, num, *shape), picture.dtype),
        )

    def estimate(
        self, key: Key, params: PyTree, state: Moments, batch: Batch | None = None
    ) -> tuple[Estimate, Moments]:
        """Estimate from fresh times, views and noise."""
        if batch is not None:
            raise ValueError("ScoreDistillation draws views and takes no batch that is handed over.")
        times, views, noise_key = self._draw(key)
        dtype = jax.tree.leaves(params)[0].dtype
        times = times.astype(dtype)
        renders, pull = jax.vjp(lambda p: jax.vmap(lambda view: self.render(p, view))(views), params)
        alpha, sigma = (_like(s, renders) for s in jax.vmap(self.schedule)(times))
        noise = rng.normal_like(noise_key, renders)
        draws = Noised(alpha * renders + sigma * noise, noise, times, views)
        direction, denoised = self._direction(draws, sigma)
        controls = self._controls(draws, sigma)
        bins = self._bin(times)
        left = direction
        if self.controls:
            left = direction + jnp.sum(jax.vmap(coefficients)(state)[bins] * controls, axis=1)
        weight = _like(jax.vmap(self.weight)(times), renders)
        gradient = pull(weight * alpha / sigma * left / self.num_samples)[0]
        value = -0.5 * jnp.mean(jnp.sum((weight * denoised**2).reshape(self.num_samples, -1), axis=1))
        state = remembered(state, controls, direction, bins, self.decay)
        return Estimate(gradient, value, n_grad=self.num_samples), state

    def probe(self, key: Key, params: PyTree, state: Moments) -> Estimate:
        """An independent estimate; the moments stay as they are."""
        return self.estimate(key, params, state)[0]

    def _draw(self, key: Key) -> tuple[Array, View, Key]:
        key_time, key_view, key_noise = jax.random.split(key, 3)
        first, last = self.times
        times = jax.random.uniform(key_time, (self.num_samples,), minval=first, maxval=last)
        return times, jax.vmap(self.views)(jax.random.split(key_view, self.num_samples)), key_noise

    def _bin(self, times: Array) -> Array:
        first, last = self.times
        return jnp.clip(((times - first) / (last - first) * self.num_bins).astype(int), 0, self.num_bins - 1)

    def _direction(self, draws: Noised, sigma: Array) -> tuple[Array, Array]:
        """The score with its baseline, and the denoising error, both times sigma (n, *shape)."""
        scores = jax.vmap(self.score)(draws.x, draws.time, draws.view)
        denoised = sigma * scores + draws.noise
        if not isinstance(self.baseline, Name):
            others = jax.vmap(self.baseline)(draws.x, draws.time, draws.view)
            return sigma * (scores - others), denoised
        return (denoised if self.baseline.name == "noise" else sigma * scores), denoised

    def _controls(self, draws: Noised, sigma: Array) -> Array:
        """Controls (n, m, *shape), each of mean zero given time and view."""
        if not self.controls:
            return jnp.zeros((self.num_samples, 0, *draws.x.shape[1:]), draws.x.dtype)

        def one(feature: Feature, x: Image, noise: Image, time: Array, view: View, sigma: Array) -> Array:
            def scalar(x: Image) -> Array:
                value = jnp.asarray(feature(x, time, view), x.dtype)
                if value.shape != ():
                    raise ValueError(f"A member of controls must return a scalar; got shape {value.shape}.")
                return value

            value, slope = jax.value_and_grad(scalar)(x)
            return noise_control(noise, value, slope, sigma)

        found = [jax.vmap(lambda *given, f=f: one(f, *given))(*draws, sigma) for f in self.controls]
        return jnp.stack(found, axis=1)


def noise_control(noise: Array, value: Array, slope: Array, sigma: Array) -> Array:
    r"""Stein's operator on a feature of :math:`x = \mu + \sigma\varepsilon`, times :math:`-\sigma`; its mean is zero.

    .. math:: \varepsilon\,\varphi(x) - \sigma\nabla\varphi(x)

    Parameters
    ----------
    noise, slope, sigma : array (*shape)
        :math:`\varepsilon`, :math:`\nabla\varphi(x)`, :math:`\sigma`.
    value : scalar array
        :math:`\varphi(x)`.
    """
    return noise * value - sigma * slope


def _like(scalars: Array, pictures: Array) -> Array:
    """Scalars (n,) as an array that goes with pictures (n, *shape)."""
    return scalars.reshape(-1, *[1] * (pictures.ndim - 1)).astype(pictures.dtype) + jnp.zeros_like(pictures)


def coefficients(moments: Moments) -> Array:
    r"""Weights (m, *shape) of the controls that leave the least second moment, pixel by pixel; 0 without moments.

    .. math:: \mu = -(\mathrm{E} h h^\top + \lambda I)^{-1} \mathrm{E} h v
    """
    shape = moments.outer.shape

    def of_pixel(inner: Array, outer: Array) -> Array:
        level = jnp.trace(inner) / len(inner)
        damping = jnp.where(level > 0, _RIDGE * level, 1.0)
        return -jnp.linalg.solve(inner + damping * jnp.eye(len(inner), dtype=inner.dtype), outer)

    inner, outer = moments.inner.reshape(*shape[:1], *shape[:1], -1), moments.outer.reshape(shape[0], -1)
    return jax.vmap(of_pixel, in_axes=-1, out_axes=-1)(inner, outer).reshape(shape)


def remembered(moments: Moments, controls: Array, direction: Array, bins: Array, decay: float) -> Moments:
    """Moments with the draws of a call, (n, m, *shape) and (n, *shape), added to what is left of the old ones."""
    inner = controls[:, :, None] * controls[:, None, :]
    outer = controls * direction[:, None]
    added = Moments(
        jnp.zeros_like(moments.inner).at[bins].add(inner), jnp.zeros_like(moments.outer).at[bins].add(outer)
    )
    return tree.axpy(tree.cast_like(decay, direction), moments, jax.lax.stop_gradient(added))
