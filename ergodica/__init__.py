"""Sampling and gradient estimation on JAX, with diagnostics that can be believed."""

from ergodica import estimators as estimators
from ergodica import samplers as samplers
from ergodica.core.cite import cite as cite
from ergodica.core.posterior import Posterior as Posterior

__version__ = "0.1.0"
