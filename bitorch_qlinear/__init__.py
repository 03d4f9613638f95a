"""bitorch_qlinear: a binarized linear layer for PyTorch that computes with bits."""

import torch

from . import functional, kernels, quantizations
from ._info import Info, info
from ._version import __version__
from .convert import LayerReport, Report, explain, pack, unpack
from .linear import QLinear, safe_globals
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

# A whole model that torch.save wrote loads with weights_only=True as far as it is ours; its other classes are the
# user's to allow.
torch.serialization.add_safe_globals([*safe_globals(), PackedQLinear])
