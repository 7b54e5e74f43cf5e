"""What importing the package costs, and what it must not bring along."""

import subprocess
import sys

HEAVY = (
    "arviz",
    "blackjax",
    "diffrax",
    "flowjax",
    "h5py",
    "matplotlib",
    "numpyro",
    "optax",
    "rich",
    "scipy",
    "typer",
    "xarray",
)

PROGRAM = """
import sys, time
begin = time.perf_counter()
import jax
import jax.numpy
middle = time.perf_counter()
brought_by_jax = set(sys.modules)
import ergodica
end = time.perf_counter()
print((end - begin) / (middle - begin))
print(*sorted(set(sys.modules) - brought_by_jax))
"""


def test_import_is_light():
    """Asserts on modules; the time, which depends on what else the machine does, is only printed."""
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    ratio, modules = answer.stdout.splitlines()
    print(f"import ergodica takes {float(ratio):.2f} times import jax")
    loaded = modules.split()
    assert "ergodica" in loaded
    assert [m for m in loaded if any(m == name or m.startswith(name + ".") for name in HEAVY)] == []
