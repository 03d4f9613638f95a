"""The operators read and write only inside tensors: each input ends (or begins) at a page that must not be touched.

The checks run in a separate process, which ends if it touches such a page. With glibc, its checking allocator also
detects writes beyond results and scratch space, and fills fresh memory so that using it gives wrong results.
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import shapes
from support.reference import (
    FLOATS,
    assert_equal,
    epilogue,
    in_range,
    pack,
    pack_signs,
    product,
    random_values,
    random_words,
    signs,
    unpack_signs,
)

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F


@pytest.mark.slow
@pytest.mark.parametrize("side", ["end", "begin"])
@pytest.mark.parametrize("kernel", _kernels.available_kernels())
def test_guard_pages(kernel, side):
    environment = {**os.environ, "BITORCH_QLINEAR_CPU_KERNEL": kernel, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    environment["OMP_NUM_THREADS"] = "1"
    tests = Path(__file__).parents[1]  # this makes tests/support importable
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")]))
    environment["LD_PRELOAD"] = "libc_malloc_debug.so.0"  # if it is missing, the loader warns and goes on
    command = [sys.executable, __file__, kernel, side]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parent)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert result.stdout.splitlines()[-1] == f"{kernel} checked"


class Guarded:
    """A function that copies tensors into separate pages, next to pages that end the process when touched."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.maps: list[tuple[int, int]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor.clone()
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = self.libc.mmap(None, inner + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        self.maps.append((start, inner + 2 * page))
        for guard in (start, start + page + inner):
            assert self.libc.mprotect(guard, page, 0) == 0
        at = start + page + (inner - size if self.side == "end" else 0)
        copy = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def release(self) -> None:
        for start, size in self.maps:
            self.libc.munmap(start, size)
        self.maps.clear()


def check(kernel: str, side: str) -> None:
    assert _kernels.active_kernel() == kernel
    generator = torch.Generator().manual_seed(0)
    guarded = Guarded(side)
    ks = [0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 255, 256, 257, 300, 479, 481, 600, 1023]
    sizes = [*itertools.product((1, 2, 5), (1, 33, 64, 130), ks), (129, 66, 250), (2, 3, shapes.SPAN + 30)]
    for i, (m, n, k) in enumerate(sizes):
        dtype, bias_dtype = FLOATS[i % 4], FLOATS[i // 4 % 4]
        x = guarded(random_values((m, k), dtype, generator))
        w = guarded(random_words(n, k, generator, stray=True))
        bias = guarded(torch.randn(n, generator=generator).to(bias_dtype))
        scale = guarded(torch.randn(n, generator=generator).to(FLOATS[i // 16 % 4]))
        prepared = guarded(F.prepare_weight(w, k))
        y, x_words, range_words = F.linear_train(x, w, k, bias, scale=scale, weight_prepared=prepared, threshold=1.0)
        expected = epilogue(product(signs(x), unpack_signs(w, k)), bias, scale, dtype)
        assert_equal(y, expected, f"linear_train {m} {n} {k}")
        assert_equal(x_words, pack_signs(x), f"x_words {m} {n} {k}")
        assert_equal(range_words, pack(in_range(x, 1.0)), f"in_range_words {m} {n} {k}")
        assert_equal(F.linear(x, w, k, bias, scale=scale), expected, f"linear {m} {n} {k}")
        words = guarded(x_words)
        y = F.binary_linear(words, w, k, bias, weight_prepared=prepared, scale=scale, out_dtype=dtype)
        assert_equal(y, expected, f"binary_linear {m} {n} {k}")
        for out in (*FLOATS, torch.bool):
            values = F.unpack_bits(words, k, out)
            assert_equal(values, signs(x) > 0 if out is torch.bool else signs(x).to(out), f"unpack_bits {m} {k}")
        for transpose in (False, True):
            reals = guarded(torch.randn(m, k if transpose else n, generator=generator).round().to(dtype))
            y = F.multiply_signs(reals, w, k, transpose)
            columns = guarded(reals.t().contiguous()).t()
            assert_equal(F.multiply_signs(columns, w, k, transpose), y, f"multiply_signs {m} {n} {k}, columns")
            signs_of_w = unpack_signs(w, k)
            exact = reals.double() @ (signs_of_w.t() if transpose else signs_of_w)
            assert torch.equal(y.double(), exact.to(dtype).double()), f"multiply_signs {m} {n} {k}"
            del reals, columns
        del x, w, bias, scale, prepared, words
        guarded.release()
    print(kernel, "checked")


if __name__ == "__main__":
    check(*sys.argv[1:])
