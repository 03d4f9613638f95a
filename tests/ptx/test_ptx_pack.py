"""csrc/cuda/pack.cu, executed as PTX against the reference; and its mutants."""

import numpy as np
import pytest
import torch
from reference import FLOATS, assert_equal, in_range, pack, random_values, signs, unpack

from .machine import In, InOut, Module, Out
from .mutate import assert_caught
from .product import DTYPES, TARGETS, ceil_div, compiled, edited, kernel, module, numpy, source


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
