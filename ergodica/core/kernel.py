"""The contract of a Markov kernel."""

import abc
from typing import Any, ClassVar

import equinox as eqx

from ergodica.core.types import Batch, Estimate, Key, Position


class AbstractKernel(eqx.Module):
    """A Markov transition. SGLD, splitting integrators, coupled pairs and ensembles are all of this kind.

    A state is a NamedTuple of arrays with a field ``position``; `step` keeps its structure, shapes and dtypes. The info
    is a NamedTuple; its scalar fields are exported as ``sample_stats`` and so bear ArviZ's names where one exists
    (``lp_minibatch``, ``step_size``, ``grad_norm``, ``n_grad``, ``temperature``, ``acceptance_rate``, ``diverging``, …).
    """

    references: ClassVar[tuple[str, ...]] = ()
    """Keys of the papers to cite (see `ergodica.cite`)."""

    @abc.abstractmethod
    def init(self, key: Key, position: Position, batch: Batch | None = None) -> Any:
        """Make the state of a chain that starts at ``position``."""

    @abc.abstractmethod
    def step(self, key: Key, state: Any, batch: Batch | None = None) -> tuple[Any, Any]:
        """Move the chain once.

        Parameters
        ----------
        key : typed PRNG key
            Consumed by this call.
        state : NamedTuple
            From `init` or the step before.
        batch : Batch, optional
            Data to use instead of what the kernel's gradient estimator would draw.

        Returns
        -------
        state, info : NamedTuple
        """

    def probe(self, key: Key, state: Any) -> Estimate | None:  # noqa: ARG002  (a default)
        """Estimate log density and gradient at ``state.position``, independently of the chain; ``None`` if it cannot."""
        return None

    def summary(self, state: Any) -> dict[str, Any]:  # noqa: ARG002  (a default)
        """What a chain has gathered over the whole run: arrays, and dicts of arrays, by name.

        `ergodica.sample` calls it once a chain at the end, and stores the arrays in the group ``summary`` and each dict in a
        group below it.
        """
        return {}

    @property
    def posterior(self) -> Any:
        """The posterior that is sampled, or ``None``."""
        return None

    @property
    def exact(self) -> bool:
        """Whether the kernel leaves the posterior invariant at any step size (Metropolis-corrected kernels do)."""
        return False

    @property
    def exact_gradient(self) -> bool:
        """Whether `probe` returns the gradient itself, without noise."""
        return False

    @property
    def batch_source(self) -> Any:
        """As for the kernel's gradient estimator (`AbstractGradientEstimator.batch_source`); ``None`` if it has none."""
        return None

    @property
    def n_grad_unit(self) -> int:
        """How many gradients of single data one count of the info's ``n_grad`` stands for."""
        return 1
