"""The parts that the tests of the CUDA kernels share: their PTX, as nvcc emits it for each target, and their arguments.

The interpreter runs the kernels; no hardware is used. Grids and blocks are those of the launchers in csrc/cuda.
"""

import functools
import hashlib
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reference import BITS, assert_equal, bits, epilogue, pack, product, random_values, unpack

from tools.ptx.machine import In, InOut, Module, Out, Report, Struct, build_once, compile_cached, nvcc, nvcc_release
from tools.ptx.mutate import Mutant

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# `make ptx-full` sets it and runs all targets and more shapes. (sm_80 is compiled from compute_80, which the build
# keeps as PTX.)
FULL = os.environ.get("PTX_FULL") == "1"
ALL_TARGETS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
USUAL_TARGETS = ["sm_75", "sm_80", "sm_90a", "sm_120"]
DRAWN = 64 if FULL else 8
"""The number of random shapes of a kernel."""
SEEDS = 5 if FULL else 2
"""The number of seeds with which each shape runs; a seed decides the schedule of the warps and the data."""


def seeded(shapes: list) -> Iterator[tuple[int, tuple]]:
    """Yield each shape with several seeds."""
    return enumerate(SEEDS * shapes)


def bit_shapes(rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of words and of a kernel's tile, and some of no values."""
    m = sorted({1, 7, 8, 9, 15, 16, 17, rows - 1, rows, rows + 1, 2 * rows + 3})
    n = sorted({1, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, columns - 1, columns, columns + 1, 2 * columns + 3})
    return [*((m, 70, 40) for m in m), *((3, n, 40) for n in n), *((rows + 1, columns + 6, k) for k in (0, 1, 33))]


def seeded_bits(shapes: list) -> Iterator[tuple[int, tuple]]:
    """Yield each shape once, or with several seeds in `make ptx-full`: the epilogue of bits is all that is new."""
    return enumerate((SEEDS if FULL else 1) * shapes)


def usual(cases: list) -> list:
    """Return every fourth case, or all of them in `make ptx-full`: each mutant is compiled, which takes seconds."""
    return cases if FULL else cases[::4]


def drawn_rows(most: int) -> list[tuple[int, int]]:
    """Return random numbers of rows and of values in a row, for the kernels that work row by row."""
    return list(map(tuple, np.random.default_rng(1).integers(1, (20, most), (DRAWN, 2)).tolist()))


def targets(first: str = "sm_75", last: str = "sm_120") -> list[str]:
    """Return the targets from `first` to `last` whose PTX is executed."""
    span = ALL_TARGETS[ALL_TARGETS.index(first) : ALL_TARGETS.index(last) + 1]
    return [target for target in span if FULL or target in USUAL_TARGETS]


TARGETS = targets()
# The number of each type in DType of csrc/dtype.h, and its name in mangled names.
DTYPES = {torch.float64: (0, "d"), torch.float32: (1, "f"), torch.float16: (2, "6__half"), torch.int32: (4, "i")}
DTYPES[torch.bfloat16] = (3, "13__nv_bfloat16")
OUT_TYPES = {**DTYPES, torch.bool: (6, "NS0_3BitE")}
"""The same of the output types of products; torch.bool stands for outputs that are bits."""

if nvcc() is None and os.environ.get("CI") != "true":
    pytest.skip("nvcc, whose PTX is executed here, is not installed", allow_module_level=True)


@functools.cache
def source(name: str) -> str:
    """Return a kernel file with our headers in place of their includes, so that it depends only on its text."""
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


@functools.cache
def layout(name: str) -> str:
    """Return the format of a struct of csrc/cuda/kernels.h for Python's module struct, as the C++ compiler lays it out.

    The values are those of the fields in the order of layouts.cpp, which must be the order of the struct.
    """
    program = Path(__file__).with_name("layouts.cpp")
    # A program is made again if what it includes has changed.
    key = hashlib.sha256(repr((program.read_text(), source("fused_plan.h"), nvcc_release())).encode()).hexdigest()[:16]

    def make(path: Path) -> None:
        subprocess.run([nvcc(), "-std=c++20", f"-I{CUDA}", str(program), "-o", str(path)], check=True)

    lines = subprocess.run([build_once(f"layouts-{key}", make)], check=True, capture_output=True, text=True).stdout
    text, end = "=", 0
    for struct_name, field, offset, letter in map(str.split, lines.splitlines()):
        if struct_name == name:
            padding = int(offset) - end
            assert padding >= 0, f"layouts.cpp: {field} of {name} is not in the order of kernels.h"
            text += f"{padding}x" * (padding > 0) + letter * (field != "end")
            end = struct.calcsize(text)
    return text


def compiled(text: str, target: str) -> str:
    return compile_cached(text, target, ("-std=c++20", "-O3"))


def code(ptx: str) -> str:
    """Return PTX without its target, comments, debug information and the random part of a file's name."""
    text = re.sub(r"^\.target .*$", "", re.sub(r"//.*", "", ptx[: ptx.index("\t.file")]), flags=re.MULTILINE)
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?)_[0-9a-f]{8}", r"\1", text)


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


def output_name(out: torch.dtype) -> str:
    """Return what As<...> of csrc/cuda/epilogue.cuh is for this type of outputs in a mangled name."""
    total = "d" if out is torch.float64 else "i" if out in (torch.int32, torch.bool) else "f"
    return f"AsI{OUT_TYPES[out][1]}{total}E"


def whole_vectors(n: int, out: torch.dtype) -> bool:
    """Return what rows_on_16_bytes of csrc/cuda/epilogue.cuh says of rows in memory that starts on 16 bytes."""
    return n * out.itemsize % 16 == 0


def aligned_words_for(k: int) -> int:
    return ceil_div(k, 128) * 4


def row_popcounts(words: np.ndarray, k: int) -> np.ndarray:
    return unpack(torch.from_numpy(words), k).sum(1).to(torch.int32).numpy()


def prepared_header(n: int, k: int) -> np.ndarray:
    """Return the bytes of PreparedHeader (csrc/packed.h) in CUDA's prepared form.

    They are written out here, not taken from C++, because the form is stored in files and must not change by accident.
    """
    return np.frombuffer(struct.pack("<8sIIqq32x", b"bitorchq", 64, 0, n, k), np.uint8).copy()


@dataclass
class Call:
    """The arguments of one product, a struct Product of csrc/cuda/kernels.h, with its reference."""

    fields: Struct
    output: Out
    y: np.ndarray
    out: torch.dtype
    expected: torch.Tensor
    what: tuple
    wrong_form: np.ndarray
    """The report about the prepared form, a WrongForm of csrc/cuda/prepared.h; all zeros at first."""

    def check(self, report: Report | None = None) -> None:
        """Assert that y is written and equals the reference; by a report, that each word of bits is stored once."""
        assert_equal(torch.from_numpy(self.y).view(self.expected.dtype), self.expected, self.what)
        assert self.output.unwritten == 0, self.what
        assert not self.wrong_form.any(), self.what
        if report and self.out is torch.bool:
            stored = sum(n for opcode, n in report.instructions.items() if opcode.startswith("st.global"))
            assert stored == self.y.size, self.what

    def check_no_result(self, form: tuple[int, int]) -> None:
        """Assert that y holds no result, and that the report has the sizes of the product and of the form."""
        _, n, k = self.what[:3]
        if self.out in (torch.bool, torch.int32):
            wanted = torch.full_like(self.expected, 0 if self.out is torch.bool else -(2**31))
        else:
            wanted = torch.full_like(self.expected, torch.nan)
        got = torch.from_numpy(self.y).view(wanted.dtype)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert self.output.unwritten == 0, self.what
        assert self.wrong_form.tolist() == [n, k, *form, 1]


def limits_of(counts: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """Return a limit for each column of counts that is one of them or next to one, or an extreme value."""
    m, n = counts.shape
    limits = counts[generator.integers(0, max(m, 1), n), np.arange(n)] if m else np.zeros(n, np.int64)
    limits = limits + generator.integers(-1, 2, n)
    extremes = np.array([-(2**31), -1, 0, k - 1, k, 2**31 - 1])
    return np.where(generator.random(n) < 0.1, generator.choice(extremes, n), limits).astype(np.int32)


def outputs_of(
    dots: torch.Tensor,
    k: int,
    out: torch.dtype,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    generator: np.random.Generator,
    flipped: bool,
) -> tuple[torch.Tensor, np.ndarray, list[object]]:
    """Return what a kernel must make of a product of k signs, memory for it, and the kernel's arguments of channels.

    Outputs that are bits have random limits and, if `flipped`, random flips in the place of scale and bias.
    """
    m, n = dots.shape
    if out is torch.bool:
        limits = limits_of((k - dots.long().numpy()) // 2, k, generator)
        flips = generator.integers(-(2**31), 2**31, ceil_div(n, 32), dtype=np.int32) if flipped else None
        scale, bias = (None if v is None else torch.from_numpy(v) for v in (limits, flips))
        expected = bits(dots, k, scale, bias)
        y = np.zeros((m, ceil_div(n, 32)), np.int32)
    else:
        expected = epilogue(dots, bias, scale, out)
        y = np.zeros((m, n), numpy(torch.zeros(1, dtype=out)).dtype)
    channels = [
        value for v in (scale, bias) for value in ((None, 0) if v is None else (In(numpy(v)), DTYPES[v.dtype][0]))
    ]
    return expected, y, channels


def product_call(
    m: int,
    n: int,
    k: int,
    out: torch.dtype = torch.int32,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    seed: int = 0,
    aligned: bool = False,
    header: np.ndarray | None = None,
    flipped: bool = True,
) -> Call:
    """Return random words, in the interchange form with random bits past k or in the aligned form, and their product.

    Both have popcounts, which only the AND kernels read. Kernels check `header`, which is that of a prepared form.
    Outputs that are bits have random limits and, if `flipped`, random flips, of which those past n must not count.
    """
    generator = np.random.default_rng(seed)
    words = [generator.integers(-(2**31), 2**31, (rows, ceil_div(k, 32)), dtype=np.int32) for rows in (m, n)]
    if aligned:
        clean = [pack(unpack(torch.from_numpy(w), k)).numpy() for w in words]
        words = [np.pad(w, ((0, 0), (0, aligned_words_for(k) - w.shape[1]))) for w in clean]
    stride = words[0].shape[1]
    unpacked = [unpack(torch.from_numpy(w[:, : ceil_div(k, 32)].copy()), k) for w in words]
    popcounts = [u.sum(1).to(torch.int32).numpy() for u in unpacked]
    dots = product(*(2.0 * u.double() - 1 for u in unpacked))
    expected, y, channels = outputs_of(dots, k, out, bias, scale, generator, flipped)
    output = Out(y)
    operands = [value for w, p in zip(words, popcounts, strict=True) for value in (In(w), stride, In(p))]
    wrong_form, memory = np.zeros(5, np.int64), None
    if header is not None:
        # The popcounts of the weights lie behind the header.
        operands[5] = In(np.concatenate([header, popcounts[1].view(np.uint8)])).at(len(header))
        memory = InOut(wrong_form)
    fields = Struct(layout("Product"), *operands, m, n, k, output, OUT_TYPES[out][0], *channels, memory)
    return Call(fields, output, y, out, expected, (m, n, k, out), wrong_form)


def check_wrong_forms(
    launch: Callable[[Call], object],
    m: int,
    n: int,
    k: int,
    make: Callable[..., Call] | None = None,
) -> None:
    """Check that a kernel reports weights that were prepared for another product, and writes no result."""
    make = make or functools.partial(product_call, aligned=True)
    right = prepared_header(n, k)
    wrong = [(prepared_header(n, k + 1), (n, k + 1)), (prepared_header(n - 1, k), (n - 1, k))]
    for byte in (0, 7, 8):  # bytes of the magic number, and one of the layout
        wrong.append((right.copy(), (-1, -1)))
        wrong[-1][0][byte] ^= 1
    for out in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool):
        for header, form in wrong if out is torch.float32 else wrong[:1]:
            call = make(m, n, k, out, header=header)
            launch(call)
            call.check_no_result(form)
    for header in (None, right):
        call = make(m, n, k, header=header)
        launch(call)
        call.check()


def channels_of(out: torch.dtype, n: int) -> list[dict[str, torch.Tensor]]:
    """Return all kinds of bias and scale as arguments of a product: neither, one, and both. int32 has neither."""
    if out is torch.int32:
        return [{}]
    generator = torch.Generator().manual_seed(n)
    total = torch.float64 if out is torch.float64 else torch.float32
    bias, scale = random_values((n,), total, generator), torch.randn(n, generator=generator).to(total)
    scale[:3] = torch.tensor([torch.inf, torch.nan, 3e38])
    return [{}, {"bias": bias}, {"scale": scale}, {"bias": bias, "scale": scale}]


BIT_EDITS = [
    ("static_cast<int32_t>(popcount) <= limit", "static_cast<int32_t>(popcount) < limit"),
    ("all_flips && exist ?", "false ?"),
    ("all_limits[column] : INT32_MIN", "all_limits[column] : 0x7fffffff"),
]
"""Mutants of the epilogue of bits, which all kernels have in common: csrc/cuda/epilogue.cuh."""
EDGE_EDITS = [
    ("row < product.m && column < product.n", "row <= product.m && column < product.n"),
    ("row < product.m && column < product.n", "row < product.m"),
]
"""The same of the kernels whose tiles have rows and words that do not exist."""


@functools.cache
def source_of_type(name: str, dtype: str = "float32") -> str:
    """Return a product's file with one type of outputs, a name of DType in csrc/dtype.h; boolean stands for bits.

    nvcc compiles it in a second, and there are many mutants. The lines of the other types are removed from the text,
    because a switch in the kernels themselves would exist only for the tests; the count shows that all were found.
    """
    text, types = re.subn(rf".*case DType::(?!{dtype})\w+: return function.*\n", "", source(name))
    assert types == 5
    return text


def edited(text: str, edits: list[tuple[str, str]], target: str = "sm_80", always: bool = False) -> list[Mutant]:
    """Return a mutant for each edit of a text, or for the usual ones; each old text, of all edits, must occur once."""
    for old, _ in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    chosen = edits if always else usual(edits)
    return [Mutant(f"{old} -> {new}", compiled(text.replace(old, new), target)) for old, new in chosen]
