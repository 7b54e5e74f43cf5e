"""The arguments of a comparison of gradient estimators, checked."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import PyTree
from ergodica.diagnostics.gradient_reference import REFERENCES
from ergodica.diagnostics.gradient_repeats import PILOT
from ergodica.diagnostics.gradient_replicates import STATES, Opening

MOST_NUMBERS = 2**24
"""Estimates of one estimator at one point that are kept: repeats times coordinates."""


class Settings(NamedTuple):
    """How a comparison is made; see `ergodica.compare_gradients`."""

    num_repeats: int | None
    max_repeats: int
    confidence: float
    bias_tolerance: float
    opening: Opening
    common_random_numbers: bool


def check_settings(
    num_repeats: int | str,
    max_repeats: int,
    confidence: float,
    bias_tolerance: float,
    state: str,
    warmup: int,
    *,
    common_random_numbers: bool,
) -> Settings:
    """Check the settings; ``num_repeats`` is ``None`` where it is to be found out."""
    if num_repeats != "auto":
        check.integer("num_repeats", num_repeats, least=30, hint="Fewer do not carry the intervals. Or 'auto'.")
    check.integer("max_repeats", max_repeats, least=PILOT, hint="That is the size of the pilot.")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1; got {confidence!r}.")
    check.positive("bias_tolerance", bias_tolerance)
    check.one_of("state", state, STATES)
    check.integer("warmup", warmup, least=0)
    if state == "frozen" and warmup == 0:
        raise ValueError(
            "state='frozen' needs warmup, the number of calls after which the state is frozen, such as warmup=100."
        )
    if state == "fresh" and warmup:
        raise ValueError("warmup has no meaning with state='fresh'; give state='frozen', or 'same samples'.")
    repeats = None if num_repeats == "auto" else int(num_repeats)
    return Settings(repeats, max_repeats, confidence, bias_tolerance, Opening(state, warmup), common_random_numbers)


def check_estimators(
    estimators: Mapping[str, AbstractGradientEstimator], budget: int | None
) -> dict[str, AbstractGradientEstimator]:
    """Check names and kinds, and give each estimator the budget."""
    if not isinstance(estimators, Mapping) or not estimators:
        raise TypeError(
            f"estimators must map names to estimators, such as {{'blocks': Minibatch(posterior, 100)}}; got {estimators!r}."
        )
    for name, estimator in estimators.items():
        check.instance(
            f"estimators[{name!r}]", estimator, AbstractGradientEstimator, "such as Minibatch(posterior, 100)"
        )
        if name in REFERENCES:
            raise ValueError(
                f"estimators has the name {name!r}, which is what reference={name!r} stands for; call it something else, such "
                f"as {name + ' one'!r}."
            )
    if budget is None:
        return dict(estimators)
    check.integer("budget", budget)
    found = {name: estimator.with_budget(budget) for name, estimator in estimators.items()}
    for name, estimator in found.items():
        if estimator is None:
            raise ValueError(
                f"budget={budget} cannot be given to estimators[{name!r}], a {type(estimators[name]).__name__}: its cost is no "
                "number of particles, or a single particle costs more. Leave budget out, and choose the sizes yourself."
            )
    return {name: estimator for name, estimator in found.items() if estimator is not None}


def check_points(params: PyTree | list[PyTree]) -> tuple[list[PyTree], list[Any]]:
    """Points to compare at, and their labels."""
    points = list(params) if isinstance(params, list) else [params]
    if not points:
        raise ValueError("params must hold at least one point to compare at; got an empty list.")
    points = [check.position(f"params[{j}]", point) for j, point in enumerate(points)]
    for j, point in enumerate(points):
        check.same_structure(f"params[{j}]", point, "params[0]", points[0])
    labels = getattr(params, "labels", None)
    return points, list(range(len(points))) if labels is None else list(labels)
