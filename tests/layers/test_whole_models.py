"""Whole saved models can be loaded by torch.load(weights_only=True)."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bitorch_qlinear import QLinear, pack, quantization_names


@pytest.mark.parametrize("packed", [False, True])
def test_torch_load_accepts_models_with_weights_only(packed: bool, tmp_path: Path) -> None:
    model: nn.Module = nn.Sequential(
        QLinear(33, 64, gradient_cancellation_threshold=1.0),
        nn.BatchNorm1d(64),
        QLinear(64, 7, bias=False, input_quantization="steheaviside", weight_quantization="approxsign"),
    ).eval()
    x = torch.randn(5, 33)
    expected = model(x)
    torch.save(pack(model) if packed else model, tmp_path / "model.pt")
    with torch.serialization.safe_globals([nn.Sequential, nn.BatchNorm1d]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("name", quantization_names())
def test_only_classes_of_torch_must_be_allowed(name: str, tmp_path: Path) -> None:
    torch.save(nn.Sequential(QLinear(8, 4, input_quantization=name, weight_quantization=name)), tmp_path / "model.pt")
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.pt")
    assert not [each for each in unknown if not each.startswith("torch.")]
