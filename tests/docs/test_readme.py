"""The README's Python is executed as it stands, and its commands exist."""

import os
import subprocess
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write a checkpoint
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / "README.md")
    examples = list(document.examples())
    assert len(examples) >= 2
    for example in examples:
        example.evaluate()
    assert (tmp_path / "packed.pt").exists()


@pytest.mark.parametrize("target", ["demo", "test", "lint", "clean"])
def test_make_targets_exist(target):
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, env=environment)


def test_linked_files_exist():
    text = (ROOT / "README.md").read_text()
    for name in ("csrc/overview.svg", "csrc/DESIGN.md", "CONTRIBUTING.md"):
        assert f"({name})" in text
        assert (ROOT / name).exists()
