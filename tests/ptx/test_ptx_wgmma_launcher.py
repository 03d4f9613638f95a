"""The launcher of csrc/cuda/gemm_wgmma_sm90a.cu launches what it should, and its mutants are caught."""

import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, PtxFault, Struct

from .launcher import INVALID_CONFIGURATION, INVALID_VALUE, SUCCESS, Launch, Launcher
from .product import OUT_TYPES, aligned_words_for, ceil_div, layout, product_call, source, usual
from .test_ptx_wgmma_sm90a import STAGES, THREADS, halves, kernel_name, maps, shared_bytes, tile_of, whole_vectors

NAME = "gemm_wgmma_sm90a"
TILES = list(STAGES)
OUTPUTS = [*FLOATS, torch.int32, torch.bool]
ADDRESS, MOST_ROWS = 1 << 40, 2**31 - 1
OUT_OF_RESOURCES = 701
each_tile = pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda tile: "m{}n{}".format(*TILES[tile]))


def product_job(m: int, n: int, k: int, out: torch.dtype = torch.int32, **changes: object) -> Struct:
    """Return a product whose memory nobody reads; any field may be changed."""
    stride = aligned_words_for(k)
    fields = {"x": ADDRESS, "x_stride": stride, "x_popcounts": ADDRESS}
    fields |= {"weight": ADDRESS, "weight_stride": stride, "weight_popcounts": ADDRESS}
    fields |= {"m": m, "n": n, "k": k, "y": ADDRESS, "dtype": OUT_TYPES[out][0]}
    fields |= {"scale": None, "scale_dtype": 0, "bias": None, "bias_dtype": 0, "wrong_form": None}
    assert set(changes) <= set(fields)
    return Struct(layout("Product"), *(fields | changes).values())


def launched(launcher: Launcher, job: Struct) -> Launch:
    error, launches = launcher(job)
    assert (error, len(launches)) == (SUCCESS, 1), job
    return launches[0]


def nothing(launcher: Launcher, job: Struct, error: int = SUCCESS, **more: int) -> None:
    assert launcher(job, **more) == (error, []), job


def check_launch(launcher: Launcher, m: int, n: int, k: int, out: torch.dtype, multiprocessors: int) -> None:
    """Execute a product, launched as the kernel's own tests expect."""
    launcher.library.runtime_multiprocessors(multiprocessors)
    call = product_call(m, n, k, out, aligned=True)
    launch, tile = launched(launcher, call.fields), TILES[launcher.tile]
    rows, columns = tile_of(out, tile)
    grid = ceil_div(m, rows), ceil_div(n, columns)
    assert launch.kernel == kernel_name(launcher.module, out, tile)
    assert (launch.grid[0], launch.block[0]) == (min(multiprocessors, grid[0] * grid[1]), THREADS)
    assert launch.shared_bytes == launch.most_dynamic == shared_bytes(out, tile)
    words = [int.from_bytes(argument, "little") for argument in launch.arguments[2:]]
    assert words == [*grid, whole_vectors(n, out)]
    expected = maps(call, tile)
    for at, value in enumerate(expected.values):
        made = launch._map(launch.arguments[1][128 * at : 128 * at + 128])
        if isinstance(value, bytes):
            assert made == value
            continue
        shape = (value.size, value.strides, value.box, value.element_bytes, value.swizzle)
        assert (made.size, made.strides, made.box, made.element_bytes, made.swizzle) == shape
        assert made.buffer == (value.buffer.at(0) if isinstance(value.buffer, In) else value.buffer)
    launch.run()
    call.check()


def check_all(launcher: Launcher) -> None:
    rows, columns = TILES[launcher.tile]
    for index, out in enumerate(OUTPUTS):
        check_launch(launcher, 2, (1, 2, 5, 33, 34, 67)[index], 130, out, 1 + index)
    for m, n, multiprocessors in ((rows + 1, columns + 1, 3), (rows + 1, columns, 4), (2, 1, 1)):
        check_launch(launcher, m, n, 70, torch.bfloat16, multiprocessors)
    for out in OUTPUTS:  # vectors are stored only if all lanes' outputs begin at multiples of their size
        for misalign in (0, 4 if out is torch.bool else out.itemsize, 16):
            call = product_call(3, 16, 70, out, aligned=True)
            call.output.misalign = misalign
            launch = launched(launcher, call.fields)
            launch.run()
            call.check()
            whole = misalign % (2 * halves(out) * out.itemsize) == 0
            assert out is torch.bool or launch.arguments[-1] == bytes([whole])
    # Without values there is nothing to map, and gemm_popc writes the outputs.
    call = product_call(3, 5, 0, torch.float32, aligned=True)
    launch = launched(launcher, call.fields)
    assert launch.module is not launcher.module
    launch.run()
    call.check()


def check_errors(launcher: Launcher) -> None:
    """Each error is returned and nothing is launched; without it the job is launched."""
    for m, n in ((0, 5), (5, 0), (0, 0)):
        for k in (0, 1, 70000):
            null = dict.fromkeys(("x", "weight", "y", "x_popcounts", "weight_popcounts"))
            nothing(launcher, product_job(m, n, k, **null))
    launched(launcher, product_job(3, 70, 200))
    for dtype in (-1, 5, 7, 8):
        nothing(launcher, product_job(3, 70, 200, dtype=dtype), INVALID_VALUE)
    for operand in ("x", "weight"):
        for offset in (1, 4, 8, 12):
            nothing(launcher, product_job(3, 70, 200, **{operand: ADDRESS + offset}), INVALID_VALUE)
        for more in (-4, 1, 2, 5):
            stride = {f"{operand}_stride": aligned_words_for(200) + more}
            nothing(launcher, product_job(3, 70, 200, **stride), INVALID_VALUE)
        nothing(launcher, product_job(3, 70, 200, **{f"{operand}_popcounts": None}), INVALID_VALUE)
    for tile in (-1, len(TILES)):
        nothing(launcher, product_job(3, 70, 200), INVALID_VALUE, tile=tile)
    for error in ((OUT_OF_RESOURCES, SUCCESS), (SUCCESS, OUT_OF_RESOURCES)):
        nothing(launcher, product_job(3, 70, 200), OUT_OF_RESOURCES, errors=error)
        launched(launcher, product_job(3, 70, 200))


def check_largest(launcher: Launcher) -> None:
    """Coordinates of a map are 32-bit integers, and so are the numbers of tiles."""
    rows, columns = TILES[launcher.tile]
    launcher.library.runtime_multiprocessors(132)
    for m, n in ((MOST_ROWS, 1), (1, MOST_ROWS), (MOST_ROWS, 127 * columns)):
        launch = launched(launcher, product_job(m, n, 2**31 - 1))
        assert launch.grid == (132, 1, 1)
        assert int.from_bytes(launch.arguments[2], "little") == ceil_div(m, rows)
        assert int.from_bytes(launch.arguments[3], "little") == ceil_div(n, columns)
    for m, n in ((MOST_ROWS + 1, 1), (1, MOST_ROWS + 1)):
        nothing(launcher, product_job(m, n, 128), INVALID_VALUE)
    nothing(launcher, product_job(MOST_ROWS, MOST_ROWS, 128), INVALID_CONFIGURATION)


@each_tile
def test_launches(tile):
    launcher = Launcher(NAME, tile)
    check_all(launcher)
    popc = {name for name in launcher.launched if "Shape" not in name}
    expected = {kernel_name(launcher.module, out, TILES[tile]) for out in OUTPUTS}
    assert launcher.launched - popc == expected and len(popc) == 1


@each_tile
def test_errors_and_bounds(tile):
    check_errors(Launcher(NAME, tile))
    check_largest(Launcher(NAME, tile))


MUTANTS = [
    ("std::min(row_tiles * column_tiles, int64_t{multiprocessors})", "row_tiles * column_tiles"),
    ("std::min(row_tiles * column_tiles, int64_t{multiprocessors})", "multiprocessors"),
    ("row_tiles > INT32_MAX / column_tiles", "row_tiles > UINT32_MAX"),
    ("product.m > kMostMapRows ||", ""),
    ("|| product.n > kMostMapRows", ""),
    ("if (product.k == 0) return gemm_popc(product, stream);", ""),
    ("!are_aligned(product) || ", ""),
    ("|| !have_popcounts(product)", ""),
    ("if (product.m == 0 || product.n == 0) return cudaSuccess;", ""),
    (
        "    error = allow_shared_memory(kernel, kBytes);\n    if (error != cudaSuccess) return error;\n",
        "    static_cast<void>(allow_shared_memory(kernel, kBytes));\n",
    ),
    ("half < product.n ? half : 0", "half"),
    ("ceil_div(product.n - first, Shape::kHalves)", "ceil_div(product.n, Shape::kHalves)"),
    ("product.weight.words + first * stride", "product.weight.words"),
    ("width, Shape::kHalves * stride", "width, stride"),
    ("encode(x, Shape::kRows, &maps->x)", "encode(x, Shape::kColumns, &maps->x)"),
    ("Shape::kColumns / Shape::kHalves, &maps", "Shape::kColumns, &maps"),
    ("CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B"),
    ("matrix.stride * kWordBytes)", "matrix.stride)"),
    ("% bytes == 0 && n * size % bytes == 0", "% bytes == 0"),
    ("reinterpret_cast<uintptr_t>(y.data) % bytes == 0 &&", ""),
    ("sizeof(typename As::Out) <= 2 ? 2 : 1", "sizeof(typename As::Out) <= 4 ? 2 : 1"),
    ("sizeof(Shared<As, Shape>) + kAlignment", "sizeof(Shared<As, Shape>)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("old, new", usual(MUTANTS))
def test_mutants_are_caught(old, new):
    text = source(f"{NAME}.cu")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    launcher = Launcher(NAME, 0, text=text.replace(old, new))
    with pytest.raises((AssertionError, PtxFault, ValueError, KeyError)):
        for check in (check_errors, check_largest, check_all):
            check(launcher)


def test_all_mutants_change_the_source():
    """Most of them are compiled in `make ptx-full` alone, so a text that is gone would be noticed late."""
    text = source(f"{NAME}.cu")
    assert [old for old, _ in MUTANTS if text.count(old) != 1] == []
