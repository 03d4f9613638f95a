"""Tensors in memory that may be read and nothing else: a write, or a read beside it, stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
# Of <sys/mman.h>; the mmap module has the other two.
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int, protection: int) -> None:
    if size and _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(content: Tensor, at_end: bool = True, misaligned: bool = False) -> Tensor:
    """A read-only copy of bytes, between two pages that nobody may touch.

    Args:
        content: uint8, one dimension.
        at_end: It ends where the page behind it begins; otherwise it begins where the page before it ends.
        misaligned: One byte further away from that page, so that no element of two bytes or more is aligned.

    Returns:
        uint8, the size of its storage.
    """
    size, shift = len(content), int(misaligned)
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    room = -(-(size + shift) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    begin = PAGE + (room - size - shift if at_end else shift)
    memory[begin : begin + size] = content.numpy().tobytes()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(address, PAGE, PROT_NONE)
    _protect(address + PAGE, room, mmap.PROT_READ)
    _protect(address + PAGE + room, PAGE, PROT_NONE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin)


def extent(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> int:
    """Elements of storage that a tensor of these sizes and strides needs."""
    if 0 in sizes:
        return 0
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def is_inside(tensor: Tensor) -> bool:
    """Whether the tensor lies in its storage, which can be resized beneath it."""
    needed = extent(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    return needed * tensor.itemsize <= tensor.untyped_storage().nbytes()


def lazy_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written: torch.zeros writes all of its own."""
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)
