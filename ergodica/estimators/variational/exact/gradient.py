"""Exact gradients of variational objectives, for comparisons with estimates and for small programs."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import RenyiELBO

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Batch, Estimate, Key, PyTree, Reference
from ergodica.estimators.variational.exact.bounds import Bound, OnGrid, evaluate_on_grid
from ergodica.estimators.variational.exact.grid import Grid, make_grid
from ergodica.estimators.variational.gradient import VariationalGradient
from ergodica.estimators.variational.numpyro_loss import NumPyroLoss
from ergodica.estimators.variational.objectives.loss import AbstractLoss
from ergodica.estimators.variational.objectives.weighted import AbstractWeightedBound

NUM_NODES = (16, 25, 36, 55, 80, 121)
"""Nodes for each continuous dimension that are tried in turn: even and odd, so that no symmetry makes two of them agree."""
TOLERANCE = 1e-4
"""Error of the gradient, as a fraction of its largest entry, at which no more nodes are tried."""
MASS_TOLERANCE = 1e-3
"""How far the grid's total probability may be from one."""
ELBO_BOUND = Bound(1.0, 1)
_ROUNDING_UNITS = 4


class UnknownObjective(TypeError):
    """The objective of a loss is not one that can be computed without sampling."""


class ExactGradient(AbstractGradientEstimator):
    r"""The gradient that a `VariationalGradient` estimates, without sampling: enumeration times quadrature.

    .. math:: \nabla \sum_z \int q(z, w)\, \log\frac{p(x, z, w)}{q(z, w)} \,\mathrm dw

    and likewise the bounds of ``IWELBO`` and ``RenyiELBO`` for any number of particles, which need one more integral.

    Parameters
    ----------
    gradient : VariationalGradient
        Of ``ELBO``, ``IWELBO`` or one of NumPyro's losses. What its estimators do at the sites does not matter here.
    num_nodes : int
        Quadrature nodes for each continuous dimension: Gauss–Hermite for normals and elementwise functions of them (log-normals,
        automatic guides), the trapezoidal rule after a transformation for any other law of numbers (mixtures, von Mises, gamma).

    Raises
    ------
    GridError
        A `ValueError` that says which site, and why: values that cannot be listed, more than 65,536 joint values, more
        than three continuous dimensions, subsampled plates, scans, or a grid of more than a million points.
    TypeError
        Where the objective of the loss is not known.

    Notes
    -----
    Laws may depend on the values of other sites: the program is run with the values of each point of the grid. Cost: two runs of it
    and a derivative for each point, 256 points at a time; ``n_grad`` counts the points.

    `reference` tries more and more nodes until the gradient stands still, and says by how much it still moved. Where model or
    guide have a kink in a continuous value, that happens slowly.

    When not to use it: to fit anything but a toy. It is what estimators are held against in `ergodica.compare_gradients`,
    which takes it by itself.

    References
    ----------
    Golub and Welsch (1969) for the nodes.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ergodica as erg
    >>> def model():
    ...     numpyro.sample("z", dist.Bernoulli(0.2))
    >>> def guide():
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.zeros(()))))
    >>> gradient = erg.estimators.VariationalGradient(erg.estimators.ELBO(), model, guide)
    >>> exact = erg.estimators.ExactGradient(gradient)
    >>> estimate, _ = exact.estimate(jax.random.key(0), {"logit": jnp.zeros(())}, ())
    >>> print(f"{estimate.gradient['logit']:.4f}")
    -0.3466
    """

    gradient: VariationalGradient
    num_nodes: int = eqx.field(static=True)

    references: ClassVar = ("golub1969",)

    def __init__(self, gradient: VariationalGradient, num_nodes: int = 36) -> None:
        self.gradient = check.instance(
            "gradient", gradient, VariationalGradient, "such as VariationalGradient(ELBO(), model, guide)"
        )
        self.num_nodes = check.integer("num_nodes", num_nodes, least=2)
        bound_of(gradient.loss)

    def start(self, key: Key) -> dict[str, PyTree]:
        """Unconstrained initial parameters, as model and guide declare them."""
        return self.gradient.start(key)

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> tuple:  # noqa: ARG002
        """Nothing is remembered."""
        return ()

    def estimate(self, key: Key, params: PyTree, state: tuple, batch: Batch | None = None) -> tuple[Estimate, tuple]:  # noqa: ARG002
        """Compute the objective and its gradient; the key is not used."""
        if batch is not None:
            raise ValueError("ExactGradient takes no batch that is handed over; data are arguments of the model.")
        done, grid = on_grid(self.gradient, params, self.num_nodes)
        return Estimate(done.gradient, done.value, n_grad=grid.size), state

    @property
    def exact(self) -> bool:
        """Without noise."""
        return True

    def reference(self, params: PyTree) -> Reference | None:
        """The gradient with as many nodes as it takes, and what is left of the error."""
        return reference_of(self.gradient, params)


def reference_of(gradient: VariationalGradient, params: PyTree) -> Reference | None:
    """Refine the grid until the gradient stands still; ``None`` where there is no grid, or no objective that is known.

    The error is what the last refinement changed, and what rounding may do to the sum.
    """
    last, error = None, None
    for num_nodes in NUM_NODES:
        try:
            done, grid = _compiled(gradient, params, num_nodes)
        except (ValueError, UnknownObjective):  # GridError, or a model that draws what the guide does not
            break
        unit = _ROUNDING_UNITS * jnp.finfo(done.value.dtype).eps
        rounding = jax.tree.map(lambda x, unit=unit: unit * x, done.absolute)
        if not grid.refinable:
            return Reference(done.gradient, rounding, rounding)
        if last is not None:
            change = jax.tree.map(lambda a, b: jnp.abs(a - b), done.gradient, last)
            error = tree.add(change, rounding)
            close = _largest(error) <= TOLERANCE * _largest(done.gradient) + 2 * _largest(rounding)
            if close and abs(float(done.mass) - 1) < MASS_TOLERANCE:
                return Reference(done.gradient, error, rounding)
        last = done.gradient
    if error is None or not np.isfinite(_largest(error)) or abs(float(done.mass) - 1) >= MASS_TOLERANCE:
        return None
    return Reference(last, error, rounding)


def on_grid(gradient: VariationalGradient, params: PyTree, num_nodes: int) -> tuple[OnGrid, Grid]:
    """Evaluate the objective of an estimator on a grid."""
    grid = make_grid(gradient.program, gradient.constrain(params), num_nodes)
    return evaluate_on_grid(gradient.program, grid, bound_of(gradient.loss), params, gradient.constrain), grid


_compiled: Callable = eqx.filter_jit(on_grid)


def bound_of(loss: Any) -> Bound:
    """The objective of a loss; raise where it is not known."""
    if isinstance(loss, NumPyroLoss):
        if isinstance(loss.of, RenyiELBO):
            return Bound(1.0 - loss.of.alpha, loss.num_particles)
        if loss.linear:
            return ELBO_BOUND
    elif isinstance(loss, AbstractWeightedBound):
        return Bound(loss.power(float), loss.num_particles)
    elif isinstance(loss, AbstractLoss) and loss.estimates_elbo:
        return ELBO_BOUND
    of = loss.of if isinstance(loss, NumPyroLoss) else loss
    raise UnknownObjective(
        f"The objective of {type(of).__name__} is not one that is known without sampling: those of ELBO, IWELBO, RenyiBound and "
        "NumPyro's losses are. Name an estimator that you trust as the reference."
    )


def _largest(x: PyTree) -> float:
    return float(jnp.max(jnp.abs(tree.ravel(x))))
