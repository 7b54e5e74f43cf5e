"""Sphinx settings. `make docs` builds the pages and runs every code cell in them; nothing is fetched from a network."""

import hashlib
import os
import pathlib
import sys

import ergodica

ROOT = pathlib.Path(__file__).resolve().parent.parent

project = "ergodica"
author = "The ergodica developers"
project_copyright = author
version = release = ergodica.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "ergodica"
html_static_path = ["_static"]
html_css_files = ["ergodica.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "pygments_light_style": "default",
}
html_sidebars = {"index": []}

# API pages: one a public name, from the docstrings
default_role = "py:obj"
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# executed pages
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_number_source_lines = False


def _hash_of_the_code() -> str:
    """Name the state of the code and of this file: pages run again when either has changed, not only when they have."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for file in sorted((ROOT / "ergodica").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


nb_execution_cache_path = str(ROOT / "docs" / "_build" / "jupyter_cache" / _hash_of_the_code())

# what the kernels that run the pages inherit
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["COLUMNS"] = "100"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, under a kernel without widgets
os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.prefix) / "bin"), os.environ["PATH"]])


def skip_fields_of_records(_app: object, _what: str, name: str, obj: object, *_: object) -> bool | None:
    """Leave out the members of NamedTuples: their fields are listed under Attributes in the docstring."""
    is_field = type(obj).__name__ == "_tuplegetter"
    inherited_from_tuple = getattr(obj, "__objclass__", None) is tuple or getattr(tuple, name, None) is obj
    return True if is_field or inherited_from_tuple else None


def setup(app: object) -> None:
    """Connect the hook."""
    app.connect("autodoc-skip-member", skip_fields_of_records)
