"""The product's CUDA kernels, executed as the PTX that nvcc emits for each target, against the reference; and mutants.

What runs here is emulated, never hardware. Grids and blocks are those of the launchers in csrc/cuda.
"""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import BITS, FLOATS, assert_equal, epilogue, in_range, pack, product, random_values, signs, unpack

from .machine import In, InOut, Module, Out, Struct, compile_cached, nvcc
from .mutate import Mutant, assert_caught, remove_barriers

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
TARGETS = ["sm_75", "sm_80", "sm_90a", "sm_120"]
# DType of csrc/dtype.h, and how a type is called in a mangled name.
DTYPES = {torch.float64: (0, "d"), torch.float32: (1, "f"), torch.float16: (2, "6__half"), torch.int32: (4, "i")}
DTYPES[torch.bfloat16] = (3, "13__nv_bfloat16")

if nvcc() is None and os.environ.get("CI") != "true":
    pytest.skip("nvcc, whose PTX is executed here, is not installed", allow_module_level=True)


@functools.cache
def source(name: str) -> str:
    """A kernel file with our headers in place of their includes, so that its text is all that it depends on."""
    text, seen = (CUDA / name).read_text(), set()

    def include(match: re.Match) -> str:
        path = next(
            p for p in (CUDA / match[1], CUDA.parent / match[1], CUDA / match[1].removeprefix("../")) if p.exists()
        )
        path = path.resolve()
        if path in seen:
            return ""
        seen.add(path)
        return re.sub(r'#include "([^"]+)"', include, path.read_text().replace("#pragma once", ""))

    return re.sub(r'#include "([^"]+)"', include, text)


def compiled(text: str, target: str) -> str:
    return compile_cached(text, target, ("-std=c++20", "-O3"))


@functools.cache
def module(name: str, target: str) -> Module:
    return Module.from_ptx(compiled(source(name), target))


def kernel(module: Module, pattern: str) -> str:
    (found,) = [name for name in module.ptx.kernels if re.search(pattern, name)]
    return found


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(BITS[tensor.dtype]).numpy() if tensor.dtype in BITS else tensor.numpy()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- pack ------------------------------------------------------------------------------------------------------------


def segment(dtype: torch.dtype) -> int:
    """Values of a row that a warp packs."""
    return 4 * 32 * (16 // dtype.itemsize)


def check_pack(module: Module, dtype: torch.dtype, m: int, k: int, strict: bool, padding: int, seed: int = 0) -> None:
    """Pack m rows of k values that lie k + padding apart: signs, in-range bits and popcounts of the rows."""
    generator = torch.Generator().manual_seed(1000 * k + seed)
    stride = k + padding
    x = random_values((m, stride), dtype, generator)
    aligned = stride * dtype.itemsize % 16 == 0
    name = kernel(module, rf"pack_rowsI{DTYPES[dtype][1]}Lb{strict:d}ELb{aligned:d}E")
    words = [np.zeros((m, ceil_div(k, 32)), np.int32) for _ in range(2)]
    popcounts = np.zeros(m, np.int32)
    segments = ceil_div(k, segment(dtype))
    outputs = [Out(array) for array in words]
    memory = In(numpy(x).reshape(-1)[: (m - 1) * stride + k])  # a view's last row may be all that is left of it
    arguments = [memory, m, k, stride, segments, 1.0, *outputs, InOut(popcounts)]
    module.launch(name, ceil_div(m * segments, 8), 256, arguments, seed=seed)
    what = (dtype, m, k, strict, padding)
    expected = pack(signs(x[:, :k], strict) > 0)
    assert_equal(torch.from_numpy(words[0]), expected, what)
    assert_equal(torch.from_numpy(words[1]), pack(in_range(x[:, :k], 1.0)), what)
    assert_equal(torch.from_numpy(popcounts), unpack(expected, k).sum(1).to(torch.int32), what)
    assert [output.unwritten for output in outputs] == [0, 0], what


def edges(dtype: torch.dtype) -> list[int]:
    return [1, 31, 32, 33, *(segment(dtype) + d for d in (-1, 0, 1)), 2 * segment(dtype) + 37]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack(target, dtype, strict):
    lanes = 16 // dtype.itemsize  # values of a vector load
    for k in edges(dtype):
        for padding in (-k % lanes, -k % lanes + 1):  # rows that start on 16 bytes, and rows that do not
            check_pack(module("pack.cu", target), dtype, 3, k, strict, padding)
    check_pack(module("pack.cu", target), dtype, 9, 2 * segment(dtype), strict, 0, seed=1)  # more than one block


# ---- gemm_popc -------------------------------------------------------------------------------------------------------


def check_popc(
    module: Module,
    m: int,
    n: int,
    k: int,
    out: torch.dtype = torch.int32,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    seed: int = 0,
) -> None:
    """A product of random words, whose bits past k are random too."""
    generator = np.random.default_rng(seed)
    x, weight = (generator.integers(-(2**31), 2**31, (rows, ceil_div(k, 32)), dtype=np.int32) for rows in (m, n))
    y = np.zeros((m, n), numpy(torch.zeros(1, dtype=out)).dtype)
    output = Out(y)
    vectors = [None if v is None else In(numpy(v)) for v in (bias, scale)]
    number, letter = DTYPES[out]
    total = "d" if out is torch.float64 else "i" if out is torch.int32 else "f"
    columns = ceil_div(n, 64)
    fields = Struct("QQqqqQi4xqi4xQQ", In(x), In(weight), m, n, k, output, number, n, k, *vectors)
    name = kernel(module, rf"multiply_tilesI\w*AsI{letter}{total}E")
    report = module.launch(name, ceil_div(m, 64) * columns, 256, [fields, columns], seed=seed)
    factors = [2.0 * unpack(torch.from_numpy(words), k).double() - 1 for words in (x, weight)]
    expected = epilogue(product(*factors), bias, scale, out)
    assert_equal(torch.from_numpy(y).view(out), expected, (m, n, k, out))
    assert output.unwritten == 0
    assert report.bank_conflicts == 0


def shapes() -> list[tuple[int, int, int]]:
    """Edges of the tile of 64 x 64 outputs and of the stage of 1024 values, and random ones."""
    tile, stage = (1, 63, 64, 65, 131), (1, 31, 32, 33, 992, 1023, 1024, 1025, 2048 + 33)
    drawn = np.random.default_rng(0).integers(1, (140, 140, 2200), (8, 3)).tolist()
    return [
        *((m, 66, 40) for m in tile),
        *((3, n, 40) for n in tile),
        *((2, 65, k) for k in stage),
        *map(tuple, drawn),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_popc(target):
    for seed, shape in enumerate(shapes()):
        check_popc(module("gemm_popc.cu", target), *shape, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_popc_outputs(target, out):
    generator = torch.Generator().manual_seed(0)
    total = torch.float64 if out is torch.float64 else torch.float32
    bias, scale = random_values((67,), total, generator), torch.randn(67, generator=generator).to(total)
    scale[:3] = torch.tensor([torch.inf, torch.nan, 3e38])
    check_popc(module("gemm_popc.cu", target), 5, 67, 333, out)
    if out is not torch.int32:
        for vectors in ({"bias": bias}, {"scale": scale}, {"bias": bias, "scale": scale}):
            check_popc(module("gemm_popc.cu", target), 5, 67, 333, out, **vectors)


# ---- mutants ---------------------------------------------------------------------------------------------------------


def edited(name: str, edits: list[tuple[str, str]]) -> list[Mutant]:
    text = source(name)
    for old, _ in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return [Mutant(f"{old} -> {new}", compiled(text.replace(old, new), "sm_80")) for old, new in edits]


def test_mutants_of_pack_are_caught():
    def run(module: Module, seed: int) -> None:
        for dtype in (torch.float32, torch.float16):
            for m, k, padding in ((3, 37, 3), (9, segment(dtype) + 1, 7), (2, 33, 0), (1, 64, 0)):
                for strict in (False, True):
                    check_pack(module, dtype, m, k, strict, padding, seed)

    edits = [
        ("column + i < k ?", "column + i <= k ?"),
        ("Aligned && column + kVector<T> <= k", "Aligned && column < k"),
        ("const bool exists = column + i < k;", "const bool exists = true;"),
        ("kVector<T> * (threadIdx.x % kLanes)", "kVector<T> * (threadIdx.x % kWarp)"),
        ("distance < kLanes", "distance < kLanes / 2"),
        ("item >= m * segments", "item > m * segments"),
        ("lane % kLanes == 0 && column < k", "lane % kLanes == 0 && column <= k"),
        ("if (writes) count += __popc(word);", "count += __popc(word);"),
        ("(bits ^ sign) - 1", "(bits ^ sign)"),
        ("<= limit && exists", "< limit && exists"),
        ("row * stride", "row * k"),
    ]
    assert_caught(compiled(source("pack.cu"), "sm_80"), edited("pack.cu", edits), run, seeds=range(2))


def test_mutants_of_popc_are_caught():
    def run(module: Module, seed: int) -> None:
        bias = torch.randn(70, generator=torch.Generator().manual_seed(seed))
        check_popc(module, 66, 70, 1025 + 32, torch.float32, bias, bias.flip(0), seed)
        check_popc(module, 1, 1, 31, seed=seed)

    text = compiled(source("gemm_popc.cu"), "sm_80")
    edits = [
        ("begin + row < rows", "begin + row <= rows"),
        ("first + word < width", "first + word <= width"),
        ("first + word == width - 1 && k % 32", "false"),
        ("m < product.m && n < product.n", "m <= product.m && n < product.n"),
        ("x[word][ty + kSide * i]", "x[word][tx + kSide * i]"),
        ("stage[word][row] = value", "stage[word][row ^ 1] = value"),
        ("weight[word][tx + kSide * i]", "weight[word ^ 1][tx + kSide * i]"),
        ("first < width; first += kStage", "first + kStage < width; first += kStage"),
        ("y.k - popcount - popcount", "y.k - popcount"),
        ("__fmul_rn(a, b)", "__fmul_rz(a, b)"),
    ]
    mutants = [*edited("gemm_popc.cu", edits), *remove_barriers(text, kernel(Module.from_ptx(text), "AsIffE"))]
    assert len(mutants) >= len(edits) + 2
    assert_caught(text, mutants, run, seeds=range(2))
