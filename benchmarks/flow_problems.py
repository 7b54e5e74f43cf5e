"""The problems of `flow_training.py`: a target, and the flow that is fitted to it from a seed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ergodica.core.flow import Flow
from ergodica.models import flows, zoo


class Problem(NamedTuple):
    """A target, and a function that makes the flow to start from."""

    target: Any
    flow: Callable[[], Flow]


def _real_nvp(dim, num_layers, **settings):
    return lambda seed: lambda: flows.real_nvp(jax.random.key(seed), dim, num_layers=num_layers, width=64, **settings)


def _splines(dim, num_layers):
    return lambda seed: lambda: flows.spline_flow(jax.random.key(seed), dim, num_layers=num_layers, width=64)


def _lattice(size):
    masks = [flows.checkerboard_mask((size, size), parity) for parity in (0, 1)]
    return _real_nvp(size * size, 8, masks=masks)


def _problem(make_target, make_flow):
    return lambda seed: Problem(make_target(), make_flow(seed))


PROBLEMS = {
    "mixture, 6 dimensions": _problem(lambda: zoo.gaussian_mixture_cube(6), _splines(6, 4)),
    "mixture, 16 dimensions": _problem(lambda: zoo.gaussian_mixture_cube(16), _splines(16, 4)),
    "phi4, 6 x 6": _problem(lambda: zoo.phi4(6, kappa=0.2, coupling=0.022), _lattice(6)),
    "phi4, 12 x 12": _problem(lambda: zoo.phi4(12, kappa=0.2, coupling=0.022), _lattice(12)),
    "many wells, 8 dimensions": _problem(lambda: zoo.many_well(8), _real_nvp(8, 8)),
    "many wells, 32 dimensions": _problem(lambda: zoo.many_well(32), _real_nvp(32, 8)),
    "logistic regression": _problem(lambda: zoo.visit_regression(100), _real_nvp(10, 6)),
    "eight schools": _problem(zoo.eight_schools, _real_nvp(10, 6)),
}
