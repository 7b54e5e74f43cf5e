"""Names for the types that appear in every signature, and the records that travel between the parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

type PyTree = Any
type Key = PRNGKeyArray
type Position = PyTree
"""What a sampler moves: a pytree of floating point arrays in unconstrained space."""
type Schedule = Callable[[Array], Array]
"""A function of the step count (int32 scalar), as optax's schedules are."""


class Name(eqx.Module):
    """A choice by name, as part of the structure of a tree."""

    name: str = eqx.field(static=True)


class Batch(NamedTuple):
    """Some rows of the data, and what each of them stands for.

    Attributes
    ----------
    data : pytree
        Arrays whose leading axis, of length ``n``, runs over the rows.
    weight : array (n,)
        What each row counts, so that ``num_data * sum(weight * f(rows))`` is an unbiased estimate of the sum of ``f``
        over all the data: ``1 / n`` for ``n`` uniform draws, ``K / num_data`` for a block out of ``K``, 0 for a row
        that is in the array for the sake of its shape.
    """

    data: PyTree
    weight: Array


class Estimate(NamedTuple):
    """An estimate of a gradient.

    Attributes
    ----------
    gradient : pytree
        Of the structure of the parameters; estimates the gradient of something that is to be *increased*.
    value : scalar array
        Estimates that something (for a posterior, its unnormalised log density).
    aux : pytree
        Whatever else the estimator has to say; ``None`` where it has nothing.
    n_grad : int or scalar array
        What it cost, in gradient evaluations of single data.
    """

    gradient: PyTree
    value: Array
    aux: PyTree = None
    n_grad: int | Array = 0


class Draws(NamedTuple):
    """What a gradient estimator averages over: independent, identically distributed draws, and the law of some of their noise.

    Attributes
    ----------
    gradient : pytree
        Of the structure of the parameters, with a leading axis (n,); the mean over it is the estimate.
    value : array (n,)
    points : array (n, D)
        Noise that each draw was made with. In the order of the raveled parameters, where each entry has noise of its own.
    score : array (n, D)
        Gradient of the log density of the law of the points, there: ``-points`` for standard normals. The density is positive
        everywhere.
    n_grad : int or scalar array
        What all of them cost.
    linearised : pytree or None
        Like ``gradient``: the term of first order in the points of each draw's gradient, expanded about the point 0. It has mean
        zero since the points have.
    """

    gradient: PyTree
    value: Array
    points: Array
    score: Array
    n_grad: int | Array = 0
    linearised: PyTree = None


class Reference(NamedTuple):
    """An exact gradient, to hold estimates against.

    Attributes
    ----------
    gradient : pytree
        Of the structure of the parameters.
    error : pytree
        How far off each entry may be, by rounding and by quadrature.
    rounding : pytree
        The part of it that is rounding.
    """

    gradient: PyTree
    error: PyTree
    rounding: PyTree
