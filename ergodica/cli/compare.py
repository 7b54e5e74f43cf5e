"""``ergodica compare``."""

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ergodica.cli import options
from ergodica.cli.errors import RUN_PROBLEM, CallError, did_you_mean, listed, wrong_calls

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from ergodica.diagnostics.gradient_table import GradientComparison

POINTS = ("mode", "start")
DEFAULT_ESTIMATORS = ("minibatch:100:uniform", "minibatch:100:blocks", "control-variate:100")
DEFAULT_REPEATS = 1000


def compare(
    model: options.Model,
    data: options.Data = None,
    columns: options.Columns = [],  # noqa: B006  (typer reads defaults, and nothing changes them)
    settings: options.Settings = [],  # noqa: B006
    subsampled: options.Subsampled = False,
    guide: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:GUIDE",
            help="Compare gradients of the ELBO under this guide, or under an automatic one such as AutoNormal.",
        ),
    ] = None,
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:SIZE[:SCHEME]",
            help="minibatch:100, minibatch:100:uniform, control-variate:100 or full; with --guide: KIND:PARTICLES, such as "
            "leave-one-out:10, score:10, enumerate:10, stl:10, auto:10, or numpyro:TraceGraph_ELBO:10; again for each.",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="Points to compare at: mode, start; with --guide: start, middle, fitted; again for each."),
    ] = None,
    num_repeats: Annotated[
        int | None,
        typer.Option(help="Independent estimates at each point: 1000 by default; with --guide as many as are needed."),
    ] = None,
    num_steps: Annotated[int, typer.Option(help="With --guide: steps of the fit.")] = 1000,
    seed: options.Seed = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    out: Annotated[pathlib.Path | None, typer.Option(help="netCDF file of all figures.")] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Figure of them, such as compare.png.")] = None,
) -> None:
    """Compare gradient estimators of a model, or of a model and a guide: bias, variance and cost.

    The exit code is 1 if one of them is biased.

    Examples
    --------
    - `ergodica compare model.py:model --data d.csv`

    - `ergodica compare model.py:model --data d.npz --estimator minibatch:100 --estimator full --plot compare.png`

    - `ergodica compare model.py:model --data d.csv --guide AutoNormal --estimator stl:10 --estimator numpyro:Trace_ELBO:10`
    """
    with wrong_calls():
        for path in (out, plot):
            if path is not None:
                options.check_can_be_written(path)
        if guide is None:
            table = _run(
                {"model": model, "data": data, "columns": columns, "settings": settings, "subsampled": subsampled},
                estimator or list(DEFAULT_ESTIMATORS),
                at or ["mode", "start"],
                DEFAULT_REPEATS if num_repeats is None else num_repeats,
                seed,
            )
        else:
            if subsampled:
                raise CallError(
                    "--subsampled is for posteriors; with --guide the model's own plates are used as they are."
                )
            from ergodica.cli import losses

            program = losses.load_program(model, guide, data, columns, settings)
            names = estimator or list(losses.DEFAULT_ESTIMATORS)
            table = losses.compare_losses(program, names, at or ["start", "fitted"], num_repeats, num_steps, seed)
        if markdown:
            typer.echo(table.to_markdown())
        else:
            from rich.console import Console

            print_tables(Console(), table, caption=CAPTION if guide is None else _of_losses(table))
        if out is not None:
            table.to_netcdf(out, engine="h5netcdf")
        if plot is not None:
            table.plot().savefig(plot, dpi=150)
    if (table["verdict"] == "biased").any():
        raise typer.Exit(RUN_PROBLEM)


def _run(model_settings: dict, names: list[str], at: list[str], num_repeats: int, seed: int) -> "GradientComparison":
    import jax

    from ergodica.cli.models import load_posterior
    from ergodica.cli.samplers import make_gradient, mode_of, parse_estimator
    from ergodica.diagnostics.gradients import compare_gradients
    from ergodica.estimators import ControlVariate

    for point in at:
        if point not in POINTS:
            raise CallError(f"--at {point!r} is no point.{did_you_mean(point, POINTS)} There are {listed(POINTS)}.")
    recipes = {name: parse_estimator(name) for name in names}
    posterior = load_posterior(**model_settings)
    key, key_mode, key_start = jax.random.split(jax.random.key(seed), 3)
    points: dict[str, Any] = {"start": posterior.start(key_start)}
    if "mode" in at or any(kind == "control-variate" for kind, _, _ in recipes.values()):
        points["mode"] = mode_of(key_mode, posterior)
    estimators = {}
    for name, (kind, batch_size, scheme) in recipes.items():
        estimators[name] = make_gradient(key, posterior, batch_size or 0, scheme, control_variate=False)
        if kind == "control-variate":
            estimators[name] = ControlVariate(estimators[name], points["mode"])
    comparison = compare_gradients(key, estimators, [points[point] for point in at], num_repeats=num_repeats)
    return comparison.assign_coords(point=at)


def print_tables(console: "Console", comparison: "GradientComparison", caption: str | None = None) -> None:
    """Lay the comparison out for a terminal, one table for each labelled point, and say how to read it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    for point, frame in readable(comparison).items():
        table = Table(
            title=f"Gradient estimators at the {point}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.show_edge = False
        table.add_column("estimator", no_wrap=True)
        for name in frame.columns:
            table.add_column(name, justify="left" if name == "bias" else "right")
        for estimator, row in frame.iterrows():
            table.add_row(Text(str(estimator)), *row)  # as it is: in markup, ':100:' is an emoji
        console.print(table, "")
    console.print(CAPTION if caption is None else caption, markup=False)


def readable(comparison: "GradientComparison") -> "dict[str, pandas.DataFrame]":
    """Give the comparison for readers: by labelled point, a table of text with a row an estimator (see `CAPTION`)."""
    import pandas

    summary = comparison.summary
    half_width = 50 * (summary.variance_upper - summary.variance_lower) / summary.variance.where(summary.variance > 0)
    text = pandas.DataFrame(
        {
            "bias": summary.verdict,
            "below": summary.bias_bound.map(_percent),
            "variance": summary.variance.map("{:.1e}".format),
            "±": half_width.fillna(0.0).map("{:.0f}%".format),
            "gradients": summary.datum_gradients.map("{:,.0f}".format),
            "time": summary.time_ratio.map("{:.2f}".format),
            "work": summary.relative_work.map("{:.2g}".format),
        }
    )
    return {str(point): text.loc[point] for point in comparison["point"].values}


def _percent(bound: float) -> str:
    if bound >= 1:
        return "—"
    return f"{100 * bound:.2g}%" if bound >= 1e-3 else "0.1%"


def _of_losses(comparison: "GradientComparison") -> str:
    return LOSS_CAPTION + "\n".join(comparison.notes) + "\n"


CAPTION = (
    "bias: of the mean gradient, against all the data; undecided where noise hides it. below: the bias that cannot be excluded, "
    "as a part of the gradient's largest entry (— if all of it). gradients: of single data, a call. time, and work "
    "(variance × gradients): relative to the first row; less is better.\n"
)

LOSS_CAPTION = (
    "bias: of the mean gradient; undecided where noise hides it. below: the bias that cannot be excluded, as a part of the "
    "gradient's largest entry (— if all of it). gradients: runs of model and guide, a call. time, and work (variance × runs): "
    "relative to the first row; less is better.\n"
)
