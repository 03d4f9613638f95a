"""The kernels of benchmarks/gpu/rates.cu do the work that their rates are computed from."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tools.ptx.machine import In, Module, Out, Struct, TensorMap

from .product import compiled, kernel, source

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "rates.cu"
BLOCKS, PIECE, ROW = 5, 128 * 128, 1024  # bytes of a piece of a matrix, and of a row


@functools.cache
def module() -> Module:
    ptx = compiled(source(str(FILE)), "sm_90a")
    assert "%clock64" in ptx
    return Module.from_ptx(ptx.replace("%clock64", "0"))  # the interpreter has no clock


def run(name: str, threads: int, arguments: list, shared: int = 0) -> np.ndarray:
    """Return the sums of all threads, by block."""
    sums, clocks = np.zeros((BLOCKS, threads), np.int32), np.zeros(BLOCKS, np.int64)
    results = Struct("QQ", Out(sums), Out(clocks))
    module().launch(kernel(module(), name), BLOCKS, threads, [*arguments, results], shared)
    assert not clocks.any()
    return sums


def random_words(numbers: np.ndarray) -> np.ndarray:
    i = numbers.astype(np.uint32)
    i = (i ^ i >> 16) * np.uint32(0x7FEB352D)
    i = (i ^ i >> 15) * np.uint32(0x846CA68B)
    return i ^ i >> 16


def products(rows: np.ndarray, columns: np.ndarray) -> int:
    """Return the sum of popcount(row & column) over all pairs of rows of words."""
    ones = [np.unpackbits(words.view(np.uint8), axis=1).sum(axis=0, dtype=np.int64) for words in (rows, columns)]
    return int(ones[0] @ ones[1])


def test_products_by_warps():
    """A round is four products of 16 x 8 x 256 bits of each warp."""
    sums = run("multiply_by_warps", 64, [3])
    words = random_words(np.arange(BLOCKS * 64 * 6)).reshape(BLOCKS * 2, 32, 6)
    for fragments, of_warp in zip(words, sums.reshape(-1, 32), strict=True):
        a, b = fragments.reshape(8, 4, 6)[:, :, :4], fragments.reshape(8, 4, 6)[:, :, 4:]
        rows = [np.concatenate([a[:, :, half], a[:, :, half + 2]], axis=1) for half in (0, 1)]
        expected = products(np.concatenate(rows), np.concatenate([b[:, :, 0], b[:, :, 1]], axis=1))
        assert of_warp.sum() == 3 * 4 * expected


@pytest.mark.parametrize("columns", [128, 192])
def test_products_by_warpgroups(columns):
    """A round is a product of 128 rows, the columns and 1024 bits, whose chunks lie exchanged in shared memory."""
    sums = run(f"multiply_by_warpgroupsILi{columns}E", 128, [2])
    words = random_words(np.arange((128 + columns) * 32)).reshape(-1, 8, 4)
    at = np.arange(8) ^ np.arange(len(words))[:, None] % 8
    lines = np.take_along_axis(words, at[:, :, None], axis=1).reshape(-1, 32)
    assert sums.sum(axis=1).tolist() == [2 * products(lines[:128], lines[128:])] * BLOCKS


def parts(pieces: int, sharers: int) -> list[list[int]]:
    """Return the pieces that each block reads."""
    count = pieces // -(-BLOCKS // sharers)
    return [[block // sharers * count + i for i in range(count)] for block in range(BLOCKS)]


@pytest.mark.parametrize("sharers", [1, 2, BLOCKS])
def test_bytes_from_l2(sharers):
    """Each block reads its part once around and begins again. All parts lie in the matrix."""
    pieces = 24
    matrix = np.random.default_rng(0).integers(0, 2**32, (pieces * PIECE // ROW, ROW // 4), np.uint32)
    sums = run("load_pieces", PIECE // 16, [In(matrix), pieces, sharers, 16])
    of_pieces = np.bitwise_xor.reduce(matrix.reshape(pieces, PIECE // 16, 4), axis=2)
    read = [[of_block[i % len(of_block)] for i in range(16)] for of_block in parts(pieces, sharers)]
    np.testing.assert_array_equal(sums.view(np.uint32), np.stack([of_pieces[i].sum(0, np.uint32) for i in read]))
    boxes = TensorMap(In(matrix), matrix.shape[::-1], (ROW,), (32, 128), 4, 128)
    run("copy_boxes", 32, [boxes, pieces, sharers, 29], 12 * PIECE + 1024)
