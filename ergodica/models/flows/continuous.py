r"""Continuous flows: the map is the solution of an ordinary differential equation (needs diffrax, the extra ``flows``).

.. math:: \frac{dx}{dt} = f(t, x), \qquad \frac{d\ell}{dt} = \mathrm{tr}\,\frac{\partial f}{\partial x}, \qquad
          \frac{ds}{dt} = -\left(\frac{\partial f}{\partial x}\right)^{\!\top} s - \nabla_x \mathrm{tr}\,\frac{\partial
          f}{\partial x}

What is solved is this equation, by steps. Three things then differ in general, each by the error of the solver: the score
that comes with a draw, the score that is the derivative of the log density at it, and the score of the law of the discretised
map. With Gauss's methods at fixed steps (``solver="gauss4"``) they are the same to rounding, whatever the step.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.flow import AbstractLayer, Flow, constant
from ergodica.core.types import Key
from ergodica.models.flows.conditioner import Activation, Conditioner

FIXED = {"gauss2": 1, "gauss4": 2, "gauss6": 3}
"""Solvers of this package, and their stages."""
NAMED = {
    "euler": "Euler",
    "heun": "Heun",
    "midpoint": "Midpoint",
    "bosh3": "Bosh3",
    "tsit5": "Tsit5",
    "dopri5": "Dopri5",
    "dopri8": "Dopri8",
}
"""Solvers of diffrax, by short names."""
WITHOUT_ERROR = ("euler", *FIXED)
ADJOINTS = {"checkpoint": "RecursiveCheckpointAdjoint", "backsolve": "BacksolveAdjoint", "direct": "DirectAdjoint"}

type Field = Callable[[Array, Array], Array]


def import_diffrax() -> Any:
    """Diffrax, or an error that says how to get it."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "Continuous flows are solved by diffrax, which is not installed: pip install 'ergodica[flows]'."
        ) from error
    return diffrax


class VelocityField(eqx.Module):
    """A fully connected network of a point and the time.

    Parameters
    ----------
    key : key
    dim : int
        D.
    width, depth, activation, start
        Of the network, see `Conditioner`; the activation must have two derivatives.
    """

    network: Conditioner

    def __init__(
        self,
        key: Key,
        dim: int,
        width: int = 64,
        depth: int = 2,
        activation: Activation = jnp.tanh,
        start: float = 0.01,
    ) -> None:
        self.network = Conditioner(key, check.integer("dim", dim) + 1, dim, width, depth, activation, start)

    def __call__(self, t: Array, x: Array) -> Array:
        """dx/dt (D,) at time t and point (D,)."""
        return self.network(jnp.concatenate([x, jnp.asarray(t, x.dtype)[None]]))


def divergence(function: Callable[[Array], Array], x: Array, probes: Array | None = None) -> tuple[Array, Array]:
    r"""Value of a map of R^D to itself and the trace of its derivative.

    .. math:: \mathrm{tr}\,J = \sum_i e_i^\top J e_i, \qquad \text{or } \frac{1}{m} \sum_{j=1}^m v_j^\top J v_j

    Parameters
    ----------
    function : callable
    x : array (D,)
    probes : array (m, D), optional
        Vectors v of independent signs for an estimate of the trace (Hutchinson); exact without them.

    Notes
    -----
    Cost: D, or m, derivatives along a direction.
    """
    value, push = jax.linearize(function, x)
    directions = jnp.eye(x.size, dtype=x.dtype) if probes is None else probes.astype(x.dtype)
    quadratic = jnp.sum(jax.vmap(push)(directions) * directions, axis=1)
    return value, jnp.sum(quadratic) if probes is None else jnp.mean(quadratic)


class Hutchinson(eqx.Module):
    """Random signs for an estimate of traces, the same at all times and points.

    Parameters
    ----------
    key : key
    dim : int
        D.
    num_probes : int
        Vectors of signs, m: the variance of the estimate falls as 1/m, its cost grows as m.

    References
    ----------
    Hutchinson (1989); Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud (2019).
    """

    signs: Array

    references: ClassVar[tuple[str, ...]] = ("grathwohl2019",)

    def __init__(self, key: Key, dim: int, num_probes: int = 1) -> None:
        rng.check_key(key)
        shape = (check.integer("num_probes", num_probes), check.integer("dim", dim))
        self.signs = jax.random.rademacher(key, shape, jnp.int8)


class Point(NamedTuple):
    """What is moved: a point (D,), the log determinant so far, and a score (D,); the last two where they are asked for."""

    x: Array
    log_det: Any = None
    score: Any = None


class Continuous(AbstractLayer):
    r"""A differential equation, solved from time 0 to ``duration``, and backwards.

    Parameters
    ----------
    field : callable
        A module ``field(t, x) -> dx/dt`` with two continuous derivatives in x, such as `VelocityField`.
    duration : float
    solver : str
        With ``num_steps``: ``"gauss2"``, ``"gauss4"``, ``"gauss6"`` (implicit, of that order; see Notes), or one of
        ``"euler"``, ``"heun"``, ``"midpoint"``, ``"bosh3"``, ``"tsit5"``, ``"dopri5"``, ``"dopri8"`` of diffrax. With
        ``tolerance``: those of diffrax but ``"euler"``.
    num_steps : int, optional
        Steps of one size. Either these or ``tolerance`` must be given.
    tolerance : float, optional
        Relative and absolute error that adaptive steps aim at, in points, log determinants and scores alike.
    trace : "exact" or Hutchinson
        ``"exact"`` costs D derivatives at each evaluation. With ``Hutchinson(key, D)`` log densities and scores are estimates:
        unbiased over its keys, but for one key those of no law. Effective sample sizes, importance weights and reports of a fit
        need ``"exact"``.
    adjoint : {"checkpoint", "backsolve", "direct"}
        How points are differentiated: through the steps, with checkpoints; by solving an equation backwards (memory
        independent of the number of steps, gradients off by the solver's error); through the steps, forward mode too
        (slower).
    max_steps : int
        At most so many adaptive steps.

    Raises
    ------
    ImportError
        Without diffrax.
    ValueError, TypeError
        For other names, both or neither of ``num_steps`` and ``tolerance``, or an adaptive solver without an error estimate.

    Notes
    -----
    Where the solver fails (out of steps, stages not found, infinite values) all results are NaN.

    `forward_with_score` solves the equation of the score along with the point. How far that is from the derivative of the log
    density of the point (the inverse solved, and differentiated: what two-pass gradients use) depends on the solver:

    - Gauss's methods with fixed steps: equal to rounding, at any step. They are symmetric, so that the inverse is exact, and
      they conserve quadratic invariants, so that the score of the discretised equation is the derivative of the discretised
      flow. Log determinants are off those of the discretised map by the solver's error, as with all methods.
    - Explicit methods with fixed steps: the difference falls with the order of the method, to rounding for ``"dopri8"``.
    - Adaptive steps: a small multiple of ``tolerance``.

    Cost of `forward_with_score`: two solves, one of the point alone (which is differentiated) and one of all. An evaluation
    of the second takes the field, the trace (D derivatives) and one derivative of both. Stages of Gauss's methods take 5 to
    20 rounds of evaluations. Nothing but the point is ever differentiated by the parameters, where a standard gradient goes
    back through the trace.

    Use couplings where they do: a draw takes one pass of their networks, here it takes hundreds.

    References
    ----------
    Chen, Rubanova, Bettencourt and Duvenaud (2018); Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud (2019); Vaitl, Nicoli,
    Nakajima and Kessel (2022); Sanz-Serna (2016).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> layer = Continuous(VelocityField(jax.random.key(0), 2, width=8), solver="gauss4", num_steps=4)
    >>> y, log_det = layer.forward(jnp.ones(2))
    >>> bool(jnp.allclose(layer.inverse(y)[0], 1.0, atol=1e-5))
    True
    """

    field: Field
    trace: Hutchinson | None
    duration: float = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    num_steps: int | None = eqx.field(static=True)
    tolerance: float | None = eqx.field(static=True)
    adjoint: str = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    references: ClassVar[tuple[str, ...]] = ("chen2018", "grathwohl2019", "sanzserna2016", "vaitl2022")

    def __init__(
        self,
        field: Field,
        *,
        duration: float = 1.0,
        solver: str = "tsit5",
        num_steps: int | None = None,
        tolerance: float | None = None,
        trace: Hutchinson | Literal["exact"] = "exact",
        adjoint: str = "checkpoint",
        max_steps: int = 4096,
    ) -> None:
        import_diffrax()
        self.field = check.function("field", field)
        self.duration = float(check.positive("duration", duration))
        self.solver = check.one_of("solver", solver, [*FIXED, *NAMED])
        self.adjoint = check.one_of("adjoint", adjoint, ADJOINTS)
        self.max_steps = check.integer("max_steps", max_steps)
        if (num_steps is None) == (tolerance is None):
            raise ValueError(
                "Give either num_steps (steps of one size) or tolerance (adaptive steps); got "
                f"num_steps={num_steps!r} and tolerance={tolerance!r}."
            )
        self.num_steps = None if num_steps is None else check.integer("num_steps", num_steps)
        self.tolerance = None if tolerance is None else float(check.positive("tolerance", tolerance))
        if tolerance is not None and solver in WITHOUT_ERROR:
            raise ValueError(f"solver={solver!r} does not estimate its error, which tolerance needs; give num_steps.")
        if trace != "exact" and not isinstance(trace, Hutchinson):
            raise ValueError(f"trace must be 'exact', or Hutchinson(key, dim) for an estimate; got {trace!r}.")
        self.trace = trace if isinstance(trace, Hutchinson) else None

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Solve to the end."""
        end = self._solve(Point(x, jnp.zeros((), x.dtype)), backwards=False)
        return end.x, end.log_det

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Solve back from the end."""
        end = self._solve(Point(y, jnp.zeros((), y.dtype)), backwards=True)
        return end.x, end.log_det

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """Solve to the end, the score's equation along."""
        return self._both(x, score, backwards=False)

    def inverse_with_score(self, y: Array, score: Array) -> tuple[Array, Array, Array]:
        """Solve back from the end, the score's equation along."""
        return self._both(y, score, backwards=True)

    def _both(self, start: Array, score: Array, *, backwards: bool) -> tuple[Array, Array, Array]:
        end = self._solve(Point(start), backwards=backwards)
        still = jax.lax.stop_gradient(Point(start, jnp.zeros((), start.dtype), score))
        carried = jax.lax.stop_gradient(constant(self)._solve(still, backwards=backwards))
        return end.x, carried.log_det, carried.score

    def _rate(self, t: Array, point: Point, _: None) -> Point:
        """Time derivatives of all that is there."""
        x, log_det, score = point
        signs = None if self.trace is None else self.trace.signs

        def along(x: Array) -> Array:
            return self.field(t, x)

        if log_det is None:
            return Point(along(x))
        if score is None:
            return Point(*divergence(along, x, signs))

        def pulled(x: Array) -> tuple[Array, tuple[Array, Array]]:
            value, trace = divergence(along, x, signs)
            return trace + jnp.sum(score * value), (value, trace)

        slope, (value, trace) = jax.grad(pulled, has_aux=True)(x)
        return Point(value, trace, -slope)

    def _solve(self, start: Point, *, backwards: bool) -> Point:
        diffrax = import_diffrax()
        duration = jnp.asarray(self.duration, start.x.dtype)
        zero = jnp.zeros_like(duration)
        t0, t1 = (duration, zero) if backwards else (zero, duration)
        if self.num_steps is None:
            step, most = None, self.max_steps
            controller = diffrax.PIDController(rtol=self.tolerance, atol=self.tolerance)
        else:
            step, most, controller = (t1 - t0) / self.num_steps, self.num_steps + 1, diffrax.ConstantStepSize()
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(self._rate),
            self._solver(diffrax),
            t0,
            t1,
            step,
            start,
            stepsize_controller=controller,
            adjoint=getattr(diffrax, ADJOINTS[self.adjoint])(),
            max_steps=most,
            throw=False,
        )
        good = solution.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda y: jnp.where(good, y[0], jnp.nan), solution.ys)

    def _solver(self, diffrax: Any) -> Any:
        if self.solver in FIXED:
            from ergodica.models.flows.gauss import Gauss

            return Gauss(FIXED[self.solver])
        return getattr(diffrax, NAMED[self.solver])()


def continuous_flow(
    key: Key,
    dim: int,
    *,
    width: int = 64,
    depth: int = 2,
    activation: Activation = jnp.tanh,
    start: float = 0.01,
    **settings: Any,
) -> Flow:
    """A differential equation from standard normals.

    Parameters
    ----------
    key : key
    dim : int
        D.
    width, depth, activation, start
        Of the `VelocityField`.
    **settings
        Of `Continuous`; ``solver="gauss4"`` with eight steps unless given.

    Examples
    --------
    >>> import jax
    >>> continuous_flow(jax.random.key(0), dim=2, width=8).sample(jax.random.key(1), 3).shape
    (3, 2)
    """
    if "num_steps" not in settings and "tolerance" not in settings:
        settings = {"solver": "gauss4", "num_steps": 8} | settings
    return Flow(dim, Continuous(VelocityField(key, dim, width, depth, activation, start), **settings))
