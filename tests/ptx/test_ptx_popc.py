"""The PTX of csrc/cuda/gemm_popc.cu equals the reference, and its mutants are caught."""

import numpy as np
import pytest
import torch
from support.reference import FLOATS, random_values

from tools.ptx.machine import Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers

from .product import (
    BIT_EDITS,
    DRAWN,
    EDGE_EDITS,
    TARGETS,
    bit_shapes,
    ceil_div,
    compiled,
    edited,
    kernel,
    module,
    output_name,
    product_call,
    seeded,
    seeded_bits,
    source,
    source_of_type,
    usual,
)


def check_popc(module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, **more) -> Report:
    """Check a product of random words, whose bits past k are random too."""
    call = product_call(m, n, k, out, **more)
    columns = ceil_div(n, 64)
    name = kernel(module, rf"multiply_tilesI\w*{output_name(out)}")
    report = module.launch(name, ceil_div(m, 64) * columns, 256, [call.fields, columns], seed=more.get("seed", 0))
    call.check(report)
    assert report.bank_conflicts == 0
    return report


def shapes() -> list[tuple[int, int, int]]:
    """Return shapes at the edges of the tile of 64 x 64 outputs and of the stage of 1024 values, and random shapes."""
    tile, stage = (1, 63, 64, 65, 131), (1, 31, 32, 33, 992, 1023, 1024, 1025, 2048 + 33)
    drawn = np.random.default_rng(0).integers(1, (140, 140, 2200), (DRAWN, 3)).tolist()
    return [
        *((m, 66, 40) for m in tile),
        *((3, n, 40) for n in tile),
        *((2, 65, k) for k in stage),
        *map(tuple, drawn),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_popc(target):
    for seed, shape in seeded(shapes()):
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


@pytest.mark.parametrize("target", TARGETS)
def test_popc_bits(target):
    for seed, shape in seeded_bits([*bit_shapes(64, 64), (18, 45, 1025)]):
        check_popc(module("gemm_popc.cu", target), *shape, torch.bool, seed=seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize("channels", FLOATS, ids=lambda dtype: "channels-" + str(dtype)[6:])
@pytest.mark.parametrize("out", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_popc_channels_of_any_type(out, channels):
    """Scale and bias are rounded to nearest in T, and may have different types."""
    generator = torch.Generator().manual_seed(1)
    bias, scale = (random_values((67,), channels, generator) for _ in range(2))
    other = torch.randn(67, generator=generator).to(torch.float16)
    for target in TARGETS:
        popc = module("gemm_popc.cu", target)
        check_popc(popc, 2, 67, 70, out, bias=bias, scale=scale)
        check_popc(popc, 2, 67, 70, out, bias=other, scale=scale)
        check_popc(popc, 1, 67, 70, out, bias=bias, scale=other)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_popc_of_no_values(target, out):
    """For k = 0 every dot product is 0, and y = T(0) * scale + bias."""
    popc, generator = module("gemm_popc.cu", target), torch.Generator().manual_seed(2)
    check_popc(popc, 3, 70, 0, out)
    if out is not torch.int32:
        bias, scale = (random_values((70,), torch.float32, generator) for _ in range(2))
        for vectors in ({"bias": bias}, {"scale": scale}, {"bias": bias, "scale": scale}):
            check_popc(popc, 3, 70, 0, out, **vectors)


def test_mutants_of_popc_are_caught():
    def run(module: Module, seed: int) -> None:
        bias = torch.randn(70, generator=torch.Generator().manual_seed(seed))
        check_popc(module, 66, 70, 1025 + 32, torch.float32, bias=bias, scale=bias.flip(0), seed=seed)
        check_popc(module, 1, 1, 31, seed=seed)
        check_popc(module, 2, 65, 0, torch.float32, bias=bias[:65], seed=seed)
        check_popc(module, 1, 70, 40, torch.float32, bias=bias.double() / 3, seed=seed)

    text = compiled(source("gemm_popc.cu"), "sm_80")
    edits = [
        ("begin + row < rows", "begin + row <= rows"),
        ("first + word < width", "first + word <= width"),
        ("first + word == width - 1 && k % 32", "false"),
        ("m >= product.m", "m > product.m"),
        ("column + first + j < n", "column + first + j <= n"),
        ("x[word][ty + kSide * i]", "x[word][tx + kSide * i]"),
        ("stage[word][row] = value", "stage[word][row ^ 1] = value"),
        ("weight[word][tx + kSide * i]", "weight[word ^ 1][tx + kSide * i]"),
        ("first < width; first += kStage", "first + kStage < width; first += kStage"),
        ("row) * operand.stride", "row) * (operand.stride + 1)"),
        ("- 2 * popcount", "- popcount"),
        ("__fmul_rn(a, b)", "__fmul_rz(a, b)"),
        (
            "__longlong_as_double(static_cast<long long>(bits))",
            "__double2float_rz(__longlong_as_double(static_cast<long long>(bits)))",
        ),
    ]
    mutants = [*edited(source("gemm_popc.cu"), edits), *remove_barriers(text, kernel(Module.from_ptx(text), "AsIffE"))]
    assert len(mutants) >= len(usual(edits)) + 2
    assert_caught(text, mutants, run, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        for m, n, k in ((66, 70, 40), (2, 31, 9), (3, 33, 1), (1, 64, 0)):
            check_popc(module, m, n, k, torch.bool, seed=seed)
            check_popc(module, m, n, k, torch.bool, seed=seed, flipped=False)

    edits = [
        *BIT_EDITS,
        *EDGE_EDITS,
        ("static_cast<int32_t>(popcount) <= limit", "static_cast<int32_t>(popcount) > limit"),
        ("static_cast<int32_t>(popcount) <= limit", "popcount <= static_cast<uint32_t>(limit)"),
        ("all_flips && exist ?", "exist ?"),
        ("all_flips && exist ?", "all_flips ?"),
        ("all_flips[first / kWordBits + i] & exist", "all_flips[first / kWordBits + i]"),
        ("column < n ? all_limits", "column <= n ? all_limits"),
        ("left < kWordBits ? static_cast<int>(left)", "left < kWordBits ? static_cast<int>(left + 1)"),
        ("row * word_count(product.n) + column", "row * (product.n / 32) + column"),
        # These are mutants of this kernel's own part.
        ("2 * word + half", "2 * word + (half ^ 1)"),
        ("kSide * j + tx]", "kSide * j + (tx ^ 1)]"),
        ("lane_index() >= kSide", "lane_index() < kSide"),
        ("0x7632 : 0x5410", "0x7632 : 0x5432"),
        ("tx == word", "tx <= word"),
        ("product, row + kSide * i, column + kWordBits * word", "product, row + kSide * i, column"),
        ("channels.flips[word]", "channels.flips[0]"),
    ]
    cxx = source_of_type("gemm_popc.cu", "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
