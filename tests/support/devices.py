"""A device without kernels, imitated on the CPU."""

from __future__ import annotations

import sys

import pytest

from bitorch_qlinear import PackedQLinear


def take_kernels_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every module of the package find no kernels and no form for any tensor, as on a device that has none."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "bitorch_qlinear" and hasattr(module, "has_kernels"):
            monkeypatch.setattr(module, "has_kernels", lambda tensor: False)
    monkeypatch.setattr(PackedQLinear, "prepare", lambda layer: setattr(layer, "weight_prepared", None))
