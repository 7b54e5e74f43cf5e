"""Variational gradients by their names, for ``ergodica compare --guide``."""

import pathlib
from collections.abc import Callable
from typing import Any

from ergodica.cli.data import arguments, columns_of, read_table, required_arguments, select
from ergodica.cli.errors import CallError, did_you_mean, listed
from ergodica.cli.models import load_model, parse_setting
from ergodica.core.posterior import Posterior

DEFAULT_ESTIMATORS = ("auto:10", "leave-one-out:10", "score:10", "numpyro:TraceGraph_ELBO:10")
POINTS = ("start", "middle", "fitted")
SITES = {
    "score": "Score",
    "leave-one-out": "LeaveOneOut",
    "enumerate": "Enumerate",
    "measure-valued": "MeasureValued",
    "disarm": "DisARM",
    "rebar": "REBAR",
    "muprop": "MuProp",
    "darn": "DARN",
    "double-control-variate": "DoubleControlVariate",
    "rodeo": "RODEO",
    "reinmax": "ReinMax",
    "straight-through": "StraightThrough",
    "gumbel-softmax": "GumbelSoftmax",
}
"""Estimators at the sites that NumPyro cannot reparameterise; at all sites, if it can reparameterise all of them."""
KINDS = ("auto", "stl", *SITES, "numpyro")
NUMPYRO = ("Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO", "RenyiELBO")


def load_program(
    model: str, guide: str, data: pathlib.Path | None, columns: list[str], settings: list[str]
) -> tuple[Callable, Callable, dict[str, Any]]:
    """Load a model, and a guide by ``FILE.py:NAME`` or the name of an automatic one; give them their arguments by name."""
    found = load_model(model)
    if isinstance(found, Posterior):
        raise CallError(f"{model} is a Posterior, which has no guide; --guide goes with a NumPyro model.")
    own = _load_guide(guide, found)
    given = dict(parse_setting(setting) for setting in settings)
    if data is not None:
        given = select(read_table(data), columns_of(columns), found, data, given=set(given)) | given
    missing = [name for name in required_arguments(found) if name not in given]
    if missing:
        raise CallError(
            f"The model's arguments {listed(missing)} got no value: give --data FILE (npz or csv), or --set NAME=VALUE "
            "for settings that are no data."
        )
    if own is not found and not _automatic(guide):
        unknown = [name for name in given if name not in arguments(own)]
        if unknown:
            raise CallError(
                f"The guide {guide} lacks the arguments {listed(unknown)}, which the model is called with; NumPyro calls both "
                f"alike. Add them, such as: def {guide.rpartition(':')[2]}({', '.join(arguments(found))})."
            )
    return found, own, given


def _automatic(guide: str) -> bool:
    return guide.startswith("Auto") and ":" not in guide and not guide.endswith(".py")


def _load_guide(guide: str, model: Callable) -> Callable:
    from numpyro.infer import autoguide

    if not _automatic(guide):
        found = load_model(guide if ":" in guide else f"{guide}:guide")
        if isinstance(found, Posterior):
            raise CallError(f"{guide} is a Posterior; a guide is a function that draws what the model draws.")
        return found
    names = [name for name in autoguide.__all__ if name.startswith("Auto") and name != "AutoGuide"]
    if guide not in names:
        raise CallError(
            f"There is no guide {guide!r}.{did_you_mean(guide, names)} There are {listed(names)}, and FILE.py:NAME."
        )
    return getattr(autoguide, guide)(model)


def parse_loss(text: str) -> tuple[str, str, int]:
    """Read ``KIND:PARTICLES`` or ``numpyro:LOSS:PARTICLES``."""
    kind, *rest = text.split(":")
    if kind not in KINDS:
        raise CallError(
            f"--estimator {text!r}: there is no estimator {kind!r} of variational gradients.{did_you_mean(kind, KINDS)} There are "
            f"{listed(KINDS)}; write KIND:PARTICLES, such as leave-one-out:10, or numpyro:TraceGraph_ELBO:10."
        )
    name = ""
    if kind == "numpyro":
        name, *rest = rest or [""]
        if name not in NUMPYRO:
            raise CallError(
                f"--estimator {text!r}: NumPyro has no loss {name!r} that is known here.{did_you_mean(name, NUMPYRO)} There are "
                f"{listed(NUMPYRO)}."
            )
    if len(rest) != 1 or not rest[0].isdigit() or int(rest[0]) < 1:
        start = text.split(":")[0] + (f":{name}" if name else "")
        raise CallError(f"--estimator {text!r}: write the number of particles, such as {start}:10.")
    return kind, name, int(rest[0])


def make_loss(kind: str, name: str, num_particles: int, program: Any, params: dict) -> Any:
    """Make the loss, with the estimator at the sites that it is for."""
    import numpyro.infer

    import ergodica.estimators
    from ergodica.estimators.variational.structure import inspect

    estimators: Any = ergodica.estimators
    if kind == "numpyro":
        return getattr(numpyro.infer, name)(num_particles=num_particles)
    if kind == "auto":
        return estimators.ELBO(num_particles)
    sites = inspect(program, params).sites
    hard = [n for n, site in sites.items() if not site.reparameterised and not site.delta]
    if kind == "stl":
        moving = [n for n, site in sites.items() if site.reparameterised and not site.delta]
        if not moving:
            raise CallError(
                "--estimator stl sticks the landing at sites that can be reparameterised, and the guide has none."
            )
        return estimators.ELBO(num_particles, dict.fromkeys(moving, estimators.Reparam(stl=True)))
    chosen = hard or [n for n, site in sites.items() if not site.delta]
    return estimators.ELBO(num_particles, dict.fromkeys(chosen, getattr(estimators, SITES[kind])()))


def compare_losses(
    program: tuple[Callable, Callable, dict[str, Any]],
    names: list[str],
    at: list[str],
    num_repeats: int | None,
    num_steps: int,
    seed: int,
) -> Any:
    """Compare gradients of the ELBO, or of NumPyro's losses, at points along one fit."""
    import jax

    from ergodica.diagnostics.gradient_points import training_points
    from ergodica.diagnostics.gradients import compare_gradients
    from ergodica.estimators import VariationalGradient

    for point in at:
        if point not in POINTS:
            raise CallError(
                f"--at {point!r} is no point of a fit.{did_you_mean(point, POINTS)} There are {listed(POINTS)}."
            )
    recipes = {name: parse_loss(name) for name in names}
    model, guide, given = program
    key, key_start, key_fit = jax.random.split(jax.random.key(seed), 3)
    leading = VariationalGradient(make_loss("auto", "", 10, None, {}), model, guide, **given)
    start = leading.start(key_start)
    estimators = {
        name: VariationalGradient(make_loss(*recipe, leading.program, leading.constrain(start)), model, guide, **given)
        for name, recipe in recipes.items()
    }
    points: dict[str, Any] = dict.fromkeys(POINTS, start)
    if set(at) != {"start"}:
        points = dict(zip(POINTS, training_points(key_fit, leading, start, num_steps=num_steps), strict=True))
    table = compare_gradients(
        key, estimators, [points[p] for p in at], num_repeats="auto" if num_repeats is None else num_repeats
    )
    return table.assign_coords(point=at)
