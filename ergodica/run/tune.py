"""The choice of a step size and a friction, from the law that they will give."""

import dataclasses
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ergodica.core import check, rng
from ergodica.core.kernel import AbstractKernel
from ergodica.core.types import Key, Position
from ergodica.run import linear_law
from ergodica.run.bias import (
    PredictedBias,
    Surroundings,
    bias_at,
    check_constant,
    look_around,
    masses,
    temperature_of,
)
from ergodica.run.curvature import LargestCurvature, largest_curvature

_HALVINGS = 20
_MOST_RATIO = 1e8
_NUM_FRICTIONS = 9


@dataclasses.dataclass(frozen=True)
class TuneReport:
    """Why the hyper-parameters are what they are; its `str` says it in words.

    Attributes
    ----------
    step_size : float
    friction : float or None
        ``None`` for samplers without.
    limited_by : {"stability", "gradient noise", "step"}
        What a larger step would run into.
    bias : PredictedBias
        Of the tuned sampler.
    target_bias : float
    largest_curvature : LargestCurvature
        By power iteration; after the mass, if there is one.
    step_without_noise : float
        The step that exact gradients would allow at the same friction and target.
    relaxation : float
        Steps in which the slowest direction forgets by a factor e.
    centre : pytree
        The mode around which all of this was computed: a centre for a control variate, a start for chains.
    """

    step_size: float
    friction: float | None
    limited_by: str
    bias: PredictedBias
    target_bias: float
    largest_curvature: LargestCurvature
    step_without_noise: float
    relaxation: float
    centre: Position

    def __str__(self) -> str:
        friction = "" if self.friction is None else f", friction {self.friction:.3g}"
        reasons = {
            "stability": "half of the largest stable one; the bias would allow more",
            "gradient noise": f"limited by gradient noise, at the target of {self.target_bias:.1%}",
            "step": f"limited by the error of the step itself, at the target of {self.target_bias:.1%}",
        }
        lines = [
            f"step_size {self.step_size:.3g}{friction}: {reasons[self.limited_by]}.",
            f"Largest curvature {self.largest_curvature.value:.4g}; the slowest direction forgets in {self.relaxation:.3g} steps.",
            str(self.bias),
        ]
        if self.limited_by == "gradient noise":
            lines.append(
                f"Without gradient noise the step could be {self.step_without_noise / self.step_size:.3g} times as large: a "
                "control variate or a larger batch is worth up to that."
            )
        return "\n".join(lines)


class Tuned(NamedTuple):
    """A sampler with new hyper-parameters, and why."""

    sampler: Any
    report: TuneReport


class _Directions(NamedTuple):
    """Independent directions of the problem, scaled to unit mass: (D,) each, with the temperature."""

    curvature: np.ndarray
    noise: np.ndarray
    num_blocks: int | None
    temperature: float


def tune(
    key: Key,
    sampler: AbstractKernel,
    centre: Position | None = None,
    *,
    target_bias: float = 0.05,
    curvature: Literal["full", "diagonal"] | Any = "full",
    noise: Any = None,
    friction: Literal["tuned", "kept"] = "tuned",
    mass: Literal["diagonal", "kept"] = "kept",
    num_steps: int = 100,
) -> Tuned:
    """Choose the largest step whose predicted bias is within a target, and the friction that then mixes fastest.

    Parameters
    ----------
    key : typed PRNG key
    sampler : AbstractKernel
        `SGLD`, `Splitting` or their presets, with any constant hyper-parameters: step size and friction are replaced.
    centre : pytree, optional
        A mode, in unconstrained space; found by `find_mode` unless given.
    target_bias : float
        Largest inflation (or deflation) of the posterior sd that is accepted, along any direction: 0.05 is 5%.
    curvature, noise
        As for `predict_bias`.
    friction : {"tuned", "kept"}
        For samplers that have one: chosen so that the slowest direction relaxes in fewest gradients, or left as it is.
    mass : {"kept", "diagonal"}
        ``"diagonal"`` replaces the mass of a splitting by the diagonal of the curvature, and so frozen it stays.
    num_steps : int
        Iterations of the power method, of 8 batches each.

    Returns
    -------
    Tuned
        ``sampler``, of the same class, and ``report``, whose `str` says why.

    Raises
    ------
    ValueError, TypeError
        As `predict_bias`; for a target that is not positive, a mass where the sampler has none, or a target that no step reaches.

    Notes
    -----
    Cost: that of `predict_bias`, and ``8 * num_steps`` Hessian-vector products on batches. A step is taken as stable if twice that
    step is stable at the largest curvature that was found. Step and friction are found in independent directions of the
    curvature, in which variances are exact; the report's prediction is of the coordinates. Not where `predict_bias` does not hold.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), step_size=0.1)
    >>> tuned = tune(jax.random.key(0), sampler, jnp.zeros(2), target_bias=0.05)
    >>> round(float(tuned.sampler.step_size), 3), round(2 - 2 / 1.05**2, 3), tuned.report.limited_by
    (0.186, 0.186, 'step')
    """
    rng.check_key(key)
    check_constant(sampler)
    target = float(check.positive("target_bias", target_bias))
    check.one_of("friction", friction, ("tuned", "kept"))
    check.one_of("mass", mass, ("diagonal", "kept"))
    check.integer("num_steps", num_steps, least=2)
    key_around, key_power = jax.random.split(key)
    around = look_around(key_around, sampler, centre, curvature=curvature, noise=noise)
    if mass == "diagonal":
        sampler = _with_diagonal_mass(sampler, around)
    scale = 1 / np.sqrt(masses(sampler, around.centre))
    largest = largest_curvature(
        key_power, linear_law.gradient_of(sampler), around.centre, num_steps=num_steps, scale=scale
    )
    problem = _directions(around, scale, largest, temperature_of(sampler))
    sampler = _best_friction(sampler, problem, target, tuned=friction == "tuned")
    return Tuned(sampler, _report(sampler, problem, around, largest, target))


def _with_diagonal_mass(sampler: Any, around: Surroundings) -> Any:
    if not hasattr(sampler, "mass"):
        raise ValueError(
            f"mass='diagonal' needs a sampler with a mass, such as Splitting; {type(sampler).__name__} has none. Use a splitting, "
            "or PreconditionedSGLD, which finds its own preconditioner in the warm-up."
        )
    diagonal = np.diag(around.curvature) if around.full else around.curvature
    flat, unravel = ravel_pytree(around.centre)
    return eqx.tree_at(lambda s: s.mass, sampler, unravel(jnp.asarray(diagonal, flat.dtype)))


def _directions(around: Surroundings, scale: np.ndarray, largest: LargestCurvature, temperature: float) -> _Directions:
    """Turn to the eigenvectors of the curvature, where it is full; check against the curvature of batches."""
    if around.full:
        whitened = scale[:, None] * around.curvature * scale
        values, vectors = np.linalg.eigh(whitened)
        noise = np.einsum("ik,ij,jk->k", vectors, scale[:, None] * around.noise * scale, vectors)
    else:
        values, noise = around.curvature * scale**2, around.noise * scale**2
    if largest.value > values.max():
        # a direction that only the power iteration saw: it must be stable, and has the noise of the noisiest
        values, noise = np.append(values, largest.value), np.append(noise, noise.max())
    return _Directions(values, noise, around.num_blocks, temperature)


def _with(sampler: Any, step_size: float, friction: float | None = None) -> Any:
    dtype = jnp.result_type(float)
    sampler = eqx.tree_at(lambda s: s.step_size, sampler, jnp.asarray(step_size, dtype))
    if friction is None:
        return sampler
    return eqx.tree_at(lambda s: s.friction, sampler, jnp.asarray(friction, dtype))


def _law(sampler: Any, problem: _Directions) -> linear_law.AffineStep:
    return linear_law.affine_steps(sampler, problem.curvature, np.ones_like(problem.curvature))


def _worst(sampler: Any, problem: _Directions) -> float:
    """Inflation of the sd that is farthest from 0, over the directions."""
    covariance = linear_law.stationary_covariance(
        _law(sampler, problem), problem.noise[:, None, None], problem.num_blocks
    )
    inflation = np.sqrt(covariance[:, 0, 0] * problem.curvature / problem.temperature) - 1
    return float(inflation[np.argmax(np.abs(inflation))])


def _is_stable(sampler: Any, problem: _Directions) -> bool:
    doubled = _with(sampler, 2 * float(sampler.step_size))
    return bool(np.all(linear_law.spectral_radius(_law(doubled, problem)) < 1))


def _largest_step(sampler: Any, problem: _Directions, target: float) -> float | None:
    """Bisect for the largest step that is stable and within the target; ``None`` if none is."""

    def allowed(step: float) -> bool:
        trial = _with(sampler, step)
        return _is_stable(trial, problem) and abs(_worst(trial, problem)) <= target

    largest = problem.curvature.max()
    high = np.log(max(4 / largest, 4 / np.sqrt(largest)))
    low = high - np.log(_MOST_RATIO)
    if not allowed(np.exp(low)):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(np.exp(middle)) else (low, middle)
    return float(np.exp(low))


def _best_friction(sampler: Any, problem: _Directions, target: float, *, tuned: bool) -> Any:
    """Give the sampler the largest step at each friction of a grid, and keep the one that relaxes fastest."""
    frictions: list[float | None] = [None]
    if tuned and hasattr(sampler, "friction"):
        roots = np.sqrt(problem.curvature)
        frictions = list(np.geomspace(roots.min() / 4, 8 * roots.max(), _NUM_FRICTIONS))
    found = []
    for friction in frictions:
        trial = _with(sampler, 1.0, friction)
        step = _largest_step(trial, problem, target)
        if step is not None:
            trial = _with(trial, step)
            found.append((float(np.max(linear_law.spectral_radius(_law(trial, problem)))), trial))
    if not found:
        raise ValueError(
            f"target_bias must be reachable; no stable step has a predicted bias within {target:.1%} at this noise. Use a larger "
            "batch, a control variate, a larger target, or friction='tuned'."
        )
    return min(found, key=lambda pair: pair[0])[1]


def _report(
    sampler: Any, problem: _Directions, around: Surroundings, largest: LargestCurvature, target: float
) -> TuneReport:
    exact = problem._replace(noise=0 * problem.noise)
    step = float(sampler.step_size)
    beyond = _with(sampler, 1.02 * step)
    if abs(_worst(beyond, problem)) <= target:
        limited_by = "stability"
    else:
        limited_by = "step" if abs(_worst(sampler, exact)) > target / 2 else "gradient noise"
    without_noise = _largest_step(sampler, exact, target)
    return TuneReport(
        step_size=step,
        friction=float(sampler.friction) if hasattr(sampler, "friction") else None,
        limited_by=limited_by,
        bias=bias_at(sampler, around),
        target_bias=target,
        largest_curvature=largest,
        step_without_noise=step if without_noise is None else without_noise,
        relaxation=float(-1 / np.log(np.max(linear_law.spectral_radius(_law(sampler, problem))))),
        centre=around.centre,
    )
