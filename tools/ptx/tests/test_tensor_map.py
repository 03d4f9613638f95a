"""Copies by tensor maps, against NumPy: boxes in one to five dimensions, edges, swizzles, both directions."""

import numpy as np
import pytest

from ..machine import In, InOut, Out, PtxFault, Struct, TensorMap
from .helpers import assert_fault, run
from .test_mbarrier import EXPECT, barrier, wait

RNG = np.random.default_rng(6)
SEEDS = range(4)
PARAMS = ".param .u64 out, .param .align 64 .b8 map[128]"
MAP = "mov.b64 %rd4, map; cvta.param.u64 %rd4, %rd4;"


def load(bytes: int, corner: tuple[int, ...], dims: int, place: int = 0, more: str = "") -> str:
    """Return a kernel of 32 threads whose thread 0 loads a box to `place`, and which then copies s to out."""
    at = "{" + ",".join(f"%r{8 + k}" for k in range(dims)) + "}"
    coordinates = "".join(f"mov.s32 %r{8 + k}, {c};" for k, c in enumerate(corner))
    copy = (
        f"cp.async.bulk.tensor.{dims}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        f"{'.L2::cache_hint' if more else ''} [%r21], [%rd4, {at}], [%r19]{more};"
    )
    return (
        barrier(1).replace("s[1024]", "s[16384]").replace(".align 128 .b8 s", ".align 1024 .b8 s")
        + MAP
        + coordinates
        + f"add.u32 %r21, %r20, {place}; @!%p1 bra A; prefetch.tensormap [%rd4];"
        + EXPECT.format(bytes=bytes)
        + copy
        + "A:"
        + wait()
        + f"mul.lo.u32 %r2, %tid, 4; COPY: setp.ge.u32 %p3, %r2, {bytes}; @%p3 bra END;"
        "add.u32 %r3, %r21, %r2; ld.shared.u32 %r4, [%r3]; cvt.u64.u32 %rd5, %r2; add.u64 %rd5, %rd5, %out;"
        "st.global.u32 [%rd5], %r4; add.u32 %r2, %r2, 128; bra COPY; END:"
    )


def box_of(x: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """Return the box of an array whose last axis is dimension 0, with zeros outside."""
    got = np.zeros(box[::-1], x.dtype)
    for index in np.ndindex(*box[::-1]):
        at = tuple(c + i for c, i in zip(corner[::-1], index, strict=True))
        if all(0 <= a < n for a, n in zip(at, x.shape, strict=True)):
            got[index] = x[at]
    return got


def unswizzled(data: np.ndarray, swizzle: int, place: int = 0) -> np.ndarray:
    """Undo a swizzle: chunk c of a line of 128 bytes lies at c ^ line, as far as the swizzle's width goes."""
    chunks = data.view(np.uint8).reshape(-1, 16)
    order = [k // 8 * 8 + (k % 8 ^ (k // 8 + place // 128) % 8 % (swizzle // 16)) for k in range(len(chunks))]
    return np.ascontiguousarray(chunks[order]).reshape(-1)


CASES = [
    # shape (outermost first), box (innermost first), corner, element type
    ((40,), (16,), (0,), np.uint8),
    ((40,), (32,), (24,), np.uint8),
    ((9, 32), (16, 4), (8, 3), np.uint8),
    ((9, 36), (8, 4), (-3, 7), np.uint32),
    ((9, 36), (8, 4), (33, -2), np.uint32),
    ((5, 8, 32), (8, 3, 2), (30, 6, -1), np.uint16),
    ((3, 4, 5, 16), (8, 2, 3, 2), (4, -1, 2, 2), np.uint16),
    ((2, 3, 4, 5, 8), (2, 3, 2, 2, 2), (7, 3, 3, -1, 1), np.uint64),
    ((2, 3, 4, 5, 8), (4, 3, 2, 2, 2), (2, 1, 1, 1, 0), np.uint64),
]


@pytest.mark.parametrize(("shape", "box", "corner", "dtype"), CASES)
def test_boxes(shape, box, corner, dtype):
    """PTX ISA, "Tensors": a box lies in shared memory with dimension 0 innermost; outside there are zeros."""
    x = RNG.integers(1, np.iinfo(dtype).max, shape, dtype)
    tensor_map = TensorMap(In(x), shape[::-1], x.strides[-2::-1], box, x.itemsize)
    want = box_of(x, corner, box)
    for seed in SEEDS:
        got = np.zeros(want.shape, dtype)
        run(load(want.nbytes, corner, len(shape)), [Out(got), tensor_map], params=PARAMS, seed=seed)
        assert (got == want).all()


@pytest.mark.parametrize("place", [0, 128, 384, 1024])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles(swizzle, place):
    """The pattern follows the address in shared memory, so that in a box that is not aligned it begins elsewhere."""
    x = RNG.integers(1, 255, (40, 256)).astype(np.uint8)
    box = (swizzle, 20)
    for corner in ((0, 0), (64, 25), (256 - swizzle + 16, 30)):
        got = np.zeros(swizzle * 20, np.uint8)
        tensor_map = TensorMap(In(x), (256, 40), (256,), box, swizzle=swizzle)
        run(load(got.size, corner, 2, place), [Out(got), tensor_map], params=PARAMS)
        assert (unswizzled(got, swizzle, place) == box_of(x, corner, box).reshape(-1)).all()


def test_the_swizzle_is_that_of_the_descriptor():
    """What a box of 128-byte lines puts into shared memory is what a descriptor with the same swizzle reads."""
    from .test_warpgroup import place

    x = RNG.integers(1, 255, (64, 128)).astype(np.uint8)
    for swizzle in (32, 64, 128):
        got = np.zeros((64, swizzle), np.uint8)
        tensor_map = TensorMap(In(x), (128, 64), (128,), (swizzle, 64), swizzle=swizzle)
        run(load(got.size, (0, 0), 2), [Out(got), tensor_map], params=PARAMS)
        flat = got.reshape(-1)
        for row in range(64):
            for chunk in range(swizzle // 16):
                at = place(row, chunk, swizzle, 16, 8 * swizzle)
                assert (flat[at : at + 16] == x[row, 16 * chunk : 16 * chunk + 16]).all()


def test_forms_of_the_instruction():
    x = RNG.integers(1, 255, (8, 32)).astype(np.uint8)
    tensor_map = TensorMap(In(x), (32, 8), (32,), (16, 8))
    body = load(128, (0, 0), 2)
    for form in (
        body,
        body.replace(".tile", ""),
        body.replace("shared::cluster.global", "shared::cta.global"),
        load(128, (0, 0), 2, more=", %rd4"),
    ):
        got = np.zeros((8, 16), np.uint8)
        run(form, [Out(got), tensor_map], params=PARAMS)
        assert (got == x[:, :16]).all()
    # A tensor map may lie in a struct, and in global memory.
    struct_ = Struct("<Q56x128s", 7, tensor_map)
    body = load(128, (0, 0), 2).replace("mov.b64 %rd4, map;", "mov.b64 %rd4, map; add.u64 %rd4, %rd4, 64;")
    run(body, [Out(got), struct_], params=PARAMS.replace("[128]", "[192]"))
    assert (got == x[:, :16]).all()


def store(bytes: int, corner: tuple[int, ...], fence: str = "fence.proxy.async;") -> str:
    coordinates = ",".join(str(c) for c in corner)
    return (
        ".shared .align 1024 .b8 s[16384]; mov.u32 %r20, s; setp.eq.u32 %p1, %tid, 0;"
        + MAP
        + "mul.lo.u32 %r2, %tid, 4;"
        f"FILL: setp.ge.u32 %p3, %r2, {bytes}; @%p3 bra STORE; add.u32 %r3, %r20, %r2;"
        "cvt.u64.u32 %rd5, %r2; add.u64 %rd5, %rd5, %out; ld.global.u32 %r4, [%rd5]; st.shared.u32 [%r3], %r4;"
        f"add.u32 %r2, %r2, 128; bra FILL; STORE: {fence} bar.sync 0; @!%p1 bra END;"
        f"cp.async.bulk.tensor.{len(corner)}d.global.shared::cta.tile.bulk_group [%rd4, {{{coordinates}}}], [%r20];"
        "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
    )


def test_stores_leave_out_what_lies_outside():
    for swizzle in (0, 32):
        for corner in ((0, 0), (16, 3), (24, 6), (-8, -2)):
            data = RNG.integers(1, 255, 32 * 4).astype(np.uint8)
            y, want = np.zeros((8, 48), np.uint8), np.zeros((8, 48), np.uint8)
            tensor_map = TensorMap(InOut(y), (40, 8), (48,), (32, 4), swizzle=swizzle)
            run(store(128, corner), [In(data), tensor_map], params=PARAMS)
            rows = (unswizzled(data, swizzle) if swizzle else data).reshape(4, 32)
            for row, column in np.ndindex(4, 32):
                at = corner[1] + row, corner[0] + column
                if 0 <= at[0] < 8 and 0 <= at[1] < 40:
                    want[at] = rows[row, column]
            assert (y == want).all()
    args = [In(data), tensor_map]
    assert_fault("proxy", "no fence.proxy.async", store(128, (0, 0), fence=""), args, params=PARAMS)
    read_only = TensorMap(In(y), (40, 8), (48,), (32, 4))
    assert_fault("read-only", "is an input", store(128, (0, 0)), [In(data), read_only], params=PARAMS)


def test_faults():
    x = In(RNG.integers(1, 255, (8, 32)).astype(np.uint8))
    tensor_map = TensorMap(x, (32, 8), (32,), (16, 8))
    out = Out(np.zeros(128, np.uint8))
    assert_fault("misaligned", "aligned to 128", load(128, (0, 0), 2, 16), [out, tensor_map], params=PARAMS)
    assert_fault("illegal", "has 2 dimensions", load(128, (0, 0, 0), 3), [out, tensor_map], params=PARAMS)
    assert_fault("illegal", "there is no tensor map", load(128, (0, 0), 2), [out, bytes(128)], params=PARAMS)
    assert_fault("deadlock", "bytes pending", load(144, (0, 0), 2), [out, tensor_map], params=PARAMS)
    long = TensorMap(x, (32, 9), (32,), (16, 8))  # the map says more than the memory has
    assert_fault("out of bounds", "", load(128, (0, 8), 2), [out, long], params=PARAMS)
    for seed in SEEDS:
        with pytest.raises(PtxFault, match=r"before griddepcontrol\.wait"):
            run(load(128, (0, 0), 2), [out, tensor_map], params=PARAMS, dependent=[x], seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (8, 8)}, "no multiple of 16"),
        ({"box": (32, 8), "swizzle": 0, "strides": (24,)}, "multiples of 16"),
        ({"box": (48, 8), "swizzle": 32}, "wider than the swizzle"),
        ({"box": (16, 257)}, "between 1 and 256"),
        ({"size": (0, 8)}, "between 1 and 2"),
        ({"size": (32, 8, 1)}, "a tensor map of 3 dimensions"),
        ({"element_bytes": 3}, "do not exist"),
        ({"swizzle": 16}, "do not exist"),
    ],
)
def test_what_the_driver_refuses(change, message):
    x = In(np.zeros((8, 32), np.uint8))
    options = {"size": (32, 8), "strides": (32,), "box": (16, 8)} | change
    with pytest.raises(ValueError, match=message):
        run(load(128, (0, 0), 2), [Out(np.zeros(128, np.uint8)), TensorMap(x, **options)], params=PARAMS)
    with pytest.raises(ValueError, match="multiple of 16"):
        shifted = TensorMap(In(np.zeros((8, 32), np.uint8), misalign=8), (32, 8), (32,), (16, 8))
        run(load(128, (0, 0), 2), [Out(np.zeros(128, np.uint8)), shifted], params=PARAMS)
