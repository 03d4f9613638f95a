"""The table in docs/cuda.md agrees with these tests, the targets of the build and the measurements on a GPU."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from .product import ALL_TARGETS, CUDA, code, compiled, source

ROOT = Path(__file__).parents[2]
SAME_CODE = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_100": "sm_120"}
"""The target whose PTX is identical, for each of these targets: executing one executes the other."""
HARDWARE = {"H200": "sm_90a"}
"""The devices in the cells of the table, with the target for which the operators were compiled there."""


def figures() -> dict[str, Any]:
    """Return the committed results of `make gpu`."""
    return json.loads((ROOT / "benchmarks" / "results" / "gpu" / "gpu.json").read_text())


def ran_on_hardware(kernel: str) -> bool:
    """Return whether the committed results prove that this kernel ran."""
    found = figures()
    if kernel == "pack":
        return "pack_bits" in found["packing"]
    if kernel == "unpack":
        return "QLinear" in found["training"]  # its backward expands the bits
    if kernel == "align":
        return any(row["k"] % 128 and row["contestant"] == "packed x" for row in found["products"])
    contestants = f"packed x, {kernel}", f"bf16 x, packed inside, {kernel}"
    return any(row["contestant"] in contestants for row in found["products"])


def table() -> dict[str, dict[str, str]]:
    """Return the cells of the table by kernel and target."""
    text = (ROOT / "docs" / "cuda.md").read_text()
    lines = text[text.index("<!-- status") : text.index("<!-- /status")].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    targets = rows[0][2:]
    cells = [(name, row[2:]) for row in rows[2:] for name in re.findall(r"`(\w+)`", row[0])]
    return {name: dict(zip(targets, row, strict=True)) for name, row in cells}


def interpreted(kernel: str) -> list[str]:
    """Return the targets that a kernel's tests run without `make ptx-full`, and those with the same code."""
    module = importlib.import_module(f"ptx.test_ptx_{kernel}")
    usual = set(importlib.import_module("ptx.product").USUAL_TARGETS) & set(module.TARGETS)
    return [target for target in ALL_TARGETS if SAME_CODE.get(target, target) in usual]


@pytest.mark.parametrize("target", SAME_CODE)
@pytest.mark.parametrize("file", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_same_code(file, target):
    text = source(file.name)
    assert code(compiled(text, target)) == code(compiled(text, SAME_CODE[target]))


def test_table_has_every_kernel_and_target():
    files = {path.stem.removeprefix("gemm_") for path in CUDA.glob("*.cu")}
    assert set(table()) == files
    setup = (ROOT / "setup.py").read_text()
    compiled = re.search(r"^CUDA_ARCHITECTURES = \[(.*)\]$", setup, re.MULTILINE)[1]
    built = [f"sm_{architecture}" for architecture in re.findall(r'"(\w+)"', compiled)]
    assert built == ALL_TARGETS
    assert all(list(cells) == built for cells in table().values())


@pytest.mark.parametrize("kernel", sorted(table()))
def test_table_is_true(kernel):
    cells = table()[kernel]
    assert set(cells.values()) <= {"interpreted", "compiled", "–", *HARDWARE}
    # The kernels that ran on hardware are interpreted too.
    assert [target for target, cell in cells.items() if cell not in ("compiled", "–")] == interpreted(kernel)
    ran = {target for target, cell in cells.items() if cell in HARDWARE}
    assert ran == ({target_of_the_figures()} if ran_on_hardware(kernel) else set())
    assert all(HARDWARE[cells[target]] == target for target in ran)


def target_of_the_figures() -> str:
    """Return the target for which the operators of the committed results were compiled."""
    return "sm_" + figures()["setting"]["built_for"].replace(".", "")


def test_committed_results_are_of_the_device_that_the_table_names():
    setting = figures()["setting"]
    (name,) = HARDWARE
    assert setting["device"] == f"NVIDIA {name}" and target_of_the_figures() == HARDWARE[name]
    assert name in (ROOT / "docs" / "cuda.md").read_text()
