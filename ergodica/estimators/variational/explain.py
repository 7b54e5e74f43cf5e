"""The table that `explain` prints."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ergodica.estimators.variational.particles import num_runs
from ergodica.estimators.variational.sites.reparam import Reparam
from ergodica.estimators.variational.structure import Structure


class Row(NamedTuple):
    """What is done at one site.

    ``runs`` is the factor by which the site alone multiplies the runs of the program; ``terms`` are those downstream.
    """

    site: str
    distribution: str
    estimator: str
    why: str
    unbiased: bool
    runs: int
    terms: tuple[str, ...]


class Explanation(NamedTuple):
    """What an objective does with a model and a guide."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("site", "distribution", "estimator", "unbiased", "runs", "downstream terms", "why")
        cells = [
            (r.site, r.distribution, r.estimator, "yes" if r.unbiased else "no", str(r.runs), _short(r.terms), r.why)
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *cells]
        ]
        return "\n".join([self.title, *self.notes, "", *lines])


def explain(objective: Any, structure: Structure, chosen: Mapping[str, Any]) -> Explanation:
    """Describe the choices."""
    rows = tuple(
        Row(
            site=name,
            distribution=site.distribution + _shape(site.batch_shape + site.event_shape),
            estimator=_name(chosen[name].estimator),
            why=chosen[name].why,
            unbiased=chosen[name].estimator.unbiased,
            runs=chosen[name].estimator.num_branches(site) * (1 + chosen[name].estimator.num_reruns(site)),
            terms=site.terms,
        )
        for name, site in structure.sites.items()
    )
    runs = num_runs(objective.num_particles, structure, {name: c.estimator for name, c in chosen.items()})
    unbiased = objective.unbiased and all(row.unbiased for row in rows)
    title = (
        f"{objective.label}, {objective.num_particles} particle{'s' * (objective.num_particles != 1)}: "
        f"{runs} runs of model and guide a step; the gradient is {'unbiased' if unbiased else 'biased'}."
    )
    return Explanation(title, rows, objective.notes)


def _name(estimator: Any) -> str:
    if isinstance(label := getattr(estimator, "label", None), str):
        return label
    if isinstance(estimator, Reparam):
        return "Reparam(stl=True)" if estimator.stl else "Reparam()"
    inner = getattr(estimator, "baseline", None)
    return f"{type(estimator).__name__}({'' if inner is None else type(inner).__name__})"


def _shape(shape: tuple[int, ...]) -> str:
    return f" {shape}" if shape else ""


def _short(terms: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(terms[:most]) + (f", … ({len(terms)} in all)" if len(terms) > most else "")
