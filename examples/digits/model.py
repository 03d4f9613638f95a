"""The images, the binary network, its float32 twin, and how both are trained."""

from __future__ import annotations

import importlib
import time
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import QLinear, Report, explain, pack

__all__ = [
    "CLASSES",
    "HIDDEN_LAYERS",
    "LEARNING_RATE",
    "TRAINING_BATCH",
    "Digits",
    "Training",
    "accuracy",
    "build_model",
    "hidden_layers",
    "load_digits",
    "pack_and_check",
    "progress_bar",
    "require",
    "train",
    "train_epoch",
]

HIDDEN_LAYERS = 3
CLASSES = 10
TRAINING_BATCH = 128
LEARNING_RATE = 1e-3
# Label smoothing gains the binary network about one percent of test accuracy: with weights of ±1 its logits are large,
# and without smoothing it soon fits the 1347 training images with too much confidence.
LABEL_SMOOTHING = 0.1


class Digits(NamedTuple):
    """Images and their labels. Each row of x is an image with values in [-1, 1]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Training(NamedTuple):
    """What a training run reached and how long it took.

    Attributes:
        loss: Mean cross entropy of the training images in each epoch.
        test_accuracy: Share of the test images that the model recognizes after each epoch.
        epoch_seconds: Time of each epoch, without the evaluation after it.
    """

    loss: list[float]
    test_accuracy: list[float]
    epoch_seconds: list[float]


def require(module: str, package: str) -> Any:
    """Import a module that only this example needs.

    Args:
        module: Name of the module.
        package: Name under which pip knows it.

    Raises:
        SystemExit: The module is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"The demo needs {package} ({error}): pip install 'bitorch_qlinear[demo]'") from error


def progress_bar(steps: int, what: str, unit: str) -> Any:
    """Return ``range(steps)`` that shows tqdm's progress bar if stderr is a terminal, and nothing in a log file."""
    return require("tqdm", "tqdm").tqdm(range(steps), desc=what, unit=unit, disable=None)


def load_digits(seed: int, device: torch.device) -> Digits:
    """Load the 8×8 handwritten digits that scikit-learn contains, and keep a quarter of each class for the test.

    Args:
        seed: Decides which images are kept.
        device: Device of the returned tensors.
    """
    x, y = require("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    split = require("sklearn.model_selection", "scikit-learn").train_test_split
    x_train, x_test, y_train, y_test = split(x / 8 - 1, y, test_size=0.25, stratify=y, random_state=seed)
    images = [torch.tensor(part, dtype=torch.float32, device=device) for part in (x_train, x_test)]
    labels = [torch.tensor(part, device=device) for part in (y_train, y_test)]
    return Digits(images[0], labels[0], images[1], labels[1])


def build_model(features: int, hidden: int, binary: bool = True) -> nn.Sequential:
    """Build the binary classifier or its float32 twin; both draw the same initial weights from the same seed.

    The first and the last layer are real-valued. A BatchNorm precedes each hidden layer, so that the values
    whose signs it takes are centred at zero. These signs are the binary network's nonlinearity. The twin has a ReLU in
    their place.

    Args:
        features: Number of values of an image.
        hidden: Width of the hidden layers.
        binary: Whether the hidden layers are QLinear, or ReLU and nn.Linear.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(first=nn.Linear(features, hidden, bias=False))
    layers["norm0"] = nn.BatchNorm1d(hidden)
    for i in range(1, HIDDEN_LAYERS + 1):
        # The hidden layers need no bias because the BatchNorm behind each has one.
        if binary:
            layers[f"hidden{i}"] = QLinear(hidden, hidden, bias=False, gradient_cancellation_threshold=1.0)
        else:
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"hidden{i}"] = nn.Linear(hidden, hidden, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(hidden)
    layers["last"] = nn.Linear(hidden, CLASSES)
    return nn.Sequential(layers)


def hidden_layers(model: nn.Module) -> nn.ModuleList:
    """Return the linear layers that are binary in one network and float32 in the other."""
    return nn.ModuleList(layer for name, layer in model.named_children() if name.startswith("hidden"))


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's logits in eval mode; the model stays in eval mode."""
    with torch.inference_mode():
        logits: Tensor = model.eval()(x)
    return logits


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that a model recognizes; the model stays in eval mode."""
    return (predict(model, x).argmax(1) == y).float().mean().item()


def train(model: nn.Module, digits: Digits, epochs: int, what: str = "training") -> Training:
    """Train a model with AdamW and a learning rate of one cycle.

    The test accuracy is recorded after each epoch but decides nothing: the result is the model of the last epoch.

    Args:
        model: Changed in place; in eval mode and without gradients afterwards.
        digits: The images.
        epochs: Number of passes over the training images.
        what: Label of the progress bar.
    """
    steps = epochs * -(-len(digits.x_train) // TRAINING_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    loss: list[float] = []
    test_accuracy: list[float] = []
    seconds: list[float] = []
    with progress_bar(epochs, what, "epoch") as progress:
        for _ in progress:
            start = time.perf_counter()
            loss.append(train_epoch(model, digits, optimizer, schedule))
            seconds.append(time.perf_counter() - start)
            test_accuracy.append(accuracy(model, digits.x_test, digits.y_test))
            progress.set_postfix(loss=f"{loss[-1]:.3f}", test_accuracy=f"{test_accuracy[-1]:.1%}")
    model.zero_grad()  # the next model's training needs the memory of these gradients
    return Training(loss, test_accuracy, seconds)


def train_epoch(
    model: nn.Module,
    digits: Digits,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Pass over the training images once, in random order.

    Returns:
        The mean loss.
    """
    model.train()
    total, images = 0.0, len(digits.x_train)
    for chosen in torch.randperm(images).to(digits.x_train.device).split(TRAINING_BATCH):
        loss = F.cross_entropy(model(digits.x_train[chosen]), digits.y_train[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() * len(chosen)
    return total / images


def pack_and_check(model: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
    """Pack a model and check that the packed one computes the same logits, bit for bit.

    Args:
        model: The trained model; it is in eval mode afterwards.
        x: Images for which the logits are compared.

    Returns:
        The packed model, and a report of what computes its binary layers.

    Raises:
        RuntimeError: A logit differs.
    """
    packed = pack(model.eval())
    expected, got = predict(model, x), predict(packed, x)
    if not torch.equal(expected, got):
        differing = int((expected != got).sum())
        raise RuntimeError(f"the packed model differs from the trained one in {differing} of {got.numel()} logits")
    return packed, explain(packed)
