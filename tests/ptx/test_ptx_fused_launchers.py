"""The launchers of the kernels that pack x themselves launch what they should, and their mutants are caught."""

import ctypes
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import PtxFault, Struct

from . import test_ptx_fused_cluster_sm90 as fused_cluster_sm90
from . import test_ptx_fused_skinny as fused_skinny
from . import test_ptx_fused_skinny_mma_sm80 as fused_skinny_mma_sm80
from .fused import MOST_VALUES, WARPS, Shape, fits, plan
from .launcher import INVALID_VALUE, SUCCESS, Launcher
from .product import DTYPES, FULL, OUT_TYPES, aligned_words_for, kernel, layout, output_name, source, usual
from .test_ptx_launchers import ADDRESS, NO_KERNEL_IMAGE, OUTPUTS, launched, nothing

TESTS: dict[str, ModuleType] = {
    "gemm_fused_skinny": fused_skinny,
    "gemm_fused_skinny_mma_sm80": fused_skinny_mma_sm80,
    "gemm_fused_cluster_sm90": fused_cluster_sm90,
}
each_launcher = pytest.mark.parametrize("name", TESTS)


def fused_job(m: int, n: int, k: int, dtype: int = 1, out: int = 4, **changes: object) -> Struct:
    """Return a job whose memory nobody reads, in which any field may be changed."""
    fields = {"x_words": None, "x_stride": 0, "x_popcounts": None}
    fields |= {"weight": ADDRESS, "weight_stride": aligned_words_for(k), "weight_popcounts": None}
    fields |= {"m": m, "n": n, "k": k, "y": ADDRESS, "out": out}
    fields |= {"scale": None, "scale_dtype": 0, "bias": None, "bias_dtype": 0, "wrong_form": None}
    fields |= {"x": ADDRESS, "dtype": dtype, "stride": k, "strict": False, "multiprocessors": 5}
    assert set(changes) <= set(fields)
    return Struct(layout("FusedProduct"), *(fields | changes).values())


def check_edges(launcher: Launcher) -> None:
    """Products are executed as the kernel's own tests expect them."""
    tests = TESTS[launcher.name]
    for m in range(1, tests.SHAPE.most_rows + 1):
        tests.check_fused(launcher, m, 9, 65)
    for n in (1, 31, 32, 33, 64, 65, 129, 400):
        tests.check_fused(launcher, 3, n, 200, multiprocessors=2)
        tests.check_fused(launcher, 3, n, 200, torch.bool, multiprocessors=2)
    for k in (0, 1, 128, 4000):
        tests.check_fused(launcher, 2, 70, k, multiprocessors=4)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(0))
    for out in FLOATS:
        tests.check_fused(launcher, 3, 37, 40, out, dtype=out, bias=bias, scale=bias.flip(0))
    for more in ({"padding": 8}, {"padding": 4}, {"padding": 1}, {"misalign": 2}, {"misalign": 16}):
        tests.check_fused(launcher, 2, 9, 256, dtype=torch.bfloat16, **more)
        tests.check_fused(launcher, 1, 9, 256, dtype=torch.bfloat16, **more)


def check_errors(launcher: Launcher) -> None:
    """Without an output nothing is launched; nor is it with sizes and operands that the kernel does not take."""
    most = TESTS[launcher.name].SHAPE.most_rows
    for m, n in ((0, 5), (3, 0), (0, 0)):
        nothing(launcher, fused_job(m, n, 70, weight=None, y=None, x=None))
    launched(launcher, fused_job(most, 70, MOST_VALUES // most))
    launched(launcher, fused_job(1, 70, MOST_VALUES))
    for m, k in ((most + 1, 70), (most, MOST_VALUES // most + 1), (1, MOST_VALUES + 1), (1, 2**31 - 1)):
        nothing(launcher, fused_job(m, 70, k), INVALID_VALUE)
    for dtype in (-1, 4, 5, 6, 7):
        nothing(launcher, fused_job(3, 70, 200, dtype), INVALID_VALUE)
    for out in (-1, 5, 7, 8):
        nothing(launcher, fused_job(3, 70, 200, out=out), INVALID_VALUE)
    for more in (4, 8, 12):
        nothing(launcher, fused_job(3, 70, 200, weight=ADDRESS + more), INVALID_VALUE)
    for more in (-4, 1, 2):
        nothing(launcher, fused_job(3, 70, 200, weight_stride=aligned_words_for(200) + more), INVALID_VALUE)
    nothing(launcher, fused_job(3, 2**31, 200), INVALID_VALUE)
    launched(launcher, fused_job(3, 2**31 - 1, 200))
    nothing(launcher, fused_job(3, 70, 200), NO_KERNEL_IMAGE, errors=(NO_KERNEL_IMAGE, SUCCESS))


def check_any_size(launcher: Launcher, count: int) -> None:
    """For random sizes each launch divides the work as the kernel's tests expect, and its blocks have all columns."""
    shape = TESTS[launcher.name].SHAPE
    generator = np.random.default_rng(len(launcher.name))
    for _ in range(count):
        m = int(generator.integers(1, shape.most_rows + 1))
        n, k = (int(2 ** generator.uniform(0, most)) for most in (31, 17))
        multiprocessors = int(generator.integers(0, 200))
        dtype, out = FLOATS[int(generator.integers(4))], OUTPUTS[int(generator.integers(len(OUTPUTS)))]
        piece = int(generator.choice([1, 32, 128]))
        k = max(k // piece, 1) * piece
        address = ADDRESS + dtype.itemsize * int(generator.integers(2))
        stride = k + int(generator.choice([0, 1, 16 // dtype.itemsize]))
        job = fused_job(
            *(m, n, k, DTYPES[dtype][0], OUT_TYPES[out][0]), x=address, stride=stride, multiprocessors=multiprocessors
        )
        if not fits(m, k):
            nothing(launcher, job, INVALID_VALUE)
            continue
        whole = address % 16 == 0 and k % 128 == 0 and (stride * dtype.itemsize % 16 == 0 or m == 1)
        divided = plan(shape, n, k, multiprocessors, out, whole)
        rows = f"Li{4 if m > 2 else m}E" if launcher.name == "gemm_fused_skinny" else "EE"
        name = kernel(launcher, rf"{output_name(out)}E{rows}")
        launcher.execute = False
        more = {"cluster": shape.cluster} if shape.cluster > 1 else {}
        launcher.launch(name, divided.blocks, 32 * WARPS, [job, divided.struct()], **more)
        launcher.execute = True
        columns = shape.unit * WARPS // divided.parts
        assert divided.blocks * divided.rounds * columns >= n > (divided.blocks * (divided.rounds - 1)) * columns
        assert divided.blocks <= max(multiprocessors, shape.cluster) and divided.chunk * divided.parts >= divided.width
        assert m * divided.pitch <= MOST_VALUES // 32 + 32 * 16, "the words of x exceed their place in shared memory"


@each_launcher
def test_edges(name):
    check_edges(Launcher(name))


@each_launcher
def test_errors(name):
    check_errors(Launcher(name))


@each_launcher
def test_any_size(name):
    launcher = Launcher(name)
    check_any_size(launcher, 1000)
    assert launcher.launched == set(launcher.ptx.kernels)


def check_clusters(launcher: Launcher) -> None:
    """No more clusters are launched, which CUDA is asked about once; without any, each block packs x for itself."""
    job = fused_job(3, 1000, 200, multiprocessors=132)

    def launched_on(device: int, clusters: int) -> tuple[int, int]:
        launcher.library.runtime_device(device, clusters)
        launch = launched(launcher, job)
        assert ("multiply_in_cluster" in launch.kernel) == (launch.cluster > 0)
        return launch.grid[0], launch.cluster

    def planned(shape: Shape, multiprocessors: int) -> int:
        return plan(shape, 1000, 200, multiprocessors, torch.int32, False).blocks

    alone = planned(fused_skinny_mma_sm80.SHAPE, 132), 0
    try:
        for clusters in (15, 3, 1):
            expected = planned(fused_cluster_sm90.SHAPE, 8 * clusters), 8
            assert launched_on(clusters, clusters) == expected and expected[0] <= 8 * clusters
            assert launched_on(clusters, 16) == expected, "the number is remembered"
        assert launched_on(20, 0) == launched_on(20, 16) == alone
        assert launched_on(21, -1) == alone
        assert launched_on(21, 3) == (planned(fused_cluster_sm90.SHAPE, 24), 8), "an error is remembered"
        assert launched_on(1000, 1) == (8, 8) and launched_on(1000, 0) == alone, "only the first devices are remembered"
        launcher.library.runtime_device(22, 1)
        with mock.patch.object(launcher.library, "runtime_errors"):  # which would clear the error
            earlier = launcher.library.cudaDeviceGetAttribute(ctypes.byref(ctypes.c_int()), 0, 0)
            assert launcher(job)[0] == earlier != SUCCESS, "an earlier error of the program is hidden"
    finally:
        launcher.library.runtime_device(0, 2**28)


def test_clusters_that_a_device_runs_at_once():
    check_clusters(Launcher("gemm_fused_cluster_sm90"))


CLUSTER_MUTANTS = [
    ("at once", "std::min(job.multiprocessors, clusters * kBlocks)", "job.multiprocessors"),
    ("none", "if (clusters == 0) return gemm_fused_skinny_mma_sm80(job, stream);", ""),
    ("remembered", "known == kNone ? 0 : known", "known"),
    ("blocks", "attribute.val.clusterDim.x = kBlocks", "attribute.val.clusterDim.x = 4"),
    ("asked", "configuration.gridDim = dim3(kBlocks), ", ""),
    ("capture", "const RelaxedCapture relaxed;", ""),
    ("error", "static_cast<void>(cudaGetLastError());  // clears this error, before others see it", ""),
    ("hidden", "const RelaxedCapture relaxed;", "const RelaxedCapture relaxed;\n    cudaGetLastError();"),
]


@pytest.mark.parametrize("what, old, new", CLUSTER_MUTANTS if FULL else CLUSTER_MUTANTS[:1])
def test_mutants_of_clusters_are_caught(what, old, new):
    text = source("gemm_fused_cluster_sm90.cu")
    assert text.count(old) == 1, f"{what}: {old!r} occurs {text.count(old)} times"
    with pytest.raises((AssertionError, PtxFault)):
        check_clusters(Launcher("gemm_fused_cluster_sm90", text=text.replace(old, new)))


MUTANTS = [
    ("pitch", "(width + 15) / 32 * 32 + 16", "(width + 31) / 32 * 32"),
    ("x", "reinterpret_cast<uintptr_t>(job.x.data) % 16 == 0 && ", ""),
    ("k", "product.k % (kWordBits * kAlignedWords) == 0 &&", "product.k % kWordBits == 0 &&"),
    ("stride", "(row_bytes % 16 == 0 || product.m == 1)", "true"),
    ("bits", "if (bits && unit * units < static_cast<int>(kWordBits)) break;", ""),
    ("rounds", "rounds = ceil_div(groups, launched)", "rounds = groups / launched"),
    ("chunk", "ceil_div(ceil_div(std::max(plan.width, 1), parts), piece) * piece", "std::max(plan.width, 1) / parts"),
    ("blocks", "std::min(ceil_div(groups, cluster), clusters) * cluster", "groups"),
    ("rows", "product.m <= most_rows && ", ""),
    ("values", "fits_fused(product.m, product.k) && ", ""),
    ("address", "reinterpret_cast<uintptr_t>(product.weight.words) % 16 == 0 && ", ""),
    ("weight stride", "product.weight.stride >= width", "true"),
    ("m > 2", "if (job.product.m > 2)", "if (job.product.m > 3)"),
    ("nothing", "if (job.product.m == 0 || job.product.n == 0) return cudaSuccess;", ""),
]


@pytest.mark.parametrize("what, old, new", usual(MUTANTS))
def test_mutants_of_launchers_are_caught(what, old, new):
    text = source("gemm_fused_skinny.cu")
    assert text.count(old) == 1, f"{what}: {old!r} occurs {text.count(old)} times"
    with pytest.raises((AssertionError, PtxFault)):
        launcher = Launcher("gemm_fused_skinny", text=text.replace(old, new))
        check_errors(launcher)
        check_any_size(launcher, 200)


def test_all_mutants_change_the_sources():
    """Most of them are compiled in `make ptx-full` alone, so a text that is gone would be noticed late."""
    of_clusters, of_blocks = source("gemm_fused_cluster_sm90.cu"), source("gemm_fused_skinny.cu")
    assert [old for _, old, _ in CLUSTER_MUTANTS if of_clusters.count(old) != 1] == []
    assert [old for _, old, _ in MUTANTS if of_blocks.count(old) != 1] == []
