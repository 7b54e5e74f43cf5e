"""The contract of an estimator at one sample site of a guide."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.density import log_density
from ergodica.estimators.variational.facts import Context, Distribution, Downstream, Draw, Site


class AbstractSiteEstimator(eqx.Module):
    """How the gradient with respect to the distribution of one sample site is estimated.

    An estimator draws the site's value, says whether derivatives flow through it, and adds a surrogate whose gradient (not
    its value) enters the objective. Only `draw` must be written; see `ergodica.estimators.Score` for one that adds a surrogate,
    and `ergodica.estimators.Enumerate` for one that runs the program once for each of several branches.
    """

    references: ClassVar[tuple[str, ...]] = ()
    """Keys of the papers to cite (see `ergodica.cite`)."""

    entropy: ClassVar[Literal["keep", "stop", "stick"]] = "stop"
    """What the objective's own term ``-log q`` of the site does to the gradient, where the objective is linear: ``"keep"`` it;
    ``"stop"`` it, since its mean is zero where the value does not move with the parameters; ``"stick"``: keep what flows
    through the value, with the parameters held (sticking the landing)."""

    @property
    def unbiased(self) -> bool:
        """Whether the estimate is unbiased wherever `check` lets it be used."""
        return True

    @property
    def landing(self) -> Literal["keep", "stop", "stick"]:
        """The instance's ``entropy``."""
        return self.entropy

    def check(self, site: Site, context: Context) -> None:  # noqa: ARG002
        """Raise ``site.refuse(self, reason, alternatives)`` unless the estimator is right at the site."""
        return

    def num_branches(self, site: Site) -> int:  # noqa: ARG002
        """How many values of the site the rest of the program is run for, with common random numbers."""
        return 1

    def num_reruns(self, site: Site) -> int:  # noqa: ARG002
        """How many times the surrogate runs the program once more, by `Downstream.cost_of`."""
        return 0

    def noise(self, key: Key, site: Site, num_particles: int) -> PyTree:  # noqa: ARG002
        """Draw what couples the particles: arrays with a leading axis ``K`` of which `draw` gets one; or ``None``."""
        return None

    def draw(self, key: Key, fn: Distribution, branch: Array | int, site: Site, noise: PyTree) -> Draw | None:
        """Draw the site's value for one particle on one branch; ``None`` leaves it to NumPyro, with derivatives through it."""
        raise NotImplementedError

    def log_prob(self, fn: Distribution, value: Array, intermediates: Any = None) -> Array:
        """Log density at a value of `draw`, in the guide and in the model: a relaxation may continue it off the support."""
        return log_density(fn, value, intermediates)

    def log_weights(self, log_prob: Array, record: PyTree) -> Array | None:  # noqa: ARG002
        """Log weights of the branches, from their log probabilities and what `draw` recorded.

        ``None``: branch 0 is the draw, and the others are probes.
        """
        return None

    def parameters(self, key: Key, site: Site, *args: Any, **kwargs: Any) -> PyTree:  # noqa: ARG002
        """Initial value of what is learned along with the guide; ``None`` if there is nothing."""
        return None

    def init(self, site: Site) -> PyTree:  # noqa: ARG002
        """Initial value of what is remembered from step to step; ``None`` if there is nothing."""
        return None

    def surrogate(self, site: Site, downstream: Downstream) -> Array | None:  # noqa: ARG002
        """Return an array over the particles whose gradient estimates that of the expected cost, for each particle on its own.

        It is summed over everything, the particles' mean is taken where the objective is a mean, and its value does not count.
        """
        return None

    def update(self, site: Site, downstream: Downstream) -> PyTree:  # noqa: ARG002
        """What is remembered for the next step."""
        return downstream.state


def score_surrogate(log_prob: Array, signal: Array) -> Array:
    r"""Surrogate whose gradient is :math:`\text{signal}\cdot\nabla\log q` (Williams 1992)."""
    return log_prob * jax.lax.stop_gradient(signal).astype(log_prob.dtype)


def only_gradient(x: Array) -> Array:
    """Zero, with the derivatives of ``x``."""
    return jnp.sum(x) - jax.lax.stop_gradient(jnp.sum(x))
