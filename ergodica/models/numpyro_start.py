"""Where the chains of a NumPyro model start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import handlers

from ergodica.core import check
from ergodica.core.types import Key, Position
from ergodica.models.numpyro_arguments import Arguments
from ergodica.models.numpyro_program import Program


@dataclass(frozen=True)
class StartAt:
    """A fixed start, made by `start_at`."""

    values: dict[str, Any]
    constrained: bool


@dataclass(frozen=True)
class StartFromGuide:
    """Starts from a fitted guide, made by `start_from_guide`."""

    guide: Callable
    params: dict[str, Any]
    arguments: tuple[tuple, dict[str, Any]]


class GuideDraw(eqx.Module):
    """Draws a position from a guide."""

    program: Program
    guide: Callable = eqx.field(static=True)
    params: dict[str, Any]
    arguments: Arguments

    def __call__(self, key: Key) -> Position:
        """Draw constrained values, then undo the constraints."""
        keyword = self.arguments.keyword()
        positional = keyword.pop("positional")
        if hasattr(self.guide, "sample_posterior"):
            values = self.guide.sample_posterior(key, self.params, *positional, **keyword)
        else:
            guide = handlers.substitute(handlers.seed(self.guide, key), data=self.params)
            sites = handlers.trace(guide).get_trace(*positional, **keyword)
            values = {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}
        names = [name for name, _ in self.program.structure.latents]
        _check_names("guide", values, names, extra_allowed=True)
        return self.program.unconstrain({name: values[name] for name in names})


def start_at(*, constrained: dict[str, Any] | None = None, unconstrained: dict[str, Any] | None = None) -> StartAt:
    """Start all chains of a NumPyro model at one point, such as a mode.

    Parameters
    ----------
    constrained : dict of arrays, optional
        A value for every latent site, on the scale of the model.
    unconstrained : dict of arrays, optional
        A position, as `ergodica.find_mode` gives it. Exactly one of the two.

    Returns
    -------
    StartAt
        For ``from_numpyro(…, initial=…)``.

    Raises
    ------
    ValueError
        Unless exactly one is given. A site that is missing, unknown or outside its support is reported by
        `from_numpyro`.

    Examples
    --------
    >>> start_at(constrained={"sigma": 2.0}).constrained
    True
    """
    if constrained is not None and unconstrained is None:
        return StartAt(dict(constrained), constrained=True)
    if unconstrained is not None and constrained is None:
        return StartAt(dict(unconstrained), constrained=False)
    raise ValueError("start_at takes exactly one of constrained= and unconstrained=.")


def start_from_guide(guide: Callable, params: dict[str, Any], *args: Any, **kwargs: Any) -> StartFromGuide:
    """Start each chain of a NumPyro model at its own draw from a fitted guide.

    Parameters
    ----------
    guide : callable
        An autoguide that `numpyro.infer.SVI` has fitted, or a guide function.
    params : dict of arrays
        As ``SVI.get_params`` or ``SVI.run(…).params`` give them.
    *args, **kwargs
        Of the guide, where it takes any (autoguides of models with global latents take none).

    Returns
    -------
    StartFromGuide
        For ``from_numpyro(…, initial=…)``.

    Examples
    --------
    A guide that is a point:

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> def guide():
    ...     numpyro.sample("theta", dist.Delta(numpyro.param("location", jnp.array(0.0))))
    >>> start_from_guide(guide, {"location": jnp.array(1.5)}).params["location"].item()
    1.5
    """
    return StartFromGuide(check.function("guide", guide), dict(params), (args, kwargs))


def resolve(initial: Any, program: Program) -> Position | Callable[[Key], Position]:
    """Turn what ``initial=`` takes into a position or a function of a key."""
    if isinstance(initial, str):
        check.one_of("initial", initial, ("uniform", "prior"))
        start = Program.start_uniform if initial == "uniform" else Program.start_prior
        return jax.tree_util.Partial(start, program)
    if isinstance(initial, StartAt):
        return _position(initial, program)
    if isinstance(initial, StartFromGuide):
        positional, keyword = initial.arguments
        arguments = Arguments({"positional": positional, **keyword})
        return GuideDraw(program, initial.guide, jax.tree.map(jnp.asarray, initial.params), arguments)
    if callable(initial):
        return initial
    raise TypeError(
        "initial must be 'uniform', 'prior', start_at(constrained=…), start_at(unconstrained=…), start_from_guide(…) or a "
        f"function of a key that gives an unconstrained dict; got {type(initial).__name__}."
    )


def _position(start: StartAt, program: Program) -> Position:
    shapes = dict(program.structure.latents)
    _check_names("initial", start.values, list(shapes))
    dtype = jnp.result_type(float)
    values = {name: jnp.asarray(start.values[name], dtype) for name in shapes}
    position: dict[str, Array] = program.unconstrain(values) if start.constrained else values
    for name, shape in shapes.items():
        if position[name].shape != shape:
            raise ValueError(
                f"initial[{name!r}] must have the unconstrained shape {shape}; got {position[name].shape}."
            )
        if not jnp.all(jnp.isfinite(position[name])):
            raise ValueError(
                f"initial[{name!r}] must lie inside the support of its prior; got {start.values[name]}, "
                "which is outside or on its edge."
            )
    return position


def _check_names(argument: str, values: dict[str, Any], names: list[str], *, extra_allowed: bool = False) -> None:
    missing = [name for name in names if name not in values]
    unknown = [] if extra_allowed else [name for name in values if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{argument} must give a value for each latent site, {names}; it misses {missing} and has the unknown {unknown}."
        )
