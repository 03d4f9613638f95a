"""The CUDA operators without a GPU: cuda_on_cpu.cpp runs them on CPU tensors, with loops in place of the kernels.

This tests what the operators do around the kernels: which they launch, with which memory, and what they refuse.
"""

import ctypes
import hashlib
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from support.reference import FLOATS, assert_equal, pack_signs, random_values, random_words
from torch.utils.cpp_extension import include_paths, library_paths

from bitorch_qlinear import functional as F
from tools.ptx.machine import build_once, nvcc

PROGRAM = Path(__file__).with_name("cuda_on_cpu.cpp")
CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = ["popc", "skinny", "skinny_mma_sm80", "mma_sm75", "mma_sm80", "mma_int8_sm80"]

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc, whose headers are needed, is not installed")


@pytest.fixture(scope="module")
def library():
    """Compile the operators, once for each state of their sources."""
    sources = sorted([*CSRC.glob("*.h"), *(CSRC / "torch").iterdir(), *(CSRC / "cuda").iterdir(), PROGRAM])
    command = [nvcc(), "-x", "c++", "-std=c++20", "-O1", "-shared", "-cudart=none", "-DUSE_CUDA"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-w", str(PROGRAM)]
    command += [*(f"-I{path}" for path in include_paths("cpu")), *(f"-L{path}" for path in library_paths("cpu"))]
    command += ["-ltorch", "-ltorch_cpu"]
    key = hashlib.sha256(repr((torch.__version__, command)).encode() + b"".join(s.read_bytes() for s in sources))

    def make(path):
        subprocess.run([*command, "-o", str(path)], check=True)

    path = build_once(f"cuda-on-cpu-{key.hexdigest()[:16]}.so", make)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.cuda_on_cpu_launches.restype = ctypes.c_char_p
    loaded.cuda_on_cpu_force.argtypes = [ctypes.c_char_p]
    return loaded


@pytest.fixture
def ops(library):
    library.cuda_on_cpu_launches()
    yield torch.ops.cuda_on_cpu
    library.cuda_on_cpu_force(b"")
    library.cuda_on_cpu_device(0)
    library.cuda_on_cpu_launches()


@pytest.fixture(params=KERNELS)
def kernel(request, library, ops):
    library.cuda_on_cpu_force(request.param.encode())
    return request.param


def launches(library):
    return library.cuda_on_cpu_launches().decode().split()


def odd(tensor):
    """Copy the tensor, with its strides, to an address that is not a multiple of its elements' size."""
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.zeros((last + 2) * size, dtype=torch.uint8)
    at = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=last + 1)
    at.copy_(tensor.as_strided((last + 1,), (1,)))
    copy = at.as_strided(tensor.shape, tensor.stride())
    assert copy.data_ptr() % size
    return copy


def problem(m, n, k, seed=0):
    make = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=make), random_words(n, k, make, stray=True)
    return x, weight, torch.randn(n, generator=make), torch.randn(n, generator=make)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 33, 128), (16, 5, 200), (17, 40, 256), (5, 0, 40), (0, 7, 9)])
def test_products(ops, kernel, m, n, k):
    x, weight, bias, scale = problem(m, n, k)
    words = F.pack_bits(x)
    for prepared in (None, ops.prepare_weight(weight, k)):
        more = {"weight_prepared": prepared, "scale": scale}
        want = F.linear(x, weight, k, bias, scale=scale)
        assert_equal(ops.linear(x, weight, k, bias, **more), want)
        assert_equal(ops.binary_linear(words, weight, k, bias, **more), want)
        results = ops.linear_train(x, weight, k, bias, threshold=0.5, **more)
        for got, wanted in zip(results, F.linear_train(x, weight, k, bias, scale=scale, threshold=0.5), strict=True):
            assert_equal(got, wanted)
        limits = torch.arange(n, dtype=torch.int32)
        y = ops.linear(x, weight, k, weight_prepared=prepared, out_limits=limits)
        assert_equal(y, F.linear(x, weight, k, out_limits=limits))
    reals = torch.randn(n, k)
    assert_equal(ops.sign_linear(x, reals, strict_weight=True), F.sign_linear(x, reals, strict_weight=True))


# ---- memory that is not aligned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [70, 128])
def test_elements_that_are_not_aligned_are_copied(ops, kernel, k):
    """DLPack and __cuda_array_interface__ can give tensors whose memory starts at any byte."""
    m, n = 9, 40
    x, weight, bias, scale = problem(m, n, k)
    words, limits = F.pack_bits(x), torch.full((n,), k // 2, dtype=torch.int32)
    flips = random_words(1, n, torch.Generator().manual_seed(1))[0]
    for strided in (False, True):
        vectors = {"bias": bias, "scale": scale}
        if strided:
            vectors = {name: torch.stack([v, v], 1)[:, 0] for name, v in vectors.items()}
        wanted = F.binary_linear(words, weight, k, **vectors)
        moved = {name: odd(v) for name, v in vectors.items()}
        for prepared in (None, ops.prepare_weight(odd(weight), k)):
            more = moved | {"weight_prepared": prepared}
            assert_equal(ops.binary_linear(odd(words), odd(weight), k, **more), wanted)
            rows = torch.stack([x, x], 2)[..., 0] if strided else x
            assert_equal(ops.linear(odd(rows), odd(weight), k, **more), wanted)
            y, x_words, _ = ops.linear_train(odd(rows), odd(weight), k, **more)
            assert_equal(y, wanted)
            assert_equal(x_words, words)
    y = ops.binary_linear(odd(words), odd(weight), k, out_limits=odd(limits), out_flips=odd(flips))
    assert_equal(y, F.binary_linear(words, weight, k, out_limits=limits, out_flips=flips))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_words_that_are_not_aligned_are_copied(ops, dtype):
    x = random_values((5, 70), dtype, torch.Generator().manual_seed(0))
    words = F.pack_bits(x)
    columns = x.t().contiguous().t()
    for source in (x, columns, x[:, ::2], x[:1].expand(5, 70)):
        assert_equal(ops.pack_bits(odd(source)), F.pack_bits(source))
    assert_equal(ops.unpack_bits(odd(words), 70, dtype), F.unpack_bits(words, 70, dtype))
    bias = x[0, :5].contiguous()
    for vector in (bias, x[0, :10:2], bias[:1].expand(5)):
        assert_equal(ops.linear(x, words, 70, odd(vector)), F.linear(x, words, 70, vector))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packing_by_limits(ops, dtype):
    make = torch.Generator().manual_seed(0)
    x, limits = random_values((7, 70), dtype, make), random_values((70,), dtype, make)
    flips = random_words(1, 70, make, stray=True)[0]
    for strict, flipped in itertools.product((False, True), (None, flips)):
        want = F.pack_bits(x, strict, limits=limits, flips=flipped)
        assert_equal(ops.pack_bits(x, strict, limits, flipped), want)
        given = None if flipped is None else odd(flipped)
        assert_equal(ops.pack_bits(odd(x.t().contiguous().t()), strict, odd(limits), given), want)
    for wrong in ({"limits": limits[:-1]}, {"flips": flips}, {"limits": limits, "flips": flips[:-1]}):
        with pytest.raises(RuntimeError, match=rf"bitorch_qlinear: {list(wrong)[-1]}: expected"):
            ops.pack_bits(x, False, wrong.get("limits"), wrong.get("flips"))


# ---- prepared forms of other weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [*FLOATS, torch.int32, torch.bool], ids=str)
def test_a_wrong_form_is_an_error_of_the_next_call(ops, kernel, out):
    """The form has the right size, so that only the kernel can find out, for which no call waits."""
    x, weight, _, _ = problem(3, 5, 40)
    other = ops.prepare_weight(F.pack_bits(torch.randn(5, 41)), 41)
    options = {"out_limits": torch.zeros(5, dtype=torch.int32)} if out is torch.bool else {"out_dtype": out}
    y = ops.linear(x, weight, 40, weight_prepared=other, **options)
    if kernel == "popc":  # it reads no form
        assert_equal(y, F.linear(x, weight, 40, **options))
        ops.pack_bits(x)
        return
    if out.is_floating_point:
        assert y.isnan().all()
    else:
        assert (y == (0 if out is torch.bool else -(2**31))).all()
    with pytest.raises(RuntimeError, match=r"weight_prepared: expected .*n = 5 and k = 40, got .*k = 41"):
        ops.pack_bits(x)
    assert_equal(ops.linear(x, weight, 40, **options), F.linear(x, weight, 40, **options))


# ---- launches ----------------------------------------------------------------------------------------------------


def test_launches_of_products(library, ops, kernel):
    """At most one launch comes before the product's, whatever has to be packed, aligned and counted.

    The product starts before that launch has ended (a star), unless it aligns the weights.
    """
    counts = kernel in ("mma_sm80", "mma_int8_sm80")
    early = kernel + "*" * (kernel not in ("popc", "mma_sm75"))
    for k, formed in itertools.product((128, 200), (False, True)):
        x, weight, _, _ = problem(3, 5, k)
        words, reals = pack_signs(x), torch.randn(5, k)
        prepared = ops.prepare_weight(weight, k) if formed else None
        launches(library)
        x_needs_it = counts or (kernel != "popc" and k == 200)
        both = x_needs_it and not formed
        what = "align" if k == 200 else "count"
        product = kernel if both and k == 200 else early
        ops.linear(x, weight, k, weight_prepared=prepared)
        packed = [f"pack+{what}" if both else "pack", product]
        assert launches(library) == packed, (k, formed)
        ops.binary_linear(words, weight, k, weight_prepared=prepared)
        made = [f"{what}+{what}" if both else what, product]
        assert launches(library) == (made if x_needs_it else [kernel]), (k, formed)
        ops.linear_train(x, weight, k, weight_prepared=prepared)
        # For k = 200 the words are an output, too, in another form than the kernel's.
        assert launches(library) == (["pack", *made] if kernel != "popc" and k == 200 else packed), (k, formed)
        ops.sign_linear(x, reals)
        assert launches(library) == ["pack", "pack", early]


def test_weights_that_are_aligned_in_the_call(library, ops, kernel):
    """Words that do not start on 16 bytes are aligned by the launch before, so the product waits for its end."""
    x, weight, bias, _ = problem(3, 5, 128)
    moved = torch.cat([weight.reshape(-1)[:1], weight.reshape(-1)])[1:].reshape(weight.shape)
    assert weight.data_ptr() % 16 == 0 and moved.data_ptr() % 16
    wanted = F.linear(x, weight, 128, bias)
    for prepared in (None, ops.prepare_weight(moved, 128)):
        launches(library)
        assert_equal(ops.linear(x, moved, 128, bias, weight_prepared=prepared), wanted)
        assert launches(library) == (["pack+align", kernel] if kernel != "popc" else ["pack", "popc"])
    library.cuda_on_cpu_force(b"")
    for weights, expected in ((moved, ["pack+align", "skinny"]), (weight, ["fused_skinny_mma_sm80"])):
        assert_equal(ops.linear(x, weights, 128, bias), wanted)
        assert launches(library) == expected


@pytest.mark.parametrize(("m", "kernel"), [(17, "skinny_mma_sm80"), (64, "skinny_mma_sm80"), (65, "mma_sm80")])
def test_launches_of_few_packed_rows(library, ops, m, kernel):
    """Up to 64 rows of packed x are not counted by a launch, with prepared weights or without."""
    x, weight, bias, scale = problem(m, 40, 256)
    words = pack_signs(x)
    for formed in (True, False):
        prepared = ops.prepare_weight(weight, 256) if formed else None
        launches(library)
        got = ops.binary_linear(words, weight, 256, bias, weight_prepared=prepared, scale=scale)
        assert_equal(got, F.binary_linear(words, weight, 256, bias, scale=scale))
        counted = ["count" if formed else "count+count", f"{kernel}*"]
        assert launches(library) == (counted if kernel == "mma_sm80" else [kernel])
        ops.linear(x, weight, 256, weight_prepared=prepared)
        both = kernel == "mma_sm80" and not formed
        assert launches(library) == ["pack+count" if both else "pack", f"{kernel}*"]


def test_nothing_starts_early_behind_a_kernel_that_does_not_make_x(library, ops, kernel):
    """Without values pack launches nothing, and a product behind it would lie behind whatever ran before."""
    x, weight, bias, _ = problem(3, 5, 0)
    ops.linear(x, weight, 0, bias)
    assert launches(library)[-1] == kernel
    ops.binary_linear(F.pack_bits(x), weight, 0, bias, weight_prepared=ops.prepare_weight(weight, 0))
    assert launches(library)[-1] == kernel
    # Words that the kernel reads as they are are made by no launch.
    x, weight, bias, _ = problem(3, 5, 128)
    prepared, words = ops.prepare_weight(weight, 128), F.pack_bits(x)
    launches(library)
    ops.binary_linear(words, weight, 128, bias, weight_prepared=prepared)
    counts = kernel in ("mma_sm80", "mma_int8_sm80")
    assert launches(library) == (["count", f"{kernel}*"] if counts else [kernel])


# ---- code for earlier devices ----------------------------------------------------------------------------------------

# The devices of cuda_on_cpu.cpp: all of the second to the fourth are of compute capability 9.0.
CODE_80, CODE_75, CODE_90, NO_CODE, FAILED = range(1, 6)


@pytest.mark.parametrize(
    ("device", "few", "many", "most"),
    [
        (CODE_80, "skinny_mma_sm80", "mma_sm80", "mma_sm80"),
        (CODE_75, "skinny", "popc", "popc"),
        (CODE_90, "skinny_mma_sm80*", "mma_sm80*", "wgmma_sm90a*"),
    ],
)
def test_the_code_that_a_device_runs_decides(library, ops, device, few, many, most):
    """Kernels that are empty in it are not chosen, and without the wait no product starts early."""
    library.cuda_on_cpu_device(device)
    for m, expected in ((16, few), (65, many), (256, most)):
        x, weight, bias, scale = problem(m, 40, 8192)
        prepared = ops.prepare_weight(weight, 8192)
        launches(library)
        got = ops.linear(x, weight, 8192, bias, scale=scale, weight_prepared=prepared)
        assert_equal(got, F.linear(x, weight, 8192, bias, scale=scale))
        assert launches(library) == ["pack", expected]


@pytest.mark.parametrize(
    ("device", "kernel"), [(CODE_80, "skinny_mma_sm80"), (CODE_75, "skinny"), (CODE_90, "fused_cluster_sm90")]
)
def test_clusters_need_code_for_them(library, ops, device, kernel):
    """16 rows of 4096 values of bfloat16 are too much for a block; a cluster packs them if the code has clusters."""
    x, weight, bias, scale = problem(16, 40, 4096)
    x = x.bfloat16()
    library.cuda_on_cpu_device(device)
    got = ops.linear(x, weight, 4096, bias, scale=scale)
    assert_equal(got, F.linear(x, weight, 4096, bias, scale=scale))
    assert launches(library) == ([kernel] if device == CODE_90 else ["pack", kernel])


def test_the_code_is_asked_for_on_its_device(library):
    assert [library.cuda_on_cpu_code(device) for device in (0, CODE_80, CODE_75, CODE_90)] == [80, 80, 75, 90]


def test_a_device_without_code_is_an_error(library, ops):
    x, weight, _, _ = problem(3, 5, 40)
    library.cuda_on_cpu_device(NO_CODE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"expected CUDA kernels that were built for compute capability 8\.0: "):
            ops.linear(x, weight, 40)
    assert launches(library) == []


def test_a_failure_before_the_first_product_is_not_blamed_on_the_build(library, ops):
    """Every call of CUDA returns the error of a kernel that failed, and so does the one that asks for the code."""
    x, weight, _, _ = problem(3, 5, 40)
    library.cuda_on_cpu_device(FAILED)
    with pytest.raises(RuntimeError, match=r"the CUDA kernels cannot be loaded: another error"):
        ops.linear(x, weight, 40)
    assert launches(library) == []


@pytest.mark.parametrize("forced", ["fused_skinny", "fused_skinny_mma_sm80", ""])
def test_fused(library, ops, forced):
    """Few values of real x are packed by the product, unless a launch that aligns the weights can pack them.

    Words of x, or too many values, are not for the fused kernels.
    """
    library.cuda_on_cpu_force(forced.encode())
    for m, k, formed in itertools.product((1, 3, 4, 5, 16, 17), (40, 128, 8192), (False, True)):
        x, weight, bias, scale = problem(m, 40, k)
        strided = torch.stack([x, x], 1)[:, 0]
        more = {"scale": scale, "weight_prepared": ops.prepare_weight(weight, k) if formed else None}
        launches(library)
        for rows, strict in ((x, False), (strided, True), (x.bfloat16(), True)):
            got = ops.linear(rows, weight, k, bias, strict=strict, **more)
            assert_equal(got, F.linear(rows, weight, k, bias, strict=strict, scale=scale))
            one, several = "fused_skinny", "fused_skinny_mma_sm80"
            automatic = one if m == 1 else several if m <= 16 else None
            aligns = k == 40 and not formed
            automatic = automatic if m * k * rows.element_size() <= 78400 and not aligns else None
            takes = forced and m <= (4 if forced == one else 16) and m * -(-k // 128) * 128 <= 131072
            expected = forced if takes else automatic
            *before, last = launches(library)
            assert (last if last in (one, several) else None) == expected
            assert before == (["align"] * aligns if expected else ["pack+align" if aligns else "pack"])
        words = ops.pack_bits(x)
        ops.binary_linear(words, weight, k)
        ops.linear_train(x, weight, k)
        assert not {"fused_skinny", "fused_skinny_mma_sm80"} & set(launches(library))
        reals, limits = torch.randn(40, k), torch.full((40,), k // 2, dtype=torch.int32)
        assert_equal(ops.sign_linear(x, reals), F.sign_linear(x, reals))
        assert_equal(ops.linear(x, weight, k, out_limits=limits), F.linear(x, weight, k, out_limits=limits))
