"""Textbook kernels, as nvcc compiles them, equal NumPy, and every mutant of them is caught."""

from collections.abc import Callable

import numpy as np
import pytest

from ..machine import In, InOut, Module, Out, TensorMap, compile_ptx, nvcc, nvcc_release
from ..mutate import (
    assert_caught,
    change_source,
    change_swizzles,
    edit,
    loosen_waits,
    off_by_one,
    remove,
    remove_barriers,
    remove_waits,
    swap_fragments,
)
from ..regenerate import generate, normalised
from .helpers import KERNELS, textbook

SEEDS = range(5)
# This is enough for the shapes here and stops a mutant that loops for ever soon.
LIMIT = 300_000


def launch(module: Module, *args, **options):
    return module.launch(*args, limit=LIMIT, **options)


def equal(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    wrong = np.argwhere(got != want)
    assert not wrong.size, f"at {wrong[0]}: {got[tuple(wrong[0])]}, not {want[tuple(wrong[0])]}"


# ---- Each kernel over its shapes -------------------------------------------------------------------------------------
def block_sum(module: Module, seed: int) -> None:
    for n in (0, 1, 127, 128, 1000):
        for threads in (128, 256):
            x = np.random.default_rng(seed).integers(-99, 99, n, np.int32)
            partial = np.zeros(3, np.int32)
            launch(module, "block_sum", 3, threads, [In(x), Out(partial), n], seed=seed)
            padded = np.zeros(-(-max(n, 1) // (3 * threads)) * 3 * threads, np.int32)
            padded[:n] = x
            equal(partial, padded.reshape(-1, 3, threads).sum((0, 2)).astype(np.int32))


def grid_sum(module: Module, seed: int) -> None:
    for n, grid in ((0, 1), (1, 2), (384, 3), (1000, 4)):
        x = np.random.default_rng(seed).integers(-99, 99, n, np.int32)
        total, finished = np.zeros(1, np.int32), np.zeros(1, np.uint32)
        partial = Out(np.zeros(grid, np.int32))
        launch(module, "grid_sum", grid, 128, [In(x), partial, InOut(finished), Out(total), n], seed=seed)
        equal(total, np.array([x.sum()], np.int32))


def inclusive_scan(module: Module, seed: int) -> None:
    for n, width in ((1, 32), (5, 2), (64, 64), (255, 128), (300, 256)):
        x = np.random.default_rng(seed).integers(-99, 99, n).astype(np.float32)  # their sums are exact in any order
        y, blocks = np.zeros(n, np.float32), -(-n // width)
        launch(module, "inclusive_scan", blocks, width, [x, Out(y), n], shared_bytes=8 * width, seed=seed)
        equal(y, np.concatenate([np.cumsum(x[at : at + width]) for at in range(0, n, width)]))


def transpose(name: str) -> Callable[[Module, int], None]:
    def check(module: Module, seed: int) -> None:
        for rows, columns in ((1, 1), (32, 32), (45, 70), (64, 37), (24, 40), (40, 24), (16, 48), (48, 16), (8, 8)):
            x = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
            y = np.zeros((columns, rows), np.float32)
            grid = (-(-columns // 32), -(-rows // 32))
            launch(module, name, grid, (32, 8), [x, Out(y), rows, columns], seed=seed)
            equal(y, np.ascontiguousarray(x.T))

    return check


def matmul(module: Module, seed: int) -> None:
    for m, n, k in ((1, 4, 32), (35, 36, 64), (48, 32, 160), (32, 64, 96), (16, 16, 32)):
        rng = np.random.default_rng(seed)
        a, b = rng.integers(-9, 9, (m, k)).astype(np.float32), rng.integers(-9, 9, (k, n)).astype(np.float32)
        c = np.zeros((m, n), np.float32)
        launch(module, "matmul", (-(-n // 32), -(-m // 32)), (16, 16), [a, b, Out(c), m, n, k], seed=seed)
        equal(c, a @ b)


def histogram(module: Module, seed: int) -> None:
    for n, threads in ((0, 64), (1, 320), (700, 64), (3000, 256)):
        x = np.random.default_rng(seed).integers(0, 256, n).astype(np.uint8)
        counts = np.ones(256, np.uint32)
        launch(module, "histogram", 2, threads, [x, InOut(counts), n], seed=seed)
        equal(counts, 1 + np.bincount(x, minlength=256).astype(np.uint32))


def bmma(name: str) -> Callable[[Module, int], None]:
    def check(module: Module, seed: int) -> None:
        for m, n, words in ((1, 1, 32), (16, 8, 64), (21, 13, 96), (8, 4, 32), (7, 5, 32), (13, 3, 32), (3, 3, 0)):
            rng = np.random.default_rng(seed)
            a, b = (rng.integers(0, 2**32, (rows, words), dtype=np.uint32) for rows in (m, n))
            counts = np.zeros((m, n), np.int32)
            launch(module, name, (-(-n // 8), -(-m // 16)), 32, [a, b, Out(counts), m, n, words], seed=seed)
            equal(counts, np.bitwise_count(a[:, None] & b[None]).sum(-1).astype(np.int32))

    return check


def pipeline(module: Module, seed: int) -> None:
    edges = [(77, 34, 256), (10, 5, 128), (64, 43, 256), (13, 48, 256), (70, 19, 256), (6, 24, 128), (9, 31, 128)]
    for m, n, k in (*edges, (64, 32, 1024), (70, 40, 5 * 1024 - 128), (130, 32, 2048)):
        rng = np.random.default_rng(seed)
        x, w = (rng.integers(0, 256, (rows, k // 8)).astype(np.uint8) for rows in (m, n))
        maps = [
            TensorMap(In(bits), (k // 8, len(bits)), (k // 8,), (128, rows), swizzle=128)
            for bits, rows in ((x, 64), (w, 32))
        ]
        y = np.zeros((m, n), np.int32)
        launch(module, "pipeline", (-(-n // 32), -(-m // 64)), 160, [*maps, Out(y), m, n, -(-k // 1024)], seed=seed)
        equal(y, np.bitwise_count(x[:, None] & w[None]).sum(-1).astype(np.int32))


def cluster_sum(module: Module, seed: int) -> None:
    for n, grid in ((0, 4), (100, 4), (5000, 8)):
        x = In(np.random.default_rng(seed).integers(-99, 99, n or 1, np.int32))
        total = np.zeros(1, np.int32)
        launch(module, "cluster_sum", grid, 128, [x, InOut(total), n], seed=seed, dependent=[x])
        equal(total, x.array[:n].sum(keepdims=True, dtype=np.int32))


CASES = {
    "block_sum": ("reduction", block_sum),
    "grid_sum": ("reduction", grid_sum),
    "inclusive_scan": ("scan", inclusive_scan),
    "transpose_padded": ("transpose", transpose("transpose_padded")),
    "transpose_plain": ("transpose", transpose("transpose_plain")),
    "matmul": ("matmul", matmul),
    "histogram": ("histogram", histogram),
    "bmma_direct": ("bmma", bmma("bmma_direct")),
    "bmma_ldmatrix": ("bmma", bmma("bmma_ldmatrix")),
    "pipeline": ("pipeline", pipeline),
    "cluster_sum": ("cluster_sum", cluster_sum),
}


@pytest.mark.parametrize("kernel", CASES)
def test_equals_numpy(kernel):
    file, check = CASES[kernel]
    module = Module.from_ptx(textbook(file))
    for seed in SEEDS:
        check(module, seed)


# ---- Mutants ---------------------------------------------------------------------------------------------------------
# These mutants compute the same: a part of the name, and the reason.
EQUIVALENT = {
    "grid_sum": {
        "barrier removed: bar.sync at PTX line 289": "thread 0 alone continues, and reads only what it wrote itself",
    },
    "inclusive_scan": {
        "setp.lt.s32 at PTX line 97": "offset <= width adds a round in which every thread only copies",
    },
    "matmul": {
        "setp.ge.s32 at PTX line 54": "the address is that of a row that does not exist, of which nothing is read",
        "setp.ge.s32 at PTX line 87": "the address is that of a column that does not exist, of which nothing is read",
        "setp.lt.s32 at PTX line 80": "row m of the tile holds row 0, for outputs that are not stored",
        "setp.lt.s32 at PTX line 108": "column n of the tile holds column 0, for outputs that are not stored",
        "setp.gt.s32 at PTX line 125": "k > 31 and k >= 31 are the same, because k is a multiple of 32",
    },
    "pipeline": {
        "setp.gt.s32 at PTX line 157": "blocks > 0 and blocks >= 0 are the same, because blocks is never 0",
    },
    "cluster_sum": {
        "barrier removed: bar.sync at PTX line 157": "the last sum is thread 0's, which alone reads it",
    },
    "bmma_direct": {
        "setp.lt.s32 at PTX line 40": "words < 1 and words <= 1 are the same, because words is a multiple of 8",
    },
}


@pytest.mark.parametrize("kernel", [k for k in CASES if k != "transpose_plain"])
def test_every_mutant_is_caught(kernel):
    file, check = CASES[kernel]
    ptx = textbook(file)
    mutants = [*remove_barriers(ptx, kernel), *remove_waits(ptx, kernel), *loosen_waits(ptx, kernel)]
    mutants += [*change_swizzles(ptx, kernel), *off_by_one(ptx, kernel), *swap_fragments(ptx, kernel)]
    mutants += remove("fence removed", ptx, kernel, r"membar\..*")
    assert_caught(ptx, mutants, check, seeds=range(2), equivalent=EQUIVALENT.get(kernel))


def asynchronous_mutants(ptx: str, kernel: str) -> list:
    """Return mutants of mbarriers, bulk copies, wgmma, clusters and dependent launches."""
    mutants = []
    for what, opcode in (
        ("arrival removed", r"mbarrier\.arrive\.shared.*"),
        ("expectation removed", r"mbarrier\.arrive\.expect_tx.*"),
        ("load removed", r"cp\.async\.bulk\.tensor.*"),
        ("wgmma removed", r"wgmma\.mma_async.*"),
        ("wgmma.fence removed", r"wgmma\.fence.*"),
        ("commit removed", r"wgmma\.commit_group.*"),
        ("cluster barrier removed", r"barrier\.cluster\..*"),
        ("griddepcontrol removed", r"griddepcontrol\.wait"),
    ):
        mutants += remove(what, ptx, kernel, opcode)
    wait = r"mbarrier\.try_wait\.parity.*"
    mutants += edit("another barrier waited for", ptx, kernel, wait, r"\[(%r\d+)\]", r"[\1+8]")
    mutants += edit("the wait always passes", ptx, kernel, r"selp\.b32", r"1, 0, p;", "1, 1, p;")
    mutants += edit("another barrier arrived at", ptx, kernel, r"mbarrier\.arrive.*", r"\[(%r\d+)\]", r"[\1+8]")
    mutants += edit("another barrier signalled", ptx, kernel, r"cp\.async\.bulk.*", r"\[(%r\d+)\];", r"[\1+8];")
    mutants += edit("another place loaded", ptx, kernel, r"cp\.async\.bulk.*", r"\[(%r\d+)\], \[", r"[\1+128], [")
    mutants += edit("coordinates exchanged", ptx, kernel, r"cp\.async\.bulk.*", r"\{(%r\d+), (%r\d+)\}", r"{\2, \1}")
    mutants += edit("descriptors exchanged", ptx, kernel, r"wgmma\.mma_async.*", r"(%rd\d+), (%rd\d+), p", r"\2, \1, p")
    mutants += edit("always added", ptx, kernel, r"wgmma\.mma_async.*", r", p;", ", !p;")
    mutants += edit("another block", ptx, kernel, r"mapa\.u64", r", (%r\d+);", ", 1;")
    return mutants


@pytest.mark.parametrize(("kernel", "least"), [("pipeline", 25), ("cluster_sum", 5)])
def test_mutants_of_the_asynchronous_machine(kernel, least):
    file, check = CASES[kernel]
    mutants = asynchronous_mutants(textbook(file), kernel)
    assert len(mutants) >= least
    assert_caught(textbook(file), mutants, check, seeds=range(2), equivalent=EQUIVALENT.get(kernel))


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_mutants_of_the_source():
    source = (KERNELS / "matmul.cu").read_text()
    edits = [
        ("one stage for both tiles", "const int stage = step % 2;", "const int stage = 0;"),
        ("a tile too few", "const int steps = k / kTile;", "const int steps = (k - 1) / kTile;"),
        ("a column too far", "column0 + column < n;", "column0 + column <= n;"),
    ]
    caught = assert_caught(textbook("matmul"), change_source(source, "sm_80", edits), matmul, seeds=range(2))
    assert len(caught) == 3


# ---- Counts -------------------------------------------------------------------------------------------------
def test_padding_removes_bank_conflicts():
    """A column of a 32 x 32 tile lies in one bank: 31 extra wavefronts for each of the 32 reads of a tile."""
    module = Module.from_ptx(textbook("transpose"))
    x, y = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
    plain = module.launch("transpose_plain", (2, 2), (32, 8), [x, Out(y), 64, 64])
    padded = module.launch("transpose_padded", (2, 2), (32, 8), [x, Out(y), 64, 64])
    assert plain.bank_conflicts == 4 * 32 * 31 and padded.bank_conflicts == 0
    assert sum(plain.conflicts_by_source().values()) == plain.bank_conflicts
    assert all(place.startswith("transpose.cu:") for place in plain.conflicts_by_source())
    assert plain.sectors == plain.sectors_needed == 2 * 64 * 64 * 4 // 32


def test_uncoalesced_writes_are_seen():
    module = Module.from_ptx(textbook("transpose"))
    x, y = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
    report = module.launch("transpose_naive", 2, 32, [x, Out(y), 64, 64])
    reads = 64 * 64 * 4 // 32
    assert report.sectors == reads + 64 * 64 and report.sectors_needed == 2 * reads
    ((place, excess),) = report.excess_sectors_by_source().items()
    assert place.startswith("transpose.cu:") and excess == 64 * 64 - reads
    assert f"{excess} extra sectors at {place}" in str(report)


def test_swizzled_tiles_have_no_conflicts():
    module = Module.from_ptx(textbook("bmma"))
    a, b = np.ones((16, 64), np.uint32), np.ones((8, 64), np.uint32)
    report = module.launch("bmma_ldmatrix", (1, 1), 32, [a, b, Out(np.zeros((16, 8), np.int32)), 16, 8, 64])
    assert report.bank_conflicts == 0
    assert report.instructions["mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"] == 32 * 64 // 8


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_without_the_swizzle_there_are_conflicts():
    """The eight rows of 128 bytes of a matrix share their banks: 7 extra wavefronts for each of 6 matrices a step."""
    source = (KERNELS / "bmma.cu").read_text()
    for swizzle, plain in (
        ("(i % 8 ^ i / 8 % 8)", "i % 8"),
        ("(ca ^ ra % 8)", "ca"),
        ("(cb ^ rb)", "cb"),
    ):
        assert swizzle in source
        source = source.replace(swizzle, plain)
    a, b = np.ones((16, 64), np.uint32), np.ones((8, 64), np.uint32)
    counts = np.zeros((16, 8), np.int32)
    report = Module.from_source(source).launch("bmma_ldmatrix", (1, 1), 32, [a, b, Out(counts), 16, 8, 64])
    assert (counts == 64).all() and report.bank_conflicts == 8 * 6 * 7


# ---- nvcc ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc_release() != "13.0", reason="nvcc 13.0 made the kept PTX")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.stem)
def test_kept_ptx_is_what_nvcc_emits(source):
    assert generate(source) == source.with_suffix(".ptx").read_text()


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90a", "sm_100", "sm_120"])
def test_other_targets(arch):
    module = Module(normalised(compile_ptx(KERNELS / "reduction.cu", arch)))
    block_sum(module, 0)
    grid_sum(module, 0)
