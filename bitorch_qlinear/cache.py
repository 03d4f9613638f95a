"""Packed weights, remembered until the weight that they were made from changes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _C, _library

__all__ = ["PackedWeight", "WeightCache"]


class PackedWeight(NamedTuple):
    """The two forms that the operators take.

    Attributes:
        words: int32, shape ``(n, ceil(k / 32))``.
        prepared: The form that the active kernel reads, or None.
    """

    words: Tensor
    prepared: Tensor | None


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers write parameters without moving their version (torch 2.13).
register_optimizer_step_post_hook(_count_step)


def _is_dense(weight: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, of which a sample can be taken."""
    return weight.is_contiguous() or weight.t().is_contiguous()


def is_captured(weight: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would compute something from this weight later, at each replay."""
    real = type(weight) in (Tensor, nn.Parameter)  # not a FakeTensor, whose device may not be there
    return weight.is_cuda and real and torch.cuda.is_current_stream_capturing()


class Ready:
    """Lets other CUDA streams than the one that packed or prepared a weight wait until it has."""

    __slots__ = ("device", "event", "stream")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: int = torch._C._cuda_getCurrentRawStream(device.index)
        self.event = torch.cuda.current_stream(device).record_event()

    def wait(self, *tensors: Tensor | None) -> None:
        """Make the current stream wait for the tensors, whose memory it may then use beyond their lives.

        Not while a graph is captured, which may wait for nothing outside: ``torch.cuda.graph`` waited when it began.
        """
        if torch._C._cuda_getCurrentRawStream(self.device.index) == self.stream:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.event)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)


class _Entry:
    """The state of a weight at one moment, and what was packed from it then."""

    __slots__ = (
        "address",
        "bytes",
        "device",
        "dtype",
        "generation",
        "optimizer_steps",
        "packed",
        "ready",
        "sample",
        "shape",
        "strict",
        "stride",
        "version",
        "weight",
    )  # fmt: skip

    def __init__(self, weight: Tensor, strict: bool) -> None:
        self.weight = weakref.ref(weight)
        self.version = weight._version
        self.address = weight.data_ptr()
        self.dtype, self.device = weight.dtype, weight.device
        self.shape, self.stride = weight.shape, weight.stride()
        self.strict, self.generation, self.optimizer_steps = strict, _library.generation, _optimizer_steps
        self.bytes = weight.nbytes
        self.sample = _C.sample(self.address, self.bytes) if weight.is_cpu else None
        self.packed = _pack(weight, strict)  # last: a write during it makes this entry out of date, not wrong
        self.ready = Ready(weight.device) if weight.is_cuda else None

    def holds(self, weight: Tensor, strict: bool) -> bool:
        """Whether the weight is the same and unchanged."""
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.dtype is weight.dtype
            and self.shape == weight.shape
            and self.stride == weight.stride()
            and (weight.is_cpu if self.sample is not None else self.device == weight.device)
            and self.strict is strict
            and self.generation == _library.generation
            and self.optimizer_steps == _optimizer_steps
            and (self.sample is None or _C.sample_matches(self.address, self.bytes, self.sample))
        )


class WeightCache:
    """One layer's packed weights.

    The key is the weight tensor itself, held weakly, with its version, address, dtype, device, shape and strides; and
    a step of any optimizer outdates all caches. A write through ``.data`` or a NumPy view moves none of these: on the
    CPU a sample of raw values, spread over the matrix, is compared as well, which catches writes that change most of
    it. Copying or pickling gives an empty cache.

    Several threads may use one cache: an entry is replaced as a whole, and dated before its weight is read. So may
    several CUDA streams, which wait for the one that packed. While a CUDA graph is captured nothing is remembered or
    taken from here, and the graph packs the weight at each replay: it could not notice that an entry was replaced.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        """Start empty."""
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        """Rebuild as an empty cache: what is cached belongs to one weight in one process."""
        return (WeightCache, ())

    @property
    def packed(self) -> PackedWeight | None:
        """What is held now."""
        entry = self._entry
        return None if entry is None else entry.packed

    def clear(self) -> None:
        """Forget what was packed."""
        self._entry = None

    def get(self, weight: Tensor, strict: bool) -> PackedWeight:
        """What was packed from this weight if it has not changed since; else pack and prepare it.

        Only a plain, dense Parameter is remembered: it alone is sure to notice its changes.
        """
        entry = self._entry
        if entry is not None and entry.holds(weight, strict):
            if entry.ready is None:  # not on CUDA: nothing is captured
                return entry.packed
            if not is_captured(weight):
                entry.ready.wait(*entry.packed)
                return entry.packed
        if is_captured(weight):
            return _pack(weight, strict)
        if type(weight) is not nn.Parameter or weight.is_inference() or not _is_dense(weight):
            return _pack(weight, strict)
        self._entry = entry = _Entry(weight, strict)
        return entry.packed


def _pack(weight: Tensor, strict: bool) -> PackedWeight:
    operators = torch.ops.bitorch_qlinear
    # Not an inference tensor, even under inference_mode: the cache outlives the block, and a later forward may save it
    # for backward.
    with torch.inference_mode(False), torch.no_grad():
        words = operators.pack_bits(weight.detach(), strict)
        return PackedWeight(words, operators.prepare_weight(words, weight.shape[1]))
