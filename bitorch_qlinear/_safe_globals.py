"""Tells torch that whole models with these layers may be loaded by ``torch.load(weights_only=True)``.

A pickled model names each class that is in it, and torch refuses those that nobody vouched for. Torch's own layers and
the caller's quantizations are the caller's to vouch for, by ``torch.serialization.add_safe_globals``.
"""

from __future__ import annotations

import torch

from . import quantizations
from .linear import Activation, QLinear, do_nothing
from .packed import PackedQLinear

__all__: list[str] = []

_quantizations = [type(quantizations.get_quantization(name, "name")) for name in quantizations.quantization_names()]
torch.serialization.add_safe_globals([QLinear, PackedQLinear, Activation, do_nothing, *_quantizations])
