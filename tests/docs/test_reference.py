"""The reference names everything public, what the README shows runs, and what classes cite is in the bibliography."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import ergodica
from ergodica.core.cite import bibliography
from tests.conftest import ROOT

PUBLIC = [
    "ergodica",
    *(
        package.name
        for package in pkgutil.walk_packages(ergodica.__path__, "ergodica.")
        if package.ispkg
        and package.name != "ergodica.cli"
        and hasattr(importlib.import_module(package.name), "__all__")
    ),
]
"""Every package that says what is public in it; commands are looked for below."""
CONTRACTS = (
    "ergodica.core.kernel.AbstractKernel",
    "ergodica.core.gradient.AbstractGradientEstimator",
    "ergodica.core.types.Batch",
    "ergodica.core.types.Estimate",
)
PAGES = sorted((ROOT / "docs" / "reference").glob("*.rst"))


def listed_names() -> set[str]:
    """Every name in an autosummary list of the reference."""
    return {name for page in PAGES for name in re.findall(r"^   (ergodica(?:\.\w+)+)$", page.read_text(), re.MULTILINE)}


def resolve(path: str) -> object:
    """Find what a dotted name stands for; where a module and what it defines share a name, the latter."""
    parent, _, name = path.rpartition(".")
    if not parent:
        return importlib.import_module(path)
    try:
        return getattr(resolve(parent), name)
    except AttributeError:
        return importlib.import_module(path)


def is_listed(value: object) -> bool:
    return any(resolve(name) is value for name in listed_names())


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package):
    module = importlib.import_module(package)
    assert module.__all__, package
    values = {name: getattr(module, name) for name in module.__all__}
    missing = [name for name, value in values.items() if not inspect.ismodule(value) and not is_listed(value)]
    assert not missing, f"add to docs/reference: {missing}"


@pytest.mark.parametrize("name", CONTRACTS)
def test_contracts_are_in_the_reference(name):
    assert name in listed_names()


def test_commands_are_in_the_reference():
    from ergodica.cli import app

    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert names
    assert all(f"\nergodica {name} --help\n" in page for name in names)


def test_listed_names_exist_and_are_documented():
    for name in listed_names():
        assert inspect.getdoc(resolve(name)), name


def test_a_missing_name_would_be_noticed():
    assert not is_listed(listed_names)


def algorithm_classes() -> set[type]:
    """Every class of the package that says what to cite."""
    found = set()
    for info in pkgutil.walk_packages(ergodica.__path__, "ergodica."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == info.name and hasattr(value, "references"):
                found.add(value)
    return found


def test_what_is_cited_is_in_the_bibliography():
    cited = {key for cls in algorithm_classes() for key in cls.references}
    assert cited
    assert cited <= bibliography().keys(), cited - bibliography().keys()


def test_bibliography_is_sorted_and_read_whole():
    text = (ROOT / "ergodica" / "core" / "bibliography.bib").read_text()
    keys = re.findall(r"^@\w+\{(.*),$", text, re.MULTILINE)
    assert keys == sorted(set(keys)), "one entry a key, in their order"
    assert list(bibliography()) == keys
    assert len(re.findall("^@", text, re.MULTILINE)) == len(keys)


def python_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


CHECKS_OF_THE_README = """
assert dt.attrs["result"] == "successful"
assert erg.diagnose(dt)["R-hat"].status == "passed"
assert erg.diagnose(dt)["temperature"].status == "passed"
"""


def test_the_readme_runs_and_is_right(tmp_path):
    """As a newcomer would run it: as a file of its own, under JAX's default settings."""
    (block,) = python_blocks(ROOT / "README.md")
    script = tmp_path / "readme.py"
    script.write_text(block + CHECKS_OF_THE_README)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "temperature" in done.stdout


def test_the_changelog_and_the_version_agree():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(Unreleased|" + re.escape(ergodica.__version__) + r")\]", text, re.MULTILINE)
