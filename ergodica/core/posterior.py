"""What is sampled: a log prior and one log likelihood value a datum."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.types import Key, Position, PyTree

_LEAVES = ("log_prior", "log_likelihood", "data", "initial", "transform", "observed", "source")


def as_partial(f: Callable) -> Callable:
    """Make a function a pytree, so that it can be a leaf of one; pytrees that can be called are left alone."""
    return jax.tree_util.Partial(f) if jax.tree_util.all_leaves([f]) else f


@jax.tree_util.register_pytree_with_keys_class
class Posterior:
    r"""A target :math:`\log\pi(\theta) = \log p(\theta) + \sum_{i=1}^N \log p(x_i \mid \theta)`, up to a constant.

    Parameters
    ----------
    log_prior : callable
        ``log_prior(position) -> scalar``, in unconstrained space, Jacobians included.
    log_likelihood : callable, optional
        ``log_likelihood(position, rows) -> (n,)``: one value a datum for ``n`` rows of ``data``. It must treat the rows
        independently. Left out, the target is ``log_prior`` alone.
    data : pytree of arrays, optional
        One row a datum along the leading axis of every leaf. Large arrays belong here and not in a closure: what is
        here is passed to compiled code as an argument.
    initial : pytree or callable, optional
        Where chains start: a position, or a function of a key.
    num_data : int, optional
        The number of data; from ``data`` unless given. Needed where the data are streamed.
    constrain : callable, optional
        ``constrain(position) -> dict`` of named arrays to report; the leaves by name unless given.
    dims : mapping of str to sequence of str, optional
        Names of the axes of what ``constrain`` returns.
    coords : mapping of str to sequence, optional
        Labels along those axes.
    observed : dict of arrays, optional
        What is stored as ``observed_data``; ``data`` itself unless given.
    source : pytree, optional
        What the posterior was made from (a NumPyro program); used by `ergodica.predictive`.

    Raises
    ------
    ValueError, TypeError
        If the rows disagree in length, or ``log_likelihood`` does not return one value a datum.

    Notes
    -----
    Log densities are sums over the data, not averages. A posterior is a pytree and hashes by identity, so that
    ``jax.jit(posterior.log_density)`` works; the data are then constants of the compiled program, which for large data
    is slow to compile: prefer ``jax.jit(lambda posterior, position: posterior.log_density(position))``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> posterior = Posterior(
    ...     log_prior=lambda theta: -0.5 * theta**2,
    ...     log_likelihood=lambda theta, x: -0.5 * (x - theta) ** 2,
    ...     data=jnp.array([1.0, 2.0, 3.0]),
    ...     initial=jnp.array(0.0),
    ... )
    >>> float(posterior.log_density(jnp.array(1.0)))
    -3.0
    """

    log_prior: Callable[[Position], Array]
    log_likelihood: Any
    data: PyTree
    initial: Any
    transform: Callable | None
    num_data: int
    dims: dict[str, tuple[str, ...]]
    coords: dict[str, tuple]

    def __init__(
        self,
        log_prior: Callable[[Position], Array],
        log_likelihood: Callable[[Position, PyTree], Array] | None = None,
        data: PyTree = None,
        *,
        initial: Position | Callable[[Key], Position] | None = None,
        num_data: int | None = None,
        constrain: Callable[[Position], dict[str, Array]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        observed: dict[str, Array] | None = None,
        source: PyTree = None,
    ) -> None:
        self.log_prior = as_partial(check.function("log_prior", log_prior))
        self.log_likelihood = (
            None if log_likelihood is None else as_partial(check.function("log_likelihood", log_likelihood))
        )
        self.data = None if data is None else jax.tree.map(jnp.asarray, data)
        if initial is None:
            self.initial = None
        else:
            self.initial = as_partial(initial) if callable(initial) else check.position("initial", initial)
        self.transform = None if constrain is None else as_partial(constrain)
        self.observed = observed
        self.source = source
        self.num_data = self._count(num_data)
        self.dims = {name: tuple(axes) for name, axes in (dims or {}).items()}
        self.coords = {name: tuple(labels) for name, labels in (coords or {}).items()}
        if initial is not None:
            self._check_functions()

    def _count(self, num_data: int | None) -> int:
        if self.data is not None:
            if self.log_likelihood is None:
                raise ValueError("data were given without log_likelihood; give log_likelihood(position, rows) too.")
            length = check.leading_length("data", self.data)
            if num_data is not None and num_data != length:
                raise ValueError(
                    f"num_data must be the number of rows of data, {length}; got {num_data}. Leave it out."
                )
            return length
        if self.log_likelihood is None:
            return 0
        return check.integer("num_data", num_data, hint="It is needed where log_likelihood is given without data.")

    def _check_functions(self) -> None:
        theta = self.shape()
        prior = jax.eval_shape(self.log_prior, theta)
        if getattr(prior, "shape", None) != ():
            raise ValueError(f"log_prior must return a scalar; got {prior}. Sum over the parameters.")
        if self.data is not None:
            values = jax.eval_shape(self.log_likelihood, theta, self.data)
            if getattr(values, "shape", None) != (self.num_data,):
                raise ValueError(
                    f"log_likelihood must return one value a datum, of shape ({self.num_data},) for all the data; got {values}. "
                    "Sum over event dimensions, but not over the rows."
                )

    def shape(self) -> PyTree:
        """Shapes and dtypes of a position (`jax.ShapeDtypeStruct` leaves)."""
        return jax.eval_shape(self.start, jax.random.key(0))

    def start(self, key: Key) -> Position:
        """Give a position to start a chain at."""
        if self.initial is None:
            raise ValueError("The posterior has no start: construct it with initial=, or give initial= to the run.")
        if callable(self.initial):
            return self.initial(key)
        rng.check_key(key)
        return self.initial

    def log_density(self, position: Position) -> Array:
        """Unnormalised log posterior density, over all the data. Cost: ``num_data`` likelihood evaluations."""
        if self.log_likelihood is None:
            return self.log_prior(position)
        if self.data is None:
            raise ValueError(
                "The posterior holds no data (they are streamed), so its log density cannot be summed here."
            )
        return self.log_prior(position) + jnp.sum(self.log_likelihood(position, self.data))

    def constrain(self, position: Position) -> dict[str, Array]:
        """Named values on the scale of the model, from one position."""
        if self.transform is None:
            return tree.named_leaves(position)
        return self.transform(position)

    def observed_data(self) -> dict[str, Array]:
        """All of the data by name, in their own order."""
        if self.observed is not None:
            return self.observed
        return {} if self.data is None else tree.named_leaves(self.data, root="data")

    def __repr__(self) -> str:
        size = tree.size(self.shape()) if self.initial is not None else "unknown"
        return f"Posterior(num_data={self.num_data}, num_parameters={size})"

    def tree_flatten_with_keys(self) -> tuple:
        """Split into leaves and static parts, for JAX."""
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _LEAVES]
        static = (self.num_data, tuple(sorted(self.dims.items())), tuple(sorted(self.coords.items())))
        return children, static

    @classmethod
    def tree_unflatten(cls, static: tuple, children: Sequence) -> Self:
        """Put together again, without checks: leaves may be tracers."""
        self = object.__new__(cls)
        for name, child in zip(_LEAVES, children, strict=True):
            setattr(self, name, child)
        self.num_data = static[0]
        self.dims, self.coords = dict(static[1]), dict(static[2])
        return self
