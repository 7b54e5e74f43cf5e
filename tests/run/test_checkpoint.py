"""Runs that are killed, damaged or mixed up."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.run.checkpoint import CheckpointError
from tests.support.kills import kill_twice

SCRIPT = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import ergodica as erg
    from ergodica.run import chains as runner

    runner._CHUNK_SECONDS = 0.02
    data = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, 60), jnp.float32)
    posterior = erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2), lambda theta, x: -0.5 * (x - theta[0]) ** 2 - 0.1 * theta[1] ** 2, data,
        initial=jnp.zeros(2),
    )
    sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(posterior, 7), 0.02, 1.0)
    dt = erg.sample(
        jax.random.key(3), sampler, num_samples=NUM, num_warmup=100, num_chains=2, thin=5,
        checkpoint=None if sys.argv[1] == "none" else erg.Checkpoint(sys.argv[1], every=0.05),
    )
    np.savez(
        sys.argv[2], resumed=dt.attrs["resumed_from"], draws=dt.posterior["position"].values,
        temperature=dt.probe["temperature"].values, n_grad=dt.attrs["num_gradients"],
    )
"""


def script(tmp_path, num):
    file = tmp_path / "run.py"
    file.write_text(textwrap.dedent(SCRIPT).replace("NUM", str(num)))
    return file


@pytest.mark.terminal
def test_killed_and_resumed_is_bit_identical(tmp_path):
    file = script(tmp_path, 60_000)
    checkpoint = tmp_path / "checkpoint"
    command = [sys.executable, str(file), str(checkpoint), str(tmp_path / "resumed.npz")]
    kill_twice(command, checkpoint / "manifest.json", "stored", 60_000)
    subprocess.run(command, check=True)
    subprocess.run([sys.executable, str(file), "none", str(tmp_path / "whole.npz")], check=True)
    resumed, whole = np.load(tmp_path / "resumed.npz"), np.load(tmp_path / "whole.npz")
    assert resumed["resumed"] > 0
    np.testing.assert_array_equal(resumed["draws"], whole["draws"])
    np.testing.assert_array_equal(resumed["temperature"], whole["temperature"])
    assert resumed["n_grad"] == whole["n_grad"]


@pytest.fixture
def arguments(tmp_path):
    posterior = erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), initial=jnp.zeros(2))
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)
    return {
        "key": jax.random.key(0),
        "sampler": sampler,
        "num_samples": 20,
        "num_warmup": 10,
        "num_chains": 2,
        "checkpoint": tmp_path / "run",
    }


def test_a_finished_run_is_read_back(arguments):
    first, second = erg.sample(**arguments), erg.sample(**arguments)
    np.testing.assert_array_equal(first.posterior["position"], second.posterior["position"])
    assert (first.attrs["resumed_from"], second.attrs["resumed_from"]) == (0, 20)


def test_can_be_extended(arguments):
    erg.sample(**arguments)
    longer = erg.sample(**arguments | {"num_samples": 35})
    whole = erg.sample(**arguments | {"num_samples": 35, "checkpoint": None})
    np.testing.assert_array_equal(longer.posterior["position"], whole.posterior["position"])
    with pytest.raises(ValueError, match="holds 35 draws"):
        erg.sample(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": jax.random.key(1)}, "seed"),
        ({"num_warmup": 11}, "num_warmup"),
        ({"thin": 2}, "thin"),
        ({"num_chains": 3}, "num_chains"),
        ({"probes": False}, "probes"),
        ({"initial": jnp.ones(2)}, "values"),
    ],
)
def test_another_run_is_refused(arguments, changes, words):
    erg.sample(**arguments)
    with pytest.raises(CheckpointError, match=words):
        erg.sample(**arguments | changes)


def test_another_sampler_is_refused(arguments):
    erg.sample(**arguments)
    gradient = arguments["sampler"].gradient
    with pytest.raises(CheckpointError, match="values"):
        erg.sample(**arguments | {"sampler": erg.samplers.SGLD(gradient, 0.2)})
    with pytest.raises(CheckpointError, match="sampler"):
        erg.sample(**arguments | {"sampler": erg.samplers.BAOAB(gradient, 0.1)})


@pytest.mark.parametrize("pattern", ["manifest.json", "state-*.npz", "draws-*.npz"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_damage_is_refused(arguments, pattern, harm):
    erg.sample(**arguments)
    (file,) = arguments["checkpoint"].glob(pattern)
    content = bytearray(file.read_bytes())
    if harm == "delete":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|missing|no checkpoint|differ"):
        erg.sample(**arguments)


def test_a_changed_number_in_the_manifest_is_noticed(arguments):
    erg.sample(**arguments)
    manifest = arguments["checkpoint"] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["progress"]["step"] -= 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="damaged"):
        erg.sample(**arguments)


def test_a_directory_of_other_things_is_refused(arguments):
    arguments["checkpoint"].mkdir()
    (arguments["checkpoint"] / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        erg.sample(**arguments)
    assert (arguments["checkpoint"] / "thesis.tex").read_text() == "precious"


def test_no_pickle(arguments):
    erg.sample(**arguments)
    for file in arguments["checkpoint"].glob("*.npz"):
        with np.load(file, allow_pickle=False) as archive:
            assert all(archive[name].dtype != object for name in archive.files)
