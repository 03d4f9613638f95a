"""The kernels that pack x themselves, and products that start while pack still runs, equal the CPU's scalar kernel."""

import itertools
import random

import pytest
import torch
from support.reference import FLOATS, random_values, random_words

from bitorch_qlinear import functional as F
from bitorch_qlinear.kernels import forced

from .device import CUDA, KERNELS, assert_same, captured, choice, misaligned, moved, moved_all, poison

FUSED = [name for name in KERNELS if name.startswith("fused")]
# These lie around a row's last word, 16 bytes of words, a warp's load, and the words of a group of warps.
DEPTHS = [0, 1, 7, 8, 33, 127, 128, 129, 512, 640, 1024, 2048 + 97, 4096, 4096 + 128, 8192]
every_fused = pytest.mark.parametrize("kernel", FUSED)


def rows_of(kernel: str) -> list[int]:
    """Return the numbers of rows that a fused kernel takes."""
    return list(range(1, 5 if kernel == "fused_skinny" else 17))


@every_fused
@pytest.mark.parametrize("k", DEPTHS)
def test_every_edge(kernel, k):
    """The rows of x have any dtype, rule, stride and alignment, and the outputs any type; popc needs two launches."""
    make, drawn = torch.Generator().manual_seed(k), random.Random(k)
    for m, n in itertools.product(rows_of(kernel), (1, 7, 33, 64, 129, 1000, 4300)):
        dtype, out, strict = drawn.choice(FLOATS), drawn.choice([*FLOATS, torch.int32]), drawn.random() < 0.5
        wide = random_values((m, k + drawn.choice([0, 0, 1, 16 // dtype.itemsize])), dtype, make)
        words = random_words(n, k, make, stray=True)
        vectors = {} if out is torch.int32 else {"bias": torch.randn(n), "scale": torch.randn(n)}
        options = {"out_dtype": out, "strict": strict}
        want = F.linear(wide[:, :k], words, k, **vectors, **options)
        gpu_words = drawn.choice([moved, misaligned])(words)
        prepared = F.prepare_weight(gpu_words, k) if drawn.random() < 0.5 else None
        options |= moved_all(vectors) | {"weight_prepared": prepared}
        for name in (kernel, "popc", None):
            poison(m, n, dtype=out)
            with forced(name):
                assert_same(F.linear(moved(wide)[:, :k], gpu_words, k, **options), want, (name, m, n, k, dtype, out))


@every_fused
def test_bits(kernel):
    make = torch.Generator().manual_seed(0)
    for m, n, k in itertools.product(rows_of(kernel), (1, 32, 33, 1000), (40, 1024, 4096)):
        x, words = random_values((m, k), torch.bfloat16, make), random_words(n, k, make)
        limits, flips = torch.randint(k + 1, (n,), generator=make).int(), random_words(1, n, make, stray=True)[0]
        want = F.linear(x, words, k, out_limits=limits, out_flips=flips)
        with forced(kernel):
            got = F.linear(moved(x), moved(words), k, out_limits=moved(limits), out_flips=moved(flips))
        assert_same(got, want, (m, n, k))


@every_fused
def test_long_rows(kernel):
    more = [] if kernel == "fused_skinny" else [(5, 16384), (11, 11008), (16, 8192), (16, 8191)]
    for m, k in ((1, 131072), (4, 32768), (4, 32001), *more):
        x, words = torch.randn(m, k).bfloat16(), random_words(300, k, torch.Generator().manual_seed(m))
        with forced(kernel):
            assert choice(m, 300, k, 2).startswith(kernel)
            assert_same(F.linear(moved(x), moved(words), k), F.linear(x, words, k), (m, k))


@pytest.mark.parametrize("kernel", [None, *KERNELS])
@pytest.mark.parametrize("in_a_graph", [False, True])
def test_weights_that_change_right_before_the_call(kernel, in_a_graph):
    """A product that starts early must not start before the weights, their form, the bias or x are written.

    Each step writes them in the same stream, directly before the calls, from tensors that hold its values. Without a
    form the launch before counts the weights, too; if it has to align them (K = 4000), the product starts as usual.
    """
    steps = 50
    shapes = [(1, 4096, 4096), (4, 8192, 4096), (16, 4096, 4096), (16, 512, 4000), (64, 1024, 4096), (300, 512, 4000)]
    shapes.append((300, 4096, 1024))
    for m, n, k in shapes:
        make = torch.Generator(CUDA).manual_seed(m)
        all_x = torch.randn(steps, m, k, generator=make, device=CUDA).bfloat16()
        all_words = torch.randint(-(2**31), 2**31, (steps, n, k // 32), generator=make, device=CUDA, dtype=torch.int32)
        all_bias = torch.randn(steps, n, generator=make, device=CUDA)
        x, words, bias = (torch.empty_like(values[0]) for values in (all_x, all_words, all_bias))

        def call(step: int) -> torch.Tensor:
            words.copy_(all_words[step])  # noqa: B023
            bias.copy_(all_bias[step])  # noqa: B023
            x.copy_(all_x[step])  # noqa: B023
            y = F.linear(x, words, k, bias)  # noqa: B023
            form = F.prepare_weight(words, k)  # noqa: B023
            of_real = F.linear(x, words, k, bias, weight_prepared=form)  # noqa: B023
            packed = F.pack_bits(x)  # noqa: B023
            of_words = F.binary_linear(packed, words, k, bias, weight_prepared=form, out_dtype=x.dtype)  # noqa: B023
            return torch.stack([y, of_real, of_words])

        def run() -> torch.Tensor:
            return torch.stack([call(step) for step in range(steps)])

        with forced(kernel):
            if in_a_graph:
                graph, results = captured(run)
                graph.replay()
            else:
                results = run()
        with forced("popc"):
            torch.cuda.synchronize()
            for step in range(steps):
                want = F.linear(all_x[step], all_words[step], k, all_bias[step])
                for result in results[step]:
                    assert_same(result, want, (kernel, m, step))


def test_results_that_are_overwritten_at_once():
    """What runs behind a product may write to its arguments: it starts after the product and after pack."""
    k = 4096
    for m, n in ((1, 4096), (16, 4096), (200, 1024)):
        x, words = torch.randn(m, k).bfloat16(), random_words(n, k, torch.Generator().manual_seed(m))
        want, results = F.linear(x, words, k), []
        for _ in range(50):
            gpu_x, gpu_words = moved(x), moved(words)
            results.append(F.linear(gpu_x, gpu_words, k))
            gpu_x.fill_(-1.0)
            gpu_words.fill_(0)
        for result in results:
            assert_same(result, want, (m, n))
