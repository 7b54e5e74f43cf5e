"""Rényi's bound."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ergodica.core.check import is_concrete
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from ergodica.estimators.variational.objectives.weighted import AbstractWeightedBound


class RenyiBound(AbstractWeightedBound):
    r"""Rényi's bound of order :math:`\alpha`, with unbiased gradients for continuous, discrete and mixed guides.

    .. math::

        \mathcal L_{\alpha, K} = \mathrm{E}\, \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}, \qquad
        w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    As :math:`K` grows it tends to :math:`\mathcal L_\alpha = \log p(x) - D_\alpha(q \,\|\, p(z \mid x))`, Rényi's divergence, which
    weighs what the guide misses the more the smaller :math:`\alpha` is.

    Parameters
    ----------
    alpha : float
        The order :math:`\alpha`, any number but 1. At 0 this is `ergodica.estimators.IWELBO`.
    num_particles : int
        :math:`K`: it is part of the objective. With one particle every order is the ELBO.
    sites, vectorize_particles
        As for `ergodica.estimators.IWELBO`. ``Reparam(stl=True)`` is doubly reparameterised, with weights
        :math:`\alpha \tilde w_k + (1 - \alpha) \tilde w_k^2`.

    Raises
    ------
    ValueError
        For ``alpha=1``, whose limit is `ergodica.estimators.ELBO`; for subsampled plates that do not enclose every site.
    SiteError
        Where an estimator cannot be right at a site, as under `ergodica.estimators.IWELBO`.

    Notes
    -----
    Which side of the evidence :math:`\log p(x)` it is on, and how it moves with the particles:

    - :math:`0 \le \alpha < 1`: below, and above the ELBO; it rises with :math:`K`.
    - :math:`\alpha > 1`: below, and below the ELBO too; it falls with :math:`K`. The guide shrinks into one mode.
    - :math:`\alpha < 0`: from the ELBO at one particle it rises with :math:`K` past :math:`\log p(x)`, so that at no finite
      :math:`K` it is known to be on either side. Near the posterior it differs from :math:`\log p(x)` by
      :math:`-\tfrac12 (\alpha + \frac{1 - \alpha}{K}) \operatorname{Var} w`: with more than :math:`1 - 1/\alpha` particles the
      posterior is *not* its maximum, and ascending it leads away. Evaluate it beside a lower bound; do not fit a guide by it.

    For score-function sites the signal is the whole bound, less a baseline without the particle (`VIMCO`, `LeaveOneOut`), and the
    weights' own derivative :math:`-\tilde w_k \nabla \log q`, :math:`\tilde w_k \propto w_k^{1-\alpha}`, is kept. NumPyro's
    ``RenyiELBO`` has the latter alone, which for a discrete guide can point the wrong way.

    The gradient is unbiased for :math:`\mathcal L_{\alpha, K}`, not for its limit. Powers of weights have heavy tails: far from
    :math:`\alpha = 1` many particles are needed before :math:`K` stops to matter. With :math:`|1 - \alpha| < 10^{-3}` in single
    precision the value loses digits; take the ELBO.

    Cost: that of `ergodica.estimators.IWELBO`.

    References
    ----------
    Li and Turner (2016), equations 4 and 14 and theorem 2; baselines: Mnih and Rezende (2016); double reparameterisation after
    Tucker et al. (2019), equation 8, derived at
    `ergodica.estimators.variational.objectives.weighted.doubly_reparameterised_weights`.

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.RenyiBound(0.5, num_particles=8, sites={"w": erg.estimators.Reparam(stl=True)})
    """

    alpha: Array

    references: ClassVar = ("li2016renyi", "mnih2016", "tucker2019")

    def __init__(
        self,
        alpha: float,
        num_particles: int = 2,
        sites: Mapping[str, Any] | None = None,
        *,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        AbstractObjective.__init__(self, num_particles, sites, vectorize_particles=vectorize_particles)
        self.alpha = check_order(alpha)

    def power(self, dtype: Any) -> Array:
        """The weights to the power 1 - alpha."""
        return 1 - self.alpha.astype(dtype)

    @property
    def label(self) -> str:
        """The name, and the order if it is known."""
        return f"RenyiBound({f'{float(self.alpha):g}' if is_concrete(self.alpha) else 'alpha'})"

    @property
    def notes(self) -> tuple[str, ...]:
        """Which side of the evidence the value is on."""
        if not is_concrete(self.alpha):
            return ()
        if self.alpha >= 0:
            return (f"The value is a lower bound of the evidence, {'below' if self.alpha > 1 else 'above'} the ELBO.",)
        most = f"{float(1 - 1 / self.alpha):g}"
        return (
            "The value is no bound: it rises with the number of particles from the ELBO past the evidence.",
            f"With more than {most} particles the posterior is not its maximum: do not fit a guide by it.",
        )


def check_order(alpha: Any) -> Array:
    """Return the order as a scalar array; raise where there is no such bound."""
    try:
        order = jnp.asarray(alpha, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise TypeError(f"alpha must be a number; got {alpha!r} of type {type(alpha).__name__}.") from error
    if order.ndim:
        raise ValueError(f"alpha must be one number; got shape {order.shape}. Map over bounds by jax.vmap for several.")
    if is_concrete(order):
        if not np.isfinite(order):
            raise ValueError(f"alpha must be finite; got {alpha!r}.")
        if order == 1:
            raise ValueError("alpha must not be 1, where the bound is the ELBO: use ELBO(num_particles, sites).")
    return order
