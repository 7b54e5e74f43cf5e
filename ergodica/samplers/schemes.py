"""Schemes of letters: which strings make a sampler, and how the letters are applied to a state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import tree
from ergodica.core.types import Estimate, Key, Position, PyTree
from ergodica.samplers.letters import kick

MOVES = frozenset("AU")
NOISY = frozenset("OUE")


class Force(NamedTuple):
    """A gradient estimate that a later kick at the same point reuses."""

    gradient: PyTree
    value: Array


def check_scheme(scheme: str, letters: frozenset[str]) -> str:
    """Return a scheme in capitals; raise unless its letters are among those given and make a sampler."""
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a string of letters such as 'BAOAB'; got {scheme!r}.")
    scheme = scheme.upper()
    unknown = sorted(set(scheme) - letters)
    if unknown:
        raise ValueError(
            f"scheme {scheme!r} has the unknown letters {unknown}; the letters are {', '.join(sorted(letters))}."
        )
    for needed, why in (
        (MOVES, "A or U, or the position never moves"),
        (set("B"), "B, or it never sees the target"),
        (NOISY, "O, U or E, or there is no noise"),
    ):
        if not needed & set(scheme):
            raise ValueError(f"scheme {scheme!r} needs {why}; 'BAOAB' is a good default.")
    return scheme


def apply_letters(
    scheme: str,
    key: Key,
    state: Any,
    step_size: Array,
    estimate: Callable[[Key, Position, Any], tuple[Estimate, Any]],
    flow: Callable[[str, Key, Any, Array], Any],
    *,
    reuse: bool,
) -> tuple[Any, Force, Array]:
    """Apply the letters of a scheme from left to right; kicks by ``estimate``, all other letters by ``flow``.

    Parameters
    ----------
    state : NamedTuple
        With the fields ``position``, ``momentum``, ``gradient`` (of the estimator) and ``force``.
    estimate : callable
        ``estimate(key, position, gradient_state) -> (Estimate, gradient_state)``.
    flow : callable
        ``flow(letter, key, state, time) -> state``.
    reuse : bool
        Whether kicks at one point share a gradient.

    Returns
    -------
    state : NamedTuple
        Its ``force`` is the estimate at its position, if there is one.
    latest : Force
        What the last kick used.
    n_grad : int32 scalar
    """
    latest, n_grad = state.force, jnp.zeros((), jnp.int32)
    for letter, key_letter in zip(scheme, jax.random.split(key, len(scheme)), strict=True):
        t = step_size / scheme.count(letter)
        if letter == "B":
            if state.force is None:
                found, gradient_state = estimate(key_letter, state.position, state.gradient)
                state = state._replace(gradient=gradient_state, force=Force(found.gradient, found.value))
                n_grad = n_grad + jnp.asarray(found.n_grad, jnp.int32)
            latest = state.force
            state = state._replace(momentum=kick(state.momentum, latest.gradient, t))
        else:
            state = flow(letter, key_letter, state, t)
        if letter in MOVES or not reuse:
            state = state._replace(force=None)
    return state, latest, n_grad


def carries_force(scheme: str) -> bool:
    """Whether the first kick of a step stands where the last one of the step before stood."""
    before, after = scheme.split("B")[0], scheme.split("B")[-1]
    return not MOVES & set(before + after)


def thermal_momentum(noise: PyTree, mass: PyTree, temperature: Array) -> PyTree:
    r"""Momentum of its own law, :math:`\sqrt{T M}\,\xi`."""
    return jax.tree.map(lambda m, xi: jnp.sqrt(m * tree.cast_like(temperature, xi)) * xi, mass, noise)


def kinetic_temperature(momentum: PyTree, mass: PyTree) -> Array:
    r"""Mean of :math:`p_i^2 / m_i`: the temperature that the momenta show."""
    return tree.dot(momentum, jax.tree.map(lambda p, m: p / m, momentum, mass)) / tree.size(momentum)
