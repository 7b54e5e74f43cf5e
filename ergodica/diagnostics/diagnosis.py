"""What `ergodica.diagnose` returns: checks, each of which says whether it ran."""

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

type Status = Literal["passed", "failed", "undecided", "noted", "not run"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    name : str
    status : {"passed", "failed", "undecided", "noted", "not run"}
        ``"undecided"``: the check ran and the evidence does not suffice. ``"noted"``: a fact that speaks neither for nor
        against the draws. ``"not run"``: it could not run, or met a NaN; the sentence says why.
    verdict : str
        One or a few words, such as ``"biased"`` or ``"consistent within 4%"``.
    sentence : str
        What was found and what it means.
    values : dict
        The numbers behind it.
    """

    name: str
    status: Status
    verdict: str
    sentence: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether the check came to a result."""
        return self.status != "not run"


def not_run(name: str, why: str, **values: Any) -> Check:
    """Make the check that did not run."""
    return Check(name, "not run", "not run", f"Not run: {why}", values)


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one run, in the order in which they are to be read.

    Printing it gives plain text. The word of the whole is `belief`; ``"yes"`` needs every check to have run.

    Attributes
    ----------
    run : str
        What was diagnosed, in a few words.
    checks : tuple of Check
    """

    run: str
    checks: tuple[Check, ...]

    def __getitem__(self, name: str) -> Check:
        """Give a check by name."""
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(repr(check.name) for check in self.checks)
        raise KeyError(f"There is no check {name!r}; there are {names}.")

    def by_status(self, *status: Status) -> list[Check]:
        """Give the checks that ended in one of some ways."""
        return [check for check in self.checks if check.status in status]

    @property
    def belief(self) -> Literal["yes", "no", "open"]:
        """Whether to believe the draws: ``"no"`` if a check failed, ``"open"`` if one is undecided or did not run."""
        if self.by_status("failed"):
            return "no"
        return "open" if self.by_status("undecided", "not run") else "yes"

    @property
    def headline(self) -> str:
        """The whole in a sentence or two."""
        failed, open_checks = self.by_status("failed"), self.by_status("undecided", "not run")
        names = ", ".join(check.name for check in failed or open_checks)
        if failed:
            return f"Do not believe these draws yet. Problems found by: {names}."
        if open_checks:
            return (
                "The checks that came to a result found no problem, but not all of them did, so nothing vouches for the "
                f"rest. Open: {names}."
            )
        notes = ", ".join(check.name for check in self.by_status("noted"))
        read = f" Read the notes on: {notes}." if notes else ""
        return f"No problems found: every check ran. Believe these draws within the errors stated.{read}"

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"Diagnosis of {self.run}", *textwrap.wrap(self.headline, 100), ""]
        for check in self.checks:
            lines.append(f"{check.status:>9}  {check.name:<{width}}  {check.verdict}")
            lines += textwrap.wrap(check.sentence, 100, initial_indent=" " * 11, subsequent_indent=" " * 11)
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain Python values, fit for JSON."""
        checks = {
            check.name: {
                "ran": check.ran,
                "status": check.status,
                "verdict": check.verdict,
                "sentence": check.sentence,
                "values": {key: _plain(value) for key, value in check.values.items()},
            }
            for check in self.checks
        }
        return {"run": self.run, "belief": self.belief, "headline": self.headline, "checks": checks}

    def to_datatree(self) -> "xr.DataTree":
        """Give all of it as a DataTree: one entry a check, and the scalar values by name; it can be saved as netCDF.

        Attach it to a result by ``dt["quality"] = diagnosis.to_datatree()``.
        """
        import xarray as xr

        fields = {
            name: ("check", [getattr(check, name) for check in self.checks])
            for name in ("ran", "status", "verdict", "sentence")
        }
        scalars = {
            f"{check.name} {key}".replace(" ", "_").replace("-", "_"): _plain(value)
            for check in self.checks
            for key, value in check.values.items()
            if isinstance(_plain(value), int | float) and not isinstance(value, bool)
        }
        coords = {"check": [check.name for check in self.checks]}
        attrs = {"belief": self.belief, "headline": self.headline, "run": self.run}
        return xr.DataTree(xr.Dataset(fields | scalars, coords=coords, attrs=attrs))


def _plain(value: Any) -> Any:
    """Turn numpy values into Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
