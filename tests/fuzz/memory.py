"""Tensors in read-only memory between forbidden pages: any write, and any read outside, ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
# This constant of <sys/mman.h> is missing in the mmap module.
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int, protection: int) -> None:
    if size and _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(content: Tensor, at_end: bool = True, misaligned: bool = False) -> Tensor:
    """Return a read-only copy of bytes, between two pages that must not be touched.

    Args:
        content: The bytes (uint8, one dimension).
        at_end: Let the copy end where the following page begins; otherwise it begins where the preceding page ends.
        misaligned: Leave one byte between the copy and that page, so that no element of two bytes or more is aligned.

    Returns:
        The copy (uint8), whose storage holds nothing else.
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
    """Return the number of elements of storage that a tensor of these sizes and strides needs."""
    if 0 in sizes:
        return 0
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def is_inside(tensor: Tensor) -> bool:
    """Return whether the tensor lies within its storage, which may have been resized."""
    needed = extent(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    return needed * tensor.itemsize <= tensor.untyped_storage().nbytes()


def lazy_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Return zeros that take memory only once they are written, unlike those of torch.zeros."""
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)
