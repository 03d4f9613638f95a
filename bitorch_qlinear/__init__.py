"""bitorch_qlinear: a binarized linear layer for PyTorch that computes with bits."""

from . import functional, kernels, quantizations
from ._version import __version__
from .info import info
from .linear import QLinear
from .packed import PackedQLinear, pack
from .quantizations import Quantization, quantization_names, register_quantization

__all__ = [
    "PackedQLinear",
    "QLinear",
    "Quantization",
    "__version__",
    "functional",
    "info",
    "kernels",
    "pack",
    "quantization_names",
    "quantizations",
    "register_quantization",
]
