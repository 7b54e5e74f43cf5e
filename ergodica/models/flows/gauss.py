r"""Gauss's collocation methods as solvers of diffrax; this module imports it.

Their fixed steps are symmetric, so that a solve backwards in time undoes one forwards, and they conserve quadratic
invariants. What a score and a derivative of the flow make together, :math:`s \cdot \delta x + \delta \ell`, is one: solving
the differential equation of the score by such a method gives the score of the discretised flow itself, whatever the step
(Sanz-Serna, 2016).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

from ergodica.core.types import PyTree

_MAX_ITERATIONS = 200


def collocation(stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Butcher's table of the method with given stages: nodes c of Gauss's quadrature on [0, 1].

    .. math:: a_{ij} = \int_0^{c_i} L_j(\tau)\, d\tau, \qquad b_j = \int_0^1 L_j(\tau)\, d\tau

    with Lagrange's polynomials :math:`L_j` through the nodes.

    Returns
    -------
    a, b, c : array (stages, stages), (stages,), (stages,)
    """
    c = 0.5 + 0.5 * np.polynomial.legendre.leggauss(stages)[0]
    a, b = np.zeros((stages, stages)), np.zeros(stages)
    for j in range(stages):
        others = np.delete(c, j)
        lagrange = np.poly1d(others, r=True) / np.prod(c[j] - others)
        integral = lagrange.integ()
        a[:, j], b[j] = integral(c), integral(1.0)
    return a, b, c


class Gauss(diffrax.AbstractSolver):
    """Gauss's method of order ``2 * stages``, for steps of a fixed size.

    The stages are found by iteration of their equations until they move by less than 1e-14 (1e-7 in single precision) relative to
    1 + their size; that needs steps shorter than about the inverse of the field's slope. A step whose stages are not found fails.
    """

    stages: int = eqx.field(static=True)
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.LocalLinearInterpolation

    def order(self, terms: PyTree) -> int:  # noqa: ARG002
        """2 stages."""
        return 2 * self.stages

    def init(self, terms: PyTree, t0: Any, t1: Any, y0: PyTree, args: PyTree) -> None:  # noqa: ARG002
        """Nothing is kept between steps."""
        return

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: PyTree,
        solver_state: None,  # noqa: ARG002
        made_jump: Any,  # noqa: ARG002
    ) -> tuple[PyTree, None, dict, None, Any]:
        """One step from t0 to t1."""
        a, b, c = collocation(self.stages)
        control = terms.contr(t0, t1)
        first = terms.vf_prod(t0, y0, args, control)
        dtype = jnp.result_type(*jax.tree.leaves(y0))
        goal = 8 * max(1e-15, float(jnp.finfo(dtype).eps))
        size: Any = jnp.max(jnp.stack([jnp.max(jnp.abs(y)).astype(dtype) for y in jax.tree.leaves(y0)]))
        found = optimistix.fixed_point(
            _stages,
            optimistix.FixedPointIteration(rtol=goal, atol=goal * (1.0 + size)),
            tuple(first for _ in c),
            (terms, t0, t1, y0, args, control, jnp.asarray(a, dtype), jnp.asarray(c, dtype)),
            max_steps=_MAX_ITERATIONS,
            throw=False,
        )
        y1 = jax.tree.map(lambda y, *k: y + sum(float(w) * one for w, one in zip(b, k, strict=True)), y0, *found.value)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.promote(found.result)

    def func(self, terms: Any, t0: Any, y0: PyTree, args: PyTree) -> PyTree:
        """The field."""
        return terms.vf(t0, y0, args)


def _stages(increments: tuple, inputs: tuple) -> tuple:
    """The equations of the stages: from increments to the increments of the field where they lead."""
    terms, t0, t1, y0, args, control, a, c = inputs

    def at(i: int) -> PyTree:
        point = jax.tree.map(lambda y, *k: y + sum(a[i, j] * one for j, one in enumerate(k)), y0, *increments)
        return terms.vf_prod(t0 + c[i] * (t1 - t0), point, args, control)

    return tuple(at(i) for i in range(len(increments)))
