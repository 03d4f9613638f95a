"""The contestants on the CPU. A peer that is not installed is listed with the reason instead of being timed.

nn.Linear           torch's layer, in float32 or the type that is asked for
QLinear             our layer in eval mode, which packs its input and its weights in every call
PackedQLinear       the layer that pack() makes of it, which packs only its input in every call
packed × packed     our product alone; both operands are packed before
bitorch QLinear     the layer of bitorch 0.4.1
bnn-lab GEMM        the packed product of bnn-lab 1.0.0 alone, with its AVX2 kernel if ours is the AVX2 one
int8 dynamic        torch's dynamic quantization of nn.Linear
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitorch_qlinear import PackedQLinear, QLinear, kernels
from bitorch_qlinear import functional as F

from .measuring import Call, Shape

LINEAR, QLINEAR, PACKED_LAYER, PACKED = "nn.Linear", "QLinear", "PackedQLinear", "packed × packed"
BITORCH, BNN, INT8 = "bitorch QLinear", "bnn-lab GEMM", "int8 dynamic"
NAMES = [LINEAR, QLINEAR, PACKED_LAYER, PACKED, BITORCH, BNN, INT8]


class Contestants(NamedTuple):
    """The calls that compute one shape, by name, and the reasons why others are absent."""

    calls: dict[str, Call]
    absent: dict[str, str]


def evaluation(layer: nn.Module, x: Tensor) -> Call:
    """Return a call that computes a forward without gradients, in eval mode."""
    layer.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            return layer(x)

    return call


def packed_product(layer: QLinear, x: Tensor) -> Call:
    """Return a call that multiplies what is packed and prepared here."""
    words, k = F.pack_bits(layer.weight.detach()), layer.in_features
    prepared, x_words = F.prepare_weight(words, k), F.pack_bits(x)
    bias = layer.bias.detach() if layer.bias is not None else None
    return lambda: F.binary_linear(x_words, words, k, bias, weight_prepared=prepared, out_dtype=x.dtype)


def bitorch_layer(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """Return bitorch's layer; ImportError if it is not installed."""
    from bitorch.layers import QLinear as BitorchQLinear

    return BitorchQLinear(shape.k, shape.n).to(dtype)


def bnn_product(shape: Shape) -> Call:
    """Return bnn-lab's product; ImportError without its compiled kernel, because the NumPy one is no fair peer."""
    from bnn.kernels import packed

    if not packed.native_kernel_available():
        raise ImportError("its compiled kernel does not load")
    packed.set_num_threads(torch.get_num_threads())
    packed.set_kernel("avx2" if kernels.active() == "avx2" else None)
    x, weight = (packed.pack_binary_pm1(torch.randn(rows, shape.k).sign().numpy())[0] for rows in (shape.m, shape.n))
    return lambda: packed.binary_gemm_native_prepacked(x, weight, shape.k)


def int8_layer(linear: nn.Linear) -> nn.Module:
    """Return torch's dynamically quantized layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated, but torch itself has no other int8 layer.
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)
    return quantized


def contestants(shape: Shape, dtype: torch.dtype = torch.float32, names: Collection[str] = tuple(NAMES)) -> Contestants:
    """Make the contestants of these names for one shape and type, with bias and on the same input."""
    x = torch.randn(shape.m, shape.k, dtype=dtype)
    linear = nn.Linear(shape.k, shape.n, dtype=dtype)
    binary = QLinear.from_linear(linear)
    own: dict[str, Callable[[], Call]] = {
        LINEAR: lambda: evaluation(linear, x),
        QLINEAR: lambda: evaluation(binary, x),
        PACKED_LAYER: lambda: evaluation(PackedQLinear.from_float(binary), x),
        PACKED: lambda: packed_product(binary, x),
    }
    others: dict[str, Callable[[], Call]] = {
        BITORCH: lambda: evaluation(bitorch_layer(shape, dtype), x),
        BNN: lambda: bnn_product(shape),
        INT8: lambda: evaluation(int8_layer(linear), x),
    }
    calls, absent = {name: make() for name, make in own.items() if name in names}, {}
    for name, make in others.items():
        if name not in names:
            continue
        if dtype != torch.float32 and name != BITORCH:
            absent[name] = f"does not take {str(dtype)[6:]}"
            continue
        try:
            calls[name] = make()
        except (ImportError, AttributeError, RuntimeError) as error:
            absent[name] = str(error).splitlines()[0]
    return Contestants(calls, absent)
