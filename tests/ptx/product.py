"""What the tests of the product's CUDA kernels share: their PTX, as nvcc emits it for each target, and their arguments.

What runs there is emulated, never hardware. Grids and blocks are those of the launchers in csrc/cuda.
"""

import functools
import hashlib
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reference import BITS, assert_equal, epilogue, pack, product, random_values, unpack

from tools.ptx.machine import In, Module, Out, Struct, build_once, compile_cached, nvcc, nvcc_release
from tools.ptx.mutate import Mutant

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# `make ptx-full`: all targets, and more shapes. (compute_80, which the build keeps as PTX, is what sm_80 is made of.)
FULL = os.environ.get("PTX_FULL") == "1"
ALL_TARGETS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
USUAL_TARGETS = ["sm_75", "sm_80", "sm_90a", "sm_120"]
DRAWN = 64 if FULL else 8
"""Random shapes of a kernel."""
SEEDS = 5 if FULL else 2
"""With which each of a kernel's shapes is run: another one is another schedule of the warps, and other data."""


def seeded(shapes: list) -> Iterator[tuple[int, tuple]]:
    """Each shape with several seeds."""
    return enumerate(SEEDS * shapes)


def drawn_rows(most: int) -> list[tuple[int, int]]:
    """Random numbers of rows and of values in them, for the kernels that work row by row."""
    return list(map(tuple, np.random.default_rng(1).integers(1, (20, most), (DRAWN, 2)).tolist()))


def targets(first: str = "sm_75", last: str = "sm_120") -> list[str]:
    """Those from `first` to `last` whose PTX is executed."""
    span = ALL_TARGETS[ALL_TARGETS.index(first) : ALL_TARGETS.index(last) + 1]
    return [target for target in span if FULL or target in USUAL_TARGETS]


TARGETS = targets()
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


@functools.cache
def layout(name: str) -> str:
    """The format of a struct of csrc/cuda/kernels.h for Python's module struct, as the C++ compiler lays it out.

    The values are those of the fields in the order of layouts.cpp, which must be the order of the struct.
    """
    program = Path(__file__).with_name("layouts.cpp")
    # A program is made again if what it includes has changed.
    key = hashlib.sha256(repr((program.read_text(), source("kernels.h"), nvcc_release())).encode()).hexdigest()[:16]

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
    """What PTX says but for its target: without what is for debuggers, and a file's random part of names."""
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


def total_letter(out: torch.dtype) -> str:
    """T in a mangled name."""
    return "d" if out is torch.float64 else "i" if out is torch.int32 else "f"


def aligned_words_for(k: int) -> int:
    return ceil_div(k, 128) * 4


def row_popcounts(words: np.ndarray, k: int) -> np.ndarray:
    return unpack(torch.from_numpy(words), k).sum(1).to(torch.int32).numpy()


def prepared_header(n: int, k: int) -> np.ndarray:
    """The bytes of PreparedHeader (csrc/packed.h) in CUDA's prepared form.

    They are written out here, not taken from C++, because the form is stored in files and must not change by accident.
    """
    return np.frombuffer(struct.pack("<8sIIqq32x", b"bitorchq", 64, 0, n, k), np.uint8).copy()


@dataclass
class Call:
    """Arguments of one product with their reference: a struct Product of csrc/cuda/kernels.h."""

    fields: Struct
    output: Out
    y: np.ndarray
    out: torch.dtype
    expected: torch.Tensor
    what: tuple

    def check(self) -> None:
        """All of y is written, and equals the reference."""
        assert_equal(torch.from_numpy(self.y).view(self.out), self.expected, self.what)
        assert self.output.unwritten == 0, self.what


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
) -> Call:
    """Random words, in the interchange form with random bits past k, or in the aligned form; and what their product is.

    Both have popcounts, which only the AND kernels read. `header` is that of a prepared form, to be checked by kernels.
    """
    generator = np.random.default_rng(seed)
    words = [generator.integers(-(2**31), 2**31, (rows, ceil_div(k, 32)), dtype=np.int32) for rows in (m, n)]
    if aligned:
        clean = [pack(unpack(torch.from_numpy(w), k)).numpy() for w in words]
        words = [np.pad(w, ((0, 0), (0, aligned_words_for(k) - w.shape[1]))) for w in clean]
    stride = words[0].shape[1]
    unpacked = [unpack(torch.from_numpy(w[:, : ceil_div(k, 32)].copy()), k) for w in words]
    popcounts = [u.sum(1).to(torch.int32).numpy() for u in unpacked]
    y = np.zeros((m, n), numpy(torch.zeros(1, dtype=out)).dtype)
    output = Out(y)
    operands = [value for w, p in zip(words, popcounts, strict=True) for value in (In(w), stride, In(p))]
    channels = [
        value for v in (scale, bias) for value in ((None, 0) if v is None else (In(numpy(v)), DTYPES[v.dtype][0]))
    ]
    memory = None if header is None else In(header)
    fields = Struct(layout("Product"), *operands, m, n, k, output, DTYPES[out][0], *channels, memory)
    expected = epilogue(product(*(2.0 * u.double() - 1 for u in unpacked)), bias, scale, out)
    return Call(fields, output, y, out, expected, (m, n, k, out))


def channels_of(out: torch.dtype, n: int) -> list[dict[str, torch.Tensor]]:
    """No bias and scale, either, and both, as arguments of a product: all values that they may have. int32 has none."""
    if out is torch.int32:
        return [{}]
    generator = torch.Generator().manual_seed(n)
    total = torch.float64 if out is torch.float64 else torch.float32
    bias, scale = random_values((n,), total, generator), torch.randn(n, generator=generator).to(total)
    scale[:3] = torch.tensor([torch.inf, torch.nan, 3e38])
    return [{}, {"bias": bias}, {"scale": scale}, {"bias": bias, "scale": scale}]


@functools.cache
def float32_source(name: str) -> str:
    """Return a product's file with float32 as the only type of outputs.

    nvcc compiles it in a second, and there are many mutants. The lines of the other types are removed from the text,
    because a switch in the kernels themselves would exist only for the tests; the count shows that all were found.
    """
    text, types = re.subn(r".*case DType::(?!float32)\w+: return function.*\n", "", source(name))
    assert types == 4
    return text


def edited(text: str, edits: list[tuple[str, str]], target: str = "sm_80") -> list[Mutant]:
    """A mutant for each edit of a file's text, all of which must be there once."""
    for old, _ in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return [Mutant(f"{old} -> {new}", compiled(text.replace(old, new), target)) for old, new in edits]
