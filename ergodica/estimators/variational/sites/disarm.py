"""Antithetic pairs at bits: ARM and DisARM."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site, base
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.relaxation import BITS
from ergodica.estimators.variational.sites.reparam import other_than_reparam


def antithetic_bits(uniform: Array, logits: Array) -> tuple[Array, Array]:
    r""":math:`b = [1 - u < p]` and :math:`\tilde b = [u < p]`, both with probability :math:`p = \sigma(\phi)` of 1."""
    p = jax.nn.sigmoid(logits)
    return 1 - uniform < p, uniform < p


def arm_weight(uniform: Array) -> Array:
    r"""Factor of :math:`f(b) - f(\tilde b)`: :math:`u - \tfrac12` (Yin and Zhou 2019, theorem 1)."""
    return uniform - 0.5


def disarm_weight(bit: Array, other: Array, logits: Array) -> Array:
    r"""Mean of ARM's factor given both bits (Dong et al. 2020, equation 7).

    .. math:: \tfrac12 (-1)^{\tilde b}\, [b \ne \tilde b]\; \sigma(|\phi|)
    """
    sign = jnp.where(other, -0.5, 0.5).astype(logits.dtype)
    return jnp.where(bit != other, sign * jax.nn.sigmoid(jnp.abs(logits)), 0)


class DisARM(AbstractSiteEstimator):
    r"""DisARM (also known as U2G): costs of antithetic bits, with the uniform noise integrated out given the bits.

    .. math::

        \hat g_i = \tfrac12 \left( f(b) - f(\tilde b) \right) (-1)^{\tilde b_i}\, [b_i \ne \tilde b_i]\; \sigma(|\phi_i|),
        \qquad b_i = [1 - u_i < \sigma(\phi_i)],\ \tilde b_i = [u_i < \sigma(\phi_i)]

    with respect to the logits :math:`\phi`. All bits of a site are replaced at once, however many terms share them.

    Parameters
    ----------
    coupled : bool
        Where the antithetic bits come from. Unless coupled, the program runs twice for each particle, with common random numbers,
        and the objective and other sites see the first run alone. If coupled, particles :math:`2j` and :math:`2j + 1` are
        antithetic to each other: half the runs, all of which count everywhere, but the pair's other noise is in the difference.
    rao_blackwell : bool
        Integrate :math:`u` out given the bits. Without it the estimator is ARM: :math:`(f(b) - f(\tilde b))(u_i - \tfrac12)`.

    Raises
    ------
    SiteError
        At other laws than Bernoulli and inside scans; coupled: for an odd number of particles, for a law that depends on other
        latent sites (which differ between the particles), and under `ergodica.estimators.IWELBO`, where particles are independent
        by definition.

    Notes
    -----
    Unbiased. For one bit and any cost, with :math:`\Delta = f(1) - f(0)`, :math:`M = \max(p, q)` and :math:`m = \min(p, q)`, the
    variance is :math:`\tfrac12 \Delta^2 M^2 m (1 - 2m)`: none at :math:`p = \tfrac12`.

    Cost: two runs of the program a particle; coupled, one.

    When not to use it: few bits, which `ergodica.estimators.Enumerate` and `ergodica.estimators.MeasureValued` do with less
    noise or none. Coupled, on one bit, it beats two particles of `ergodica.estimators.LeaveOneOut` at every p, most where p is near
    one half.

    References
    ----------
    Dong, Mnih and Tucker (2020), section 3; ARM: Yin and Zhou (2019).

    Examples
    --------
    >>> import ergodica as erg
    >>> loss = erg.estimators.ELBO(num_particles=4, sites={"z": erg.estimators.DisARM(coupled=True)})
    """

    coupled: bool = eqx.field(static=True, default=False)
    rao_blackwell: bool = eqx.field(static=True, default=True)

    references: ClassVar = ("dong2020", "yin2019")

    def check(self, site: Site, context: Context) -> None:
        """Raise where the site is no bit, or particles cannot be coupled."""
        others = other_than_reparam(site, context)
        if site.distribution not in BITS:
            raise site.refuse(self, "it is not Bernoulli", others)
        if site.in_scan:
            raise site.refuse(self, "it is inside a scan, where its value cannot be taken hold of", others)
        if not self.coupled:
            return
        reason = None
        if not context.linear:
            reason = f"coupled=True makes particles depend on each other, which are independent in {context.objective}"
        elif context.num_particles % 2:
            reason = f"coupled=True needs pairs of particles, and num_particles is {context.num_particles}"
        elif site.upstream:
            reason = (
                f"coupled=True needs one law for both of a pair, and it depends on {', '.join(sorted(site.upstream))}"
            )
        if reason is not None:
            raise site.refuse(self, reason, "DisARM(coupled=False)")

    def num_branches(self, site: Site) -> int:  # noqa: ARG002
        """One for each of the pair, unless other particles are the pair."""
        return 1 if self.coupled else 2

    def noise(self, key: Key, site: Site, num_particles: int) -> PyTree:
        """Uniform noise :math:`u` and :math:`1 - u` for particles in turn, where they are coupled."""
        if not self.coupled:
            return None
        u = jax.random.uniform(key, (num_particles // 2, *site.batch_shape, *site.event_shape))
        return jnp.stack([u, 1 - u], axis=1).reshape(num_particles, *u.shape[1:])

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw:
        """Draw both bits, and take that of the branch."""
        shape = site.batch_shape + site.event_shape
        logits = jnp.broadcast_to(base(fn).logits, shape)
        u = noise if self.coupled else jax.random.uniform(key, shape, logits.dtype)
        u = u.astype(logits.dtype)
        bit, other = antithetic_bits(u, jax.lax.stop_gradient(logits))
        weight = disarm_weight(bit, other, logits) if self.rao_blackwell else arm_weight(u)
        value = jnp.where(branch == 0, bit, other).astype(jnp.result_type(int))
        return Draw(value, jax.lax.stop_gradient(weight) * logits)

    def surrogate(self, site: Site, downstream: Downstream) -> Array:  # noqa: ARG002
        """Difference of the pair's costs, times the logits."""
        cost, record = jax.lax.stop_gradient(downstream.cost), downstream.record[:, 0]
        difference = cost[:, 0] - (partner(cost[:, 0]) if self.coupled else cost[:, 1])
        extra = record.ndim - difference.ndim
        return difference.reshape(*difference.shape, *(1,) * extra) * record


def partner(x: Array) -> Array:
    """Swap particles 2j and 2j + 1 along the leading axis."""
    return jnp.flip(x.reshape(-1, 2, *x.shape[1:]), axis=1).reshape(x.shape)
