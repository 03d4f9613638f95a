"""Products in tile registers (AMX): sizes at their bounds, and when a process asks the system for the registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.reference import FLOATS, assert_equal, bits, epilogue, product, random_words, unpack_signs
from support.shapes import tile_products

from bitorch_qlinear import functional as F
from bitorch_qlinear import kernels

needs_amx = pytest.mark.skipif(
    "amx" not in kernels.available(), reason="the processor or the operating system has no AMX"
)


@needs_amx
@pytest.mark.parametrize(("m", "n", "k"), tile_products())
def test_product_at_the_bounds_of_tiles(m, n, k):
    generator = torch.Generator().manual_seed(1000 * k + 10 * n + m)
    x, weight = (random_words(rows, k, generator, stray=True) for rows in (m, n))
    bias, scale = torch.randn(2, n, generator=generator)
    limits = torch.randint(k // 2 - 40, k // 2 + 40, (n,), generator=generator, dtype=torch.int32)
    flips = random_words(1, n, generator, stray=True)[0]
    integers = product(unpack_signs(x, k), unpack_signs(weight, k))
    with kernels.forced("amx"):
        prepared = F.prepare_weight(weight, k)
        assert_equal(F.binary_linear(x, weight, k, out_dtype=torch.int32), integers.to(torch.int32), "int32")
        for dtype in FLOATS:
            got = F.binary_linear(x, weight, k, bias, scale=scale, out_dtype=dtype, weight_prepared=prepared)
            assert_equal(got, epilogue(integers, bias, scale, dtype), dtype)
        got = F.binary_linear(x, weight, k, out_limits=limits, out_flips=flips, weight_prepared=prepared)
        assert_equal(got, bits(integers, k, limits, flips), "bits")


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_compute_the_same(threads):
    generator = torch.Generator().manual_seed(0)
    x, weight = (random_words(rows, 1111, generator) for rows in (203, 2600))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with kernels.forced("amx"):
            got = F.binary_linear(x, weight, 1111, out_dtype=torch.int32)
    finally:
        torch.set_num_threads(before)
    assert_equal(got, product(unpack_signs(x, 1111), unpack_signs(weight, 1111)).to(torch.int32))


# ---- permission -----------------------------------------------------------------------------------

TILES = """
import ctypes, sys
import torch
from bitorch_qlinear import functional as F

syscall = ctypes.CDLL(None).syscall
ARCH_PRCTL = 158

def granted():
    states = ctypes.c_uint64()
    assert syscall(ARCH_PRCTL, 0x1022, ctypes.byref(states)) == 0  # ARCH_GET_XCOMP_PERM
    return bool(states.value >> 18 & 1)

x, words = torch.rand(40, 300), F.pack_bits(torch.randn(70, 300))
large_x, large_words = torch.randn(70, 900), F.pack_bits(torch.randn(1300, 900))
"""


def run_with_tiles(code: str, kernel: str = "amx") -> list[str]:
    """Run code in a process of its own, in which the kernel is forced, and return the words that it prints."""
    environment = {**os.environ, "BITORCH_QLINEAR_CPU_KERNEL": kernel}
    run = subprocess.run([sys.executable, "-c", TILES + code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@needs_amx
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("F.dorefa_linear(x[:1], words, 300, bits=2)", "F.dorefa_linear(x, words, 300, bits=2)"),
        ("F.linear(large_x[:20], large_words, 900)", "F.linear(large_x, large_words, 900)"),
    ],
    ids=["levels", "signs"],
)
def test_the_system_is_asked_for_tiles_when_they_are_needed(small, large):
    before, packed, few, many = run_with_tiles(f"""
print(granted())
F.linear(x, words, 300)
print(granted())
{small}
print(granted())
{large}
print(granted())
""")
    assert [before, packed, few] == ["False"] * 3
    assert [many] == run_with_tiles("print(syscall(ARCH_PRCTL, 0x1023, 18) == 0)")  # ARCH_REQ_XCOMP_PERM
    assert run_with_tiles(f"{large}; print(granted())", "avx512") == ["False"]


@needs_amx
def test_other_instructions_compute_if_the_system_refuses_tiles():
    """A thread whose alternate stack is too small for tile registers makes the system refuse them."""
    run_with_tiles("""
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(5000)
stack = Stack(ctypes.addressof(memory), 0, 5000)
if ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) != 0:
    sys.exit()  # the system wants more without them, too
y = F.dorefa_linear(x, words, 300, bits=2)
signs = F.linear(large_x, large_words, 900)
assert not granted()
levels = torch.round(x * 3).double() @ F.unpack_bits(words, 300, torch.float64).T
assert torch.equal(y, levels.float() * torch.tensor(1 / 3))
large_x = torch.where(large_x < 0, -1.0, 1.0)
assert torch.equal(signs, large_x @ F.unpack_bits(large_words, 900, torch.float32).T)
""")


@pytest.mark.parametrize("levels", [True, False])
def test_torchs_own_use_of_tiles_is_not_disturbed(kernel, levels):
    """torch's products of bfloat16 and int8 may use the same registers in the same thread."""
    x, words = torch.rand(64, 800) * 1.4 - 0.2, F.pack_bits(torch.randn(1300, 800))
    a, b = torch.randn(96, 320).bfloat16(), torch.randn(320, 80).bfloat16()

    def compute() -> torch.Tensor:
        return F.dorefa_linear(x, words, 800, bits=2) if levels else F.linear(x, words, 800)

    expected = compute(), a @ b
    for _ in range(5):
        assert_equal(compute(), expected[0])
        assert_equal(a @ b, expected[1])
