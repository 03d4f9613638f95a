"""Products that write bits (out_limits, out_flips) equal the CPU's in every kernel, for all kinds of sizes."""

import itertools
import random

import pytest
import torch
from support.reference import FLOATS, assert_equal, bits, pack_signs, random_values, random_words

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
    no_synchronization,
    poison,
)
from .tiles import TILES, shapes_of

# These lie around words and each kernel's tiles.
SIDES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 255, 257]
# These lie around a word, a 16-byte vector of words, and stages; a row of 9000 values needs several warps or steps.
DEPTHS = [0, 1, 32, 33, 129, 513, 1024, 9000]
LIMITS = torch.iinfo(torch.int32)


def problem(m, n, k, seed=0):
    """Return words, limits that equal counts or lie beside them or are extreme, flips, and the integer products.

    The bits past k and n are random too.
    """
    make = torch.Generator().manual_seed(seed)
    x, weight = (random_words(rows, k, make, stray=True) for rows in (m, n))
    integers = F.binary_linear(x, weight, k, out_dtype=torch.int32)
    counts = (k - integers.long()) // 2
    row = torch.randint(max(m, 1), (1, n), generator=make)
    near = (counts.gather(0, row)[0] if m else torch.zeros(n)) + torch.randint(-1, 2, (n,), generator=make)
    extremes = torch.tensor([LIMITS.min, -1, 0, k, LIMITS.max])[torch.randint(5, (n,), generator=make)]
    limits = torch.where(torch.rand(n, generator=make) < 0.1, extremes, near).int()
    return x, weight, limits, random_words(1, n, make, stray=True)[0], integers


@every_kernel
@pytest.mark.parametrize("k", DEPTHS)
def test_every_edge(cuda_kernel, k):
    drawn, largest = random.Random(k), max(SIDES)
    x, weight, limits, flips, integers = problem(largest, largest, k, k)
    for m, n in itertools.product(SIDES, SIDES):
        place = [drawn.choice([moved, misaligned]) for _ in range(4)]
        gpu_x, w, lim, flip = (
            move(t.clone())
            for move, t in zip(place, (x[:m], weight[:n], limits[:n], flips[: -(-n // 32)]), strict=True)
        )
        options = {"out_limits": lim, "out_flips": flip if drawn.random() < 0.8 else None}
        if drawn.random() < 0.5:
            options["weight_prepared"] = F.prepare_weight(w, k)
        given = None if options["out_flips"] is None else flips[: -(-n // 32)]
        poison(m, -(-n // 32), dtype=torch.int32)
        y = F.binary_linear(gpu_x, w, k, **options)
        assert_same(y, bits(integers[:m, :n], k, limits[:n], given), (m, n, k, options.keys()))


@every_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_of_real_rows(cuda_kernel, dtype, strict):
    for m, n, k in ((1, 70, 333), (4, 31, 1024), (16, 129, 97), (33, 65, 1100), (70, 97, 650)):
        _, weight, limits, flips, _ = problem(m, n, k)
        x = random_values((m, k), dtype, torch.Generator().manual_seed(m))
        want = F.linear(x, weight, k, strict=strict, out_limits=limits, out_flips=flips)
        poison(m, -(-n // 32), dtype=torch.int32)
        options = {"out_limits": moved(limits), "out_flips": moved(flips)}
        assert_same(F.linear(moved(x), moved(weight), k, strict=strict, **options), want, (m, n, k))


@every_kernel
@pytest.mark.parametrize("n", [0, 1, 31, 65])
@pytest.mark.parametrize("k", [0, 1, 65])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (1, 2, 1)], ids=str)
def test_sizes_of_zero(cuda_kernel, leading, n, k):
    _, weight, limits, flips, _ = problem(1, n, k)
    x_words = pack_signs(torch.randn(*leading, k))
    want = F.binary_linear(x_words, weight, k, out_limits=limits, out_flips=flips)
    options = {"out_limits": moved(limits), "out_flips": moved(flips)}
    assert_same(F.binary_linear(x_words.to(CUDA), moved(weight), k, **options), want)


@pytest.mark.skipif("mma_sm80" not in KERNELS, reason="there is no kernel with several tiles")
@pytest.mark.parametrize("tile", TILES)
def test_every_edge_of_every_tile(tile):
    """Wide tiles need products so large that the CPU's fastest kernel, which equals the scalar one, computes them."""
    k = 513
    with forced(available()[0]), forced("mma_sm80"):
        shapes = shapes_of(tile, choice, MULTIPROCESSORS, [k])
        most_m, most_n, _ = map(max, zip(*shapes, strict=True))
        x, weight, limits, flips, integers = problem(most_m, most_n, k)
        gpu = [moved(t) for t in (x, weight, limits, flips)]
        for m, n, _ in shapes:
            words = -(-n // 32)
            poison(m, words, dtype=torch.int32)
            options = {"out_limits": gpu[2][:n], "out_flips": gpu[3][:words]}
            y = F.binary_linear(gpu[0][:m], gpu[1][:n], k, **options)
            assert_same(y, bits(integers[:m, :n], k, limits[:n], flips[:words]), (m, n))


@every_kernel
@pytest.mark.parametrize(("m", "n", "k"), [(1, 257, 4097), (16, 129, 8192), (65, 131, 1025), (300, 600, 513)])
def test_every_word_is_written_in_a_graph(cuda_kernel, m, n, k):
    """The result is filled with garbage before each replay."""
    x, weight, limits, flips, integers = problem(m, n, k)
    gpu = [moved(t) for t in (x, weight, limits, flips)]
    graph, y = captured(lambda: F.binary_linear(gpu[0], gpu[1], k, out_limits=gpu[2], out_flips=gpu[3]))
    for garbage in (0x5A5A5A5A, -1):
        y.fill_(garbage)
        graph.replay()
        assert_same(y, bits(integers, k, limits, flips), f"garbage {garbage:#x}")


@every_kernel
def test_the_same_result_every_time(cuda_kernel):
    for m, n, k in ((3, 256, 65536), (16, 100, 40001), (200, 300, 4097)):
        x, weight, limits, flips, integers = problem(m, n, k)
        gpu = [moved(t) for t in (x, weight, limits, flips)]
        for _ in range(10):
            y = F.binary_linear(gpu[0], gpu[1], k, out_limits=gpu[2], out_flips=gpu[3])
            assert_same(y, bits(integers, k, limits, flips), (m, n, k))


@every_kernel
def test_nothing_waits_for_the_device(cuda_kernel):
    x, weight, limits, flips, _ = (moved(t) for t in problem(5, 70, 300))
    options = {"out_limits": limits, "out_flips": flips}
    F.binary_linear(x, weight, 300, **options)  # the first call may load the kernel
    with no_synchronization():
        F.binary_linear(x, weight, 300, **options)
        F.linear(torch.zeros(5, 300, device=CUDA), weight, 300, **options)


@every_kernel
def test_three_layers_in_words(cuda_kernel):
    """The words of a layer are the x_words of the next, on the GPU as on the CPU."""
    sizes = [333, 129, 70, 33]
    layers = [problem(16, n, k, k)[1:4] for k, n in itertools.pairwise(sizes)]
    x = torch.randn(16, sizes[0])

    def words_of(device):
        words = F.pack_bits(x.to(device))
        for k, layer in zip(sizes, layers, strict=False):
            weight, limits, flips = (t.to(device) for t in layer)
            words = F.binary_linear(words, weight, k, out_limits=limits, out_flips=flips)
        return words

    want = words_of("cpu")
    assert_equal(words_of(CUDA).cpu(), want)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_chain(cuda_kernel, dtype):
    """A whole chain, whose last layer writes numbers, is one operator."""
    sizes, rows = [333, 129, 70, 33], 16
    layers = [problem(rows, n, k)[1:4] for k, n in itertools.pairwise(sizes)]
    weights, limits, flips = map(list, zip(*layers, strict=True))
    x, bias = torch.randn(rows, sizes[0]).to(dtype), torch.randn(sizes[-1])
    want = F.linear_chain(x, weights, sizes[0], limits[:-1], flips[:-1], bias, scale=bias)
    weights, limits, flips = ([moved(t) for t in tensors] for tensors in (weights, limits, flips))
    gpu_bias = moved(bias)
    y = F.linear_chain(moved(x), weights, sizes[0], limits[:-1], flips[:-1], gpu_bias, scale=gpu_bias)
    assert_same(y, want)
    toggles = [torch.zeros(2, 1, dtype=torch.int32, device=y.device)] * (len(weights) - 1)
    with pytest.raises(RuntimeError, match="toggles: expected none on CUDA"):
        F.linear_chain(moved(x), weights, sizes[0], limits[:-1], flips[:-1], toggles=toggles)
