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


def compare(
    model: options.Model,
    data: options.Data = None,
    columns: options.Columns = [],  # noqa: B006  (typer reads defaults, and nothing changes them)
    settings: options.Settings = [],  # noqa: B006
    subsampled: options.Subsampled = False,
    estimator: Annotated[
        list[str],
        typer.Option(
            metavar="KIND:SIZE[:SCHEME]",
            help="minibatch:100, minibatch:100:uniform, control-variate:100 or full; again for each.",
        ),
    ] = ["minibatch:100:uniform", "minibatch:100:blocks", "control-variate:100"],  # noqa: B006
    at: Annotated[list[str] | None, typer.Option(help="Points to compare at: mode, start; again for each.")] = None,
    num_repeats: Annotated[int, typer.Option(help="Independent estimates at each point.")] = 1000,
    seed: options.Seed = 0,
    out: Annotated[pathlib.Path | None, typer.Option(help="netCDF file of all figures.")] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(help="Figure of them, such as compare.png.")] = None,
) -> None:
    """Compare gradient estimators of a model: bias, variance and cost.

    The exit code is 1 if one of them is biased.

    Examples
    --------
    - `ergodica compare model.py:model --data d.csv`

    - `ergodica compare model.py:model --data d.npz --estimator minibatch:100 --estimator full --plot compare.png`
    """
    if at is None:
        at = ["mode", "start"]
    with wrong_calls():
        for path in (out, plot):
            if path is not None:
                options.check_can_be_written(path)
        table = _run(
            {"model": model, "data": data, "columns": columns, "settings": settings, "subsampled": subsampled},
            estimator,
            at,
            num_repeats,
            seed,
        )
        from rich.console import Console

        print_tables(Console(), table)
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


def print_tables(console: "Console", comparison: "GradientComparison") -> None:
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
    console.print(CAPTION)


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


CAPTION = (
    "bias: of the mean gradient, against all the data; undecided where noise hides it. below: the bias that cannot be excluded, "
    "as a part of the gradient's largest entry (— if all of it). gradients: of single data, a call. time, and work "
    "(variance × gradients): relative to the first row; less is better.\n"
)
