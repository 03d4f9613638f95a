"""Every CUDA kernel equals the CPU's scalar kernel bit for bit, in every output and for all kinds of sizes."""

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from support.operators import (
    BROKEN,
    CPU_ONLY,
    LINEAR,
    NO_HEADER,
    OPERATORS,
    PREPARED,
    TENSORS,
    arguments,
    arguments_with,
    assert_refused,
    breakages,
    call_arguments,
    named_for,
    operator,
    problems,
)
from support.reference import BITS, FLOATS, random_values, random_words, special_values

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F
from bitorch_qlinear.kernels import available, forced

from .device import (
    CUDA,
    KERNELS,
    MULTIPROCESSORS,
    assert_same,
    captured,
    choice,
    every_kernel,
    misaligned,
    moved,
    moved_all,
    no_synchronization,
    poison,
    several_devices,
)
from .first_call import PRODUCTS
from .tiles import DEPTHS as DEPTHS_OF_TILES
from .tiles import TILES, shapes_of

OUTS = [*FLOATS, torch.int32]
# These lie around one row, a warp's fragments and each kernel's tiles; a few are two tiles and a prime.
SIDES = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 2 * 64 + 13, 255, 256, 257, 2 * 128 + 13, 2 * 256 + 17]
# These lie around a word, a 16-byte vector of words, and stages of 512 and 1024 values; odd ones are never aligned.
DEPTHS = [0, 1, 31, 32, 33, 127, 128, 129, 255, 257, 511, 512, 513, 1023, 1024, 1025, 1536, 2048, 2048 + 97, 4096 + 128]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- products --------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("k", DEPTHS)
def test_every_edge(cuda_kernel, k):
    """Each result of a pair of sides equals a corner of the largest one, which the CPU computes once."""
    make, largest = generator(k), max(SIDES)
    x_words, words = (random_words(largest, k, make, stray=True) for _ in range(2))
    bias, scale = (torch.randn(largest, generator=make) for _ in range(2))
    vectors = {out: {} if out is torch.int32 else {"bias": bias, "scale": scale} for out in OUTS}
    expected = {out: F.binary_linear(x_words, words, k, out_dtype=out, **vectors[out]).to(CUDA) for out in vectors}
    gpu_vectors = {out: moved_all(vectors[out]) for out in OUTS}
    drawn = random.Random(k)
    for m, n in itertools.product(SIDES, SIDES):
        out = drawn.choice(OUTS)
        place = [drawn.choice([moved, misaligned]) for _ in range(2)]
        x, w = place[0](x_words[:m].clone()), place[1](words[:n].clone())
        prepared = F.prepare_weight(w, k) if drawn.random() < 0.5 else None
        corner = {name: vector[:n] for name, vector in gpu_vectors[out].items()}
        poison(m, n, dtype=out)
        y = F.binary_linear(x, w, k, out_dtype=out, weight_prepared=prepared, **corner)
        options = f"{m} x {n} x {k} {out} {place[0].__name__} {place[1].__name__} prepared={prepared is not None}"
        assert_same(y, expected[out][:m, :n], options)


@every_kernel
@given(problem=problems())
@settings(max_examples=150)
def test_any_problem(cuda_kernel, problem):
    """These are the problems of the CPU kernels' tests: any layout of x, bias and scale, any dtype, special values."""
    threshold, x, k, strict = (problem.pop(name) for name in ("threshold", "x", "k", "strict"))
    words, with_prepared = problem.pop("weight_words"), problem.pop("weight_prepared")
    gpu_x, gpu_words, gpu = moved(x), moved(words), moved_all(problem)
    if with_prepared:
        gpu["weight_prepared"] = F.prepare_weight(gpu_words, k)

    wanted = F.linear_train(x, words, k, **problem, strict=strict, threshold=threshold)
    results = F.linear_train(gpu_x, gpu_words, k, **gpu, strict=strict, threshold=threshold)
    for name, result, want in zip(("y", "x_words", "in_range_words"), results, wanted, strict=True):
        assert_same(result, want, name)
    assert_same(F.linear(gpu_x, gpu_words, k, **gpu, strict=strict), wanted[0], "linear")
    gpu["out_dtype"] = wanted[0].dtype
    assert_same(F.binary_linear(results[1], gpu_words, k, **gpu), wanted[0], "binary_linear")
    assert_same(gpu_x, x, "the argument x")


@every_kernel
@pytest.mark.parametrize("out", OUTS, ids=str)
def test_every_combination_of_dtypes(cuda_kernel, out):
    m, n, k = 17, 67, 200
    make = generator(1)
    words = random_words(n, k, make)
    vectors = [None, *FLOATS] if out is not torch.int32 else [None]
    for dtype, bias, scale, strict in itertools.product(FLOATS, vectors, vectors, (False, True)):
        x = random_values((m, k), dtype, make)
        options = {
            "bias": None if bias is None else random_values((n,), bias, make),
            "scale": None if scale is None else random_values((n,), scale, make),
            "out_dtype": out,
            "strict": strict,
        }
        want = F.linear(x, words, k, **options)
        poison(m, n, dtype=out)
        assert_same(F.linear(moved(x), moved(words), k, **moved_all(options)), want, (dtype, bias, scale, strict))


@every_kernel
@pytest.mark.parametrize("equal", [True, False], ids=["all equal", "all opposite"])
@pytest.mark.parametrize("k", [2**16 + 1, 2**20, 2**24 + 1])
def test_extremes_of_the_sum(cuda_kernel, k, equal):
    """Random bits do not reach these sums, and float32 rounds those beyond 2**24."""
    x = torch.ones(3, k, dtype=torch.bfloat16)
    words = F.pack_bits(x if equal else -x)
    for out in OUTS:
        assert_same(F.linear(moved(x), moved(words), k, out_dtype=out), F.linear(x, words, k, out_dtype=out), out)


@every_kernel
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 0), (5, 70, 0), (0, 70, 45), (5, 0, 45), (0, 0, 0)])
def test_sizes_of_zero(cuda_kernel, m, n, k):
    x, words, bias = torch.randn(m, k), random_words(n, k, generator(0)), torch.randn(n)
    gpu_words = moved(words)
    for prepared in (None, F.prepare_weight(gpu_words, k)):
        y = F.linear_train(moved(x), gpu_words, k, moved(bias), weight_prepared=prepared, threshold=1.0)
        for result, want in zip(y, F.linear_train(x, words, k, bias, threshold=1.0), strict=True):
            assert_same(result, want)
        assert_same(F.binary_linear(y[1], gpu_words, k, moved(bias), weight_prepared=prepared), y[0])
    assert_same(F.unpack_bits(gpu_words, k), F.unpack_bits(words, k))


@every_kernel
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 257, 4097), (16, 129, 8192), (65, 131, 1025), (300, 600, 513)]
)
def test_every_element_is_written(cuda_kernel, m, n, k):
    """A graph writes to known memory, which is filled with garbage before each replay."""
    make = generator(2)
    x, words = random_values((m, k), torch.bfloat16, make), random_words(n, k, make)
    gpu_x, gpu_words = moved(x), moved(words)
    graph, results = captured(lambda: F.linear_train(gpu_x, gpu_words, k, threshold=1.0, out_dtype=torch.float32))
    wanted = F.linear_train(x, words, k, threshold=1.0, out_dtype=torch.float32)
    for byte in (0xA5, 0xFF):
        for result in results:
            result.view(torch.uint8).fill_(byte)
        graph.replay()
        for result, want in zip(results, wanted, strict=True):
            assert_same(result, want, f"garbage {byte:#x}")


@every_kernel
def test_the_same_result_every_time(cuda_kernel):
    for m, n, k in ((3, 256, 65536), (16, 100, 40001), (200, 300, 4097)):
        x, words = moved(random_words(m, k, generator(3))), moved(random_words(n, k, generator(4)))
        first = F.binary_linear(x, words, k, out_dtype=torch.int32)
        for _ in range(10):
            assert_same(F.binary_linear(x, words, k, out_dtype=torch.int32), first)


def agree(m: int, n: int, k: int, kernels: list[str | None]) -> None:
    """Compare kernels with popc, which other tests compare with the scalar kernel on sizes that take it less time."""
    x, words = (random_words_here(rows, k) for rows in (m, n))
    with forced("popc"):
        want = F.binary_linear(x, words, k, out_dtype=torch.int32)
    for kernel in kernels:
        with forced(kernel):
            assert_same(F.binary_linear(x, words, k, out_dtype=torch.int32), want, (kernel, m, n, k))


def random_words_here(rows: int, k: int) -> torch.Tensor:
    """Return words made on the GPU; the bits past k are random too."""
    return torch.randint(-(2**31), 2**31, (rows, -(-k // 32)), device=CUDA, dtype=torch.int32)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *[(1, 8192, 8192), (16, 8192, 8192), (16, 256, 65536), (4096, 4096, 4096), (2048, 3000, 5001)],
        *[(17, 8192, 8192), (32, 4096, 4096), (33, 4097, 4097), (64, 4096, 4096), (64, 256, 65536)],
    ],
)
def test_kernels_agree_on_large_products(m, n, k):
    agree(m, n, k, [*KERNELS, None])


@pytest.mark.skipif("mma_sm80" not in KERNELS, reason="there is no kernel with several tiles")
@pytest.mark.parametrize("k", DEPTHS_OF_TILES)
@pytest.mark.parametrize("tile", TILES)
def test_every_edge_of_every_tile(tile, k):
    """Wide tiles need products so large that the CPU's fastest kernel, which equals the scalar one, computes them."""
    with forced(available()[0]), forced("mma_sm80"):
        shapes = shapes_of(tile, choice, MULTIPROCESSORS, [k])
        beside = {m - TILES[tile][0] for m, _, _ in shapes}
        assert beside >= {-1, 0, 1}, "on this device, no product at some edge gets this tile"
        most_m, most_n, _ = map(max, zip(*shapes, strict=True))
        make = generator(k)
        x, words = (random_words(rows, k, make, stray=True) for rows in (most_m, most_n))
        gpu_x, gpu_words = moved(x), moved(words)
        for out in (torch.int32, torch.bfloat16):
            want = F.binary_linear(x, words, k, out_dtype=out).to(CUDA)
            for m, n, _ in shapes:
                poison(m, n, dtype=out)
                assert_same(F.binary_linear(gpu_x[:m], gpu_words[:n], k, out_dtype=out), want[:m, :n], (m, n, out))


@pytest.mark.skipif("skinny_mma_sm80" not in KERNELS, reason="there is no kernel of fragments")
@pytest.mark.parametrize("k", [0, 1, 1023, 1024, 1025, 4 * 1024, 8 * 1024 + 1, 12 * 1024, 12 * 1024 + 1, 17 * 1024])
def test_edges_of_fragments_of_rows(k):
    """The blocks of skinny_mma_sm80 have two or four fragments of 16 rows, and more warps if there are few columns."""
    rows = (17, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64)
    make = generator(k)
    x, words = (random_words(most, k, make, stray=True) for most in (64, 4129))
    gpu_x, gpu_words = moved(x), moved(words)
    with forced(available()[0]), forced("skinny_mma_sm80"):
        for out in (torch.int32, torch.bfloat16, torch.float64):
            want = F.binary_linear(x, words, k, out_dtype=out).to(CUDA)
            for m, n in itertools.product(rows, (1, 31, 32, 33, 65, 4096, 4097, 4129)):
                poison(m, n, dtype=out)
                assert_same(F.binary_linear(gpu_x[:m], gpu_words[:n], k, out_dtype=out), want[:m, :n], (m, n, out))


@pytest.mark.skipif("wgmma_sm90a" not in KERNELS, reason="there is no kernel of warpgroups")
@pytest.mark.parametrize("k", [1, 127, 1023, 1024, 1025, 6 * 1024, 12 * 1024 + 1])
def test_edges_of_tiles_of_warpgroups(k):
    """Both tiles: the wide one is taken for many of them with long rows."""
    with forced(available()[0]), forced("wgmma_sm90a"):
        shapes = [(m, n) for m in (1, 127, 128, 129, 300) for n in (1, 2, 127, 128, 129, 193, 4099)]
        shapes += [(2049, n) for n in (8191, 8192, 8193)] if k > 6 * 1024 else []
        most_m, most_n = map(max, zip(*shapes, strict=True))
        make = generator(k)
        x, words = (random_words(rows, k, make, stray=True) for rows in (most_m, most_n))
        gpu_x, gpu_words = moved(x), moved(words)
        for out in (torch.int32, torch.bfloat16, torch.float64):
            want = F.binary_linear(x, words, k, out_dtype=out).to(CUDA)
            for m, n in shapes:
                poison(m, n, dtype=out)
                assert_same(F.binary_linear(gpu_x[:m], gpu_words[:n], k, out_dtype=out), want[:m, :n], (m, n, out))


@pytest.mark.skipif("mma_sm80" not in KERNELS, reason="there is no kernel with several tiles")
@pytest.mark.parametrize("tile", ["128x256", "128x128", "64x64"])
def test_a_forced_tile_computes_any_product(tile):
    with _kernels.forced_tile(tile):
        with forced("mma_sm80"):
            assert choice(1, 1, 1).startswith(f"mma_sm80 with tiles of {tile.replace('x', ' x ')}: the tile is forced")
        for m, n, k in ((1, 1, 1), (130, 260, 1100), (300, 40, 4097)):
            agree(m, n, k, ["mma_sm80"])


@pytest.mark.skipif("wgmma_sm90a" not in KERNELS, reason="there is no kernel of warpgroups")
@pytest.mark.parametrize("tile", ["128x192", "128x128"])
def test_a_forced_tile_of_warpgroups_computes_any_product(tile):
    with _kernels.forced_tile(tile):
        with forced("wgmma_sm90a"):
            assert choice(1, 1, 1).startswith(
                f"wgmma_sm90a with tiles of {tile.replace('x', ' x ')}: the tile is forced"
            )
        for m, n, k in ((1, 1, 1), (130, 260, 1100), (300, 40, 4097)):
            agree(m, n, k, ["wgmma_sm90a"])


@pytest.mark.skipif("wgmma_sm90a" not in KERNELS, reason="there is no kernel of warpgroups")
@pytest.mark.parametrize("tile", ["128x192", "128x128"])
def test_warpgroups_that_start_early_compute_several_tiles_each(tile):
    """More stages than the ring has and more tiles than multiprocessors, behind the launch that packs x, many times."""
    m, n, k = 2304, 4096, 8288
    make = torch.Generator(CUDA).manual_seed(0)
    words = random_words_here(n, k)
    limits = torch.randint(k // 2 - 90, k // 2 + 90, (n,), generator=make, device=CUDA, dtype=torch.int32)
    form = F.prepare_weight(words, k)
    with _kernels.forced_tile(tile):
        for _ in range(10):
            x = torch.randn(m, k, generator=make, device=CUDA).bfloat16()
            with forced("popc"):
                integers = F.linear(x, words, k, out_dtype=torch.int32)
                bits = F.linear(x, words, k, out_limits=limits)
            with forced("wgmma_sm90a"):
                for _ in range(5):
                    poison(m, n, dtype=torch.int32)
                    assert_same(F.linear(x, words, k, weight_prepared=form, out_dtype=torch.int32), integers)
                    assert_same(F.linear(x, words, k, weight_prepared=form), integers.bfloat16())
                    assert_same(F.linear(x, words, k, weight_prepared=form, out_limits=limits), bits)


def test_a_forced_kernel_is_the_one_that_runs():
    shapes = {name: (4, 300, 512, 2) if "skinny" in name else (300, 300, 512, 2) for name in KERNELS}
    before = _kernels.forced_cuda_kernel()
    for kernel, shape in shapes.items():
        with forced(kernel):
            assert re.match(rf"{kernel}\b", choice(*shape))
    assert _kernels.forced_cuda_kernel() == before
    with pytest.raises(ValueError, match="popc"), forced("popcorn"):
        pass


# ---- memory that is not aligned --------------------------------------------------------------------


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a contiguous tensor to the GPU, one byte past an aligned address, as other libraries can bring it."""
    memory = torch.empty(tensor.nbytes + 1, dtype=torch.uint8, device=CUDA)
    memory[1:].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
    return torch.as_tensor(Odd(memory, tensor), device=CUDA)


class Odd:
    """An array that begins in the second byte of `memory`, for torch.as_tensor (``__cuda_array_interface__``)."""

    def __init__(self, memory: torch.Tensor, like: torch.Tensor) -> None:
        self.memory = memory
        kind = "f" if like.dtype.is_floating_point else "i"
        self.__cuda_array_interface__ = {
            "shape": tuple(like.shape),
            "typestr": f"<{kind}{like.dtype.itemsize}",
            "data": (memory.data_ptr() + 1, False),
            "version": 3,
        }


@every_kernel
@pytest.mark.parametrize("k", [70, 128])
def test_elements_that_are_not_aligned_are_copied(cuda_kernel, k):
    m, n = 9, 40
    x, words, bias = torch.randn(m, k), random_words(n, k, generator(0)), torch.randn(n)
    limits, flips = torch.full((n,), k // 2, dtype=torch.int32), random_words(1, n, generator(1))[0]
    want, want_bits = F.linear(x, words, k, bias, scale=bias), F.linear(x, words, k, out_limits=limits, out_flips=flips)
    for prepared in (None, F.prepare_weight(odd(words), k)):
        options = {"weight_prepared": prepared, "scale": odd(bias)}
        assert_same(F.linear(odd(x), odd(words), k, odd(bias), **options), want)
        assert_same(F.binary_linear(odd(F.pack_bits(x)), odd(words), k, odd(bias), **options), want)
    columns = odd(x.t()).t()  # strided
    assert_same(F.linear(columns, odd(words), k, odd(bias.repeat_interleave(2))[::2], scale=odd(bias)), want)
    assert_same(F.linear(odd(x), odd(words), k, out_limits=odd(limits), out_flips=odd(flips)), want_bits)
    assert_same(F.unpack_bits(odd(words), k), F.unpack_bits(words, k))


# ---- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packing_at_every_edge(dtype):
    """Rows of all lengths are parts of wider ones, with any stride and alignment, or contiguous copies of these."""
    wide = random_values((65, max(DEPTHS) + 3), dtype, generator(5))
    gpu_wide = moved(wide)
    for (k, first), strict in itertools.product([*itertools.product(DEPTHS, (0, 1, 3))], (False, True)):
        for rows in (1, 2, 65):
            x, gpu_x = wide[:rows, first : first + k], gpu_wide[:rows, first : first + k]
            want = F.pack_bits(x, strict)
            for source in (gpu_x, gpu_x.contiguous()):
                poison(*want.shape, dtype=torch.int32)
                assert_same(F.pack_bits(source, strict), want, (rows, k, first, strict))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 65504.0, 1e-40, 3e38, float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_range_bits(dtype, threshold):
    special = special_values(dtype)
    x = torch.cat(
        [special, torch.tensor([threshold, -threshold]).to(dtype), random_values((999,), dtype, generator(6))]
    )
    words = random_words(3, len(x), generator(7))
    want = F.linear_train(x, words, len(x), threshold=threshold)
    for result, wanted in zip(F.linear_train(moved(x), moved(words), len(x), threshold=threshold), want, strict=True):
        assert_same(result, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packing_by_limits(dtype):
    """Values and limits are special values and patterns next to them; rows have any stride and alignment."""
    special = special_values(dtype)
    patterns = special.view(BITS[dtype])
    special = torch.cat([(patterns + step).view(dtype) for step in (-1, 0, 1)])
    for k in DEPTHS:
        make = generator(k)
        x = special[torch.randint(len(special), (17, k + 3), generator=make)]
        limits, flips = x[0, 1 : k + 1].contiguous(), random_words(1, k, make, stray=True)[0]
        for strict, flipped, first in itertools.product((False, True), (None, flips), (0, 1)):
            rows = x[:, first : first + k]
            want = F.pack_bits(rows, strict, limits=limits, flips=flipped)
            gpu_flips = None if flipped is None else moved(flipped)
            got = F.pack_bits(moved(x)[:, first : first + k], strict, limits=moved(limits), flips=gpu_flips)
            assert_same(got, want, (k, strict, flipped is not None, first))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int8, torch.bool], ids=str)
def test_unpacking(dtype):
    for k in DEPTHS:
        words = random_words(67, k, generator(k), stray=True)
        want = F.unpack_bits(words, k, dtype)
        for place in (moved, misaligned):
            poison(*want.shape, dtype=dtype)
            assert_same(F.unpack_bits(place(words), k, dtype), want, (k, place.__name__))


def test_the_prepared_form():
    """A form has a header, padded popcounts, and, unless k % 128 == 0, aligned words (check_prepared.cuh)."""
    for n, k in itertools.product([1, 3, 4, 5, 66], DEPTHS):
        words = random_words(n, k, generator(8), stray=True)
        bits = F.unpack_bits(words, k, torch.bool)
        for place in (moved, misaligned):
            prepared = F.prepare_weight(place(words), k).cpu()
            assert prepared[8:12].view(torch.int32).item() == 64
            assert prepared[16:32].view(torch.int64).tolist() == [n, k]
            counts = prepared[64 : 64 + (n + 3) // 4 * 16].view(torch.int32)
            assert counts[:n].tolist() == bits.sum(-1).tolist()
            assert not counts[n:].any()
            aligned = prepared[64 + counts.nbytes :]
            assert (aligned.numel() == 0) == (k % 128 == 0)
            if aligned.numel():
                rows = aligned.view(torch.int32).view(n, -1)
                width = -(-k // 32)
                assert torch.equal(F.unpack_bits(rows[:, :width].contiguous(), k, torch.bool), bits)
                used = F.unpack_bits(rows.contiguous(), 32 * rows.shape[1], torch.bool)
                assert not used[:, k:].any()


# ---- beyond 2**31 ----------------------------------------------------------------------------------


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info(CUDA)[0]) < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of the GPU's memory, {free / 1e9:.1f} are free")


@every_kernel
def test_more_than_2_to_the_31_outputs(cuda_kernel):
    needs(18)
    m, n, k = (16, 2**27 + 77, 40) if cuda_kernel.startswith("skinny") else (46400, 46411, 40)
    assert m * n > 2**31
    x, words = (torch.randint(-(2**31), 2**31, (rows, 2), device=CUDA, dtype=torch.int32) for rows in (m, n))
    y = F.binary_linear(x, words, k, out_dtype=torch.bfloat16)
    crossing = 2**31 // n  # in this row, the offset passes 2**31
    rows = torch.unique(torch.tensor([0, 1, crossing - 1, crossing, m - 2, m - 1, *torch.randint(m, (60,)).tolist()]))
    rows = rows[(rows >= 0) & (rows < m)].to(CUDA)
    columns = torch.unique(torch.tensor([0, 1, 2**31 % n, n - 2, n - 1, *torch.randint(n, (500,)).tolist()])).to(CUDA)
    want = F.binary_linear(x[rows].cpu(), words[columns].cpu(), k, out_dtype=torch.bfloat16)
    assert_same(y[rows[:, None], columns], want)


def test_more_than_2_to_the_31_values():
    """More values are packed, unpacked, and lie between two rows."""
    needs(14)
    m, k = 65600, 32768 + 5
    x = torch.empty(m, k, dtype=torch.bfloat16, device=CUDA).normal_()
    words = F.pack_bits(x)
    sample = torch.tensor([0, 2**31 // k, m - 1, *torch.randint(m, (100,)).tolist()], device=CUDA)
    assert_same(words[sample], F.pack_bits(x[sample].cpu()))
    values = F.unpack_bits(words, k, torch.int8)
    assert_same(values[sample], F.unpack_bits(words[sample].cpu(), k, torch.int8))
    del values
    far = x[:: m - 1, :1000]  # two rows, more than 2**31 values apart
    assert_same(F.pack_bits(far), F.pack_bits(far.cpu()))


@every_kernel
def test_more_than_2_to_the_31_words(cuda_kernel):
    needs(28)
    n, k = 2**20 + 1100, 65536
    words = torch.randint(-(2**31), 2**31, (n, k // 32), device=CUDA, dtype=torch.int32)
    assert words.numel() > 2**31
    x = torch.randint(-(2**31), 2**31, (2, k // 32), device=CUDA, dtype=torch.int32)
    y = F.binary_linear(x, words, k, out_dtype=torch.int32)
    sample = torch.tensor([0, 2**20 - 1, 2**20, n - 1, *torch.randint(n, (200,)).tolist()], device=CUDA)
    assert_same(y[:, sample], F.binary_linear(x.cpu(), words[sample].cpu(), k, out_dtype=torch.int32))


# ---- streams, graphs, devices ----------------------------------------------------------------------


@every_kernel
def test_nothing_waits_for_the_device(cuda_kernel):
    x = torch.randn(5, 300, device=CUDA)
    words, bias = F.pack_bits(torch.randn(70, 300, device=CUDA)), torch.randn(140, device=CUDA)[::2]
    F.linear(x, words, 300, bias)  # the first call may load the kernel
    with no_synchronization():
        prepared = F.prepare_weight(words, 300)
        x_words = F.pack_bits(x)
        F.unpack_bits(x_words, 300)
        F.binary_linear(x_words, words, 300, bias, weight_prepared=prepared, scale=bias)
        F.linear(x[:, :].t().contiguous().t(), words, 300, bias)
        F.linear_train(x, words, 300, bias, threshold=1.0)


@every_kernel
def test_the_current_stream(cuda_kernel):
    """Arguments are written after a delay, so a kernel in another stream would read the previous values."""
    x, words = torch.randn(33, 1000), random_words(70, 1000, generator(9))
    want = F.linear(x, words, 1000)
    gpu_x, gpu_words = torch.zeros_like(x, device=CUDA), torch.zeros_like(words, device=CUDA)
    x, words = moved(x), moved(words)
    F.linear(gpu_x, gpu_words, 1000)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gpu_x.copy_(x)
        gpu_words.copy_(words)
        y = F.linear(gpu_x, gpu_words, 1000, weight_prepared=F.prepare_weight(gpu_words, 1000))
    stream.synchronize()
    assert_same(y, want)


@every_kernel
@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 4096), (16, 256, 40000), (200, 300, 1000)])
def test_in_a_graph(cuda_kernel, m, n, k):
    gpu_x, gpu_words = torch.zeros(m, k, device=CUDA), torch.zeros(n, -(-k // 32), device=CUDA, dtype=torch.int32)

    def call():
        return F.linear(gpu_x, gpu_words, k, weight_prepared=F.prepare_weight(gpu_words, k))

    graph, y = captured(call)
    for seed in range(3):
        x, words = torch.randn(m, k, generator=generator(seed)), random_words(n, k, generator(seed))
        gpu_x.copy_(x)
        gpu_words.copy_(words)
        graph.replay()
        assert_same(y, F.linear(x, words, k))


FIRST_CALL = """
import torch
from bitorch_qlinear import functional as F
torch.manual_seed(0)
products = {products}
ks = [k for m, n, k, dtype in products]
xs = [torch.randn(m, k).to(getattr(torch, dtype)) for m, n, k, dtype in products]
words = [F.pack_bits(torch.randn(n, k)) for m, n, k, dtype in products]
gpu_xs, gpu_words = [x.cuda() for x in xs], [w.cuda() for w in words]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
ys = []
with torch.cuda.graph(graph, capture_error_mode={mode!r}):
    for x, w, k in zip(gpu_xs, gpu_words, ks):
        real = F.linear(x, w, k, weight_prepared=F.prepare_weight(w, k), out_dtype=torch.int32)
        ys.append((real, F.binary_linear(F.pack_bits(x), w, k, out_dtype=torch.int32)))
    values = F.unpack_bits(gpu_words[0], ks[0])
graph.replay()
for (real, packed), x, w, k in zip(ys, xs, words, ks):
    want = F.linear(x, w, k, out_dtype=torch.int32)
    assert torch.equal(real.cpu(), want) and torch.equal(packed.cpu(), want)
assert torch.equal(values.cpu(), F.unpack_bits(words[0], ks[0]))
print("computed")
"""


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_call_of_a_process_may_be_captured(mode):
    """Kernels are loaded at their first launch, which must not end the capture."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", FIRST_CALL.format(mode=mode, products=PRODUCTS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.stdout.strip() == "computed", result.stderr[-2000:]


@several_devices
@every_kernel
def test_another_device_than_the_current_one(cuda_kernel):
    other = torch.device("cuda", 1)
    x, words, bias = torch.randn(33, 300), random_words(70, 300, generator(0)), torch.randn(70)
    want = F.linear_train(x, words, 300, bias, threshold=1.0)
    with torch.cuda.device(0):
        gpu_x, gpu_words, gpu_bias = (moved(tensor, other) for tensor in (x, words, bias))
        prepared = F.prepare_weight(gpu_words, 300)
        results = F.linear_train(gpu_x, gpu_words, 300, gpu_bias, weight_prepared=prepared, threshold=1.0)
        assert torch.cuda.current_device() == 0
    for result, wanted in zip(results, want, strict=True):
        assert result.device == other
        assert_same(result, wanted)
    with pytest.raises(RuntimeError, match="bitorch_qlinear: weight_words: expected a tensor on the same device"):
        F.linear(gpu_x, gpu_words.to(CUDA), 300)


# ---- errors ----------------------------------------------------------------------------------------


def gpu_arguments(argument=""):
    """Return the arguments of the CPU's tests on the GPU, with the GPU's form and layout and a value for this one."""
    values = moved_all(arguments_with(argument))
    prepared = F.prepare_weight(values["weight_words"], values["k"])
    return values | {"weight_prepared": prepared, "layout": _kernels.CUDA_LAYOUT}


def seen_by_the_host(name, argument, what):
    """Return whether the host can see the fault; a form's header is checked by the kernel, and the next call fails."""
    return name not in CPU_ONLY and what not in NO_HEADER


@pytest.mark.parametrize(("name", "argument", "what"), [p for p in breakages() if seen_by_the_host(*p.values)])
def test_wrong_arguments_are_refused(name, argument, what):
    values = gpu_arguments(argument)
    values[argument] = BROKEN[argument][what](values[argument])
    assert_refused(name, values, *named_for(name, argument))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("argument", TENSORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_on_different_devices_are_refused(name, argument, device):
    values = gpu_arguments(argument)
    names = [a.name for a in operator(name)._schema.arguments]
    if argument in names:
        values[argument] = values[argument].to(device)
        assert_refused(name, values, *([argument] if argument != names[0] else TENSORS))


def test_weights_prepared_by_the_cpu_or_for_another_size_are_refused():
    values = moved_all(arguments())
    others = {
        "the CPU": moved(F.prepare_weight(arguments()["weight_words"], 40)),
        "a larger n": F.prepare_weight(moved(random_words(9, 40, generator(0))), 40),
        "a larger k": F.prepare_weight(moved(random_words(5, 129, generator(0))), 129),
    }
    for name in PREPARED:
        for prepared in others.values():
            assert_refused(name, values | {"weight_prepared": prepared}, "weight_prepared")


OTHER_FORM = r"weight_prepared: expected .*n = 5 and k = 40, got .*n = 5 and k = 41.* an earlier call"


def wrong_form() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, words, and weights prepared for another k, which have the right size, so that only kernels can tell."""
    x, words = torch.randn(3, 40, generator=generator(0)), random_words(5, 40, generator(0))
    return moved(x), moved(words), F.prepare_weight(moved(random_words(5, 41, generator(1))), 41)


reads_a_form = pytest.mark.parametrize("cuda_kernel", [name for name in KERNELS if name != "popc"], indirect=True)


@reads_a_form
@pytest.mark.parametrize("out", [*OUTS, torch.bool], ids=str)
def test_weights_prepared_for_another_product_are_an_error_of_the_next_call(cuda_kernel, out):
    x, words, other = wrong_form()
    limits = torch.full((5,), 20, dtype=torch.int32, device=CUDA)
    options = {"out_limits": limits} if out is torch.bool else {"out_dtype": out}
    y = F.linear(x, words, 40, weight_prepared=other, **options)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=OTHER_FORM):
        F.pack_bits(x)
    if out.is_floating_point:
        assert y.isnan().all()
    else:
        assert (y == (0 if out is torch.bool else -(2**31))).all()
    torch.cuda.synchronize()
    y = F.linear(x, words, 40, weight_prepared=F.prepare_weight(words, 40), **options)
    want = F.linear(x.cpu(), words.cpu(), 40, **{name: moved_back(value) for name, value in options.items()})
    assert_same(y, want)


def moved_back(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


@reads_a_form
def test_a_replay_reports_weights_prepared_for_another_product(cuda_kernel):
    x, words, other = wrong_form()
    right = F.prepare_weight(words, 40)
    graph, y = captured(lambda: F.linear(x, words, 40, weight_prepared=right))
    for form, is_right in ((right, True), (other.clone(), False), (right.clone(), True)):
        right.copy_(form)
        graph.replay()
        torch.cuda.synchronize()
        if is_right:
            assert_same(y, F.linear(x.cpu(), words.cpu(), 40))
        else:
            assert y.isnan().all()
            with pytest.raises(RuntimeError, match=OTHER_FORM):
                F.pack_bits(x)


@several_devices
def test_another_device_does_not_report_the_wrong_form():
    x, words, other = wrong_form()
    F.linear(x, words, 40, weight_prepared=other)
    torch.cuda.synchronize()
    F.pack_bits(x.to("cuda:1"))
    with pytest.raises(RuntimeError, match=OTHER_FORM):
        F.pack_bits(x)


def test_samples_of_all_operators():
    """Full and minimal calls of every operator, also of future ones, give the CPU's results."""
    for name in sorted(set(OPERATORS) - set(CPU_ONLY)):
        for required_only in (False, True):
            torch.manual_seed(0)
            args, kwargs = call_arguments(name, arguments(), required_only)
            want = operator(name)(*args, **kwargs)
            torch.manual_seed(0)
            args, kwargs = call_arguments(name, gpu_arguments(), required_only)
            results = operator(name)(*args, **kwargs)
            if name == "prepare_weight":
                continue  # each device has its own form
            pairs = [(results, want)] if isinstance(want, torch.Tensor) else zip(results, want, strict=True)
            for result, wanted in pairs:
                assert_same(result, wanted, name)
