"""bitorch_qlinear: a binarized linear layer for PyTorch that computes with bits."""

from . import _safe_globals as _safe_globals  # registers the layers, for torch.load(weights_only=True)
from . import functional, kernels, quantizations
from ._info import Info, info
from ._version import __version__
from .convert import LayerReport, Report, explain, pack, unpack
from .linear import QLinear
from .packed import PackedQLinear
from .quantizations import Quantization, quantization_names, register_quantization

__all__ = [
    "Info",
    "LayerReport",
    "PackedQLinear",
    "QLinear",
    "Quantization",
    "Report",
    "__version__",
    "explain",
    "functional",
    "info",
    "kernels",
    "pack",
    "quantization_names",
    "quantizations",
    "register_quantization",
    "unpack",
]
