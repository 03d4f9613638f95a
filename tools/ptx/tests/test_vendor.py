"""The interpreter agrees with what NVIDIA says: CuTe's layouts, and the constants that ptxas folds.

The headers of CuTe come from the package nvidia-cutlass, cuobjdump from triton (the extra `vendor`, and a torch for
CUDA). CI has them in its second half; where one is missing, the tests are skipped.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ...machine_code import find_cuobjdump
from ..machine import In, Out, build_once, nvcc, nvcc_release
from .helpers import module, run
from .test_matrix import B1_SHAPES
from .test_warpgroup import ASYNC, COMMIT, FENCE, IMAGE, PARAMS, WAIT, kernel, registers, result

RNG = np.random.default_rng(7)


# ---- CuTe ------------------------------------------------------------------------------------------------------------
def cuda_headers() -> list[Path]:
    """Return the folders of CUDA's headers, those of the toolkit that nvcc belongs to."""
    compiler = nvcc()
    if compiler is None:
        return []
    said = subprocess.run([compiler, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    home = Path(found[1]) if found else Path(compiler).resolve().parents[1]
    return [path for path in (home / "include", home / "include" / "cccl") if path.is_dir()]


def cutlass_headers() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "source" / "include" / "cute").is_dir():
            return Path(folder) / "source" / "include"
    return None


def skip(why: str) -> None:
    """Skip the test, except in the half of CI that installs what it needs."""
    if os.environ.get("CI") == "true" and os.environ.get("BITORCH_QLINEAR_BUILD_CUDA") == "1":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def cute() -> dict[str, list[list[str]]]:
    """Return the lines that cute_layouts.cpp prints, by the line that introduces them."""
    headers = cutlass_headers()
    if headers is None:
        skip("CuTe's headers are missing: pip install nvidia-cutlass")
    if not cuda_headers():
        skip("CUDA's headers, which CuTe includes, are missing: there is no nvcc")
    source = Path(__file__).with_name("cute_layouts.cpp")
    compiler = os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))

    def make(path: Path) -> None:
        includes = [f"-I{folder}" for folder in (headers, *cuda_headers())]
        program = path.with_suffix(".program")
        subprocess.run([*compiler.split(), "-std=c++17", "-w", *includes, str(source), "-o", program], check=True)
        path.write_text(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        program.unlink()

    key = hashlib.sha256(repr((source.read_text(), str(headers), nvcc_release())).encode()).hexdigest()[:16]
    found: dict[str, list[list[str]]] = {}
    for line in build_once(f"cute-{key}.txt", make).read_text().splitlines():
        words = line.split()
        if words[0] in ("matrix", "fragment"):
            lines = found.setdefault(line, [])
        elif words[0] in ("descriptor", "chunk", "element", "broken"):
            lines.append(words)
    return found


def elements(cute: dict[str, list[list[str]]], name: str, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (thread, value, row, column) of a fragment."""
    for _, thread, value, index in cute[f"fragment {name}"]:
        yield int(thread), int(value), int(index) % rows, int(index) // rows


def test_fragments_of_mma(cute):
    """test_matrix.py compares the interpreter with these functions."""
    count = 0
    for shape, (rows, _, a_at, b_at, c_at, _) in B1_SHAPES.items():
        for part, at, height in (("a", a_at, rows), ("b", b_at, 8), ("c", c_at, rows)):
            if shape == "m16n8k128" and part == "a":
                continue
            for thread, value, row, column in elements(cute, f"{shape}.{part}", height):
                want = at(thread, value)
                assert (row, column) == (want if part != "b" else want[::-1]), (shape, part, thread, value)
                count += 1
    assert count == 32 * (32 + 32 + 2 + 32 + 4 + 128 + 64 + 4)


def test_fragments_of_mma_of_bytes(cute):
    """An 8-bit element i of a lane is at group or group + 8, and four consecutive columns a thread."""
    for depth in (16, 32):
        for thread, value, row, column in elements(cute, f"m16n8k{depth}.a", 16):
            group = thread >> 2
            assert row == (group if value < 4 or 8 <= value < 12 else group + 8)
            assert column == thread % 4 * 4 + (value & 3) + (16 if value >= 8 else 0)
        for thread, value, row, column in elements(cute, f"m16n8k{depth}.b", 8):
            assert row == thread >> 2
            assert column == thread % 4 * 4 + (value & 3) + (16 if value >= 4 else 0)


@pytest.mark.parametrize("n", [8, 24, 256])
def test_accumulators_of_wgmma(cute, n):
    """`result` in test_warpgroup.py reads the accumulators as CuTe does."""
    numbers = np.arange(n // 2 * 128).reshape(n // 2, 128)
    got = result(numbers)
    for thread, value, row, column in elements(cute, f"wgmma.d{n}", 64):
        assert got[row, column] == numbers[value, thread]


def test_a_of_wgmma_in_registers(cute):
    """A byte of A lies in register value / 4, at the row and the four bytes of K that test_warpgroup.py says."""
    for thread, value, row, byte in elements(cute, "wgmma.a", 64):
        warp, lane, r = thread // 32, thread % 32, value // 4
        assert row == 16 * warp + lane // 4 + 8 * (r % 2)
        assert byte == 4 * (lane % 4 + 4 * (r // 2)) + value % 4


@pytest.mark.parametrize(
    ("swizzle", "row_bytes"), [(0, 32), (0, 64), (32, 32), (32, 64), (64, 64), (128, 128), (128, 256)]
)
def test_descriptors(cute, swizzle, row_bytes):
    """Matrices that lie in shared memory as CuTe lays them out give the right product with CuTe's descriptors."""
    image, at, bits = np.zeros(IMAGE, np.uint8), 24576, []
    steps = row_bytes // 32
    matrices, descriptors = [], []
    for base, rows in ((0, 64), (at, 96)):
        lines = cute[f"matrix {swizzle} {rows} {row_bytes}"]
        assert not [line for line in lines if line[0] == "broken"]
        data = RNG.integers(0, 256, (rows, row_bytes)).astype(np.uint8)
        matrices.append(np.unpackbits(data, axis=1, bitorder="little"))
        descriptors.append([int(line[2], 16) for line in lines if line[0] == "descriptor"])
        for _, row, chunk, place in (line for line in lines if line[0] == "chunk"):
            to = base + int(place)
            image[to : to + 16] = data[int(row), 16 * int(chunk) : 16 * int(chunk) + 16]
            bits.append(to)
    assert len(set(bits)) == len(bits) and len(descriptors[0]) == steps
    body = FENCE
    for step in range(steps):
        for register, base, all_ in (("%rd6", 0, descriptors[0]), ("%rd7", at, descriptors[1])):
            body += f"add.u32 %r21, %r20, {base}; shr.u32 %r21, %r21, 4; cvt.u64.u32 {register}, %r21;"
            body += f"add.u64 {register}, {register}, {all_[step]};"
        body += ASYNC.format(n=96, d=registers(96), a="%rd6", p="%p6" if step else "%p7")
    d = np.zeros((48, 128), np.int32)
    run(kernel(body + COMMIT + WAIT, 96), [Out(d), In(image)], threads=128, params=PARAMS)
    a, b = (matrix.astype(np.int64) for matrix in matrices)
    assert (result(d) == a @ b.T).all()


# ---- ptxas -----------------------------------------------------------------------------------------------------------
# Each takes constants a, b, c (32 bits), f, g (floats), p (a double), and s, t, small (numbers); it leaves %d. ptxas
# leaves other instructions, such as lop3, prmt and other roundings, to the machine.
FOLDED = [
    *(f"{op}.{sign}32 %d, {{a}}, {{b}};" for op in ("mul.lo", "mul.hi", "min", "max", "add", "sub") for sign in "us"),
    *(f"{op}.b32 %d, {{a}}, {{b}};" for op in ("and", "or", "xor")),
    *(f"{op}.b32 %d, {{a}};" for op in ("not", "cnot", "brev", "popc", "clz")),
    *(f"{op}.s32 %d, {{a}};" for op in ("abs", "neg")),
    *(f"mad.lo.{sign}32 %d, {{a}}, {{b}}, {{c}};" for sign in "us"),
    *(f"mul24.lo.{sign}32 %d, {{a}}, {{b}};" for sign in "us"),
    *(f"{op} %d, {{a}}, {{s}};" for op in ("shl.b32", "shr.u32", "shr.s32")),
    *(f"shf.{side}.{mode}.b32 %d, {{a}}, {{b}}, {{s}};" for side in "lr" for mode in ("wrap", "clamp")),
    *(f"bfe.{sign}32 %d, {{a}}, {{s}}, {{t}};" for sign in "us"),
    "bfi.b32 %d, {a}, {b}, {s}, {t};",
    *(f"bfind{shift}.{sign}32 %d, {{a}};" for sign in "us" for shift in ("", ".shiftamt")),
    *(f"szext.{mode}.{sign}32 %d, {{a}}, {{s}};" for mode in ("wrap", "clamp") for sign in "us"),
    *(f"dp4a.{x}32.{y}32 %d, {{a}}, {{b}}, {{c}};" for x in "us" for y in "us"),
    *(f"{op}.{sign}32 %d, {{a}}, {{small}};" for op in ("div", "rem") for sign in "us"),
    *(f"setp.{test}.{sign}32 %x, {{a}}, {{b}}; selp.b32 %d, 1, 2, %x;" for test in ("lt", "ge", "eq") for sign in "us"),
    *(f"set.{test}.u32.{sign}32 %d, {{a}}, {{b}};" for test in ("le", "ne") for sign in "us"),
    *(f"setp.{test}.f32 %x, {{f}}, {{g}}; selp.b32 %d, 1, 2, %x;" for test in ("lt", "geu", "nan", "equ", "num")),
    *(f"{op}.rn{ftz}.f32 %e, {{f}}, {{g}}; mov.b32 %d, %e;" for op in ("add", "sub", "mul") for ftz in ("", ".ftz")),
    *(f"{op}.f32 %e, {{f}}, {{g}}; mov.b32 %d, %e;" for op in ("min", "max", "min.NaN")),
    *(f"{op}.f32 %e, {{f}}; mov.b32 %d, %e;" for op in ("abs", "neg", "abs.ftz")),
    *(f"cvt.{mode}.{sign}32.f32 %d, {{f}};" for mode in ("rni", "rzi", "rmi", "rpi") for sign in "us"),
    *(f"cvt.rn.f32.{sign}32 %e, {{a}}; mov.b32 %d, %e;" for sign in "us"),
    "cvt.rn.f32.f64 %e, {p}; mov.b32 %d, %e;",
    "cvt.rn.f16.f32 %i, {f}; cvt.u32.u16 %d, %i;",
    "cvt.rn.bf16.f32 %i, {f}; cvt.u32.u16 %d, %i;",
    "cvt.rn.f16x2.f32 %d, {f}, {g};",
    "mov.b64 %l, {{{a}, {b}}}; shl.b64 %l, %l, {s}; mov.b64 {{_, %d}}, %l;",
    "mul.wide.s32 %l, {a}, {b}; mov.b64 {{_, %d}}, %l;",
    "mul.wide.u32 %l, {a}, {b}; mov.b64 {{%d, _}}, %l;",
]
FLOATS = [
    0,
    0x80000000,
    1,
    0x807FFFFF,
    0x7F7FFFFF,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x3F800000,
    0x4B000001,
    0x477FF000,
]


def constants() -> dict[str, str]:
    """Draw one constant of each kind, as PTX writes it; half of them are edge cases."""

    def drawn(edges: list[int], other: int) -> int:
        return int(RNG.choice(edges)) if RNG.integers(2) else other

    integers = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x0000FF80]
    found = {name: f"0x{drawn(integers, int(RNG.integers(1 << 32))):08x}" for name in "abc"}
    for name in "fg":
        near_one = int(RNG.integers(100, 160)) << 23 | int(RNG.integers(1 << 23)) | int(RNG.integers(2)) << 31
        found[name] = f"0f{drawn(FLOATS, near_one):08X}"
    (double,) = struct.unpack("<Q", struct.pack("<d", RNG.standard_normal() * 2.0 ** RNG.integers(-40, 40)))
    found["p"] = f"0d{double:016X}"
    return found | {"s": str(RNG.integers(40)), "t": str(RNG.integers(36)), "small": str(RNG.integers(1, 1000))}


DECLARE = ".reg .b32 %d; .reg .pred %x; .reg .f32 %e; .reg .b16 %i; .reg .f64 %g; .reg .b64 %l;"


def stored_constants(cubin: Path) -> dict[int, int]:
    """Return, by offset, the values that STG stores from registers whose constant the machine code loads."""
    text = subprocess.run([find_cuobjdump(), "-sass", cubin], check=True, capture_output=True, text=True).stdout
    known: dict[str, int] = {"RZ": 0, "URZ": 0}
    found = {}
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)(?: (.*?))? ;\s+/\* 0x([0-9a-f]{16}) \*/"
    for guard, opcode, operands, code in re.findall(pattern, text, re.MULTILINE):
        names = [name.strip().removesuffix(".reuse") for name in operands.split(",")]
        if opcode.startswith("STG"):
            offset = re.search(r"\+(0x[0-9a-f]+)\]", operands)
            if names[-1] in known:
                found[int(offset[1], 16) if offset else 0] = known[names[-1]]
            continue
        if not names or not re.fullmatch(r"U?R\d+", names[0]):
            continue
        value: int | None = None
        immediate = int(code, 16) >> 32
        if opcode in ("MOV", "UMOV", "IMAD.MOV.U32", "IMAD.U32", "HFMA2.MMA", "HFMA2", "CS2R"):
            zeros = opcode not in ("HFMA2.MMA", "HFMA2") or names[1:3] == ["-RZ", "RZ"]
            moved = opcode in ("MOV", "UMOV") or opcode.startswith("HFMA2") or names[1:3] == ["RZ", "RZ"]
            if zeros and moved:
                value = known.get(names[-1]) if re.fullmatch(r"U?R(\d+|Z)", names[-1]) else immediate
        wide = ".64" in opcode or ".WIDE" in opcode or opcode.startswith(("CS2R", "D", "LDC"))
        for more in range(4 if wide else 1):
            known.pop(re.sub(r"\d+", lambda number, by=more: str(int(number[0]) + by), names[0]), None)
        if value is not None and not guard and "c[" not in operands:
            known[names[0]] = value
    return found


def test_folded_constants(tmp_path):
    """ptxas computes instructions of constants itself. What it stores is what the interpreter computes."""
    ptxas = shutil.which("ptxas") or (nvcc() and str(Path(nvcc() or "").with_name("ptxas")))
    if not ptxas or not Path(ptxas).exists():
        skip("there is no ptxas")
    try:
        find_cuobjdump()
    except FileNotFoundError as error:
        skip(str(error))
    compared, different = 0, []
    for part in range(12):
        cases = [text.format(**constants()) for text in FOLDED]
        body = "".join(
            f"\n{{ {DECLARE} {text} st.volatile.global.u32 [%out+{4 * k}], %d; }}" for k, text in enumerate(cases)
        )
        launched = module(body)
        cubin = tmp_path / f"{part}.cubin"
        # ptxas does not let a register have the name of a special one.
        (tmp_path / "folded.ptx").write_text(re.sub(r"%tid\b(?!\.)", "%thread", launched.text))
        subprocess.run([ptxas, "-arch=sm_90a", str(tmp_path / "folded.ptx"), "-o", cubin], check=True)
        got = np.zeros(len(cases), np.uint32)
        launched.launch("k", 1, 1, [Out(got)])
        for offset, value in stored_constants(cubin).items():
            compared += 1
            if value != got[offset // 4]:
                different.append(f"{cases[offset // 4]} ptxas {value:#x}, interpreter {got[offset // 4]:#x}")
    assert not different, "\n".join(different)
    assert compared > 8 * len(FOLDED), (compared, len(FOLDED))
