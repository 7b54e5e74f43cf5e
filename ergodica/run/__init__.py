"""The loops: sampling from data that are held or streamed, fits by gradient estimators, and the search for a mode."""

from ergodica.run.fit import Fit, FitError, fit
from ergodica.run.fit_monitor import Monitor
from ergodica.run.stream import RowBlocks, stream

__all__ = ["Fit", "FitError", "Monitor", "RowBlocks", "fit", "stream"]
