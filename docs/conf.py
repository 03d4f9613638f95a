"""Sphinx's configuration: ``make docs`` builds the pages into ``build/docs``."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "bitorch_qlinear"
copyright = "the authors of bitorch_qlinear, Apache-2.0"
release = version = runpy.run_path(str(ROOT / "bitorch_qlinear" / "_version.py"))["__version__"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["experiments"]
html_theme = "furo"
html_title = f"{project} {version}"

myst_heading_anchors = 3

default_role = "code"  # for single backticks in docstrings

autodoc_mock_imports = ["transformers"]  # one module of the package imports it, and these pages need none of it
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute is part of its class's text, not an object that autodoc describes a second time

# Every reference must lead somewhere, except to what other projects describe: the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"(torch|collections)\..*"),
    (r"py:class", r"bitorch_qlinear\..*\._\w+"),  # type variables, which have no page
]
