"""The Python in the pages runs, paths and commands that they name exist, and their figures are the committed ones."""

import json
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from bitorch_qlinear.quantizations import registry

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WITH_PYTHON = [name for name in NAMES if "```python" in (ROOT / name).read_text()]

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]*)\)")
FOLDERS = ("bitorch_qlinear", "csrc", "examples", "benchmarks", "tools", "tests", "docs", ".ci")
PATH = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*")
TO_COME = {
    "bitorch_qlinear/distributed.py",
    "bitorch_qlinear/export/",
    "examples/cpp/",
}
"""The places that CONTRIBUTING keeps for later features."""


def prose(name: str) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the pages' code writes checkpoints
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))  # it also registers a quantization
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / name)
    examples = list(document.examples())
    assert len(examples) == (ROOT / name).read_text().count("```python")
    for example in examples:
        example.evaluate()


def test_pages_have_python():
    assert {"README.md", "docs/quickstart.md", "docs/training.md", "docs/inference.md"} <= set(WITH_PYTHON)


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name):
    paths = [match[0] for code in CODE.findall(prose(name)) for match in [PATH.fullmatch(code)] if match]
    missing = [path for path in paths if path not in TO_COME and "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_paths_are_looked_at():
    found = {path for name in NAMES for path in CODE.findall(prose(name)) if PATH.fullmatch(path)}
    assert {"csrc/cpu/kernel.h", "tests/support/"} | TO_COME <= found


def test_places_to_come_are_free():
    assert not [path for path in TO_COME if (ROOT / path).exists()], "some of TO_COME exist now: remove them from it"


@pytest.mark.parametrize("name", NAMES)
def test_links_exist(name):
    links = [link.partition("#")[0] for link in LINK.findall(prose(name)) if not re.match(r"\w+:|#|$", link)]
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / name).read_text()
    named = re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)
    assert not set(named) - targets


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "clean"])
def test_make_targets_can_be_planned(target):
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, env=environment)


def test_readme_quotes_the_page_on_training():
    sentence = re.search(r"default, None.*?\)", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    without, with_threshold = re.findall(r"(\d+\.\d %)", sentence)
    page = (ROOT / "docs" / "training.md").read_text()
    assert re.search(rf"^\| None, 0.01 \| .* \| {without}", page, re.MULTILINE)
    assert re.search(rf"^\| \*\*1.0, 0.01\*\* \| .* \| {with_threshold}", page, re.MULTILINE)


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 160


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {name for tree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for name in tree.split()}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_training_tables_are_made_of_the_committed_figures():
    pytest.importorskip("sklearn")
    program = runpy.run_path(str(ROOT / "docs" / "experiments" / "training.py"))
    figures = json.loads(program["RESULTS"].read_text())
    text = program["PAGE"].read_text()
    assert program["fill"](text, figures) == text, "run python docs/experiments/training.py --tables"
    changed = json.loads(program["RESULTS"].read_text().replace('"accuracy": 0.9', '"accuracy": 0.8'))
    assert program["fill"](text, changed) != text
