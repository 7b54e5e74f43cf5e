"""Programs and evaluation of `benchmarks/discrete_latents.py`, against sums over all latents."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.statistics import REJECTION, assert_mean, z_scores

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("numpyro_promotion")


@pytest.fixture
def numpyro_promotion():
    """NumPyro's discrete laws mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def pictures(number):
    return jnp.asarray(np.random.default_rng(0).random((number, 6)) < 0.4, jnp.float32)


def tiny(kind):
    """Tasks with 3 bits a layer, or one vector of ten, on pictures of 6 pixels."""
    from discrete_parts.programs import Shape, belief_network, lower_half, vae

    shape = Shape(kind, {"bits": 3, "categories": 10}[kind], jnp.mean(pictures(20), axis=0))
    return {"vae": vae(shape), "half": lower_half(shape), "deep": belief_network(shape)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("half", "bits"),
        pytest.param("vae", "categories", marks=pytest.mark.slow),
        pytest.param("deep", "bits", marks=pytest.mark.slow),
    ],
)
def test_the_bound_that_is_reported_is_the_evidence_in_the_mean(name, kind):
    """Of one picture the exponential of the bound has the mean p(x), whatever the number of draws; the mutant is the ELBO."""
    from discrete_parts.exact import exact_bound, exact_evidence
    from discrete_parts.methods import METHODS
    from discrete_parts.training import compiled, make_bound, parameters

    task, x, generator = tiny(kind)[name], pictures(1), np.random.default_rng(1)
    shapes = jax.eval_shape(compiled(task).start, jax.random.key(0), METHODS["leave_one_out"].loss(task, 1.0), x)
    params = {k: jnp.asarray(0.7 * generator.normal(size=v.shape), jnp.float32) for k, v in parameters(shapes).items()}
    bound = make_bound(task, 4)

    @jax.jit
    def run(keys, params):
        values = jax.vmap(lambda key: jnp.exp(bound(key, params, x)))(keys)
        exact = jnp.exp(exact_evidence(task, params, task.split(x))[0])
        return values, exact, jnp.exp(exact_bound(task, params, task.split(x)))

    values, exact, elbo = run(jax.random.split(jax.random.key(1), 20_000), params)
    assert_mean(values, float(exact), smallest_error=0.1)
    assert np.abs(z_scores(values, float(elbo))) > REJECTION


def test_all_cells_are_planned_with_the_runs_that_the_table_states():
    """Every estimator is right at every site of its tasks, and costs what is said; the biased ones say so."""
    from discrete_parts.methods import METHODS, cells
    from discrete_parts.programs import make_tasks

    x = pictures(4)
    tasks = make_tasks(jnp.mean(x, axis=0), 10)
    biased = {"straight_through", "annealed", "gumbel", "gumbel_hard", "reinmax", "darn"}
    assert {task for task, _ in cells()} == set(tasks)
    for name, method in cells():
        task = tasks[name]
        rows = METHODS[method].loss(task, 1.0).plan(task.model, task.guide, *task.split(x)).rows
        assert {row.site for row in rows} == set(task.sites)
        assert all(row.unbiased == (method not in biased) for row in rows)
        each = {"muprop": [2, 2], "darn": [2, 2], "disarm": [1, 2]}.get(method, [1, 1])
        assert [row.runs for row in rows] == each[: len(rows)], (name, method)


def test_runs_are_stored_and_resumed(tmp_path, monkeypatch):
    """The better rate is kept and serves the next seed; what is there is not run again; another protocol is refused."""
    import discrete_latents

    asked = []

    class Recorder:
        def __init__(self, task, *_):
            self.task = task

        def run(self, seed, rate):
            asked.append((self.task.name, seed, rate))
            return {"rate": rate, "validation": -rate, "curve": [], "training": [], "step_ms": 1.0}, None

        def best(self, seed):
            return *self.run(seed, 0.003), {"0.003": -0.003, "0.01": float("nan")}

        def test(self, seed, state):
            return -float(seed)

        def runs(self):
            return 2

    def call(*more):
        names = ["--only", "vae_bits:leave_one_out", "deep_bits:average", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["discrete_latents.py", "--epochs", "2", *names, *more])
        discrete_latents.main()

    monkeypatch.setattr(discrete_latents, "Trainer", Recorder)
    call("--seeds", "0")
    call("--seeds", "0", "1", "--resume")
    assert asked == [(task, seed, 0.003) for seed in (0, 1) for task in ("vae_bits", "deep_bits")]
    stored = json.loads((tmp_path / "discrete_latents.json").read_text())["digits"]
    assert {name: set(cells) for name, cells in stored["cells"].items()} == {
        "vae_bits:leave_one_out": {"0", "1"},
        "deep_bits:average": {"0", "1"},
    }
    assert stored["cells"]["deep_bits:average"]["1"]["bound"] == -1.0
    with pytest.raises(SystemExit, match="another protocol"):
        call("--epochs", "3", "--resume")


@pytest.mark.slow
def test_a_run_on_digits_ends_above_where_it_started(tmp_path, monkeypatch):
    """Forty epochs on digits: the bound beats the means of the pixels."""
    import discrete_latents
    from discrete_parts.programs import make_tasks
    from discrete_parts.training import load

    only = ["--only", "vae_bits:leave_one_out", "--seeds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["discrete_latents.py", "--epochs", "40", *only])
    discrete_latents.main()
    cell = json.loads((tmp_path / "discrete_latents.json").read_text())["digits"]["cells"]["vae_bits:leave_one_out"][
        "0"
    ]
    task = make_tasks(jnp.mean(load("digits").train, axis=0), 50)["vae_bits"]
    assert cell["bound"] > task.start + 1
