"""Tests of csrc/cuda/heuristics.h, which is compiled for the host and asked about all kinds of devices."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from gpu.first_call import PRODUCTS

from bitorch_qlinear import _kernels
from tools import gpu_model
from tools.ptx.machine import build_once

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
KERNELS = ["popc", "skinny", "skinny_mma_sm80", "mma_sm75", "mma_sm80", "mma_int8_sm80"]
KERNELS += ["wgmma_sm90a", "fused_skinny", "fused_skinny_mma_sm80", "fused_cluster_sm90"]
WIDEST, MIDDLE, SMALLEST = range(3)
CAPABILITIES = [75, 80, 86, 87, 88, 89, 90, 91, 99, 100, 103, 110, 120, 121, 130, 200]
TENSOR_CORES = [80, 86, 87, 88, 89, 90]  # the capabilities with mma_sm80
SHAPES = 100_000
MOST_K, MOST_OUTPUTS = 2**31 - 1, 2**40
HARNESS = ROOT / "tests" / "native" / "heuristics.cpp"
CHECKS = "signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,bounds,enum"


@functools.cache
def library():
    """Load the harness, compiled so that undefined overflows and conversions execute an illegal instruction."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    flags += [f"-fsanitize={CHECKS}", "-fsanitize-undefined-trap-on-error", "-ffp-contract=off"]
    sources = b"".join(
        path.read_bytes()
        for path in (
            HARNESS,
            *(CUDA / f"{name}.h" for name in ("heuristics", "records", "warpgroup_tiles", "prepared")),
            CSRC / "packed.h",
        )
    )
    key = hashlib.sha256(repr((compiler, flags)).encode() + sources).hexdigest()[:16]

    def make(path):
        subprocess.run([*compiler.split(), *flags, f"-I{CSRC}", "-o", str(path), str(HARNESS)], check=True)

    lib = ctypes.CDLL(str(build_once(f"heuristics-{key}.so", make)))
    for function in (lib.decide_in_words, lib.names_of, lib.decide_tile_in_words, lib.depends_in_words):
        function.restype = ctypes.c_char_p
    lib.decide_tile_in_words.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        *[ctypes.c_int64] * 3,
        ctypes.c_bool,
    ]
    lib.decide_in_words.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4, ctypes.c_bool]
    lib.is_legal.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 3]
    lib.fits.argtypes = [ctypes.c_int64] * 2
    lib.choose_for_real_x.restype = None
    lib.choose_for_real_x.argtypes = [
        *(ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p),
    ]
    for function in (lib.choose_all, lib.estimate_all, lib.estimate_fragments, lib.estimate_warpgroups):
        function.restype = None
        function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * (5 if function is lib.choose_all else 2)]
    return lib


def queries(capability, multiprocessors, m, n, k):
    columns = np.broadcast_arrays(capability, multiprocessors, m, n, k)
    return np.ascontiguousarray(np.stack(columns, -1).reshape(-1, 5), np.int64)


class Choices(NamedTuple):
    kernel: np.ndarray
    tile: np.ndarray
    warpgroup_tile: np.ndarray
    reason: np.ndarray  # addresses of C strings


def choose(*arguments):
    """Return the choices for capability, multiprocessors, m, n and k, which are broadcast against each other."""
    asked = queries(*arguments)
    found = *np.full((3, len(asked)), -1, np.int32), np.zeros(len(asked), np.uint64)
    library().choose_all(len(asked), asked.ctypes.data, *(column.ctypes.data for column in found))
    return Choices(*found)


def estimate(*arguments):
    """Return the estimated clocks of each tile, of shape (queries, 3); the arguments are those of ``choose``."""
    asked = queries(*arguments)
    clocks = np.full((len(asked), 3), np.nan)
    library().estimate_all(len(asked), asked.ctypes.data, clocks.ctypes.data)
    return clocks


def choose_for_real_x(value_bytes, *arguments, aligns=False):
    """Return the kernels for real x with values of so many bytes; the other arguments are those of ``choose``.

    ``aligns`` says whether a launch has to align the weights.
    """
    asked = queries(*arguments)
    kernels = np.full(len(asked), -1, np.int32)
    library().choose_for_real_x(len(asked), asked.ctypes.data, value_bytes, aligns, kernels.ctypes.data)
    return kernels


def estimate_fragments(*arguments):
    """Return the same of skinny_mma_sm80 and of mma_sm80's best tile, for 17 to 64 rows; of shape (queries, 2)."""
    asked = queries(*arguments)
    clocks = np.full((len(asked), 2), np.nan)
    library().estimate_fragments(len(asked), asked.ctypes.data, clocks.ctypes.data)
    return clocks


def estimate_warpgroups(*arguments):
    """Return the same of the tiles of wgmma_sm90a, of shape (queries, 2)."""
    asked = queries(*arguments)
    clocks = np.full((len(asked), 2), np.nan)
    library().estimate_warpgroups(len(asked), asked.ctypes.data, clocks.ctypes.data)
    return clocks


def decide(name, capability, multiprocessors, m, n, k, value_bytes=0, float64=False):
    words = library().decide_in_words(name.encode(), capability, multiprocessors, m, n, k, value_bytes, float64)
    return words.decode()


def random_sizes(seed, count=SHAPES):
    """Return random m, n, k and multiprocessors; sizes have all magnitudes, are often near whole tiles, rarely 0."""
    rng = np.random.default_rng(seed)
    outputs = rng.uniform(0, 40, count)
    bits = rng.uniform(0, 1, count) * outputs
    m, n, k = (np.floor(2.0**power).astype(np.int64) for power in (bits, outputs - bits, rng.uniform(0, 31, count)))
    for sizes, side in ((m, 64), (n, 128), (k, 512)):
        near = (rng.random(count) < 0.5) & (sizes > side)
        sizes[near] = sizes[near] // side * side + rng.integers(-1, 2, near.sum())
        sizes[rng.random(count) < 0.01] = 0
    small = rng.random(count) < 0.3
    m[small] = rng.integers(0, 300, small.sum())
    n = np.minimum(n, MOST_OUTPUTS // np.maximum(m, 1))
    return m, n, np.minimum(k, MOST_K), rng.integers(1, 201, count)


def fragments_win(capability, multiprocessors, m, n, k, words, code=200):
    """Return whether skinny_mma_sm80 is estimated to be faster than mma_sm80, which it can be for 17 to 64 rows."""
    few = (m > 16) & (m <= 64)
    if not 80 <= capability <= 90:
        return few & False
    multiprocessors, m, n, k = (np.where(few, size, 17) for size in (multiprocessors, m, n, k))
    # On 9.0 mma_sm80 hides half of the launch that counts x, if it has the code for it.
    counted = np.where(words & (k.ravel() % 128 == 0), 1400 if capability == 90 and code >= 90 else 2800, 0)
    fragments, tiles = estimate_fragments(capability, multiprocessors, m, n, k).T
    found = fragments < tiles + 2000 + counted
    return few & found.reshape(few.shape)


def expected_kernel(capability, multiprocessors, m, n, k, words=True, code=200):
    """Return the kernels' indices according to the table at the top of heuristics.h and to warpgroup_tiles.h."""
    multiprocessors, m, n, k = np.broadcast_arrays(multiprocessors, m, n, k)
    if capability > 90:
        return np.where(m <= 16, KERNELS.index("skinny"), KERNELS.index("mma_int8_sm80")).ravel()
    few, tiles = ("skinny", "mma_sm75") if capability < 80 else ("skinny_mma_sm80", "mma_sm80")
    names = np.where(m <= 4, KERNELS.index("skinny"), KERNELS.index(few))
    if capability == 90:
        in_one_round = 4 * (-(-m // 128) * -(-n // 128)) <= multiprocessors
        warpgroups = (m >= 256) & (np.maximum(m, n) < 2**31) & (k > 0) & (~in_one_round | (k >= 8192))
        tiles = np.where(warpgroups, KERNELS.index("wgmma_sm90a"), KERNELS.index(tiles))
    else:
        tiles = KERNELS.index(tiles)
    fragments = fragments_win(capability, multiprocessors, m, n, k, words, code)
    return np.where((m > 16) & ~fragments, tiles, np.where(fragments, KERNELS.index("skinny_mma_sm80"), names)).ravel()


# ---- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_random_shapes(capability):
    """Choices are legal, have a reason, do not depend on earlier ones, and follow the documented table."""
    m, n, k, multiprocessors = random_sizes(capability)
    choices = choose(capability, multiprocessors, m, n, k)
    np.testing.assert_array_equal(choices.kernel, expected_kernel(capability, multiprocessors, m, n, k))
    for kernel in np.unique(choices.kernel):
        rows = m[choices.kernel == kernel]
        assert library().is_legal(int(kernel), capability, int(rows.max()), 0, 0)
    assert np.isin(choices.tile, [WIDEST, MIDDLE, SMALLEST]).all()
    for reason in np.unique(choices.reason):
        assert len(ctypes.string_at(int(reason))) > 20

    order = np.random.default_rng(1).permutation(len(m))
    again = choose(capability, multiprocessors[order], m[order], n[order], k[order])
    for first, second in zip(choices, again, strict=True):
        np.testing.assert_array_equal(first[order], second)


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_every_number_of_multiprocessors(capability):
    m, n, k, _ = random_sizes(capability, 500)
    multiprocessors = np.arange(1, 201)[:, None]
    choices = choose(capability, multiprocessors, m, n, k)
    np.testing.assert_array_equal(choices.kernel, expected_kernel(capability, multiprocessors, m, n, k))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_more_rows_never_bring_a_kernel_back(capability):
    m = np.r_[0:300, 2 ** np.arange(9, 30)]
    for n, k in ((64, 64), (1024, 1024), (4096, 8191), (64, 8192), (8192, 1)):
        kernels = choose(capability, 100, m, n, k).kernel
        assert (np.diff(kernels) != 0).sum() == len(np.unique(kernels)) - 1


@pytest.mark.parametrize("value_bytes", [2, 4, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_real_x(capability, value_bytes):
    """Real x goes to a fused kernel if a block packs it faster than a launch; otherwise the choice is that of words."""
    m, n, k, multiprocessors = random_sizes(2000 + capability)
    m[: SHAPES // 2] = np.random.default_rng(5).integers(0, 18, SHAPES // 2)
    n = np.minimum(n, MOST_OUTPUTS // np.maximum(m, 1))
    device = (capability, multiprocessors, m, n, k)
    kernels = choose_for_real_x(value_bytes, *device)
    few = m * k * value_bytes <= (0.8 if capability == 90 else 1.6) * 49e3
    fits = (m <= 16) & (m * -(-k // 128) * 128 <= 131072)
    tensor_cores = (m > 1) & (80 <= capability <= 90)
    fused = few & fits & ((m <= 4) | tensor_cores)
    names = np.where(tensor_cores, KERNELS.index("fused_skinny_mma_sm80"), KERNELS.index("fused_skinny"))
    cluster = ~few & fits & (m * k * value_bytes <= 196_000) & (capability == 90) & (multiprocessors >= 8)
    expected = np.where(cluster, KERNELS.index("fused_cluster_sm90"), expected_kernel(*device, words=False))
    np.testing.assert_array_equal(kernels, np.where(fused, names, expected))
    # A launch that has to align the weights packs x as well, so none is saved.
    aligned = choose_for_real_x(value_bytes, *device, aligns=True)
    np.testing.assert_array_equal(aligned, expected_kernel(*device, words=False))
    assert 0 < fused.sum() < SHAPES and (cluster.sum() > 0) == (capability == 90)


def test_fits():
    for m, k in ((1, 131072), (4, 32768), (16, 8192), (3, 43648), (1, 0), (0, 2**31 - 1)):
        assert library().fits(m, k)
    for m, k in ((1, 131073), (4, 32769), (16, 8193), (3, 43649), (17, 1), (2**40, 2**31 - 1)):
        assert not library().fits(m, k)


# ---- the tile --------------------------------------------------------------------------------------


def random_tiles(capability, count=SHAPES):
    m, n, k, multiprocessors = random_sizes(1000 + capability, count)
    return np.maximum(m, 65), np.minimum(n, MOST_OUTPUTS // np.maximum(m, 65)), k, multiprocessors


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_tile_is_the_first_of_least_time(capability):
    m, n, k, multiprocessors = random_tiles(capability)
    clocks = estimate(capability, multiprocessors, m, n, k)
    assert np.isfinite(clocks).all() and (clocks >= 0).all()
    np.testing.assert_array_equal(choose(capability, multiprocessors, m, n, k).tile, clocks.argmin(1))
    assert set(clocks.argmin(1)) == {WIDEST, MIDDLE, SMALLEST}


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_tile_depends_on_whole_tiles_and_stages(capability):
    m, n, k, multiprocessors = random_tiles(capability)
    whole = (-(-size // unit) * unit for size, unit in ((m, 64), (n, 64), (k, 512)))
    first, second = choose(capability, multiprocessors, m, n, k), choose(capability, multiprocessors, *whole)
    np.testing.assert_array_equal(first.tile, second.tile)


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_longer_rows_never_bring_a_tile_back(capability):
    m, n, _, multiprocessors = random_tiles(capability, SHAPES // 40)
    k = np.r_[0, np.geomspace(1, MOST_K, 80).astype(np.int64)]
    tiles = choose(capability, multiprocessors[:, None], m[:, None], n[:, None], k).tile.reshape(len(m), -1)
    changes = (np.diff(tiles) != 0).sum(1)
    kinds = sum((tiles == tile).any(1).astype(int) for tile in (WIDEST, MIDDLE, SMALLEST))
    np.testing.assert_array_equal(changes, kinds - 1)
    assert changes.max() > 0, "no tile changes with k, so this test proves nothing"


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_larger_products_never_take_less_time(capability):
    m, n, k, multiprocessors = random_tiles(capability)
    rng = np.random.default_rng(2)
    larger = [size + np.floor(size * 2.0 ** rng.uniform(-20, 1, SHAPES)).astype(np.int64) for size in (m, n, k)]
    less, more = (estimate(capability, multiprocessors, *sizes).min(1) for sizes in ((m, n, k), larger))
    assert (less <= more).all()


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_widest_tile_if_it_leaves_nothing_idle(capability):
    rng = np.random.default_rng(3)
    few, more, rounds = (np.floor(2 ** rng.uniform(0, most, SHAPES)).astype(np.int64) for most in (7, 7, 6))
    multiprocessors, k = rng.integers(1, 201, SHAPES), rng.integers(0, MOST_K, SHAPES)
    whole_rounds = more * rounds * multiprocessors
    for rows, columns in ((few, whole_rounds), (whole_rounds, few)):
        assert (choose(capability, multiprocessors, 128 * rows, 256 * columns, k).tile == WIDEST).all()


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_widest_tile_if_there_are_many(capability):
    rng = np.random.default_rng(4)
    m, n = (np.floor(2 ** rng.uniform(12, 20, SHAPES)).astype(np.int64) for _ in range(2))
    tiles = -(-m // 128) * -(-n // 256)
    multiprocessors = np.clip(tiles // 40, 1, rng.integers(1, 201, SHAPES))
    many = tiles >= 40 * multiprocessors
    k = rng.integers(1, MOST_K, SHAPES)
    assert many.sum() > SHAPES / 2
    assert (choose(capability, multiprocessors, m, n, k).tile[many] == WIDEST).all()


def test_sizes_at_their_bounds():
    """The harness is compiled with overflow checks, which end the process if an int64 overflows."""
    powers = 2 ** np.arange(41)
    m, n = np.r_[powers, 0, MOST_OUTPUTS, 0], np.r_[powers[::-1], MOST_OUTPUTS, 0, 0]
    for capability in CAPABILITIES:
        for k in (0, 1, MOST_K):
            for multiprocessors in (1, 200):
                clocks = estimate(capability, multiprocessors, m, n, k)
                assert np.isfinite(clocks).all() and (clocks >= 0).all()
                choices = choose(capability, multiprocessors, m, n, k)
                expected = expected_kernel(capability, multiprocessors, m, n, k)
                np.testing.assert_array_equal(choices.kernel, expected)
                assert np.isfinite(estimate_warpgroups(capability, multiprocessors, m, n, k)).all()


# ---- 17 to 64 rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "shape", "clocks"),
    [
        # 128 blocks, one on a multiprocessor: 8 stages of 96 rows from L2, and 2048 sums of 4 warps.
        (90, 132, (64, 4096, 4096), (2000 + 8 * 256 + 576, 2000 + 8 * 128 * 64 / 24)),
        # 256 blocks, two on a multiprocessor, 16 stages of 64 rows.
        (90, 132, (32, 8192, 8192), (2000 + 2 * (16 * 64 * 64 / 24 + 288), 2000 + 16 * 96 * 64 / 24)),
        # 344 blocks, three on a multiprocessor, of which two can be there at the same time.
        (90, 132, (33, 11008, 4096), (2 * 2000 + 3 * (8 * 65 * 64 / 24 + 576), 2000 + 2 * 8 * 97 * 64 / 24)),
        # On 8.0, L2 keeps up with the counting of set bits.
        (80, 108, (64, 4096, 512), (2000 + 2 * (96 * 64 / 47 + 576), 2000 + 192)),
        (80, 108, (33, 64, 512), (2000 + 96 + 576, 2000 + 192)),
        (86, 82, (17, 1, 1), (2000 + 49 * 4 + 288, 2000 + 81 * 4)),
        # The tensor cores bound a tile that brings few rows of x.
        (90, 132, (17, 64, 512), (2000 + 49 * 64 / 24 + 288, 2000 + 256)),
        (90, 132, (64, 1, 0), (2000 + 576, 2000)),
    ],
)
def test_estimates_of_fragments(capability, multiprocessors, shape, clocks):
    assert estimate_fragments(capability, multiprocessors, *shape)[0] == pytest.approx(clocks)


@pytest.mark.parametrize(
    ("shape", "words", "real"),
    [
        ((17, 64, 64), True, True),
        ((64, 4096, 4096), True, True),  # 128 blocks instead of 64
        ((64, 256, 65536), True, True),
        ((32, 8192, 8192), True, True),
        ((64, 8192, 4096), True, False),  # for words of x a launch is saved
        ((64, 8192, 8192), False, False),  # of which mma_sm80 would hide half
        ((48, 8192, 8192), True, False),
        ((48, 8192, 8191), False, False),  # which has to align these
        ((32, 12672, 8192), True, True),
        ((32, 28672, 8192), False, False),
        ((64, 28672, 8192), False, False),
        ((17, 198528, 8192), False, False),  # of which tiles bring fewer bytes
        ((65, 64, 64), False, False),
    ],
)
def test_fragments_on_an_h200(shape, words, real):
    found = KERNELS[choose(90, 132, *shape).kernel[0]], KERNELS[choose_for_real_x(2, 90, 132, *shape)[0]]
    assert found == tuple("skinny_mma_sm80" if wins else "mma_sm80" for wins in (words, real))


@pytest.mark.parametrize("capability", [80, 87, 90])
def test_longer_rows_change_the_kernel_once(capability):
    """Here the smallest tile is always the best one of mma_sm80, and both estimates are lines over k."""
    _, n, _, multiprocessors = random_sizes(3000 + capability, SHAPES // 40)
    m, n = np.random.default_rng(6).integers(17, 65, len(n)), np.minimum(n, MOST_OUTPUTS // 64)
    k = 512 * np.r_[0, np.geomspace(1, MOST_K // 512, 60).astype(np.int64)]
    kernels = choose(capability, multiprocessors[:, None], m[:, None], n[:, None], k).kernel.reshape(len(m), -1)
    changes = (np.diff(kernels) != 0).sum(1)
    assert changes.max() == 1
    assert set(np.unique(kernels)) == {KERNELS.index("skinny_mma_sm80"), KERNELS.index("mma_sm80")}


def test_the_shape_of_fragments_is_that_of_the_kernel():
    """skinny_mma_sm80 has a shape for 32 rows and one for 64, whose columns the estimate uses."""
    shapes = re.findall(r"Shape<([24]), (\d+), (\d+), (\d+), 1>", (CUDA / "gemm_skinny_mma_sm80.cu").read_text())
    assert sorted((fragments, tiles) for fragments, tiles, *_ in shapes) == [("2", "4"), ("4", "4")]


# ---- warpgroups ------------------------------------------------------------------------------------

WIDE, NARROW = range(2)


def test_warpgroup_tile_is_that_of_least_time():
    m, n, k, multiprocessors = random_tiles(90)
    clocks = estimate_warpgroups(90, multiprocessors, m, n, k)
    chosen = choose(90, multiprocessors, m, n, k)
    warpgroups = chosen.kernel == KERNELS.index("wgmma_sm90a")
    expected = np.where(clocks[:, WIDE] < clocks[:, NARROW], WIDE, NARROW)
    np.testing.assert_array_equal(chosen.warpgroup_tile[warpgroups], expected[warpgroups])
    assert set(expected[warpgroups]) == {WIDE, NARROW}


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2048, 2048, 2048), NARROW),
        ((4096, 4096, 4096), NARROW),
        ((512, 4096, 4096), NARROW),
        ((8192, 8192, 8192), WIDE),
        ((2048, 8192, 8192), WIDE),
        ((16384, 16384, 16384), WIDE),
    ],
)
def test_warpgroup_tile_is_the_faster_one_of_those_measured(shape, tile):
    """The table of csrc/DESIGN.md ("What hardware said") has the times."""
    chosen = choose(90, 132, *shape)
    assert (chosen.kernel[0], chosen.warpgroup_tile[0]) == (KERNELS.index("wgmma_sm90a"), tile)


def test_the_model_of_the_tools_has_these_clocks_and_tiles():
    """An H200 has 132 multiprocessors. tools/gpu_model.py estimates the products of its table and those of any size."""
    generator = np.random.default_rng(0)
    shapes = np.concatenate([[*gpu_model.PRODUCTS.values()], generator.integers(256, 20000, (300, 3))])
    clocks, chosen = estimate_warpgroups(90, 132, *shapes.T), choose(90, 132, *shapes.T)
    wgmma = chosen.kernel == KERNELS.index("wgmma_sm90a")
    for shape, of_tiles, tile in zip(shapes.tolist(), clocks, chosen.warpgroup_tile, strict=True):
        bounds = [gpu_model.warpgroup_bound(*shape, columns) for columns in (192, 128)]
        assert [bound.clocks for bound in bounds] == of_tiles.tolist(), shape
        assert gpu_model.best_bound(*shape) == bounds[tile], shape
    assert wgmma.all() and set(chosen.warpgroup_tile) == {WIDE, NARROW}


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((255, 8192, 8192), "mma_sm80"),
        ((256, 8192, 8192), "wgmma_sm90a"),
        ((256, 2048, 4096), "mma_sm80"),  # 128 blocks of 64 x 64 fit the multiprocessors
        ((256, 2176, 4096), "wgmma_sm90a"),
        ((512, 256, 8191), "mma_sm80"),
        ((512, 256, 8192), "wgmma_sm90a"),
        ((2**31 - 1, 128, 1), "wgmma_sm90a"),
        ((2**31, 128, 1), "mma_sm80"),
        ((256, 2**31, 1), "mma_sm80"),
        ((4096, 4096, 0), "mma_sm80"),
    ],
)
def test_bounds_of_warpgroups(shape, kernel):
    assert KERNELS[choose(90, 132, *shape).kernel[0]] == kernel


def test_warpgroup_tiles_fit_their_kernel():
    """A block has 227 KiB of shared memory: the stages, 1 KiB to align them, and 8 KiB for margins and barriers."""
    figures = (ctypes.c_int64 * 6)()
    library().read_warpgroup_tiles(figures)
    rows, stage_bits, *tiles = figures
    for columns, stages in (tiles[:2], tiles[2:]):
        assert stages * (rows + columns) * stage_bits // 8 <= (227 - 9) * 1024 < (stages + 1) * (rows + columns) * 128
    text = (CUDA / "gemm_wgmma_sm90a.cu").read_text()
    for name in ("kWarpgroupRows", "kWarpgroupColumns", "kWarpgroupStages", "kWarpgroupStageBits"):
        assert re.search(rf"\b{name}\b", text), name
    for columns in (tiles[0], tiles[2]):
        assert f"case WarpgroupTile::m{rows}n{columns}:" in text


# ---- figures that comments and the kernels repeat --------------------------------------------------


def read_tile(tile, capability):
    shape, clocks, blocks = (ctypes.c_int64 * 6)(), ctypes.c_double(), ctypes.c_int64()
    library().read_tile(tile, capability, shape, ctypes.byref(clocks), ctypes.byref(blocks))
    return list(shape), clocks.value, blocks.value


@pytest.mark.parametrize(
    ("capability", "clocks", "blocks"),
    [
        (80, [1024, 512, 192], [1, 2, 4]),
        (86, [2048, 1024, 512], [1, 1, 3]),
        (87, [1024, 512, 192], [1, 2, 4]),
        (89, [2048, 1024, 512], [1, 1, 3]),
        (90, [2048, 1024, 341], [1, 2, 4]),
    ],
)
def test_documented_estimates(capability, clocks, blocks):
    tiles = [read_tile(tile, capability) for tile in range(3)]
    assert [int(tile[1]) for tile in tiles] == clocks
    assert [tile[2] for tile in tiles] == blocks


def test_tiles_are_those_of_the_kernel():
    """The kernel's sources use the constants of heuristics.h and have a case for each tile."""
    text = (CUDA / "gemm_mma_sm80.cu").read_text() + (CUDA / "mma_tiles.cuh").read_text()
    for name in ("kTileRows", "kTileColumns", "kTileSide", "kTileBlocks", "kTileStages", "kTileStageBits"):
        assert re.search(rf"\b{name}\b", text), name
    for tile in range(3):
        assert f"case Tile::m{'{}n{}'.format(*read_tile(tile, 80)[0])}:" in text


def records():
    all_records = []
    for i in range(len(KERNELS)):
        name, values = ctypes.c_char_p(), (ctypes.c_int64 * 7)()
        library().read_record(i, ctypes.byref(name), values)
        index, lowest, highest, aligned, popcounts, most_rows, fused = values
        assert index == i and fused == name.value.startswith(b"fused")
        all_records.append((name.value.decode(), lowest, highest, bool(aligned), bool(popcounts), most_rows))
    return all_records


def test_table_of_kernels():
    newest, any_rows = 2**31 - 1, 2**63 - 1
    assert records() == [
        ("popc", 75, newest, False, False, any_rows),
        ("skinny", 75, newest, True, False, 16),
        ("skinny_mma_sm80", 80, 90, True, False, 64),
        ("mma_sm75", 75, 89, True, False, any_rows),
        ("mma_sm80", 80, 90, True, True, any_rows),
        ("mma_int8_sm80", 80, newest, True, True, any_rows),
        ("wgmma_sm90a", 90, 90, True, True, 2**31 - 1),
        ("fused_skinny", 75, newest, True, False, 4),
        ("fused_skinny_mma_sm80", 80, 90, True, False, 16),
        ("fused_cluster_sm90", 90, 90, True, False, 16),
    ]


def test_every_kernel_has_a_file_and_a_launcher():
    """A kernel's launcher is gemm_<name>, and each file is named after one of the launchers in it."""
    files = sorted(CUDA.glob("gemm_*.cu"))
    defined = {file.stem: re.findall(r"^cudaError_t (gemm_\w+)\([^;]*?\{", file.read_text(), re.M) for file in files}
    assert all(stem in launchers for stem, launchers in defined.items())
    launchers = sorted(name for names in defined.values() for name in names)
    assert launchers == sorted(f"gemm_{name}" for name in KERNELS)
    assert list(_kernels.CUDA_KERNELS) == KERNELS
    declared = re.findall(r"^cudaError_t (gemm_\w+)\(", (CUDA / "kernels.h").read_text(), re.M)
    assert sorted(declared) == launchers


@pytest.mark.parametrize(("macro", "kernel"), [("MMA_SM75", "mma_sm75"), ("MMA_SM80", "mma_sm80")])
def test_tensor_core_kernels_are_only_chosen_for_targets_that_have_their_code(macro, kernel):
    text = (CUDA / "mma.cuh").read_text()
    pattern = rf"__CUDA_ARCH__ >= (\d+) && __CUDA_ARCH__ < (\d+)\n#define BITORCH_QLINEAR_{macro} 1"
    first, end = (int(number) for number in re.search(pattern, text).groups())
    for name, lowest, highest, *_ in records():
        if name.endswith(kernel):
            assert first <= 10 * lowest and 10 * highest < end


def test_first_calls_have_every_kernel():
    """What tests/gpu captures in a new process loads each kernel that an H200 chooses, and a large tile."""
    chosen = set()
    for m, n, k, dtype in PRODUCTS:
        chosen |= {decide("", 90, 132, m, n, k, size) for size in (0, 4 if dtype == "float32" else 2)}
    names = {choice.partition(":")[0].partition(" ")[0] for choice in chosen}
    assert names == {*KERNELS} - {"popc", "mma_sm75", "mma_int8_sm80"}
    assert any(choice.startswith("mma_sm80 with tiles of 128 x 256") for choice in chosen)


# ---- code for an earlier device --------------------------------------------------------------------

EARLIER_CODE = [(80, 75), (86, 80), (87, 80), (89, 75), (89, 86), (90, 75), (90, 80), (90, 89), (100, 75), (100, 80)]
EARLIER_CODE += [(100, 90), (110, 80), (110, 103), (120, 75), (121, 120)]


def with_code(capability, code):
    """Return both as the harness expects them in place of a capability."""
    return capability + 1000 * code


@pytest.mark.parametrize(("capability", "code"), EARLIER_CODE)
def test_kernels_are_those_that_device_and_code_have(capability, code):
    """Neither a kernel that is empty in the code is chosen, nor one whose instructions the device emulates."""
    device = with_code(capability, code)
    common = [r for r in records() if r[1] <= min(capability, code) and max(capability, code) <= r[2]]
    assert library().names_of(device).decode() == ", ".join(name for name, *_ in common)
    m, n, k, multiprocessors = random_sizes(3000 + capability)
    chosen = choose(device, multiprocessors, m, n, k)
    expected = expected_kernel(capability, multiprocessors, m, n, k, code=code)
    if code < 80:
        tiles = "mma_sm75" if capability < 90 else "popc"
        expected = np.where(m <= 16, KERNELS.index("skinny"), KERNELS.index(tiles))
    elif capability == 90:
        expected[expected == KERNELS.index("wgmma_sm90a")] = KERNELS.index("mma_sm80")
    np.testing.assert_array_equal(chosen.kernel, expected)
    for kernel in np.unique(chosen.kernel):
        assert KERNELS[kernel] in [name for name, *_ in common]
        assert library().is_legal(int(kernel), device, int(m[chosen.kernel == kernel].max()), 0, 0)


@pytest.mark.parametrize(("capability", "code"), EARLIER_CODE)
def test_the_device_gives_the_figures_whatever_its_code(capability, code):
    m, n, k, multiprocessors = random_tiles(capability, 1000)
    sizes = (multiprocessors, m, n, k)
    np.testing.assert_array_equal(estimate(with_code(capability, code), *sizes), estimate(capability, *sizes))


def test_code_that_cannot_wait():
    """On 9.0 a launch that packs x costs less if the product behind it starts early, which code for 8.0 does not."""
    for bytes_of_x, fused in ((39200, {0, 90, 89}), (39202, {89}), (78400, {89}), (78402, set())):
        for code in (0, 90, 89):
            chosen = choose_for_real_x(2, with_code(90, code), 132, 1, 64, bytes_of_x // 2)
            assert (KERNELS[chosen[0]] == "fused_skinny") == (code in fused)


def test_forced_though_the_code_lacks_it():
    assert decide("wgmma_sm90a", with_code(90, 80), 132, 300, 300, 300) == (
        "error: BITORCH_QLINEAR_CUDA_KERNEL: expected one of the kernels that compute capability 9.0, with code for "
        "compute capability 8.0, has (popc, skinny, skinny_mma_sm80, mma_sm80, mma_int8_sm80, fused_skinny, "
        'fused_skinny_mma_sm80), got "wgmma_sm90a"'
    )
    assert decide("", with_code(90, 75), 132, 300, 300, 300) == (
        "popc: CUDA cores: the code was compiled for a compute capability before the device's"
    )


# ---- the override ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forced(capability):
    device = (capability, 100)
    names = library().names_of(capability).decode()
    for name, lowest, highest, _, _, most_rows in records():
        assert (name in names.split(", ")) == (lowest <= capability <= highest)
        for m in (0, 1, 16, 17, 64, 65, 5000, 2**31):
            got = decide(name, *device, m, 300, 700)
            if not lowest <= capability <= highest:
                major, minor = divmod(capability, 10)
                assert got == (
                    f"error: BITORCH_QLINEAR_CUDA_KERNEL: expected one of the kernels that compute capability "
                    f'{major}.{minor} has ({names}), got "{name}"'
                )
            elif m > most_rows or name.startswith("fused"):
                automatic = decide("", *device, m, 300, 700).partition(": ")[0]
                takes = "few values of real x" if name.startswith("fused") else f"at most {most_rows} rows"
                assert got == f"{automatic}: the automatic choice: the kernel that is forced takes {takes}"
            else:
                assert re.match(rf"{name}(?: with tiles of \d+ x \d+)?: forced, by \w+ or by the program$", got)


def test_forced_wgmma_with_too_many_columns():
    """A coordinate of a tensor map is an int32, also for the rows of the weights."""
    assert decide("wgmma_sm90a", 90, 132, 1, 2**31 - 1, 128).startswith("wgmma_sm90a with tiles of 128 x 192: forced")
    assert decide("wgmma_sm90a", 90, 132, 1, 2**31, 128) == (
        "skinny: the automatic choice: the kernel that is forced takes at most 2147483647 rows"
    )


@pytest.mark.parametrize("name", ["nope", "mma_sm75x", "Popc", " popc", "skinny_mma", "popc, skinny"])
def test_forced_by_a_name_that_does_not_exist(name):
    for capability in CAPABILITIES:
        assert decide(name, capability, 100, 10, 10, 10) == (
            f'error: BITORCH_QLINEAR_CUDA_KERNEL: expected one of {", ".join(KERNELS)}, got "{name}"'
        )


def decide_tile(tile, name, capability, m, n, k, float64=False):
    return library().decide_tile_in_words(tile.encode(), name.encode(), capability, m, n, k, float64).decode()


@pytest.mark.parametrize("tile", ["128x256", "128x128", "64x64"])
def test_forced_tile(tile):
    """Every product of mma_sm80 has the tile; those of kernels with one tile do not change."""
    for name, sizes in (("", (65, 9, 9)), ("", (255, 8192, 8192)), ("mma_sm80", (1, 1, 1))):
        assert decide_tile(tile, name, 90, *sizes) == (
            f"mma_sm80 with tiles of {tile.replace('x', ' x ')}: "
            "the tile is forced, by BITORCH_QLINEAR_CUDA_TILE or by the program"
        )
    for capability, m in ((90, 16), (90, 17), (75, 100), (120, 100)):
        assert decide_tile(tile, "", capability, m, 300, 300) == decide("", capability, 100, m, 300, 300)
    assert decide_tile("", "", 90, 8192, 300, 300) == decide("", 90, 100, 8192, 300, 300)


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("size", [2048, 8192])
def test_forced_tile_of_warpgroups(size, float64):
    """wgmma_sm90a has two of the tiles, and one of them for float64; mma_sm80 lacks the other one."""
    product = 90, 100, size, size, size, 0, float64
    automatic = decide("", *product)
    expected = "128 x 128" if float64 or size == 2048 else "128 x 192"
    assert automatic.startswith(f"wgmma_sm90a with tiles of {expected}: tensor cores of warpgroups")
    for tile in ("128x256", "128x192", "128x128", "64x64"):
        got = decide_tile(tile, "", 90, size, size, size, float64)
        if tile == "128x128" or (tile == "128x192" and not float64):
            assert got.startswith(f"wgmma_sm90a with tiles of {tile.replace('x', ' x ')}: the tile is forced, by ")
        else:
            assert got == automatic
    assert decide_tile("128x192", "mma_sm80", 90, size, size, size) == decide("mma_sm80", 90, 100, size, size, size)


def test_the_sizes_of_tiles_are_those_of_the_kernels():
    """Every tile of a kernel can be forced."""
    for tile in range(3):
        rows, columns, *_ = read_tile(tile, 80)[0]
        assert decide_tile(f"{rows}x{columns}", "", 80, 300, 300, 300).startswith(
            f"mma_sm80 with tiles of {rows} x {columns}: the tile is forced"
        )


@pytest.mark.parametrize("tile", ["128", "128 x 256", "256x128", "m64n64"])
def test_forced_by_a_tile_that_does_not_exist(tile):
    assert decide_tile(tile, "", 90, 10, 10, 10) == (
        f'error: BITORCH_QLINEAR_CUDA_TILE: expected one of 128x256, 128x192, 128x128, 64x64, got "{tile}"'
    )


def test_early_starts():
    """Products start early on 9.0 in code for 9.0, unless the environment's variable is 0."""
    for value in ("", "1"):
        for capability, expected in ((90, "yes"), (90_000 + 90, "yes"), (80_000 + 90, "no"), (89, "no"), (100, "no")):
            assert library().depends_in_words(value.encode(), capability).decode() == expected
    assert library().depends_in_words(b"0", 90) == b"no"
    for value in ("00", "off", "-1", " "):
        error = library().depends_in_words(value.encode(), 90).decode()
        assert error == f'error: BITORCH_QLINEAR_CUDA_EARLY_START: expected 0 or 1, got "{value}"'


@pytest.mark.parametrize("capability", [30, 52, 61, 70, 72])
def test_a_device_that_is_too_old_is_an_error(capability):
    assert not library().is_supported(capability)
    assert library().names_of(capability) == b""
    for name in ("", "popc", "mma_sm80"):
        major, minor = divmod(capability, 10)
        assert decide(name, capability, 20, 10, 10, 10) == (
            f"error: compute capability {major}.{minor} is not supported: the CUDA kernels need 7.5 or later"
        )
    assert not any(library().is_legal(kernel, capability, 1, 64, 2) for kernel in range(len(KERNELS)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_supported(capability):
    assert library().is_supported(capability)
    for kernel, (name, lowest, highest, _, _, most_rows) in enumerate(records()):
        for m in (0, 1, 4, 5, 16, 17, 64, 65, 2**31 - 1, 2**31, MOST_OUTPUTS):
            legal = lowest <= capability <= highest and m <= most_rows
            assert bool(library().is_legal(kernel, capability, m, 64, 2)) == legal
            assert bool(library().is_legal(kernel, capability, m, 64, 0)) == (legal and not name.startswith("fused"))
            fits = legal and (not name.startswith("fused") or m <= 2)
            assert bool(library().is_legal(kernel, capability, m, 65536, 2)) == fits


def test_words():
    h100 = 90, 132
    wide, small = (decide("", 80, 108, size, size, size) for size in (8192, 300))
    assert wide == "mma_sm80 with tiles of 128 x 256: tensor cores, by the tile that moves the fewest bytes"
    assert small.startswith("mma_sm80 with tiles of 64 x 64: tensor cores, by the smallest tile: ")
    wide, small = (decide("", *h100, size, size, size) for size in (8192, 1024))
    assert wide.startswith("wgmma_sm90a with tiles of 128 x 192: tensor cores of warpgroups, from 256 rows on")
    assert small.startswith("wgmma_sm90a with tiles of 128 x 128: ")
    assert decide("", *h100, 255, 1024, 1024).startswith("mma_sm80 with tiles of 64 x 64: ")
    assert decide("", *h100, 1, 8192, 8192).startswith("skinny: ")
    assert decide("", *h100, 16, 8192, 8192).startswith("skinny_mma_sm80: ")
    assert decide("", *h100, 64, 4096, 4096).startswith("skinny_mma_sm80: tensor cores by narrow blocks")
    assert decide("", 120, 170, 17, 8192, 8192).startswith("mma_int8_sm80: ")
    assert decide("mma_sm75", 75, 40, 1, 10, 10).startswith("mma_sm75: forced")
    assert decide("", *h100, 1, 8192, 8192, 2).startswith("fused_skinny: one launch")
    assert decide("", *h100, 16, 1024, 1024, 2).startswith("fused_skinny_mma_sm80: one launch")
    for m, k, value_bytes in ((16, 4096, 2), (8, 8192, 2), (4, 8192, 2), (8, 11008, 2), (5, 16384, 2), (1, 28672, 2)):
        assert decide("", *h100, m, 8192, k, value_bytes).startswith("fused_cluster_sm90: one launch, in which the ")
    assert decide("", *h100, 16, 8192, 8192, 2).startswith("skinny_mma_sm80: ")
    assert decide("", *h100, 16, 8192, 4096, 4).startswith("skinny_mma_sm80: ")
    assert decide("", 90, 7, 16, 8192, 4096, 2).startswith("skinny_mma_sm80: ")
    assert decide("fused_cluster_sm90", *h100, 16, 8192, 8192, 2).startswith("fused_cluster_sm90: forced")
    assert decide("fused_skinny", *h100, 4, 8192, 8192, 2).startswith("fused_skinny: forced")
    assert decide("fused_skinny", *h100, 16, 8192, 8192, 2).startswith("skinny_mma_sm80: the automatic choice: ")
