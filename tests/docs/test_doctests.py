"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import ergodica

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = sorted(["ergodica", *(info.name for info in pkgutil.walk_packages(ergodica.__path__, "ergodica."))])
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in FINDER.find(module, name) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name, request):
    if name.startswith(
        ("ergodica.estimators.variational", "ergodica.estimators.flows.numpyro")
    ):  # NumPyro mixes dtypes
        request.getfixturevalue("numpyro_promotion")
    for test in examples(name):
        output: list[str] = []
        results = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=output.append)
        assert results.failed == 0, "".join(output)


def test_there_are_examples():
    found = {test.name for name in MODULES for test in examples(name)}
    assert "ergodica.samplers.langevin.SGLD" in found
    assert "ergodica.run.sample.sample" in found
