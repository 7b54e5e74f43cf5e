"""`report`: one self-contained page that says which draws to believe, and why."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.diagnostics import page, plots
from ergodica.diagnostics.checks import diagnose
from ergodica.diagnostics.comparison import REFERENCE_COLUMNS, comparison
from ergodica.diagnostics.diagnosis import Diagnosis
from ergodica.diagnostics.reference import reference_table
from ergodica.diagnostics.scalars import has_group, scalar_draws, variable
from ergodica.diagnostics.temperature import run_temperature

if TYPE_CHECKING:
    import xarray as xr

SECTIONS = ("checks", "summary", "reference", "temperature", "plots", "run", "citations")

EXPLANATION = (
    "How to read this page. R-hat (at most 1.01) says whether the chains agree with each other, and ESS (effective sample size) "
    "how many independent draws they are worth. Neither says whether the chains agree with the posterior: an approximate sampler "
    "with too large a step mixes fast and looks excellent. The temperature does: it is 1 where the spread of the draws "
    "fits the posterior, above 1 where they spread too far (standard deviations are too large by its square root), below 1 "
    "where too little. No check can see a region that no chain ever visited."
)


def report(
    dt: "xr.DataTree | Mapping[str, xr.DataTree]",
    path: str | os.PathLike = "report.html",
    *,
    posterior: Posterior | None = None,
    title: str | None = None,
    reference: "xr.DataTree | None" = None,
    tables: Mapping[str, Any] | None = None,
    sections: Sequence[str] = SECTIONS,
    max_parameters: int = 6,
) -> pathlib.Path:
    """Write a page that says whether to believe one or several runs, and why.

    Parameters
    ----------
    dt : DataTree or mapping of str to DataTree
        A run, or several by name; several are compared at the top.
    path : path
        The HTML file; it holds its figures and style, and fetches nothing.
    posterior : Posterior, optional
        For `ergodica.diagnose`, where a run stored no probes.
    title : str, optional
    reference : DataTree, optional
        A trusted run (a long one of NUTS) to compare moments with.
    tables : mapping of str to table, optional
        More to show, by title: pandas or xarray objects, Matplotlib figures, or strings of HTML, which are taken as they
        are.
    sections : sequence of str
        Of each run, among ``"checks"``, ``"summary"``, ``"reference"``, ``"temperature"``, ``"plots"``, ``"run"`` and
        ``"citations"``.
    max_parameters : int
        Parameters in ArviZ's plots, those with the fewest effective draws; the page says how many were left out.

    Returns
    -------
    pathlib.Path
        Where the page is.

    Raises
    ------
    ValueError, TypeError
        For unknown sections, no runs, or what `ergodica.diagnose` objects to.

    Notes
    -----
    Takes some seconds a run, nearly all for the figures. What is missing in a result is named on the page.
    """
    for name in sections:
        check.one_of("sections", name, SECTIONS)
    runs = _by_name(dt)
    if not runs:
        raise ValueError("dt must hold at least one run; got none.")
    diagnoses = {name: diagnose(run, posterior) for name, run in runs.items()}
    title = title or ("Diagnosis of " + (" and ".join(runs) if len(runs) > 1 else next(iter(diagnoses.values())).run))
    errors = {name: _errors(run, reference) for name, run in runs.items()}
    body = [page.heading(1, title)]
    body += comparison(runs, diagnoses, errors) if len(runs) > 1 else [_box(diagnoses[next(iter(runs))])]
    body.append(page.paragraph(EXPLANATION, "faint"))
    for name, content in (tables or {}).items():
        body += [page.heading(2, name), _any_table(content)]
    for number, (name, run) in enumerate(runs.items()):
        if len(runs) > 1:
            body += [page.heading(2, name, f"run{number}"), _box(diagnoses[name])]
        level = 3 if len(runs) > 1 else 2
        for section in sections:
            body += _section(section, level, run, diagnoses[name], errors[name], max_parameters)
    path = pathlib.Path(path)
    path.write_text(page.document(title, "\n".join(body)), encoding="utf-8")
    return path


def _by_name(dt: "xr.DataTree | Mapping[str, xr.DataTree]") -> "dict[str, xr.DataTree]":
    import xarray as xr

    if isinstance(dt, xr.DataTree):
        return {"": dt}
    if not isinstance(dt, Mapping):
        raise TypeError(f"dt must be an xarray.DataTree or a dict of them by name; got {type(dt).__name__}.")
    return dict(dt)


def _box(diagnosis: Diagnosis) -> str:
    """Say the verdict, with the sentences of the checks that decide it."""
    deciding = diagnosis.by_status("failed") or diagnosis.by_status("undecided", "not run")
    reasons = " ".join(one.sentence for one in deciding) or diagnosis["temperature"].sentence
    return page.verdict(diagnosis.belief, diagnosis.headline, reasons)


def _errors(run: "xr.DataTree", reference: "xr.DataTree | None") -> "Any | str | None":
    """Compare with the reference: a table, or why there is none; ``None`` without a reference."""
    if reference is None:
        return None
    if run is reference:
        return "This run is the reference itself."
    try:
        return reference_table(run, reference)
    except ValueError as error:
        return f"No comparison: {error}"


def _section(
    name: str, level: int, run: "xr.DataTree", diagnosis: Diagnosis, errors: Any, max_parameters: int
) -> list[str]:
    """Make one section of one run; a section without content is left out."""
    makers = {
        "checks": ("Checks", lambda: [_checks(diagnosis)]),
        "summary": ("Summary", lambda: _summary(run)),
        "reference": ("Errors against the reference", lambda: _reference(errors)),
        "temperature": ("Temperature and energy", lambda: _temperature(run, diagnosis)),
        "plots": ("Plots", lambda: _plots(run, diagnosis, max_parameters)),
        "run": ("How the run was made", lambda: _how(run)),
        "citations": ("What to cite", lambda: _citations(run)),
    }
    title, make = makers[name]
    content = make()
    return [page.heading(level, title), *content] if content else []


def _checks(diagnosis: Diagnosis) -> str:
    rows = [
        [one.name, (one.status.replace(" ", "-"), one.status), ("words", one.verdict), ("words", one.sentence)]
        for one in diagnosis.checks
    ]
    return page.table(["check", "status", ("words", "verdict"), ("words", "what was found")], rows)


def _summary(run: "xr.DataTree") -> list[str]:
    if not has_group(run, "posterior"):
        return [page.paragraph("Not shown: the result has no group 'posterior'.")]
    import arviz as az

    if not np.all(np.isfinite(scalar_draws(run).values)):
        return [page.paragraph("Not shown: some draws are NaN or infinite, and averages over them mean nothing.")]
    with np.errstate(invalid="ignore", divide="ignore"):
        summary = az.summary(run, round_to="none")
    caption = (
        "Mean, standard deviation, central 89% interval (eti89), effective sample sizes, R-hat, and the Monte Carlo standard "
        "errors (mcse) of mean and standard deviation; by arviz.summary."
    )
    return [_frame(summary), page.paragraph(caption, "faint")]


def _reference(errors: Any) -> list[str]:
    if errors is None:
        return []
    if isinstance(errors, str):
        return [page.paragraph(errors)]
    left_out = errors.attrs["left_out"]
    note = f" Left out, since only one of the two runs has them: {', '.join(left_out)}." if left_out else ""
    return [_frame(errors), page.paragraph(REFERENCE_COLUMNS + note, "faint")]


def _temperature(run: "xr.DataTree", diagnosis: Diagnosis) -> list[str]:
    parts = []
    if variable(run, "sample_stats", "energy") is not None:
        caption = "Energy of a Hamiltonian sampler: its distribution and that of its changes should overlap."
        parts.append(page.figure(plots.plot_energy(run), caption))
    if not has_group(run, "probe"):
        return [*parts, page.paragraph("Temperature not shown: the run stored no probe gradients.")]
    if not diagnosis["temperature"].ran:
        return [*parts, page.paragraph(f"Temperature not shown. {diagnosis['temperature'].sentence}")]
    single = (
        "Temperature of single unconstrained coordinates and of their mean. Intervals that miss the line at 1 are red; "
        f"relative to the run's own temperature, {run_temperature(run):g}."
    )
    running = "It should settle at 1. A line that settles elsewhere shows a bias that more draws will not cure."
    return [
        *parts,
        page.figure(plots.plot_temperature(run), single),
        page.figure(plots.plot_running_temperature(run), running),
    ]


def _plots(run: "xr.DataTree", diagnosis: Diagnosis, max_parameters: int) -> list[str]:
    if not has_group(run, "posterior"):
        return [page.paragraph("Not shown: the result has no group 'posterior'.")]
    if not (diagnosis["ESS"].ran and diagnosis["frozen"].status == "passed"):
        return [page.paragraph("Not shown: the draws are too few, frozen or not finite (see the checks).")]
    names, total = plots.worst_parameters(run, max_parameters), scalar_draws(run).sizes["parameter"]
    which = (
        f"{len(names)} of {total} parameters are shown: those with the fewest effective draws."
        if len(names) < total
        else f"All {total} parameters are shown."
    )
    parts = [page.paragraph(which)]
    for plot, (title, caption, _) in plots.ARVIZ_PLOTS.items():
        if plot == "plot_rank" and run.children["posterior"].sizes["chain"] < 2:
            parts.append(page.paragraph("Ranks not shown: they compare chains, and there is one."))
            continue
        parts.append(page.figure(plots.arviz_figure(run, plot, names), f"{title}. {caption}"))
    return parts


def _how(run: "xr.DataTree") -> list[str]:
    labels = {
        "sampler": "sampler",
        "exact": "leaves the posterior invariant at any step size",
        "num_chains": "chains",
        "num_warmup": "warm-up steps a chain",
        "thin": "steps a stored draw",
        "num_data": "data",
        "num_gradients": "gradients of single data by the sampler",
        "num_probe_gradients": "gradients of single data by probes",
        "wall_time": "run time in seconds",
        "compile_time": "compile time in seconds",
        "seed": "seed",
        "resumed_from": "stored draws found in a checkpoint",
        "result": "result",
        "result_message": "message",
        "created_at": "made at",
        "inference_library": "library",
        "inference_library_version": "its version",
    }
    rows = [[label, ("words", _readable(key, run.attrs[key]))] for key, label in labels.items() if key in run.attrs]
    missing = [label for key, label in labels.items() if key not in run.attrs]
    parts = [page.table(["", ""], rows)] if rows else []
    if missing:
        parts.append(page.paragraph(f"The result does not say: {', '.join(missing)}.", "faint"))
    if "settings" in run.attrs:
        parts.append(page.preformatted(json.dumps(json.loads(run.attrs["settings"]), indent=2)))
    return parts


def _readable(key: str, value: Any) -> Any:
    if key == "exact":
        return {"exact": "yes (exact)", "approximate": "no (approximate)"}.get(value, value)
    return (
        f"{float(value):.3g}"
        if key.endswith("_time")
        else f"{value:,}"
        if isinstance(value, int | np.integer)
        else value
    )


def _citations(run: "xr.DataTree") -> list[str]:
    entries = json.loads(run.attrs.get("references", "[]"))
    if not entries:
        return [page.paragraph("The result names no papers.")]
    return [page.paragraph("The methods that this run used, as BibTeX:"), page.preformatted("\n\n".join(entries))]


def _any_table(content: Any) -> str:
    import xarray as xr
    from matplotlib.figure import Figure

    if isinstance(content, str):
        return content
    if isinstance(content, Figure):
        return page.figure(content, "")
    if isinstance(content, xr.Dataset | xr.DataArray):
        content = content.to_dataframe().reset_index()
        content = content.set_index(content.columns[0])
    return _frame(content)


def _frame(frame: Any) -> str:
    """Show a pandas table."""
    columns = [frame.index.name or "", *map(str, frame.columns)]
    rows = [
        [_row_name(index), *map(_scalar, row)]
        for index, row in zip(frame.index, np.asarray(frame, object), strict=True)
    ]
    return page.table(columns, rows)


def _row_name(index: Any) -> str:
    return " · ".join(map(str, index)) if isinstance(index, tuple) else str(index)


def _scalar(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return float(value) if isinstance(value, float | np.floating) else value
