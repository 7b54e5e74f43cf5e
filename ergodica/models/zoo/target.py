"""What a problem with exact references offers, to samplers and to flows alike."""

import abc
import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array

from ergodica.core import check, rng
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key


class ReferenceValue(NamedTuple):
    """A number that is known, and how well.

    Attributes
    ----------
    value : float
    standard_error : float
        0 where the value is a closed form, or a quadrature that is right to rounding.
    """

    value: float
    standard_error: float = 0.0


class AbstractTarget(eqx.Module):
    """A law on R^D (or on angles) whose answers are known.

    ``dim`` is D. ``source`` says where the problem is from, and ``licence`` under which terms its numbers or data come;
    ``references`` holds keys of the bibliography, for `ergodica.core.cite.cite`.
    """

    dim: eqx.AbstractVar[int]
    source: eqx.AbstractClassVar[str]
    licence: eqx.AbstractClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def log_density(self, x: Array) -> Array:
        """Unnormalised log density at one point (D,), a scalar."""

    @abc.abstractmethod
    def observables(self, x: Array) -> dict[str, Array]:
        """Named scalars at one point (D,)."""

    @property
    @abc.abstractmethod
    def log_normaliser(self) -> ReferenceValue | None:
        r"""Log of the integral of the exponential of `log_density`; ``None`` where nobody has computed it."""

    @property
    @abc.abstractmethod
    def reference(self) -> dict[str, ReferenceValue]:
        """Expectations of observables, by their names; those that are not known are left out."""

    @abc.abstractmethod
    def start(self, key: Key) -> Array:
        """Give a point (D,) to start a chain at."""

    @property
    def has_draws(self) -> bool:
        """Whether `draws` gives independent draws of this law."""
        return False

    def draws(self, key: Key, num_draws: int) -> Array:
        """Independent draws (num_draws, D) of the law itself, where they can be had.

        Raises
        ------
        ValueError
            Where there is no exact sampler for these parameters (``has_draws`` says so).
        """
        rng.check_key(key)
        check.integer("num_draws", num_draws)
        if not self.has_draws:
            raise ValueError(
                f"There is no exact sampler for {type(self).__name__} with these parameters; run a chain instead: "
                "ergodica.sample(key, sampler) with a sampler of target.posterior()."
            )
        return self._draws(key, num_draws)

    def _draws(self, key: Key, num_draws: int) -> Array:
        raise NotImplementedError

    def score(self, x: Array) -> Array:
        """Gradient of `log_density` at one point (D,): what physicists call the force."""
        return jax.grad(self.log_density)(x)

    def posterior(self) -> Posterior:
        """Make the target a `Posterior`, whose draws are stored as ``position`` beside the observables."""
        return Posterior(self.log_density, initial=self.start, constrain=self._report)

    def _report(self, x: Array) -> dict[str, Array]:
        return {"position": x} | self.observables(x)


def finite_float(name: str, value: Any, *, positive: bool = False, least: float = -math.inf) -> float:
    """Return ``value`` as a Python float; raise unless it is one finite number within bounds."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}.") from error
    if not math.isfinite(number) or (positive and number <= 0) or number < least:
        expects = (
            "positive and finite" if positive else "finite" if least == -math.inf else f"at least {least} and finite"
        )
        raise ValueError(f"{name} must be {expects}; got {value!r}.")
    return number
