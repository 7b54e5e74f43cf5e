"""What is sampled: programs, where their chains start, and normalizing flows (``flows``).

Imported at first use: programs need NumPyro.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ergodica.core.latent import LatentPosterior as LatentPosterior
    from ergodica.models.equinox import from_equinox as from_equinox
    from ergodica.models.numpyro import from_numpyro as from_numpyro
    from ergodica.models.numpyro_start import start_at as start_at
    from ergodica.models.numpyro_start import start_from_guide as start_from_guide

_LAZY = {
    "LatentPosterior": "ergodica.core.latent",
    "from_equinox": "ergodica.models.equinox",
    "from_numpyro": "ergodica.models.numpyro",
    "start_at": "ergodica.models.numpyro_start",
    "start_from_guide": "ergodica.models.numpyro_start",
}

__all__ = ["LatentPosterior", "from_equinox", "from_numpyro", "start_at", "start_from_guide"]


def __getattr__(name: str) -> Any:
    if name == "flows":
        return importlib.import_module("ergodica.models.flows")
    if name not in _LAZY:
        raise AttributeError(f"module 'ergodica.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "flows"})
