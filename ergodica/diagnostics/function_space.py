"""Functions of the draws, and whether chains agree about them where their parameters cannot."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core import check
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Position, PyTree
from ergodica.diagnostics.full_gradient import unconstrained_positions

if TYPE_CHECKING:
    import xarray as xr

_DRAWS_AT_ONCE = 32


def function_draws(
    dt: "xr.DataTree",
    posterior: Posterior,
    function: Callable[[Any, PyTree], Any],
    rows: PyTree,
    *,
    batch_size: int = 1000,
) -> "xr.DataArray":
    r"""Evaluate a function of the parameters at every draw, such as what a network says of new inputs.

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`.
    posterior : Posterior
        What was sampled.
    function : callable
        ``function(parameters, rows) -> array (n, ...)``, one row a datum. ``parameters`` is the network for
        `ergodica.models.from_equinox`; for others the dictionary of constrained values where the posterior transforms its
        positions (all of ``from_numpyro``), or the position.
    rows : pytree of arrays
        Handed to the function, cut along the leading axis.
    batch_size : int
        Rows that are worked on at a time.

    Returns
    -------
    DataArray (chain, draw, row, ...)

    Raises
    ------
    ValueError, TypeError
        If the draws are not of this posterior, rows differ in length, or ``function`` does not return one row a datum.

    Notes
    -----
    Cost: one call for each draw and chunk of rows. The result is what `arviz.rhat`, `arviz.ess` and `chain_disagreement`
    take.

    Examples
    --------
    >>> import arviz as az, numpy as np, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> dt = az.from_dict({"posterior": {"position": np.ones((4, 100, 2), np.float32)}})
    >>> line = function_draws(dt, posterior, lambda theta, x: theta[0] + theta[1] * x, jnp.arange(3.0))
    >>> line.dims, line[0, 0].values.tolist()
    (('chain', 'draw', 'row'), [1.0, 2.0, 3.0])
    """
    import xarray as xr

    check.instance("posterior", posterior, Posterior, "what was sampled")
    check.function("function", function)
    batch_size = check.integer("batch_size", batch_size)
    positions = jax.tree.map(jnp.asarray, unconstrained_positions(dt, posterior))
    rows, function = jax.tree.map(jnp.asarray, rows), as_partial(function)
    num_rows, chunks = check.leading_length("rows", rows), []
    for start in range(0, num_rows, batch_size):
        part = jax.tree.map(lambda x, begin=start: x[begin : begin + batch_size], rows)
        chunks.append(np.asarray(_evaluate(function, posterior, positions, part)))
        length = check.leading_length("rows", part)
        if chunks[-1].ndim < 2 or chunks[-1].shape[1] != length:
            raise ValueError(
                f"function must return one row a datum, with the leading axis {length}; got the shape {chunks[-1].shape[1:]}. "
                "Map a network over the rows by jax.vmap."
            )
    values = np.concatenate(chunks, axis=1)
    values = values.reshape(*jax.tree.leaves(positions)[0].shape[:2], *values.shape[1:])
    dims = ("chain", "draw", "row", *(f"value_dim_{i}" for i in range(values.ndim - 3)))
    return xr.DataArray(values, dims=dims, coords={"chain": dt["posterior"]["chain"], "draw": dt["posterior"]["draw"]})


def chain_disagreement(values: "xr.DataArray") -> "xr.Dataset":
    r"""Compare chains in what they predict: the share of the variance that lies between them.

    .. math::

        W = \frac1M \sum_m \mathrm{Var}_s\,f_{ms}, \qquad B = \mathrm{Var}_m\,\bar f_m, \qquad
        \text{share} = \frac{B}{B + W}

    Parameters
    ----------
    values : DataArray (chain, draw, ...)
        Such as of `function_draws`.

    Returns
    -------
    Dataset
        For each value: ``within`` (:math:`W`), ``between`` (:math:`B`), ``share``, and ``rhat``, rank-normalised (NaN where
        no chain moves).

    Raises
    ------
    ValueError
        For fewer than two chains or four draws.

    Notes
    -----
    Permuting hidden units, or flipping the signs around an odd activation, changes the weights and not the function, so that
    chains which agree perfectly may differ in every weight: R-hat of weights says nothing about a network. It has a meaning
    for the function.

    Chains of independent draws from one law have :math:`E[B] = W / S`, and correlated ones :math:`W` over the effective
    sample size of a chain: a share of that size is noise. A share near 1 means that each chain predicts something else, as
    the members of a deep ensemble do, and that the mean over chains is an average over where they started.

    References
    ----------
    Gelman and Rubin (1992) for the two variances; Izmailov, Vikram, Hoffman and Wilson (2021), What are Bayesian neural network
    posteriors really like?, for their use on functions.

    Examples
    --------
    >>> import xarray as xr
    >>> draws = np.random.default_rng(0).normal(size=(4, 1000, 1)) + np.arange(4.0)[:, None, None]
    >>> round(chain_disagreement(xr.DataArray(draws, dims=("chain", "draw", "row"))).share.item(), 1)
    0.6
    """
    import arviz_stats
    import xarray as xr

    values = check.instance("values", values, xr.DataArray, "from function_draws").astype(float)
    for dim, least in (("chain", 2), ("draw", 4)):
        if dim not in values.dims or values.sizes[dim] < least:
            raise ValueError(
                f"values must have the dimension {dim!r} with at least {least} entries; got {dict(values.sizes)}."
            )
    within = values.var("draw", ddof=1).mean("chain")
    between = values.mean("draw").var("chain", ddof=1)
    total = between + within
    return xr.Dataset(
        {
            "within": within,
            "between": between,
            "share": xr.where(total > 0, between / total.where(total > 0), 0.0),
            "rhat": arviz_stats.rhat(values.where(within > 0), method="rank"),
        }
    )


@jax.jit
def _evaluate(function: Callable, posterior: Posterior, positions: Position, rows: PyTree) -> jax.Array:
    def at(position: Position) -> jax.Array:
        return jnp.asarray(function(_parameters(posterior, position), rows))

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), positions)
    return jax.lax.map(at, flat, batch_size=_DRAWS_AT_ONCE)


def _parameters(posterior: Posterior, position: Position) -> Any:
    """What a user's function is called with."""
    network = getattr(posterior.source, "network", None)
    if network is not None:
        return network(position)
    return position if posterior.transform is None else posterior.constrain(position)
