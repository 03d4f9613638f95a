"""An imitation, on the CPU, of a device without kernels."""

from __future__ import annotations

import sys

import pytest

from bitorch_qlinear import PackedQLinear


def take_kernels_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package find neither kernels nor a prepared form for any tensor, as on a device without kernels."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "bitorch_qlinear" and hasattr(module, "has_kernels"):
            monkeypatch.setattr(module, "has_kernels", lambda tensor: False)
    monkeypatch.setattr(PackedQLinear, "prepare", lambda layer: setattr(layer, "weight_prepared", None))
