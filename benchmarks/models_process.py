"""Times whole models in a process of its own, which ``benchmarks.models`` starts.

``python -m benchmarks.models_process ROUNDS CASES`` prints the times of all cases as a JSON list. CASES is a JSON list
of [variant, size, batches].
"""

from __future__ import annotations

import json
import sys
from typing import TypeVar

import torch
from torch import Tensor, nn

from bitorch_qlinear import ChannelShift, QLinear, RPReLU, explain, pack

from .measuring import Times, interleaved, prepare
from .peers import evaluation

_Module = TypeVar("_Module", bound=nn.Module)

LAYERS = 4
FLOAT, PACKED, FUSED = "nn.Linear", "packed", "fused"
NAMES = [FLOAT, PACKED, FUSED]

HARDTANH, NORM, REACT, SCALED = "BatchNorm, Hardtanh", "BatchNorm", "BatchNorm, RPReLU, RSign", "α, BatchNorm, Hardtanh"
VARIANTS = [HARDTANH, NORM, REACT, SCALED]
"""What lies between two layers, in the order of the calls. α is ``weight_scale="mean"``."""


def between(variant: str, size: int) -> list[nn.Module]:
    """Return the modules between two layers, with parameters and statistics as after some training."""
    norm = nn.BatchNorm1d(size)
    with torch.no_grad():
        # A product of signs has a variance of about `size`.
        norm.running_mean.normal_(0, size**0.5)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5 * size, 1.5 * size)  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.5)
    if variant == NORM:
        return [norm]
    if variant == REACT:
        activation = randomized(RPReLU(size))
        with torch.no_grad():
            activation.slope.uniform_(0.1, 0.4)  # a negative slope in one channel would keep its layer from fusing
        return [norm, activation, randomized(ChannelShift(size))]
    return [norm, nn.Hardtanh()]


def randomized(module: _Module) -> _Module:
    """Add normal values to all parameters of a module, and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def make(variant: str, size: int, binary: bool, outputs: int | None = None) -> nn.Sequential:
    """Make a chain of ``LAYERS`` layers in eval mode, the last of which may have another number of outputs."""
    scale = "mean" if variant == SCALED else None
    modules: list[nn.Module] = [randomized(ChannelShift(size))] if variant == REACT else []
    for place in range(LAYERS):
        last = place == LAYERS - 1
        features = (outputs or size) if last else size
        modules.append(QLinear(size, features, weight_scale=scale) if binary else nn.Linear(size, features))
        modules += [] if last else between(variant, size)
    return nn.Sequential(*modules).eval()


def fuse(model: nn.Module, packed: nn.Module, x: Tensor) -> nn.Module:
    """Return the fused model.

    Raises:
        RuntimeError: It hands on floats somewhere, or its output is not that of the packed model.
    """
    fused = pack(model, fuse=True)
    outputs = [layer.output for layer in explain(fused)]
    if not all(output.startswith("words for the next layer") for output in outputs[:-1]):
        raise RuntimeError(f"expected words between all layers, got {outputs}")
    with torch.inference_mode():
        if not torch.equal(fused(x), packed(x)):
            raise RuntimeError("the fused model's output differs from the packed model's")
    return fused


def times(variant: str, size: int, batches: list[int], rounds: int) -> list[Times]:
    """Time a chain's float, packed and fused form in turns, once for each batch."""
    torch.manual_seed(0)
    x = torch.randn(max(batches), size)
    model = make(variant, size, binary=True)
    packed = pack(model)
    models = {FLOAT: make(variant, size, binary=False), PACKED: packed, FUSED: fuse(model, packed, x)}
    del model
    return [
        interleaved({name: evaluation(each, x[:batch]) for name, each in models.items()}, rounds) for batch in batches
    ]


if __name__ == "__main__":
    prepare(1)
    print(json.dumps([times(*case, int(sys.argv[1])) for case in json.loads(sys.argv[2])]))
