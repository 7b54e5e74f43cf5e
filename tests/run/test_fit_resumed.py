"""Fits that go on: bit for bit as if they had not been interrupted, and not from what is damaged or of another fit."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ergodica as erg
from ergodica.run import Monitor, RowBlocks
from ergodica.run.checkpoint import Checkpoint, CheckpointError
from tests.support.fits import (
    CURVATURES,
    Quadratic,
    assert_same,
    noisy,
    quadratic,
    quiet,
    squared_length,
    start,
)
from tests.support.kills import kill_twice

KEY = jax.random.key(0)


@pytest.fixture(name="quadratic")
def _quadratic():
    return quadratic()


class TestResumed:
    OPTIMISER = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.02))

    def arguments(self, **changes):
        return {
            "optimiser": self.OPTIMISER,
            "metrics": squared_length,
            "evaluate_every": 40,
            "monitor": Monitor("squared", minimise=True),
            **changes,
        }

    def test_in_parts_is_unbroken_bit_for_bit(self, tmp_path):
        """Ends on and off the grid of evaluations; states of optimiser (with a key of its own) and estimator go along."""
        whole = quiet(KEY, noisy(), start(), num_steps=333, **self.arguments())
        for num_steps in (40, 101, 333):
            part = quiet(KEY, noisy(), start(), num_steps=num_steps, checkpoint=tmp_path / "fit", **self.arguments())
        assert_same(part, whole)
        assert (whole.history.attrs["resumed_from"], part.history.attrs["resumed_from"]) == (0, 101)
        again = quiet(KEY, noisy(), start(), num_steps=333, checkpoint=tmp_path / "fit", **self.arguments())
        assert_same(again, whole)
        with pytest.raises(ValueError, match="holds 333 steps"):
            quiet(KEY, noisy(), start(), num_steps=300, checkpoint=tmp_path / "fit", **self.arguments())

    def test_ended_between_checkpoints_is_unbroken_bit_for_bit(self, tmp_path):
        """The fit dies in a metric at step 240, after a save at the end of the chunk before."""

        def deadly(key, params):
            alive.append(params)
            if len(alive) == 7:
                raise SystemError("out of memory")
            return squared_length(key, params)

        alive, where = [], Checkpoint(tmp_path / "fit", every=0.0)
        with pytest.raises(SystemError):
            quiet(KEY, noisy(), start(), num_steps=333, checkpoint=where, **self.arguments(metrics=deadly))
        saved = json.loads((tmp_path / "fit" / "manifest.json").read_text())["progress"]["step"]
        resumed = quiet(KEY, noisy(), start(), num_steps=333, checkpoint=where, **self.arguments(metrics=deadly))
        assert 200 <= resumed.history.attrs["resumed_from"] == saved < 240
        assert_same(resumed, quiet(KEY, noisy(), start(), num_steps=333, **self.arguments()))

    def test_without_the_state_it_would_not_be(self, tmp_path, monkeypatch):
        """The mutant forgets the optimiser's second moments."""
        from ergodica.run import fit_run

        whole = quiet(KEY, noisy(), start(), num_steps=120, **self.arguments())
        quiet(KEY, noisy(), start(), num_steps=60, checkpoint=tmp_path / "fit", **self.arguments())
        right = fit_run._from_host

        def forget(array, like):
            moments = like.shape == (3,) and np.all(array >= 0)  # of Adam, the second ones
            return right(np.zeros_like(array) if moments else array, like)

        monkeypatch.setattr(fit_run, "_from_host", forget)
        mutant = quiet(KEY, noisy(), start(), num_steps=120, checkpoint=tmp_path / "fit", **self.arguments())
        with pytest.raises(AssertionError):
            assert_same(mutant, whole)

    def test_streamed_batches_are_read_on(self, tmp_path):
        rows = np.random.default_rng(0).normal(1.0, 1.0, (300, 2)).astype(np.float32)
        posterior = erg.Posterior(
            lambda t: -0.5 * jnp.sum(t**2),
            lambda t, y: -0.5 * jnp.sum((y - t[None]) ** 2, -1),
            num_data=300,
            initial=jnp.zeros(2),
        )
        gradient = erg.estimators.Minibatch(posterior, 32)
        kwargs = {"batches": RowBlocks(rows, 32), "optimiser": optax.sgd(1e-4), "evaluate_every": 25}
        whole = quiet(KEY, gradient, num_steps=90, **kwargs)
        quiet(KEY, gradient, num_steps=37, checkpoint=tmp_path / "fit", **kwargs)
        assert_same(quiet(KEY, gradient, num_steps=90, checkpoint=tmp_path / "fit", **kwargs), whole)
        params = np.zeros(2)
        blocks = iter(kwargs["batches"](0))
        for _ in range(90):
            batch = next(blocks)
            params += 1e-4 * (-params + 300 * np.sum(batch.weight[:, None] * (batch.data - params), 0))
        np.testing.assert_allclose(whole.params, params, rtol=1e-4)
        with pytest.warns(UserWarning, match="batches ended before step 5"):
            short = quiet(KEY, gradient, num_steps=90, batches=iter([rows[:32]] * 5), optimiser=optax.sgd(1e-4))
        assert short.result == "interrupted"
        with pytest.raises(ValueError, match="read from any step"):
            quiet(KEY, gradient, batches=[rows[:32]], checkpoint=tmp_path / "other")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"key": jax.random.key(1)}, "seed"),
            ({"gradient": Quadratic(jnp.asarray(CURVATURES, jnp.float32), 0.2)}, "gradient"),
            ({"gradient": Quadratic(2 * jnp.asarray(CURVATURES, jnp.float32), 0.3)}, "values"),
            ({"params": jnp.ones(3)}, "values"),
            ({"optimiser": optax.adam(0.03)}, "optimiser"),
            ({"optimiser": optax.sgd(0.02)}, "optimiser"),
            ({"evaluate_every": 10}, "evaluate_every"),
            ({"monitor": "value"}, "monitor"),
            ({"metrics": {"squared": lambda k, p: p[0]}}, "metrics"),
            ({"on_nonfinite": "skip"}, "guard"),
        ],
    )
    def test_another_fit_is_refused(self, tmp_path, changes, words):
        """The optimiser is known by its numbers, though Optax keeps them in closures; a new one with the same is the same."""
        arguments = {
            "key": KEY,
            "gradient": noisy(),
            "params": start(),
            "num_steps": 40,
            "checkpoint": tmp_path / "fit",
        }
        arguments |= self.arguments(optimiser=optax.adam(0.02))
        quiet(**arguments)
        with pytest.raises(CheckpointError, match=words):
            quiet(**arguments | changes)
        quiet(**arguments | {"optimiser": optax.adam(0.02), "num_steps": 41})

    @pytest.mark.parametrize("pattern", ["manifest.json", "state-*.npz", "draws-*.npz"])
    @pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
    def test_damage_is_refused(self, tmp_path, pattern, harm):
        arguments = {"num_steps": 50, "checkpoint": tmp_path / "fit"} | self.arguments()
        quiet(KEY, noisy(), start(), **arguments)
        (file,) = (tmp_path / "fit").glob(pattern)
        content = bytearray(file.read_bytes())
        if harm == "delete":
            file.unlink()
        elif harm == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged|missing|no checkpoint|differ"):
            quiet(KEY, noisy(), start(), **arguments)


SCRIPT = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import ergodica as erg

    data = jax.random.normal(jax.random.key(5), (512, 3))
    posterior = erg.Posterior(
        lambda t: -0.5 * jnp.sum(t**2), lambda t, y: -0.5 * jnp.sum((y - t) ** 2, -1), data, initial=jnp.zeros(3)
    )
    gradient = erg.estimators.SVRG(erg.estimators.Minibatch(posterior, 16))
    where = None if sys.argv[1] == "none" else erg.Checkpoint(sys.argv[1], every=0.02)
    done = erg.run.fit(
        jax.random.key(0), gradient, num_steps=NUM, optimiser=1e-3, checkpoint=where, evaluate_every=700,
        metrics=lambda key, params: {"noisy": jnp.sum(params) + jax.random.normal(key)}, monitor="noisy",
    )
    steps, evaluations = done.history["steps"], done.history["evaluations"]
    np.savez(
        sys.argv[2], params=done.params, best=done.best_params, resumed=done.history.attrs["resumed_from"],
        value=steps["value"], n_grad=steps["n_grad"], noisy=evaluations["noisy"], at=evaluations["step"],
    )
"""


@pytest.mark.slow
@pytest.mark.terminal
def test_killed_between_checkpoints_and_resumed_is_bit_identical(tmp_path):
    file, checkpoint, num = tmp_path / "run.py", tmp_path / "fit", 200_000
    file.write_text(textwrap.dedent(SCRIPT).replace("NUM", str(num)))
    command = [sys.executable, str(file), str(checkpoint), str(tmp_path / "resumed.npz")]
    kill_twice(command, checkpoint / "manifest.json", "step", num)
    subprocess.run(command, check=True)
    subprocess.run([sys.executable, str(file), "none", str(tmp_path / "whole.npz")], check=True)
    resumed, whole = np.load(tmp_path / "resumed.npz"), np.load(tmp_path / "whole.npz")
    assert resumed["resumed"] > 0
    for name in set(whole.files) - {"resumed"}:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
