"""Products that start while pack or align still runs, which makes their x: they wait before they touch what it writes.

The interpreter stops a kernel that reads such memory before `griddepcontrol.wait`, or through the path for data that no
kernel writes meanwhile (`ld.global.nc`).
"""

import re
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


X, X_BITS, WEIGHT, WEIGHT_BITS, Y = 0, 2, 3, 5, 9
"""The fields of a Product with the words of x and of the weights, the set bits of both, and the outputs."""
WRITTEN = (X, X_BITS, WEIGHT_BITS, Y)
"""What pack or align may write or, of y, still read."""


class Early:
    """A module whose products start before the kernel that makes x has ended.

    `fields` are those that it may touch only after that. Set bits that belong to a prepared form are never among them.
    """

    def __init__(self, module: Module, fields: tuple[int, ...] = WRITTEN) -> None:
        self.module, self.ptx, self.fields = module, module.ptx, fields

    def launch(self, kernel: str, grid: Any, block: Any, args: Sequence[Any], *rest: Any, **more: Any) -> Report:
        values = [args[0].values[field] for field in self.fields]
        written = [value for value in values if isinstance(value, (In, Out))]
        return self.module.launch(kernel, grid, block, args, *rest, dependent=written, **more)


def check_mma(
    module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0, **more: Any
) -> None:
    mma_sm80.check_mma(module, m, n, k, out, mma_sm80.SMALL, seed=seed, **more)


def check_wgmma(
    module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0, **more: Any
) -> None:
    if k:  # the launcher leaves a product of no values to another kernel
        wgmma_sm90a.check_wgmma(module, m, n, k, out, list(wgmma_sm90a.STAGES)[seed % 2], seed, **more)


PRODUCTS: dict[str, Callable[..., object]] = {
    "gemm_skinny": skinny.check_skinny,
    "gemm_skinny_mma_sm80": skinny_mma_sm80.check_skinny,
    "gemm_mma_sm80": check_mma,
    "gemm_mma_int8_sm80": check_mma,
    "gemm_wgmma_sm90a": check_wgmma,
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


@each_product
def test_products_that_start_early(name):
    early = Early(module(f"{name}.cu", TARGET))
    for seed, (m, n, k) in enumerate([(1, 9, 700), (2, 70, 4129), (4, 9, 1), (16, 33, 9000), (3, 5, 0)]):
        # The launch before counts the set bits of weights that have no form.
        for out, formed in ((torch.int32, seed % 2), (torch.bool, (seed + 1) % 2)):
            PRODUCTS[name](early, m, n, k, out, seed=seed, **({} if formed else {"header": None}))
    for m, n, k in [(20, 33, 700), (64, 5, 2100)] if name == "gemm_skinny_mma_sm80" else ():
        PRODUCTS[name](early, m, n, k, torch.bfloat16)


def test_wgmma_starts_early():
    """The weights of all stages of the ring, and of fewer, are copied before x is there; a block has several tiles."""
    early = Early(module("gemm_wgmma_sm90a.cu", TARGET))
    for seed, stages in enumerate([1, 5, 7]):
        for tile in wgmma_sm90a.STAGES:
            n = (tile[1] + 3, 2 * tile[1] + 5)[seed % 2]
            k = 1024 * stages - 7
            wgmma_sm90a.check_wgmma(early, 140, n, k, torch.bfloat16, tile, seed, blocks=1, header=None)


@each_product
def test_weights_are_read_early(name):
    early = Early(module(f"{name}.cu", TARGET), (WEIGHT,))
    with pytest.raises(PtxFault, match=r"is read before griddepcontrol\.wait"):
        PRODUCTS[name](early, 4, 9, 700)


def test_wgmma_without_a_result_waits():
    """It writes y only after pack has ended, even if the weights were prepared for another product."""
    early = Early(module("gemm_wgmma_sm90a.cu", TARGET))
    check_wrong_forms(lambda call: wgmma_sm90a.launch(early, call, wgmma_sm90a.NARROW), 3, 9, 700)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "wgmma" not in name])
def test_loads_of_weights_do_not_wait(name):
    """The skinny kernels load their first weights before they wait, and by no load that ptxas moves past the wait.

    Those of tiles copy the weights of one stage, or of all four if L2 bounds the tile.
    """
    for symbol, found in module(f"{name}.cu", TARGET).ptx.kernels.items():
        opcodes = [instruction.opcode for instruction in found.instructions]
        wait = opcodes.index("griddepcontrol.wait")
        assert opcodes.count("griddepcontrol.wait") == 1
        loads = [opcode for opcode in opcodes[:wait] if opcode.startswith("ld.global")]
        copies = [opcode for opcode in opcodes[:wait] if opcode.startswith("cp.async.cg")]
        if name.startswith("gemm_skinny"):
            assert any(".L1::no_allocate." in opcode for opcode in loads) and not copies
            assert not any(".nc." in opcode for opcode in loads)
            continue
        tile = tuple(map(int, re.search(r"ShapeILi(\d+)ELi(\d+)E", symbol).groups()))
        stages = mma_sm80.STAGES if tile == mma_sm80.SMALL else 1
        assert not loads and len(copies) == stages * tile[1] * mma_sm80.STAGE_BYTES // 16 // mma_sm80.THREADS[tile]


def fields_that_catch(text: str, mutant: Mutant, run: Callable[[Early, int], None]) -> set[int]:
    """Return the fields that a mutant touches too early, of those that the kernel itself does not."""

    def is_caught(text: str, field: int) -> bool:
        try:
            run(Early(Module.from_ptx(text), (field,)), 0)
        except PtxFault as fault:
            assert fault.kind == "dependent launch"
            return True
        return False

    assert not any(is_caught(text, field) for field in WRITTEN)
    return {field for field in WRITTEN if is_caught(mutant.text, field)}


def test_mutants_of_the_waits_of_wgmma_are_caught():
    """The producer waits, each consumer, and a block without results."""

    def multiply(early: Early, seed: int) -> None:
        wgmma_sm90a.check_wgmma(early, 4, 9, 700, torch.bfloat16, seed=seed, header=None)

    def run(module: Module, seed: int) -> None:
        early = Early(module)
        multiply(early, seed)
        call = product_call(4, 9, 700, torch.bfloat16, seed=seed, aligned=True, header=prepared_header(9, 701))
        wgmma_sm90a.launch(early, call, wgmma_sm90a.NARROW, seed=seed)
        call.check_no_result((9, 701))

    text = wgmma_sm90a.ptx()
    mutants = remove("wait removed", text, kernel(Module.from_ptx(text), "multiply_tiles"), r"griddepcontrol\.wait")
    assert len(mutants) == 3
    assert_caught(text, mutants, run, seeds=range(1))
    caught = sorted(sorted(fields_that_catch(text, mutant, multiply)) for mutant in mutants)
    assert caught == [[], [X], [X_BITS, WEIGHT_BITS, Y]]


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "wgmma" not in name])
def test_mutants_of_the_wait_are_caught(name):
    def multiply(early: Early, seed: int) -> None:
        PRODUCTS[name](early, 4, 9, 700, seed=seed, header=None)

    def run(module: Module, seed: int) -> None:
        try:
            multiply(Early(module), seed)
        except PtxFault as fault:
            assert fault.kind == "dependent launch"
            raise

    text = compiled(source_of_type(f"{name}.cu", "int32"), TARGET)
    shape = {"gemm_skinny": "ShapeILi4ELi2E", "gemm_skinny_mma_sm80": "ShapeILi1ELi1E"}.get(name, "ShapeILi64E")
    launched = kernel(Module.from_ptx(text), shape)
    mutants = remove("wait removed", text, launched, r"griddepcontrol\.wait")
    assert len(mutants) == 1
    counted = set() if name.startswith("gemm_skinny") else {X_BITS, WEIGHT_BITS}  # skinny kernels count by themselves
    assert fields_that_catch(text, mutants[0], multiply) == {X, Y, *counted}
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
    _, (early,) = launcher(product_job(4, 70, 700), starts_early=True)
    assert early.starts_early and not usual.starts_early
    early.starts_early = False
    assert early == usual
