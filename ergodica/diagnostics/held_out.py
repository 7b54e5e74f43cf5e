"""Scores of held-out data that stay with their owners: each sends sums over its rows, and no row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.core.types import PyTree
from ergodica.diagnostics.predictive import log_mean_exp, pointwise_log_likelihood

if TYPE_CHECKING:
    import xarray as xr


class HeldOutSums(NamedTuple):
    r"""What one client sends of its held-out data; with :math:`\ell_i` the log predictive density of datum :math:`i`.

    Attributes
    ----------
    rows : int
        How many there are.
    lpd : float
        :math:`\sum_i \ell_i`.
    squares : float
        :math:`\sum_i (\ell_i - \bar\ell)^2`, about the client's own mean.
    influence : array (chain, draw)
        :math:`\sum_i p(x_i \mid \theta_{cd}) / \bar p_i`, from which comes the Monte Carlo error.
    """

    rows: int
    lpd: float
    squares: float
    influence: np.ndarray


def held_out_sums(dt: "xr.DataTree", posterior: Posterior, data: PyTree, *, batch_size: int = 1000) -> HeldOutSums:
    r"""Score the draws on a client's held-out data, at the client.

    .. math:: \ell_i = \log \frac1M \sum_{m=1}^M p(x_i \mid \theta_m)

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`. The draws travel to the client.
    posterior : Posterior
        For its likelihood: such as ``shards.only(client).posterior``, which holds no others' data.
    data : pytree
        The client's held-out rows, in the form of the posterior's own.
    batch_size : int
        Data that are worked on at a time.

    Returns
    -------
    HeldOutSums

    Raises
    ------
    ValueError, TypeError
        For draws that do not fit the posterior.

    Notes
    -----
    Cost: ``chains * draws`` likelihood evaluations of each row. What is sent is three numbers, and one number a draw. The sums of
    a client with few rows say much about these: they are not private by themselves.

    Examples
    --------
    >>> import arviz as az, jax.numpy as jnp, numpy as np, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> dt = az.from_dict({"posterior": {"position": np.random.default_rng(0).normal(2, 0.4, (4, 100)).astype("float32")}})
    >>> sums = [held_out_sums(dt, posterior, rows) for rows in (jnp.array([1.0, 2.0]), jnp.array([3.0]))]
    >>> round(combine_held_out(sums)["nll"], 2)
    0.36
    """
    check.instance("posterior", posterior, Posterior, "such as shards.only(client).posterior")
    values = pointwise_log_likelihood(dt, posterior, data, check.integer("batch_size", batch_size))
    total = np.asarray(sum(values.values()))  # of one datum over its sites
    lpd = log_mean_exp(total)
    influence = np.exp(total - lpd).sum(-1)
    return HeldOutSums(len(lpd), float(lpd.sum()), float(np.sum((lpd - lpd.mean()) ** 2)), influence)


def combine_held_out(sums: Sequence[HeldOutSums]) -> dict[str, float]:
    """Add up what clients have sent: the scores that `ergodica.predictive` gives for all rows in one place.

    Parameters
    ----------
    sums : sequence of HeldOutSums
        One a client, of the same draws.

    Returns
    -------
    dict
        ``elpd`` with its errors ``elpd_se`` (over data) and ``elpd_mcse`` (over draws), ``nll``, ``nll_mcse``, and ``rows``.

    Raises
    ------
    ValueError
        If there are no rows, or the sums are of different draws.

    References
    ----------
    Chan, Golub and LeVeque (1983) for the sums of squares.
    """
    import arviz_stats

    shapes = {np.shape(s.influence) for s in sums}
    if len(shapes) != 1 or sum(s.rows for s in sums) == 0:
        raise ValueError(
            f"sums must be of at least one held-out row, and of the same draws at all clients; got influences of shapes "
            f"{sorted(shapes)} and {sum(s.rows for s in sums)} rows."
        )
    rows = sum(s.rows for s in sums)
    elpd = sum(s.lpd for s in sums)
    squares = sum(s.squares + s.rows * (s.lpd / s.rows - elpd / rows) ** 2 for s in sums if s.rows)
    influence = np.sum([np.asarray(s.influence) for s in sums], axis=0)
    mcse = float(arviz_stats.mcse(influence, method="mean"))
    return {
        "elpd": elpd,
        "elpd_se": float(np.sqrt(rows * squares / (rows - 1))) if rows > 1 else float("nan"),
        "elpd_mcse": mcse,
        "nll": -elpd / rows,
        "nll_mcse": mcse / rows,
        "rows": rows,
    }
