"""Times a training step and counts the bytes that its forward keeps for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bitorch_qlinear import QLinear
from bitorch_qlinear import functional as F

from .contestants import random_rows
from .timing import Timer, quartiles


def saved_by_kind(layer: nn.Module, x: Tensor) -> dict[str, int]:
    """Count the bytes that a forward keeps for the backward: packed weights, and all else but the parameters."""
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(x)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = [tensor.detach() for address, tensor in saved.items() if address not in parameters]
    words = F.pack_bits(layer.weight.detach())
    of_weights = [tensor for tensor in kept if tensor.shape == words.shape and torch.equal(tensor, words)]
    weights = sum(tensor.nbytes for tensor in of_weights)
    return {"activations": sum(tensor.nbytes for tensor in kept) - weights, "weights": weights}


def measure_training(size: int, device: torch.device, timer: Timer) -> dict[str, dict[str, Any]]:
    """Time a forward and the gradients of x, weight and bias, for each layer."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    layers = {
        "nn.Linear": nn.Linear(size, size, **options),
        "QLinear": QLinear(size, size, **options),
        "QLinear, threshold 1": QLinear(size, size, gradient_cancellation_threshold=1.0, **options),
    }
    x, g = random_rows(size, size, device).requires_grad_(), random_rows(size, size, device)
    found = {}
    for name, layer in layers.items():

        def step(layer: nn.Module = layer) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], g)

        found[name] = {
            "size": size,
            "seconds_quartiles": quartiles(timer([step], True)),
            "saved": saved_by_kind(layer, x),
        }
    return found
