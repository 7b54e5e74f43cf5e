"""``ergodica sample``."""

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from ergodica.cli import options
from ergodica.cli.errors import RUN_PROBLEM, CallError, did_you_mean, listed, stop, wrong_calls

if TYPE_CHECKING:
    import xarray

STARTS = ("uniform", "prior", "mode")


def sample(
    model: options.Model,
    data: options.Data = None,
    columns: options.Columns = [],  # noqa: B006  (typer reads defaults, and nothing changes them)
    settings: options.Settings = [],  # noqa: B006
    subsampled: options.Subsampled = False,
    sampler: Annotated[
        str,
        typer.Option(
            help="SGLD, BAOAB, another splitting in letters (OBABO, UBU, …), SGHMC, or NUTS with all the data."
        ),
    ] = "BAOAB",
    step_size: Annotated[
        float | None, typer.Option(help="The step h, a time; not for NUTS, which adapts its own.")
    ] = None,
    friction: Annotated[float | None, typer.Option(help="Of the splittings, one over a time.  [default: 1]")] = None,
    temperature: Annotated[float, typer.Option(help="1 samples the posterior.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows a gradient.")] = 128,
    scheme: Annotated[
        str, typer.Option(help="How batches are drawn: blocks (reshuffled), uniform or full.")
    ] = "blocks",
    control_variate: Annotated[
        bool,
        typer.Option(
            "--control-variate", help="Find the mode, and correct the gradients by what the same rows say there."
        ),
    ] = False,
    start: Annotated[str, typer.Option(help="Where chains start: uniform (on -2 to 2), prior, or mode.")] = "uniform",
    num_samples: Annotated[int, typer.Option(help="Stored draws a chain.")] = 1000,
    num_warmup: Annotated[int, typer.Option(help="Steps before the first stored draw.")] = 1000,
    num_chains: Annotated[int, typer.Option()] = 4,
    thin: Annotated[int, typer.Option(help="Steps a stored draw.")] = 1,
    seed: options.Seed = 0,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="Folder to save the run in, and to go on from if it holds one.")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="netCDF file of the result.")] = pathlib.Path("run.nc"),
) -> None:
    """Sample from the posterior of a model and save the draws.

    Examples
    --------
    - `ergodica sample model.py:model --data d.csv --step-size 1e-3`

    - `ergodica sample model.py:model --data d.csv --columns x=age,height --columns y=visits --sampler SGLD --step-size 1e-5`

    - `ergodica sample model.py:model --data d.npz --sampler NUTS --out nuts.nc`
    """
    with wrong_calls():
        options.check_can_be_written(out)
        dt = _run(
            {"model": model, "data": data, "columns": columns, "settings": settings, "subsampled": subsampled},
            sampler=sampler,
            sampler_settings=(step_size, friction, temperature),
            gradient_settings=(batch_size, scheme, control_variate),
            start=start,
            run_settings={"num_samples": num_samples, "num_warmup": num_warmup, "num_chains": num_chains, "thin": thin},
            seed=seed,
            checkpoint=checkpoint,
        )
    dt.to_netcdf(out, engine="h5netcdf")
    typer.echo(f"Saved {_size(dt)} to {out}.")
    if dt.attrs["result"] != "successful":
        raise stop(dt.attrs["result_message"], RUN_PROBLEM)
    from ergodica.diagnostics.checks import diagnose

    typer.echo(f"{diagnose(dt).headline}\nFor the checks one by one: ergodica diagnose {out}")


def _run(
    model_settings: dict,
    *,
    sampler: str,
    sampler_settings: tuple,
    gradient_settings: tuple[int, str, bool],
    start: str,
    run_settings: dict,
    seed: int,
    checkpoint: pathlib.Path | None,
) -> "xarray.DataTree":
    """Build everything, run it, and return what was sampled, whether or not it ended well."""
    import jax

    from ergodica.cli.models import load_posterior
    from ergodica.cli.samplers import NUTS, make_gradient, make_nuts, make_sampler, mode_of, sampler_name
    from ergodica.core.result import SamplingError
    from ergodica.run.sample import sample as run

    name = sampler_name(sampler)
    if start not in STARTS:
        raise CallError(f"There is no start {start!r}.{did_you_mean(start, STARTS)} There are {listed(STARTS)}.")
    posterior = load_posterior(**model_settings, initial="prior" if start == "prior" else "uniform")
    key_run, key_mode, key_adapt = jax.random.split(jax.random.key(seed), 3)
    initial = mode_of(key_mode, posterior) if start == "mode" else None
    if name == NUTS:
        _refuse_for_nuts(sampler_settings, gradient_settings)
        kernel, initial = make_nuts(key_adapt, posterior, max(100, run_settings["num_warmup"]))
    else:
        batch_size, scheme, control_variate = gradient_settings
        gradient = make_gradient(key_mode, posterior, batch_size, scheme, control_variate=control_variate)
        kernel = make_sampler(name, gradient, *sampler_settings)
    try:
        return run(key_run, kernel, **run_settings, initial=initial, checkpoint=checkpoint)
    except SamplingError as error:
        return error.partial


def _refuse_for_nuts(sampler_settings: tuple, gradient_settings: tuple[int, str, bool]) -> None:
    step_size, friction, temperature = sampler_settings
    if step_size is not None or friction is not None or temperature != 1 or gradient_settings[2]:
        raise CallError(
            "NUTS adapts its own step and uses all the data: leave out --step-size, --friction, --temperature and "
            "--control-variate."
        )


def _size(dt: "xarray.DataTree") -> str:
    sizes = dt["posterior"].sizes
    return f"{sizes['chain']} chains of {sizes['draw']:,} draws"
