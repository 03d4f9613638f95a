"""What the examples share: training on the digits, and times as ratios inside one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.model import Digits

__all__ = ["accuracy", "median_seconds", "train"]


def train(
    model: nn.Module, digits: Digits, epochs: int, learning_rate: float = 3e-3, frozen: Sequence[nn.Module] = ()
) -> nn.Module:
    """Train the parameters that require a gradient, with AdamW and a learning rate of one cycle.

    Args:
        model: Changed in place; in eval mode afterwards.
        digits: The images.
        epochs: Number of passes over the training images.
        learning_rate: The highest one.
        frozen: Modules inside that stay in eval mode, so that their running statistics do not change.

    Returns:
        The model.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = -(-len(digits.x_train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
    model.train()
    for module in frozen:
        module.eval()
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.x_train)).split(64):
            loss = F.cross_entropy(model(digits.x_train[chosen]), digits.y_train[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of test images that a model in eval mode recognizes."""
    with torch.inference_mode():
        return float((model(digits.x_test).argmax(1) == digits.y_test).float().mean())


def median_seconds(calls: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int = 15) -> dict[str, float]:
    """Return the median time of each call, in seconds; the calls take turns, so that all meet the same conditions.

    Args:
        calls: The functions by name.
        x: Their argument.
        rounds: Number of turns.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                call(x)
                if turn > 1:  # the first turns warm up
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}
