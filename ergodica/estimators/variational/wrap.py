"""State and parameters of estimators that remember or learn, declared in the guide so that SVI carries and trains them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpyro
from numpyro.handlers import block
from numpyro.primitives import mutable

from ergodica.core.types import PyTree
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.structure import Program, Structure, inspect

STATE, LEARNED = "$remembered", "$learned"
"""What the names of a site's mutable state and of its estimator's parameters end in."""


def declare_in_guide(objective: Any, model: Callable, guide: Callable) -> Callable:
    """Wrap a guide: the same draws, and after them the declarations."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = guide(*args, **kwargs)
        with block():
            structure = inspect(Program(model, guide, args, kwargs), {})
        for name, choice in objective.choose(structure).items():
            estimator, site = choice.estimator, structure.sites[name]
            state = estimator.init(site)
            if state is not None:
                mutable(name + STATE, state)
            learned = learned_shape(estimator, site, args, kwargs)
            if learned is not None:

                def initial(key: Any, estimator: Any = estimator, site: Any = site) -> PyTree:
                    return estimator.parameters(key, site, *args, **kwargs)

                numpyro.param(name + LEARNED, initial)
        return result

    return wrapped


def learned_shape(estimator: AbstractSiteEstimator, site: Any, args: tuple, kwargs: dict) -> PyTree:
    """Shapes of what an estimator learns, or ``None``."""
    return jax.eval_shape(lambda key: estimator.parameters(key, site, *args, **kwargs), jax.random.key(0))


def missing_state(
    structure: Structure, estimators: Mapping[str, AbstractSiteEstimator], state: dict, learned: dict, program: Program
) -> None:
    """Raise where an estimator's state or parameters were not declared."""
    for name, site in structure.sites.items():
        estimator = estimators[name]
        lacks_state = name not in state and estimator.init(site) is not None
        lacks_learned = name not in learned and learned_shape(estimator, site, program.args, program.kwargs) is not None
        if lacks_state or lacks_learned:
            what = "remembers what it saw at earlier steps" if lacks_state else "has parameters of its own"
            raise site.refuse(
                estimator,
                f"it {what}, which SVI keeps only if the guide declares it",
                "SVI(model, loss.guide(model, guide), optimiser, loss), or LeaveOneOut(), which keeps nothing",
            )
