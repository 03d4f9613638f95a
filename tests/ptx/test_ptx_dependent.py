"""Products behind pack, launched while it still runs: they touch what it writes only after they have waited for it.

The interpreter stops a kernel that reads such memory before `griddepcontrol.wait`, or through the path for data that no
kernel writes meanwhile (`ld.global.nc`).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.ptx.machine import In, Module, PtxFault, Report
from tools.ptx.mutate import Mutant, assert_caught, remove

from . import test_ptx_mma_sm80 as mma_sm80
from . import test_ptx_skinny as skinny
from . import test_ptx_skinny_mma_sm80 as skinny_mma_sm80
from .launcher import Launcher
from .product import compiled, kernel, module, source_of_type
from .test_ptx_launchers import product_job
from .test_ptx_pack import check_pack

TARGET = "sm_90a"
"""The target of the devices on which products are launched in this way (launches_depend in csrc/cuda/records.h)."""


class BehindPack:
    """A module whose products start before pack, which writes their x and its set bits, has ended."""

    def __init__(self, module: Module) -> None:
        self.module, self.ptx = module, module.ptx

    def launch(self, kernel: str, grid: Any, block: Any, args: Sequence[Any], *rest: Any, **more: Any) -> Report:
        written = [value for i, value in enumerate(args[0].values) if i in (0, 2) and isinstance(value, In)]
        return self.module.launch(kernel, grid, block, args, *rest, dependent=written, **more)


def check_mma(module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0) -> None:
    mma_sm80.check_mma(module, m, n, k, out, mma_sm80.SMALL, seed=seed)


PRODUCTS: dict[str, Callable[..., object]] = {
    "gemm_skinny": skinny.check_skinny,
    "gemm_skinny_mma_sm80": skinny_mma_sm80.check_skinny,
    "gemm_mma_sm80": check_mma,
    "gemm_mma_int8_sm80": check_mma,
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


@each_product
def test_products_behind_pack(name):
    behind = BehindPack(module(f"{name}.cu", TARGET))
    for seed, (m, n, k) in enumerate([(1, 9, 700), (2, 70, 4129), (4, 9, 1), (16, 33, 9000), (3, 5, 0)]):
        PRODUCTS[name](behind, m, n, k, seed=seed)
        PRODUCTS[name](behind, m, n, k, torch.bool, seed=seed)
    for m, n, k in [(20, 33, 700), (64, 5, 2100)] if name == "gemm_skinny_mma_sm80" else ():
        PRODUCTS[name](behind, m, n, k, torch.bfloat16)


@each_product
def test_loads_of_weights_do_not_wait(name):
    """The skinny kernels load their first weights before they wait; the others, which copy stages, wait first."""
    for found in module(f"{name}.cu", TARGET).ptx.kernels.values():
        opcodes = [instruction.opcode for instruction in found.instructions]
        wait = opcodes.index("griddepcontrol.wait")
        assert opcodes.count("griddepcontrol.wait") == 1
        early = [opcode for opcode in opcodes[:wait] if opcode.startswith(("ld.global", "cp.async"))]
        assert any(".nc." in opcode for opcode in early) == name.startswith("gemm_skinny")


@each_product
def test_mutants_of_the_wait_are_caught(name):
    def run(module: Module, seed: int) -> None:
        try:
            PRODUCTS[name](BehindPack(module), 4, 9, 700, seed=seed)
        except PtxFault as fault:
            assert fault.kind == "dependent launch"
            raise

    text = compiled(source_of_type(f"{name}.cu", "int32"), TARGET)
    shape = {"gemm_skinny": "ShapeILi4ELi2E", "gemm_skinny_mma_sm80": "ShapeILi1ELi1E"}.get(name, "ShapeILi64E")
    launched = kernel(Module.from_ptx(text), shape)
    mutants = remove("wait removed", text, launched, r"griddepcontrol\.wait")
    assert len(mutants) == 1
    if name.startswith("gemm_skinny"):
        old = "@exist ld.global.v4.b32 {"
        assert old in text
        mutants.append(
            Mutant("x through the path for constant data", text.replace(old, "@exist ld.global.nc.v4.b32 {"))
        )
    assert_caught(text, mutants, run, seeds=range(1))


@pytest.mark.parametrize("target", ["sm_80", TARGET, "sm_120"])
def test_pack_lets_the_product_start(target):
    """Each thread of pack says so at once, on the target whose products are launched in this way."""
    report = check_pack(module("pack.cu", target), torch.bfloat16, 3, 700)
    said = report.instructions["griddepcontrol.launch_dependents"]
    assert said == (256 if target == TARGET else 0)


@each_product
def test_launchers(name):
    """A product is launched in this way if that is asked for, and in all else as usual."""
    launcher = Launcher(name)
    _, (usual,) = launcher(product_job(4, 70, 700))
    _, (behind,) = launcher(product_job(4, 70, 700), behind_pack=True)
    assert behind.behind_pack and not usual.behind_pack
    behind.behind_pack = False
    assert behind == usual


ASKED_FOR = """
from ptx.launcher import Launcher
from ptx.test_ptx_launchers import product_job
for name in ("gemm_skinny", "gemm_mma_sm80"):
    for _ in range(2):
        error, (launch,) = Launcher(name)(product_job(4, 70, 700), behind_pack=True)
        print(error, launch.behind_pack)
"""


@pytest.mark.parametrize(("target", "depends"), [("80", False), ("90", True), ("0", False)])
def test_code_that_cannot_wait_is_launched_as_usual(target, depends):
    """PTX of 8.0, which the driver compiles for 9.0, lacks the wait; 0 stands for a target that cannot be asked for."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PTX_TARGET_OF_KERNELS": target, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ASKED_FOR], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"0 {depends}"] * 4, done.stderr[-2000:]
