"""Several devices, and several processes: each needs processes of their own."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT
from tests.run import on_four_devices

# without fused multiply-adds, which LLVM places differently for another number of chains in a program
FOUR_DEVICES = "--xla_force_host_platform_device_count=4 --xla_cpu_max_isa=AVX"


@pytest.fixture(scope="module")
def outcome():
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.run.on_four_devices"],
        # programs compiled under other flags must not be taken from the cache
        env={**os.environ, "XLA_FLAGS": FOUR_DEVICES, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-avx")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", on_four_devices.CHECKS)
def test_on_four_devices(outcome, name):
    assert name in outcome.stdout.splitlines(), outcome.stderr


TWO_PROCESSES = """
    import sys
    import jax

    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
    import numpy as np
    import ergodica as erg
    from tests.support.problems import logistic_regression

    assert (jax.device_count(), jax.local_device_count()) == (2, 1)
    posterior = logistic_regression()
    alone = erg.estimators.Minibatch(posterior, 7)
    arguments = dict(num_samples=20, num_warmup=10, num_chains=2, progress=False)
    draws = [
        erg.sample(jax.random.key(7), erg.samplers.SGLD(gradient, 0.02), **arguments).posterior["position"].values
        for gradient in (alone, erg.estimators.DataParallel(alone))
    ]
    np.testing.assert_allclose(draws[1], draws[0], rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_data_over_two_processes(tmp_path):
    """Each runs the same program; their devices share the rows."""
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = [
        subprocess.Popen([sys.executable, script, str(i), port], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
