"""Data that are spread over owners."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.posterior import Posterior
from ergodica.core.types import Batch, Key, PyTree

_ROWS_COMPARED = 4


class Shards(eqx.Module):
    r"""A posterior whose data belong to clients, :math:`p(\theta)\,\prod_{s=1}^S p(x_s \mid \theta)`.

    The rows are stored once, sorted by client, and a client is a range of them: shards may have any sizes, and what a draw
    from one costs does not depend on how many there are.

    Parameters
    ----------
    posterior : Posterior
        Of all the data, with the whole prior.
    client : array (N,)
        Which client each datum belongs to: numbers or strings. Clients are counted in the order of the sorted labels.

    Attributes
    ----------
    rows : pytree
        The data, sorted by client.
    offsets, sizes : int32 array (S,)
        Where each client's rows begin, and how many there are.
    names : tuple
        The clients' labels.

    Raises
    ------
    ValueError, TypeError
        For a posterior without data, or labels that are not one a datum.

    Examples
    --------
    >>> import jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> shards = Shards(posterior, ["b", "a", "b", "b", "a", "b"])
    >>> shards.names, shards.sizes.tolist(), shards.rows.tolist()
    (('a', 'b'), [2, 4], [1.0, 4.0, 0.0, 2.0, 3.0, 5.0])
    """

    posterior: Posterior
    rows: PyTree
    offsets: Array
    sizes: Array
    names: tuple = eqx.field(static=True)
    largest: int = eqx.field(static=True)

    def __init__(self, posterior: Posterior, client: Any) -> None:
        check.instance("posterior", posterior, Posterior, "such as from_numpyro(model, data=…)")
        if posterior.data is None:
            raise ValueError("Shards cut all the data by client; the posterior holds no data.")
        labels = np.asarray(client)
        if labels.shape != (posterior.num_data,):
            raise ValueError(
                f"client must say for each datum whose it is, shape ({posterior.num_data},); got shape {labels.shape}."
            )
        names, sizes = np.unique(labels, return_counts=True)
        order = np.argsort(labels, kind="stable")
        self.posterior = posterior
        self.rows = jax.tree.map(lambda x: x[order], posterior.data)
        self.offsets = jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)
        self.sizes = jnp.asarray(sizes, jnp.int32)
        self.names = tuple(names.tolist())
        self.largest = int(sizes.max())

    @classmethod
    def from_datasets(cls, make: Callable[[PyTree], Posterior], datasets: Sequence[PyTree]) -> Self:
        """Make a posterior of all data, and shards of it, from one data set a client.

        Parameters
        ----------
        make : callable
            ``make(data) -> Posterior`` for any rows: ``lambda data: erg.from_numpyro(model, data=data)``.
        datasets : sequence of pytrees
            Of one structure, with one row a datum.
        """
        joined, client = _join(datasets)
        return cls(make(joined), client)

    @classmethod
    def from_posteriors(cls, posteriors: Sequence[Posterior]) -> Self:
        """Take posteriors of the clients, each with the *whole* prior and its own data, for shards of one posterior.

        Prior and likelihood are those of the first; that the others have the same is checked at a start, on a few rows.

        Raises
        ------
        ValueError, TypeError
            For posteriors without data, or of different priors or likelihoods.
        """
        first, joined, client = *_check_alike(posteriors), _clients(posteriors)
        whole = Posterior(
            first.log_prior,
            first.log_likelihood,
            joined,
            initial=first.initial,
            constrain=first.transform,
            dims=first.dims,
            coords=first.coords,
        )
        return cls(whole, client)

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self.sizes.shape[0]

    def draw(self, key: Key, client: Array, num_rows: int) -> Batch:
        """Draw rows of a client, uniformly and with replacement."""
        rows = jax.random.randint(key, (num_rows,), 0, self._size(client))
        rows = rows if self.num_clients == 1 else rows.astype(jnp.int32) + self.offsets[client]
        return Batch(self._take(rows), jnp.full((num_rows,), 1.0 / num_rows))

    def whole(self, client: Array | int) -> Batch:
        """All rows of a client, in an array as long as the largest client's; what is beyond its own has weight 0."""
        size = self.sizes[client]
        place = jnp.arange(self.largest, dtype=jnp.int32)
        data = self._take(self.offsets[client] + jnp.minimum(place, size - 1))
        return Batch(data, jnp.where(place < size, 1.0 / size.astype(jnp.result_type(float)), 0.0))

    def log_likelihood(self, params: PyTree, client: Array | int, batch: Batch) -> Array:
        """Estimate the log likelihood of all of a client's data from a batch of it (scalar)."""
        values = self.posterior.log_likelihood(params, batch.data)
        # surplus rows of `whole` are real data, so that 0 times their value is 0 wherever the client's own are finite
        size = jnp.asarray(self._size(client), values.dtype)
        return size * jnp.sum(batch.weight.astype(values.dtype) * values)

    def gradient_moments(self, params: PyTree, client: Array | int, *, diagonal: bool = False) -> tuple[Array, Array]:
        """Mean (D,) and covariance (D, D), or variances (D,), of the gradients of single data, over the client's data."""

        def of_one(row: PyTree) -> Array:
            one = jax.tree.map(lambda x: x[None], row)
            return tree.ravel(jax.grad(lambda theta: self.posterior.log_likelihood(theta, one)[0])(params))

        batch = self.whole(client)
        gradients = jax.vmap(of_one)(batch.data)
        weight = batch.weight.astype(gradients.dtype)
        mean = weight @ gradients
        away = gradients - mean[None]
        return mean, weight @ away**2 if diagonal else (weight[:, None] * away).T @ away

    def only(self, client: int) -> "Shards":
        """Take what one client holds: shards of one, whose posterior has no other data."""
        begin, size = int(self.offsets[client]), int(self.sizes[client])
        rows = jax.tree.map(lambda x: x[begin : begin + size], self.rows)
        whole = self.posterior
        own = Posterior(whole.log_prior, whole.log_likelihood, rows, initial=whole.initial, constrain=whole.transform)
        return Shards(own, np.full(size, self.names[client]))

    def _size(self, client: Array | int) -> Array | int:
        """Rows of a client; of the only one a constant, as in `Minibatch`, so that compiled code rounds alike."""
        return self.largest if self.num_clients == 1 else self.sizes[client]

    def _take(self, index: Array) -> PyTree:
        return jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), self.rows)


def _join(datasets: Sequence[PyTree]) -> tuple[PyTree, np.ndarray]:
    """Put data sets under each other, and say whose each row is."""
    if not isinstance(datasets, list | tuple) or not datasets:
        raise ValueError(f"datasets must be a list with one data set a client; got {type(datasets).__name__}.")
    lengths = [check.leading_length(f"datasets[{i}]", data) for i, data in enumerate(datasets)]
    for i, data in enumerate(datasets):
        if jax.tree.structure(data) != jax.tree.structure(datasets[0]):
            raise ValueError(
                f"datasets[{i}] must have the structure of the first, {jax.tree.structure(datasets[0])}; got "
                f"{jax.tree.structure(data)}."
            )
    joined = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *datasets)
    return joined, np.repeat(np.arange(len(datasets)), lengths)


def _clients(posteriors: Sequence[Posterior]) -> np.ndarray:
    return np.repeat(np.arange(len(posteriors)), [p.num_data for p in posteriors])


@jax.jit
def _values(posterior: Posterior, position: PyTree, rows: PyTree) -> tuple[Array, Array]:
    return posterior.log_prior(position), posterior.log_likelihood(position, rows)


def _check_alike(posteriors: Sequence[Posterior]) -> tuple[Posterior, PyTree]:
    """Give the first posterior and all data; raise where another one has another prior or likelihood."""
    if not isinstance(posteriors, list | tuple) or not posteriors:
        raise TypeError(f"posteriors must be a list of one Posterior a client; got {type(posteriors).__name__}.")
    for i, posterior in enumerate(posteriors):
        check.instance(f"posteriors[{i}]", posterior, Posterior, "with the client's data")
        if posterior.data is None:
            raise ValueError(f"posteriors[{i}] must hold the client's data; it holds none.")
    first = posteriors[0]
    joined, _ = _join([p.data for p in posteriors])
    position = first.start(jax.random.key(0))
    for i, posterior in enumerate(posteriors[1:], 1):
        rows = jax.tree.map(lambda x: x[:_ROWS_COMPARED], posterior.data)
        for name, own, firsts in zip(
            ("prior", "likelihood"), _values(posterior, position, rows), _values(first, position, rows), strict=True
        ):
            if not np.allclose(own, firsts, rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"posteriors[{i}] must have the {name} of the first; at a start theirs are {own} and {firsts}. Each "
                    "client's posterior has the whole prior, not a share of it, and its model takes the data as arguments."
                )
    return first, joined
