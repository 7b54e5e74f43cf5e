"""The commands on small data: results, exit codes, and errors as sentences."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import ergodica

SHORT = "--num-samples 60 --num-warmup 50 --num-chains 4 --thin 2"


def mean_slope(path):
    with xr.open_datatree(path, engine="h5netcdf") as dt:
        return dt["posterior"]["slope"].mean(("chain", "draw")).values


def least_squares():
    with np.load("d.npz") as file:
        x, y = file["x"], file["y"]
    return np.linalg.solve(x.T @ x + np.eye(2), x.T @ y), np.sqrt(np.diag(np.linalg.inv(x.T @ x + np.eye(2))))


class TestSample:
    @pytest.mark.parametrize(
        "options",
        [
            "--data d.csv --sampler BAOAB --step-size 0.02 --friction 15 --batch-size 50",
            "--data d.npz --sampler sgld --step-size 1e-3 --batch-size 50 --control-variate --start mode",
            "--data d.csv --columns x=height,weight --columns y=y --sampler OABAO --step-size 0.05 --friction 15 --scheme full",
            "--data d.npz --sampler NUTS --start prior",
        ],
    )
    @pytest.mark.swept_after(2)
    def test_draws_from_the_posterior(self, folder, call, options):
        result = call(
            f"sample model.py:model {options} --num-samples 400 --num-warmup 400 --thin 4 --seed 1 --out run.nc"
        )
        assert result.exit_code == 0, result.output
        assert "Saved 4 chains of 400 draws to run.nc." in result.output
        mean, sd = least_squares()
        # effective draws are at least a few hundred: a swapped column or a wrong scale is ten and more deviations off
        assert np.all(np.abs(mean_slope("run.nc") - mean) < 0.5 * sd)

    def test_model_may_be_a_posterior_and_settings_reach_the_model(self, folder, call):
        result = call(f"sample model.py:posterior --step-size 0.01 --batch-size 10 {SHORT}")
        assert result.exit_code == 0, result.output
        result = call(f"sample model.py --data d.csv --set scale=0.01 --sampler NUTS {SHORT}")
        assert result.exit_code == 0, result.output
        with xr.open_datatree("run.nc", engine="h5netcdf") as dt:
            assert float(dt["posterior"]["slope"].std(("chain", "draw")).max()) < 0.002

    def test_same_seed_same_draws_and_checkpoint_resumes(self, folder, call):
        line = f"sample model.py --data d.npz --step-size 0.01 --batch-size 50 {SHORT} --checkpoint saved"
        assert call(f"{line} --out a.nc").exit_code == 0
        assert call(f"{line} --out b.nc").exit_code == 0
        np.testing.assert_array_equal(mean_slope("a.nc"), mean_slope("b.nc"))
        with xr.open_datatree("b.nc", engine="h5netcdf") as dt:
            assert dt.attrs["resumed_from"] == 60

    def test_a_run_that_breaks_down_ends_with_1_and_keeps_its_draws(self, folder, call):
        result = call(f"sample model.py --data d.npz --sampler SGLD --step-size 10 --batch-size 50 {SHORT}")
        assert result.exit_code == 1
        assert "NaN or infinite in chain" in result.stderr
        assert (folder / "run.nc").is_file()


class TestDiagnose:
    def test_exit_code_and_page(self, folder, call):
        # a step of 1/λ with noise of four rows in 200: the variance is many times too large
        line = "--num-samples 500 --num-warmup 200 --thin 5 --scheme uniform"
        call(f"sample model.py --data d.npz --sampler SGLD --step-size 2e-3 --batch-size 4 {line} --out hot.nc")
        call("sample model.py --data d.npz --sampler NUTS --num-samples 500 --out nuts.nc")
        result = call("diagnose hot.nc --html report.html --reference nuts.nc")
        assert result.exit_code == 1
        assert "Do not believe these draws" in result.output
        assert "sd_ratio" in result.output
        assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
        checks = json.loads(call("diagnose nuts.nc --json").output)["checks"]
        assert checks["R-hat"]["status"] == "passed"

    def test_errors(self, folder, call):
        (folder / "run1.nc").write_text("no netCDF")
        result = call("diagnose run.nc")
        assert (result.exit_code, "There is no file 'run.nc'. Did you mean 'run1.nc'?" in result.stderr) == (2, True)
        result = call("diagnose run1.nc")
        assert (result.exit_code, "could not be read as netCDF" in result.stderr) == (2, True)


class TestCompare:
    def test_table_file_and_figure(self, folder, call):
        result = call(
            "compare model.py --data d.csv --estimator minibatch:20:uniform --estimator control-variate:20 --estimator full "
            "--num-repeats 200 --at start --out table.nc --plot figure.png"
        )
        assert result.exit_code == 0, result.output
        with xr.open_dataset("table.nc", engine="h5netcdf") as table:
            assert table["datum_gradients"].values.ravel().tolist() == [20, 40, 200]
            assert table["variance"].sel(estimator="full").item() == 0
        assert (folder / "figure.png").stat().st_size > 1000
        assert "control-variate:20" in result.output

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--estimator minibach:10", "Did you mean 'minibatch'?"),
            ("--estimator minibatch", "write minibatch:BATCH_SIZE"),
            ("--estimator minibatch:10:blocs", "the scheme is blocks or uniform"),
            ("--estimator full:10", "takes no batch size"),
            ("--estimator minibatch:1000", "batch_size must be between 1 and 200"),
            ("--at mod", "Did you mean 'mode'?"),
            ("--num-repeats 2", "num_repeats must be at least 30"),
            ("--plot nowhere/f.png", "The folder nowhere of f.png does not exist"),
        ],
    )
    def test_errors(self, folder, call, options, message):
        result = call(f"compare model.py --data d.csv {options}")
        assert result.exit_code == 2
        assert message in result.stderr


GUIDED = """
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist


def model(x, y=None):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("obs", dist.Normal((0.5 + z) * jnp.mean(x, axis=1), 5.0), obs=y)


def guide(x, y=None):
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(0.3))))


def short(x):
    guide(x)
"""


class TestCompareLosses:
    def test_numpyros_wrong_gradient_ends_with_1(self, folder, call):
        """The gradient of Trace_ELBO at a bit; figures, file and Markdown of the same comparison."""
        (folder / "guided.py").write_text(GUIDED)
        result = call(
            "compare guided.py --guide guided.py --data d.csv --estimator leave-one-out:4 --estimator numpyro:Trace_ELBO:4 "
            "--at start --num-repeats 4000 --markdown --out table.nc --plot figure.png"
        )
        assert result.exit_code == 1, result.output
        assert "| leave-one-out:4 | unbiased |" in result.output
        assert "| numpyro:Trace_ELBO:4 | biased |" in result.output
        assert "The reference is exact." in result.output
        with xr.open_dataset("table.nc", engine="h5netcdf") as table:
            assert table["datum_gradients"].values.ravel().tolist() == [4, 4]
        assert (folder / "figure.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--guide AutoNorml", "Did you mean 'AutoNormal'?"),
            ("--guide guided.py:short", "lacks the arguments y"),
            ("--guide guided.py --estimator leave-one:10", "Did you mean 'leave-one-out'?"),
            ("--guide guided.py --estimator score", "write the number of particles, such as score:10"),
            ("--guide guided.py --estimator numpyro:Trace:10", "Did you mean 'Trace_ELBO'?"),
            ("--guide guided.py --at mode", "is no point of a fit"),
            ("--guide guided.py --subsampled", "--subsampled is for posteriors"),
        ],
    )
    def test_errors(self, folder, call, options, message):
        (folder / "guided.py").write_text(GUIDED)
        result = call(f"compare guided.py --data d.csv {options}")
        assert result.exit_code == 2
        assert message in result.stderr


class TestWrongCalls:
    """Each ends with exit code 2 and a sentence that names what is wrong and what there is."""

    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            ("modl.py:model", ["There is no file 'modl.py'", "Did you mean 'model.py'?"]),
            ("model.py:modle", ["has no 'modle'", "Did you mean 'model'?", "two_inputs", "posterior"]),
            ("model.py:number", ["is a int; it must be a NumPyro model"]),
            ("model.py --data e.csv", ["There is no file 'e.csv'", "Did you mean 'd.csv'?"]),
            ("model.py --data model.py", ["must be a .npz or .csv file"]),
            ("model.py", ["arguments x got no value", "--data"]),
            ("model.py:posterior --data d.csv", ["leave --data out"]),
            (
                "model.py --data d.csv --columns x=heigth --columns y=y",
                ["no column 'heigth'", "Did you mean 'height'?", "weight"],
            ),
            ("model.py --data d.csv --columns w=height", ["'w', which is no argument of the model", "x, y, scale"]),
            ("model.py --data d.csv --columns height", ["--columns expects ARGUMENT=column"]),
            ("model.py:two_inputs --data d.csv", ["arguments x, z found no column", "height, weight, y", "--columns"]),
            ("model.py:two_inputs --data d.npz", ["argument z found no array", "x, y"]),
            ("model.py --data d.csv --set scale", ["--set expects NAME=VALUE"]),
            (
                "model.py --data d.csv --sampler SGDL --step-size 1",
                ["no sampler 'SGDL'", "Did you mean 'SGLD'?", "BAOAB"],
            ),
            ("model.py --data d.csv --sampler AO --step-size 1", ["scheme 'AO' needs B"]),
            ("model.py --data d.csv", ["BAOAB needs --step-size"]),
            ("model.py --data d.csv --step-size -1", ["step_size must be finite and above 0; got -1.0"]),
            ("model.py --data d.csv --step-size nan", ["step_size must be finite"]),
            ("model.py --data d.csv --step-size 1 --scheme block", ["Did you mean 'blocks'?"]),
            ("model.py --data d.csv --step-size 1 --batch-size 0", ["batch_size must be between 1 and 200; got 0"]),
            ("model.py --data d.csv --step-size 1 --start moed", ["Did you mean 'mode'?"]),
            ("model.py --data d.csv --sampler SGLD --step-size 1 --friction 1", ["--friction has no meaning"]),
            ("model.py --data d.csv --sampler NUTS --step-size 1", ["NUTS adapts its own step"]),
            (
                "model.py --data d.csv --step-size 1 --out nowhere/run.nc",
                ["The folder nowhere of run.nc does not exist"],
            ),
            ("model.py --data d.csv --step-size 1 --num-samples 0", ["num_samples must be at least 1"]),
        ],
    )
    def test_sentence(self, folder, call, arguments, messages):
        result = call(f"sample {arguments}")
        assert result.exit_code == 2, result.output
        for message in messages:
            assert message in result.stderr
        assert "Traceback" not in result.output

    def test_missing_values_and_text(self, folder, call):
        (folder / "bad.csv").write_text("a,b,y\n1,2,3\n1,,3\n2,,1\n")
        result = call("sample model.py --data bad.csv --step-size 1")
        assert result.exit_code == 2
        assert "The column 'b' of bad.csv has 2 values that are missing, NaN or infinite" in result.stderr
        assert "the first in row 1 (counted from 0, line 3 of the file)" in result.stderr
        (folder / "text.csv").write_text("a,b,y\n1,red,3\n1,blue,3\n")
        result = call("sample model.py --data text.csv --step-size 1")
        assert (result.exit_code, "'b' of text.csv holds what is no number, such as 'red'" in result.stderr) == (
            2,
            True,
        )
        np.savez("bad.npz", x=np.full((3, 2), np.inf), y=np.ones(3))
        result = call("sample model.py --data bad.npz --step-size 1")
        assert (result.exit_code, "The array 'x' of bad.npz has 6 values" in result.stderr) == (2, True)

    def test_a_model_file_that_does_not_run(self, folder, call):
        (folder / "broken.py").write_text("x = 1\ny = undefined\n")
        result = call("sample broken.py --data d.csv --step-size 1")
        assert result.exit_code == 2
        assert "broken.py could not be imported: NameError: name 'undefined' is not defined (line 2)" in result.stderr

    def test_traceback_on_request(self, folder, call):
        with pytest.raises(ValueError, match="step_size must be finite"):
            call("--traceback sample model.py --data d.csv --step-size -1")


def test_program_in_a_process_of_its_own(folder):
    program = [sys.executable, "-c", "from ergodica.cli import app; app()"]
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ergodica {ergodica.__version__}"
    done = subprocess.run([*program, "sample", "nothing.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: There is no file 'nothing.py'.")


def test_help_has_examples(call):
    for command in ("sample", "diagnose", "compare", "demo"):
        result = call(f"{command} --help")
        assert result.exit_code == 0
        assert f"ergodica {command}" in result.output


def test_data_columns_keep_their_order(folder):
    from ergodica.cli.data import read_table, select

    table = read_table(folder / "d.csv")

    def model(x, y=None):
        return None

    chosen = select(table, {"x": ["weight", "height"]}, model, folder / "d.csv", set())
    assert chosen["x"].shape == (200, 2)
    np.testing.assert_array_equal(chosen["x"][:, 0], table.arrays["weight"].astype(np.float32))
    assert select(table, {"x": ["weight", ""]}, model, folder / "d.csv", set())["x"].shape == (200, 1)
    assert jnp.asarray(chosen["y"]).dtype == jnp.float32
