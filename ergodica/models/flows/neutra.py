"""A posterior in the coordinates of a flow's base."""

from collections.abc import Callable

import jax
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.flow import Flow, StandardNormal, flat_log_density
from ergodica.core.latent import LatentPosterior
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position, PyTree


def neutra(posterior: Posterior, flow: Flow) -> Posterior:
    r"""Change variables by a flow that was fitted to a posterior, so that samplers move where it is nearly standard normal.

    .. math:: \log\tilde\pi(z) = \log p(T(z)) + \log\left|\det\frac{\partial T}{\partial z}\right|
              + \sum_{i=1}^N \log p(x_i \mid T(z))

    Parameters
    ----------
    posterior : Posterior
        With a start, from which the structure of its positions is known. Its data may be streamed.
    flow : Flow
        :math:`T` with a base of standard normals; its points are positions in the order of ``ergodica.core.tree.ravel``. Its
        parameters are held as they are.

    Returns
    -------
    Posterior
        Its positions are arrays (D,), :math:`z`; its data, names and axes are those of ``posterior``. What is reported is on the
        scale of the model, with :math:`z` in the group ``unconstrained_posterior``. Chains start at draws of the base.

    Raises
    ------
    ValueError, TypeError
        For a flow of another dimension or with another base, or a posterior with a latent of each datum.

    Notes
    -----
    The law of :math:`T(z)` is the posterior, exactly, whatever the flow: a poor one costs time and not accuracy. It helps where
    the posterior is curved, funnel-shaped or badly scaled, so that one step size or mass matrix does not fit everywhere, and a flow
    can be had that follows that. It does not help where the flow lacks a mode: the missing mode is still there in :math:`z`,
    far out and squeezed, and harder to reach than before. Nor where a diagonal mass matrix already does: each gradient costs a
    pass through the flow and its derivative.

    The row-wise likelihood is untouched, so that minibatch gradients are unbiased as before. The Jacobian belongs to the
    prior. A minibatch gradient differentiates the flow twice, for prior and likelihood.

    References
    ----------
    Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan (2019).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * jnp.sum(t["a"] ** 2), initial={"a": jnp.zeros(2)})
    >>> flow = erg.models.flows.real_nvp(jax.random.key(0), dim=2, num_layers=2)
    >>> easier = erg.models.flows.neutra(posterior, flow)
    >>> sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(easier, scheme="full"), step_size=0.5)
    >>> dt = erg.sample(jax.random.key(1), sampler, num_samples=50, num_warmup=50, num_chains=2)
    >>> dt.posterior["a"].shape
    (2, 50, 2)
    """
    check.instance("posterior", posterior, Posterior, "whose variables are to be changed")
    check.instance("flow", flow, Flow, "such as erg.models.flows.real_nvp(key, dim=2)")
    if isinstance(posterior, LatentPosterior):
        raise TypeError(
            "posterior must have a likelihood of each datum; this LatentPosterior has an integral in its place, which only "
            "estimators.LocalLatents handles."
        )
    if not isinstance(flow.base, StandardNormal):
        raise ValueError(
            f"flow must have a base of standard normals, on all of R^D; got {type(flow.base).__name__}. Angles have no "
            "coordinates there in which the density can be normalised."
        )
    model = Posterior(posterior.log_prior, initial=posterior.initial, constrain=posterior.transform)
    flat_log_density(model, flow.dim)  # raises where the dimensions disagree
    likelihood = posterior.log_likelihood
    return Posterior(
        jax.tree_util.Partial(_log_prior, model, flow),
        None if likelihood is None else jax.tree_util.Partial(_log_likelihood, model, flow, likelihood),
        posterior.data,
        initial=jax.tree_util.Partial(_start, flow),
        num_data=posterior.num_data or None,
        constrain=jax.tree_util.Partial(_constrain, model, flow),
        dims=posterior.dims,
        coords=posterior.coords,
        observed=posterior.observed,
        source=posterior.source,
    )


def _log_prior(model: Posterior, flow: Flow, z: Array) -> Array:
    x, log_det = flow.layer.forward(z)
    prior = model.log_prior(tree.unravel(x, model.shape()))
    return prior + log_det.astype(prior.dtype)


def _log_likelihood(
    model: Posterior, flow: Flow, likelihood: Callable[[Position, PyTree], Array], z: Array, rows: PyTree
) -> Array:
    return likelihood(_position(model, flow, z), rows)


def _constrain(model: Posterior, flow: Flow, z: Array) -> dict[str, Array]:
    return model.constrain(_position(model, flow, z))


def _position(model: Posterior, flow: Flow, z: Array) -> Position:
    return tree.unravel(flow.layer.forward(z)[0], model.shape())


def _start(flow: Flow, key: Key) -> Array:
    return flow.base.sample(key, 1)[0]
