"""Settings that every test runs under: strict promotion, no silent broadcasting, compiled code kept between runs."""

import os
import pathlib

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax")
)
# workers, and processes that tests start, read each other's programs, the small ones too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_disable_most_optimizations", True)  # for what modules compute when they are imported; see below
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave to `make sweep` what comes after the first ``n`` cases of tests that are marked ``swept_after(n)``."""
    seen = {}
    for item in items:
        marker = item.get_closest_marker("swept_after")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            seen[test] = seen.get(test, 0) + 1
            if seen[test] > marker.args[0]:
                item.add_marker(pytest.mark.sweep)


@pytest.fixture(autouse=True)
def compilation(request):
    """Compile with few optimisations where that saves more than it costs.

    Most tests run a program once or twice, and its compilation is nearly all of their time. What runs for long says so with
    the marker ``optimised``; it, the sweep, the pages, the examples and programs in processes of their own are compiled as
    users have them.
    """
    as_users = any(request.node.get_closest_marker(name) for name in ("optimised", "slow", "sweep"))
    jax.config.update("jax_disable_most_optimizations", not as_users)


@pytest.fixture
def x64():
    """Double precision for one test: ``@pytest.mark.usefixtures("x64")``."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key_reuse_checker():
    """Raise where a random key is consumed twice."""
    with jax.debug_key_reuse(True):
        yield


@pytest.fixture
def numpyro_promotion():
    """JAX's standard promotion, for laws and guides of NumPyro that mix dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
