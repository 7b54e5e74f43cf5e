"""Averages of draws that do not all stand for the same time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ergodica.diagnostics.scalars import SAMPLE_DIMS, variable

if TYPE_CHECKING:
    import xarray as xr


def weighted_mean(
    dt: "xr.DataTree",
    function: "Callable[[xr.Dataset], xr.Dataset] | None" = None,
    *,
    group: str = "posterior",
    dim: str | Sequence[str] = SAMPLE_DIMS,
) -> "xr.Dataset":
    r"""Average draws with weights in proportion to the step that made them.

    .. math:: \hat\phi = \frac{\sum_t h_t\,\phi(\theta_t)}{\sum_t h_t}

    Draws made at temperature 0 (the exploration phase of `ergodica.samplers.schedules.cyclical`) have weight 0.

    Parameters
    ----------
    dt : DataTree
        From `ergodica.sample`, with ``step_size`` and ``temperature`` among its ``sample_stats``.
    function : callable, optional
        Maps the dataset of draws to one of what is to be averaged, such as ``lambda draws: draws**2``; the draws themselves
        unless given.
    group : str
        Which draws.
    dim : str or sequence of str
        Over what to average: ``"draw"`` gives one average a chain.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    ValueError
        For a result without step sizes, or one in which all draws were made at temperature 0.

    Notes
    -----
    Under a constant step at a temperature above 0 this is the plain mean. Under a schedule the plain mean weighs the many
    draws of the small steps, which cover little time, as much as those of the large ones: it is more strongly correlated, not
    more accurate. Weights do not remove the bias of the large steps.

    References
    ----------
    Welling and Teh (2011), section 4.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t**2), initial=jnp.zeros(2))
    >>> step_size = erg.samplers.schedules.polynomial(0.5, delay=100)
    >>> sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), step_size)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=100, num_warmup=10)
    >>> weighted_mean(dt, dim="draw")["position"].shape
    (4, 2)
    """
    steps, temperatures = (variable(dt, "sample_stats", name) for name in ("step_size", "temperature"))
    if steps is None:
        raise ValueError("The result has no sample_stats step_size to weigh its draws by; use the plain mean.")
    weights = steps if temperatures is None else steps.where(temperatures > 0, 0.0)
    if not np.all(weights.sum(dim) > 0):
        raise ValueError(
            "All draws were made at temperature 0 and are no samples: store draws of the sampling phase too."
        )
    draws = dt[group].to_dataset()
    return (draws if function is None else function(draws)).weighted(weights).mean(dim)
