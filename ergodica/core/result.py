"""How a run ended. Values known only at run time never raise inside a compiled loop: they end here.

The loop carries flags; the host reads them once, makes a `Result` and, with ``throw=True``, raises `SamplingError`,
which keeps what was sampled.
"""

import enum
from typing import Any, NamedTuple


class Result(enum.StrEnum):
    """Result code of a run."""

    SUCCESSFUL = "successful"
    NONFINITE = "nonfinite"
    INTERRUPTED = "interrupted"
    NOT_MET = "not_met"
    COLLAPSED = "collapsed"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"


class Outcome(NamedTuple):
    """A result code with where it happened.

    Attributes
    ----------
    result : Result
    chain, step : int or None
        The first chain and step (0-based, warm-up included) at which the run went wrong.
    """

    result: Result
    chain: int | None = None
    step: int | None = None

    def message(self) -> str:
        """Say in words what happened and what to do."""
        where = f" in chain {self.chain} at step {self.step}" if self.chain is not None else ""
        return {
            Result.SUCCESSFUL: "The run ended as planned.",
            Result.NONFINITE: (
                f"The position became NaN or infinite{where}. The usual cause is a step size above the limit of stability: "
                "try a tenth of it. With throw=False the chains that stayed finite are kept."
            ),
            Result.INTERRUPTED: "The run was interrupted; what had been sampled by then is kept.",
            Result.NOT_MET: f"A pair of chains did not meet{where} within the steps allowed.",
            Result.COLLAPSED: f"The ensemble collapsed{where}: its particles no longer span the space.",
            Result.STOPPED: "The run ended early, since what is monitored no longer improved.",
            Result.TIMED_OUT: "The run ended early, since its time was up.",
        }[self.result]


class SamplingError(RuntimeError):
    """A run that went wrong.

    Attributes
    ----------
    outcome : Outcome
        The code, chain and step.
    partial : xarray.DataTree or None
        What was sampled until then.
    """

    def __init__(self, outcome: Outcome, partial: Any = None) -> None:
        super().__init__(outcome.message())
        self.outcome = outcome
        self.partial = partial
