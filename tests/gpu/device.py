"""The GPU under test, and ways to bring tensors to it. Without a GPU, importing this skips the importing module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.reference import assert_equal
from torch import Tensor

from bitorch_qlinear import _kernels, _library

CUDA = torch.device("cuda", 0)


def why_not() -> str:
    """Return the reason why these tests cannot run, or ""."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that this torch can use"
    if not _library.has_cuda:
        return f"there are no CUDA operators: {_library.no_cuda_reason}"
    if not _kernels.device_cuda_kernels(CUDA):
        return "the GPU is older than compute capability 7.5"
    return ""


if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

CAPABILITY = torch.cuda.get_device_capability(CUDA)
MULTIPROCESSORS = torch.cuda.get_device_properties(CUDA).multi_processor_count
CODE = _kernels.cuda_code(0)
KERNELS = _kernels.device_cuda_kernels(CUDA)

every_kernel = pytest.mark.parametrize("cuda_kernel", KERNELS, indirect=True)
several_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")


def choice(m: int, n: int, k: int, value_bytes: int = 0) -> str:
    """Return the library's description of how this GPU computes m x n x k: kernel, tile, reason.

    ``value_bytes`` is the size of a value of x, or 0 if x is packed.
    """
    return _kernels.cuda_choice(CAPABILITY, MULTIPROCESSORS, m, n, k, value_bytes, CODE)


def moved(tensor: Tensor, device: torch.device = CUDA) -> Tensor:
    """Copy the tensor to the GPU in memory of the same layout; ``to`` would close the gaps of strided tensors."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))
    copy = memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch._neg_view(copy) if tensor.is_neg() else copy


def moved_all(values: dict[str, Any], device: torch.device = CUDA) -> dict[str, Any]:
    """Return the same values with all tensors moved to the GPU."""
    return {name: moved(value, device) if isinstance(value, Tensor) else value for name, value in values.items()}


def misaligned(words: Tensor) -> Tensor:
    """Copy the words to the GPU, to one word past an aligned address."""
    memory = torch.empty(words.numel() + 1, dtype=words.dtype, device=CUDA)
    return memory[1:].view(words.shape).copy_(words)


def poison(*sizes: int, dtype: torch.dtype) -> None:
    """Fill with garbage the memory that torch's allocator will most likely give to a result of this size."""
    size = torch.Size(sizes).numel() * dtype.itemsize
    torch.full((size,), 0xA5, dtype=torch.uint8, device=CUDA)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a CUDA graph of the call, and the result that each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls may initialize something, which must not be captured
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise an error if torch waits for the device inside the context; direct calls of CUDA are not detected."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Assert that the first tensor is on the GPU and equals the second bit for bit, which may be on the CPU."""
    assert actual.device.type == CUDA.type, f"{what}: computed on {actual.device}"
    assert_equal(actual, expected.to(actual.device), what)
