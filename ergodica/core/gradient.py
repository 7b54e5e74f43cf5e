"""The contract of a gradient estimator."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax

from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree, Reference


class AbstractGradientEstimator(eqx.Module):
    """Something that estimates the gradient of a quantity to be increased, with a state of its own.

    A minibatch gradient, a control variate, an ELBO, a path gradient are all of this kind. Estimators are frozen
    pytrees, composed by wrapping one in another; data are leaves of the tree, so that a jitted function takes them as
    an argument. A class is abstract or final: to change an estimator, wrap it.

    The state must be a pytree of arrays whose structure, shapes and dtypes `estimate` keeps. It holds no typed keys.
    """

    references: ClassVar[tuple[str, ...]] = ()
    """Keys of the papers to cite (see `ergodica.cite`)."""

    @abc.abstractmethod
    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> Any:
        """Make the state in which the first call of `estimate` starts.

        Parameters
        ----------
        key : typed PRNG key
        params : pytree of floating point arrays
            Where the estimator will be used first.
        batch : Batch, optional
            As for `estimate`.
        """

    @abc.abstractmethod
    def estimate(self, key: Key, params: PyTree, state: Any, batch: Batch | None = None) -> tuple[Estimate, Any]:
        """Estimate the gradient at ``params``.

        Parameters
        ----------
        key : typed PRNG key
            Consumed by this call.
        params : pytree of floating point arrays
        state : pytree
            From `init` or the call before.
        batch : Batch, optional
            Data to use instead of a draw from the data that the estimator holds: the way in for data that are streamed.

        Returns
        -------
        Estimate
            ``gradient`` has the structure, shapes and dtypes of ``params``.
        state
            For the next call.
        """

    def probe(self, key: Key, params: PyTree, state: Any) -> Estimate | None:  # noqa: ARG002  (a default)
        """Estimate the gradient independently of all that `estimate` has used or will use; ``None`` if it cannot.

        Leaves the state alone: cursors do not advance and snapshots are not renewed. Diagnostics rest on it, since the
        sampler's own gradients are not independent of the position where batches are reshuffled.
        """
        return None

    def per_draw(
        self,
        key: Key,  # noqa: ARG002  (a default)
        params: PyTree,  # noqa: ARG002
        state: Any,  # noqa: ARG002
        batch: Batch | None = None,  # noqa: ARG002
        *,
        linearise: bool = False,  # noqa: ARG002
        independent: bool = False,  # noqa: ARG002
    ) -> tuple[Draws, Any] | None:
        """Estimate as `estimate` does, but hand over each draw and its noise, and the next state; ``None`` if it cannot.

        For `ergodica.estimators.SteinControl`. The draws must be independent given ``params``, ``state`` and the batch: no
        baseline may look at the other draws.

        Parameters
        ----------
        key, params, state, batch
            As for `estimate`.
        linearise : bool
            Fill `Draws.linearised`; ``None`` if that cannot be done.
        independent : bool
            As `probe` does: independently of all that `estimate` has used or will use.
        """
        return None

    def reference(self, params: PyTree) -> Reference | None:  # noqa: ARG002  (a default)
        """The gradient that is estimated, without noise, at a concrete point; ``None`` where it cannot be had.

        Called by the host, and may take many evaluations; for comparisons. Where there is a `posterior` that holds its data, the
        gradient of its log density is taken instead.
        """
        return None

    def estimate_apart(self, key_data: Key, key: Key, params: PyTree, state: Any) -> Estimate | None:
        """Estimate with the choice of data drawn from a key of its own; ``None`` if the two cannot be told apart.

        With the same ``key_data`` and other keys, what is left of the noise is that of sampling. State is not moved.
        """
        source = self.batch_source
        if source is None:
            return None
        key_open, key_draw = jax.random.split(key_data)
        batch, _ = source.draw(key_draw, source.init(key_open, params))
        return self.estimate(key, params, state, batch)[0]

    def with_budget(self, budget: int) -> "AbstractGradientEstimator | None":  # noqa: ARG002  (a default)
        """The estimator with as many particles as ``n_grad`` of ``budget`` allows; ``None`` if there is no such number."""
        return None

    def evaluations(self, params: PyTree, n_grad: float) -> tuple[float, float]:  # noqa: ARG002  (a default)
        """How many values, and how many derivatives, of what is differentiated a call computes that counts ``n_grad``.

        Values come along with derivatives, so by default both are ``n_grad``. Override where derivatives are not needed.
        """
        return n_grad, n_grad

    @property
    def exact(self) -> bool:
        """Whether `estimate` returns the gradient and value themselves, without noise."""
        return False

    @property
    def reshuffles(self) -> bool:
        """Whether successive estimates depend on each other by a common order of the data, so that their noise cancels."""
        inner = [value for value in vars(self).values() if isinstance(value, AbstractGradientEstimator)]
        return any(estimator.reshuffles for estimator in inner)

    @property
    def batch_source(self) -> Any:
        """The estimator inside whose ``draw(key, state)`` makes the batches that `estimate` takes; ``None`` if there is none.

        Its ``init`` takes no account of ``params``. One draw of it can be handed to many chains.
        """
        inner = [value for value in vars(self).values() if isinstance(value, AbstractGradientEstimator)]
        return next((e.batch_source for e in inner if e.batch_source is not None), None)

    @property
    def posterior(self) -> Any:
        """The posterior whose log density is differentiated, or ``None``."""
        return None
