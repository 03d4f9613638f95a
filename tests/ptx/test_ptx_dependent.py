"""Products behind pack or align, launched while it still runs: they wait before they touch what it writes.

The interpreter stops a kernel that reads such memory before `griddepcontrol.wait`, or through the path for data that no
kernel writes meanwhile (`ld.global.nc`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tools.ptx.machine import In, Module, Out, PtxFault, Report
from tools.ptx.mutate import Mutant, assert_caught, remove

from . import test_ptx_mma_sm80 as mma_sm80
from . import test_ptx_skinny as skinny
from . import test_ptx_skinny_mma_sm80 as skinny_mma_sm80
from . import test_ptx_wgmma_sm90a as wgmma_sm90a
from .launcher import Launcher
from .product import check_wrong_forms, compiled, kernel, module, prepared_header, product_call, source_of_type
from .test_ptx_align import check_align
from .test_ptx_launchers import product_job
from .test_ptx_pack import check_pack

TARGET = "sm_90a"
"""The target of the devices on which products are launched in this way (launches_depend in csrc/cuda/records.h)."""


X, WEIGHT = (0, 2), (3,)
"""The fields of a Product with x's words and set bits, and with the words of the weights."""
Y = 9
"""The field with the outputs, which the product may not write before x is there either."""


class BehindPack:
    """A module whose products start before the kernel that makes x has ended.

    Pack writes x and its set bits; align writes the set bits and perhaps x. `fields` are those of what is written.
    """

    def __init__(self, module: Module, fields: tuple[int, ...] = X) -> None:
        self.module, self.ptx, self.fields = module, module.ptx, (*fields, Y)

    def launch(self, kernel: str, grid: Any, block: Any, args: Sequence[Any], *rest: Any, **more: Any) -> Report:
        values = [args[0].values[field] for field in self.fields]
        written = [value for value in values if isinstance(value, (In, Out))]
        return self.module.launch(kernel, grid, block, args, *rest, dependent=written, **more)


def check_mma(module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0) -> None:
    mma_sm80.check_mma(module, m, n, k, out, mma_sm80.SMALL, seed=seed)


def check_wgmma(module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0) -> None:
    if k:  # the launcher leaves a product of no values to another kernel
        wgmma_sm90a.check_wgmma(module, m, n, k, out, list(wgmma_sm90a.STAGES)[seed % 2], seed)


PRODUCTS: dict[str, Callable[..., object]] = {
    "gemm_skinny": skinny.check_skinny,
    "gemm_skinny_mma_sm80": skinny_mma_sm80.check_skinny,
    "gemm_mma_sm80": check_mma,
    "gemm_mma_int8_sm80": check_mma,
    "gemm_wgmma_sm90a": check_wgmma,
}
EARLY = ("gemm_skinny", "gemm_skinny_mma_sm80", "gemm_wgmma_sm90a")
"""The products that load or copy weights before they wait; the others, which copy stages, wait first."""
each_product = pytest.mark.parametrize("name", PRODUCTS)


@each_product
def test_products_behind_pack(name):
    behind = BehindPack(module(f"{name}.cu", TARGET))
    for seed, (m, n, k) in enumerate([(1, 9, 700), (2, 70, 4129), (4, 9, 1), (16, 33, 9000), (3, 5, 0)]):
        PRODUCTS[name](behind, m, n, k, seed=seed)
        PRODUCTS[name](behind, m, n, k, torch.bool, seed=seed)
    for m, n, k in [(20, 33, 700), (64, 5, 2100)] if name == "gemm_skinny_mma_sm80" else ():
        PRODUCTS[name](behind, m, n, k, torch.bfloat16)


def test_wgmma_behind_pack():
    """The weights of all stages of the ring, and of fewer, are copied before x is there; a block has several tiles."""
    behind = BehindPack(module("gemm_wgmma_sm90a.cu", TARGET))
    for seed, stages in enumerate([1, 5, 7]):
        for tile in wgmma_sm90a.STAGES:
            n = (tile[1] + 3, 2 * tile[1] + 5)[seed % 2]
            wgmma_sm90a.check_wgmma(behind, 140, n, 1024 * stages - 7, torch.bfloat16, tile, seed, blocks=1)


@each_product
def test_weights_are_read_early(name):
    behind = BehindPack(module(f"{name}.cu", TARGET), WEIGHT)
    if name in EARLY:
        with pytest.raises(PtxFault, match=r"is read before griddepcontrol\.wait"):
            PRODUCTS[name](behind, 4, 9, 700)
    else:
        PRODUCTS[name](behind, 4, 9, 700)


def test_wgmma_without_a_result_waits():
    """y may be written only when all before pack has ended, also if the weights were prepared for another product."""
    behind = BehindPack(module("gemm_wgmma_sm90a.cu", TARGET))
    check_wrong_forms(lambda call: wgmma_sm90a.launch(behind, call, wgmma_sm90a.NARROW), 3, 9, 700)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "wgmma" not in name])
def test_loads_of_weights_do_not_wait(name):
    """The skinny kernels load their first weights before they wait, by the path for data that no kernel writes."""
    for found in module(f"{name}.cu", TARGET).ptx.kernels.values():
        opcodes = [instruction.opcode for instruction in found.instructions]
        wait = opcodes.index("griddepcontrol.wait")
        assert opcodes.count("griddepcontrol.wait") == 1
        early = [opcode for opcode in opcodes[:wait] if opcode.startswith(("ld.global", "cp.async"))]
        assert any(".nc." in opcode for opcode in early) == name.startswith("gemm_skinny")


def test_mutants_of_the_waits_of_wgmma_are_caught():
    """The producer waits, each consumer, and a block without results."""

    def run(module: Module, seed: int) -> None:
        behind = BehindPack(module)
        wgmma_sm90a.check_wgmma(behind, 4, 9, 700, torch.bfloat16, seed=seed)
        call = product_call(4, 9, 700, torch.bfloat16, seed=seed, aligned=True, header=prepared_header(9, 701))
        wgmma_sm90a.launch(behind, call, wgmma_sm90a.NARROW, seed=seed)
        call.check_no_result((9, 701))

    text = wgmma_sm90a.ptx()
    mutants = remove("wait removed", text, kernel(Module.from_ptx(text), "multiply_tiles"), r"griddepcontrol\.wait")
    assert len(mutants) == 3
    assert_caught(text, mutants, run, seeds=range(1))


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "wgmma" not in name])
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
def test_the_kernel_that_makes_x_lets_the_product_start(target):
    """Each thread of pack and align says so at once, on the target whose products are launched in this way."""
    for report in (
        check_pack(module("pack.cu", target), torch.bfloat16, 3, 700),
        check_align(module("align.cu", target), 3, 700),
    ):
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
