"""Sampling and gradient estimation on JAX, with diagnostics that can be believed."""

import importlib
from typing import TYPE_CHECKING, Any

from ergodica import estimators as estimators
from ergodica import samplers as samplers
from ergodica.core.cite import cite as cite
from ergodica.core.posterior import Posterior as Posterior
from ergodica.core.result import SamplingError as SamplingError
from ergodica.core.shards import Shards as Shards
from ergodica.estimators.federated.build import fsgld as fsgld
from ergodica.run.checkpoint import Checkpoint as Checkpoint
from ergodica.run.sample import sample as sample

if TYPE_CHECKING:
    from ergodica import diagnostics as diagnostics
    from ergodica import integrations as integrations
    from ergodica import models as models
    from ergodica.diagnostics.checks import diagnose as diagnose
    from ergodica.diagnostics.gradients import compare_gradients as compare_gradients
    from ergodica.diagnostics.predictive import predictive as predictive
    from ergodica.diagnostics.reference import reference_table as reference_table
    from ergodica.diagnostics.report import report as report
    from ergodica.integrations.blackjax import from_blackjax as from_blackjax
    from ergodica.integrations.blackjax import to_blackjax as to_blackjax
    from ergodica.models.numpyro import from_numpyro as from_numpyro
    from ergodica.run.bias import predict_bias as predict_bias
    from ergodica.run.federated_bias import predict_federated as predict_federated
    from ergodica.run.mode import find_mode as find_mode
    from ergodica.run.tune import tune as tune

__version__ = "0.1.0"

# imported at first use, since they (or what they build on) import ArviZ, NumPyro, BlackJAX, Optax or Matplotlib
_LAZY = {
    "compare_gradients": "ergodica.diagnostics.gradients",
    "diagnose": "ergodica.diagnostics.checks",
    "find_mode": "ergodica.run.mode",
    "from_blackjax": "ergodica.integrations.blackjax",
    "from_numpyro": "ergodica.models.numpyro",
    "predict_bias": "ergodica.run.bias",
    "predict_federated": "ergodica.run.federated_bias",
    "predictive": "ergodica.diagnostics.predictive",
    "reference_table": "ergodica.diagnostics.reference",
    "report": "ergodica.diagnostics.report",
    "to_blackjax": "ergodica.integrations.blackjax",
    "tune": "ergodica.run.tune",
}
_LAZY_PACKAGES = ("diagnostics", "integrations", "models")

__all__ = [
    "Checkpoint",
    "Posterior",
    "SamplingError",
    "Shards",
    "cite",
    "compare_gradients",
    "diagnose",
    "diagnostics",
    "estimators",
    "find_mode",
    "from_blackjax",
    "from_numpyro",
    "fsgld",
    "integrations",
    "models",
    "predict_bias",
    "predict_federated",
    "predictive",
    "reference_table",
    "report",
    "sample",
    "samplers",
    "to_blackjax",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_PACKAGES:
        value = importlib.import_module(f"ergodica.{name}")
    else:
        raise AttributeError(f"module 'ergodica' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
