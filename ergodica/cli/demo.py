"""``ergodica demo``: real data, five samplers, and which of them to believe."""

import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    import xarray
    from rich.console import Console

    from ergodica.core.kernel import AbstractKernel
    from ergodica.core.posterior import Posterior
    from ergodica.diagnostics.gradient_table import GradientComparison
    from ergodica.run.mode import Mode

BATCH_SIZE = 1000
NUM_DRAWS, THIN = 5000, 12
REFERENCE = "NUTS"
TOO_HOT, WARM, COOL = 2.5, 1.05, 1.02


class Scales(NamedTuple):
    """What steps are chosen from: eigenvalues of the curvature at the mode, and the noise of gradients.

    Attributes
    ----------
    stiffest, softest, total : float
        Largest and smallest eigenvalue of minus the Hessian of the log density, and their sum.
    noise : dict of str to float
        Variance of each gradient estimator, summed over the coordinates, at a typical point of the posterior.
    num_parameters : int
    """

    stiffest: float
    softest: float
    total: float
    noise: dict[str, float]
    num_parameters: int

    def step_for_temperature(self, temperature: float, estimator: str) -> float:
        """Step at which SGLD on this curvature, with independent batches of this noise, has the given mean temperature.

        To first order a step h raises it by h (noise + curvature) / 2, each averaged over the parameters.
        """
        return 2 * self.num_parameters * (temperature - 1) / (self.noise[estimator] + self.total)


def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the report and the runs.")] = pathlib.Path(
        "demo-output"
    ),
) -> None:
    """Show on real data which samplers to believe, and why.

    A logistic regression of 20,190 person-years (public domain, part of the package) is sampled by NUTS, as the reference,
    and by four stochastic-gradient samplers. About two minutes on two cores.

    Example: `ergodica demo --out my-folder`
    """
    import jax
    from rich.console import Console

    import ergodica as erg
    from ergodica.models import zoo

    console, began = Console(soft_wrap=False), time.monotonic()
    key_mode, key_compare, key_nuts, *keys = jax.random.split(jax.random.key(2026), 7)
    out.mkdir(parents=True, exist_ok=True)

    console.rule("The question")
    data = zoo.doctor_visits()
    console.print(data.description)
    posterior = erg.from_numpyro(
        zoo.logistic_regression, data={"x": data.x, "y": data.y}, coords={"feature": data.columns}
    )
    mode = erg.find_mode(key_mode, posterior)

    console.rule("The gradients")
    estimators = make_estimators(posterior, mode.position)
    typical = typical_point(posterior, mode)
    start = jax.tree.map(lambda x: 0 * x, mode.position)
    points = {"mode": mode.position, "typical posterior draw": typical, "origin": start}
    comparison = erg.compare_gradients(key_compare, estimators, list(points.values()), num_repeats=1000)
    comparison = comparison.assign_coords(point=list(points))
    from ergodica.cli.compare import print_tables

    print_tables(console, comparison)
    console.print(GRADIENTS_READ)

    console.rule("The samplers")
    scales = measure_scales(posterior, mode, comparison)
    samplers = make_samplers(estimators, scales)
    runs = {REFERENCE: run_nuts(key_nuts, posterior)}
    _progress(console, REFERENCE, runs[REFERENCE])
    for key, (name, sampler) in zip(keys, samplers.items(), strict=True):
        # a control variate takes two gradients a row, so half as many steps cost as much
        thin = THIN // 2 if "control variate" in name else THIN
        warmup = NUM_DRAWS * thin // 10
        runs[name] = erg.sample(
            key, sampler, NUM_DRAWS, warmup, thin=thin, initial=mode.position, progress=False, throw=False
        )
        _progress(console, name, runs[name])

    rows = {name: judge(dt, runs[REFERENCE]) for name, dt in runs.items()}
    console.rule("Which to believe")
    _print_samplers(console, rows)
    console.print(SAMPLERS_READ)

    page = write(out, runs, comparison)
    console.rule("What next")
    console.print(NEXT.format(page=page, out=out, seconds=time.monotonic() - began), highlight=False)


def make_estimators(posterior: "Posterior", centre: Any) -> dict[str, Any]:
    """Make the gradients to compare: two ways to draw batches, a control variate, and all the data."""
    from ergodica.estimators import ControlVariate, Minibatch

    blocks = Minibatch(posterior, BATCH_SIZE, scheme="blocks")
    return {
        "uniform": Minibatch(posterior, BATCH_SIZE, scheme="uniform"),
        "blocks": blocks,
        "control variate": ControlVariate(blocks, centre),
        "full": Minibatch(posterior, scheme="full"),
    }


def curvature(posterior: "Posterior", mode: "Mode") -> Any:
    """Minus the Hessian of the log density at the mode, as a matrix over all parameters."""
    import jax
    from jax.flatten_util import ravel_pytree

    flat, unravel = ravel_pytree(mode.position)
    return -jax.jit(jax.hessian(lambda vector: posterior.log_density(unravel(vector))))(flat)


def typical_point(posterior: "Posterior", mode: "Mode") -> Any:
    """Draw from the normal approximation at the mode: a point as far from it as the draws will be."""
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    flat, unravel = ravel_pytree(mode.position)
    factor = jnp.linalg.cholesky(jnp.linalg.inv(curvature(posterior, mode)))
    return unravel(flat + factor @ jax.random.normal(jax.random.key(1), flat.shape))


def measure_scales(posterior: "Posterior", mode: "Mode", comparison: "GradientComparison") -> Scales:
    """Read off what the steps are chosen from."""
    import numpy as np

    eigenvalues = np.linalg.eigvalsh(curvature(posterior, mode))
    at_typical = comparison["variance"].isel(point=1)
    noise = {str(name): float(at_typical.sel(estimator=name)) for name in comparison["estimator"].values}
    return Scales(float(eigenvalues[-1]), float(eigenvalues[0]), float(eigenvalues.sum()), noise, len(eigenvalues))


def make_samplers(estimators: dict[str, Any], scales: Scales) -> "dict[str, AbstractKernel]":
    """Choose steps from the curvature and the noise.

    SGLD: for a predicted temperature. BAOAB on reshuffled blocks: an epoch shorter than the time scale of the stiffest
    direction, so that the noise of the blocks cancels before it does harm; friction critical for the softest direction.
    """
    from ergodica.samplers import BAOAB, SGLD

    epoch, num_blocks = 0.7 * scales.stiffest**-0.5, estimators["blocks"].num_blocks
    return {
        "SGLD, large step": SGLD(estimators["uniform"], scales.step_for_temperature(TOO_HOT, "uniform")),
        "SGLD, small step": SGLD(estimators["uniform"], scales.step_for_temperature(WARM, "uniform")),
        "BAOAB, blocks": BAOAB(estimators["blocks"], epoch / num_blocks, 2 * scales.softest**0.5),
        "SGLD, control variate": SGLD(
            estimators["control variate"], scales.step_for_temperature(COOL, "control variate")
        ),
    }


def run_nuts(key: Any, posterior: "Posterior") -> "xarray.DataTree":
    """Sample by BlackJAX's NUTS, adapted by its windows."""
    import jax

    import ergodica as erg
    from ergodica.cli.samplers import make_nuts

    key_adapt, key_run = jax.random.split(key)
    nuts, position = make_nuts(key_adapt, posterior, num_warmup=500)
    return erg.sample(key_run, nuts, 1000, num_warmup=100, initial=position, progress=False)


def judge(dt: "xarray.DataTree", reference: "xarray.DataTree") -> dict[str, Any]:
    """Hold a run against the reference and its own diagnosis."""
    import ergodica as erg

    diagnosis, errors = erg.diagnose(dt), erg.reference_table(dt, reference)
    farthest = (errors["sd_ratio"] - 1).abs().idxmax()
    return {
        "R-hat": diagnosis["R-hat"].values["max"],
        "ESS": diagnosis["ESS"].values["bulk_min"],
        "temperature": diagnosis["temperature"].values["mean"],
        "verdict": diagnosis["temperature"].verdict,
        "mean error": errors["mean_error"].abs().max(),
        "sd ratio": errors.loc[farthest, "sd_ratio"],
        "gradients": dt.attrs["num_gradients"],
        "seconds": dt.attrs["wall_time"],
        "believe?": in_plain_words(diagnosis),
    }


def in_plain_words(diagnosis: Any) -> str:
    """Say in a few words whether to believe a run, from its diagnosis alone: the reference is not looked at."""
    failed = {check.name for check in diagnosis.by_status("failed")}
    if "finite" in failed or "frozen" in failed:
        return "No: it broke down."
    if "temperature" in failed:
        hidden = " R-hat and ESS do not see it." if not failed & {"R-hat", "ESS"} else ""
        return f"No: the spread is wrong.{hidden}"
    if failed & {"R-hat", "ESS"}:
        return "No: too short, it mixes slowly."
    if failed:
        return f"No: {', '.join(sorted(failed))}."
    return "Yes." if diagnosis.belief == "yes" else "Not yet: run longer to decide."


def write(
    out: pathlib.Path,
    runs: "dict[str, xarray.DataTree]",
    comparison: "GradientComparison",
) -> pathlib.Path:
    """Save every run, the comparison of the estimators and the report."""
    import ergodica as erg
    from ergodica.cli.compare import CAPTION, readable

    for name, dt in runs.items():
        dt.to_netcdf(out / f"{name.replace(',', '').replace(' ', '-').lower()}.nc", engine="h5netcdf")
    comparison.to_netcdf(out / "gradients.nc", engine="h5netcdf")
    figure = comparison.plot()
    figure.savefig(out / "gradients.png", dpi=150)
    tables: dict[str, Any] = {
        f"Gradient estimators at the {point}": frame for point, frame in readable(comparison).items()
    }
    tables["How to read the estimators"] = f"<p>{CAPTION}</p>"
    tables["Variance times cost, and bias, of the estimators"] = figure
    return erg.report(
        runs,
        out / "report.html",
        title="Which sampler to believe: 20,190 visits to a doctor",
        reference=runs[REFERENCE],
        tables=tables,
        max_parameters=4,
    )


def _progress(console: "Console", name: str, dt: "xarray.DataTree") -> None:
    console.print(f"{name}: {dt.attrs['wall_time']:.1f} s (and {dt.attrs['compile_time']:.1f} s to compile)")


def _print_samplers(console: "Console", rows: dict[str, dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="What each run says of itself, and its errors against NUTS", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("sampler", no_wrap=True)
    for name in ("R-hat", "ESS", "temp.", "mean err.", "sd ratio", "10⁶ grad.", "s"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        reference = name == REFERENCE
        table.add_row(
            name,
            f"{row['R-hat']:.3f}",
            f"{row['ESS']:,.0f}",
            f"{row['temperature']:.2f}",
            "—" if reference else f"{row['mean error']:.2f}",
            "—" if reference else f"{row['sd ratio']:.2f}",
            f"{row['gradients'] / 1e6:,.0f}",
            f"{row['seconds']:.0f}",
            end_section=reference,
        )
    console.print(table)
    beliefs = Table("sampler", "believe?", "temperature", box=SIMPLE_HEAD)
    for name, row in rows.items():
        beliefs.add_row(name, row["believe?"], row["verdict"])
    console.print(beliefs)


GRADIENTS_READ = (
    "At the origin, far from the posterior, every estimator can be shown to be unbiased. Nearer to the mode the noise of a "
    "minibatch hides its own mean: undecided is what can honestly be said there. Where the posterior is, the control variate has "
    "far less noise than a minibatch of the same rows; at the origin it has little advantage. Blocks look like uniform draws here, "
    "since one call is looked at: their noise cancels over an epoch, and only a sampler can show that.\n"
)

SAMPLERS_READ = (
    "R-hat (at most 1.01) and ESS (at least 400) say whether the chains agree with each other. The temperature says whether "
    "they agree with the posterior: 1 is right, and it needs no NUTS. Nor does the answer to 'believe?', so that you can have it "
    "where NUTS is too slow. mean err.: the largest difference of a posterior mean from NUTS, in posterior standard "
    "deviations; sd ratio: the standard deviation farthest from that of NUTS, as a ratio; 10⁶ grad.: gradients of single data.\n\n"
    "SGLD with a large step mixes fast, so R-hat and ESS like it, and its standard deviations are far too large: the temperature "
    "gives it away. With a small step it is nearly right and far too slow. Blocks in an order reshuffled each epoch (BAOAB) or a "
    "control variate take away the noise that forced the step to be so small.\n"
)

NEXT = """The report, with every check and plot:  {page}
The runs, for arviz.from_netcdf:        {out}/*.nc
All of it took {seconds:.0f} s.

Try next
  ergodica diagnose {out}/sgld-large-step.nc
      the checks one by one
  ergodica compare model.py:model --data your.csv
      which gradient for your model and data?
  ergodica sample model.py:model --data your.csv --step-size 1e-3
      sample from it
  python examples/quickstart.py
      the same from Python"""
