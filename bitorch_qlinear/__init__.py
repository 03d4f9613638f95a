"""bitorch_qlinear: a binarized linear layer for PyTorch that computes with bits."""

import torch

from . import _fake as _fake  # registers the shapes of the operators' results, for torch.compile and torch.export
from . import _flops as _flops  # registers the number of operations, for torch.utils.flop_counter
from . import _vmap as _vmap  # registers the batching rules, for torch.func.vmap
from . import functional, kernels, quantizations
from ._info import Info, info
from ._version import __version__
from .convert import BinarizeReport, LayerChoice, LayerReport, Report, binarize, explain, explain_binarize, pack, unpack
from .fused import FusedSequential
from .linear import QLinear, safe_globals
from .packed import PackedQLinear
from .quantizations import BinaryQuantization, Quantization, quantization_names, register_quantization
from .shifts import ChannelShift, RPReLU

__all__ = [
    "BinarizeReport",
    "BinaryQuantization",
    "ChannelShift",
    "FusedSequential",
    "Info",
    "LayerChoice",
    "LayerReport",
    "PackedQLinear",
    "QLinear",
    "Quantization",
    "RPReLU",
    "Report",
    "__version__",
    "binarize",
    "explain",
    "explain_binarize",
    "functional",
    "info",
    "kernels",
    "pack",
    "quantization_names",
    "quantizations",
    "register_quantization",
    "unpack",
]

# torch.load(weights_only=True) may build this package's classes of a whole saved model. The user allows all others.
torch.serialization.add_safe_globals([*safe_globals(), PackedQLinear, FusedSequential, ChannelShift, RPReLU])
