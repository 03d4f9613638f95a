"""The images, the binary network, its float32 twin, and how both are trained."""

from __future__ import annotations

import argparse
import importlib
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import Report, binarize, explain, pack

__all__ = [
    "CLASSES",
    "HIDDEN_LAYERS",
    "LEARNING_RATE",
    "TRAINING_BATCH",
    "Digits",
    "Training",
    "accuracy",
    "build_model",
    "check_equal",
    "export_and_check",
    "hidden_layers",
    "load_digits",
    "pack_and_check",
    "positive",
    "predict",
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


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


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

    ``binarize`` makes the binary network of a float one: it replaces all linear layers except the first and the last by
    ``QLinear``. A BatchNorm precedes each of them, so that the values whose signs it takes are centred at zero. These
    signs are the binary network's nonlinearity. The twin has a ReLU in their place.

    Args:
        features: Number of values of an image.
        hidden: Width of the hidden layers.
        binary: Whether the hidden layers are QLinear, or ReLU and nn.Linear.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(first=nn.Linear(features, hidden, bias=False))
    layers["norm0"] = nn.BatchNorm1d(hidden)
    for i in range(1, HIDDEN_LAYERS + 1):
        if not binary:
            layers[f"relu{i}"] = nn.ReLU()
        # The hidden layers need no bias because the BatchNorm behind each has one.
        layers[f"hidden{i}"] = nn.Linear(hidden, hidden, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(hidden)
    layers["last"] = nn.Linear(hidden, CLASSES)
    model = nn.Sequential(layers)
    return binarize(model, inplace=True) if binary else model


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


def pack_and_check(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, Report]:
    """Pack a model twice, as separate layers and fused, and check that both compute the same logits, bit for bit.

    Args:
        model: The trained model; it is in eval mode afterwards.
        x: Images for which the logits are compared.

    Returns:
        The packed model, the fused one, and a report of what computes the binary layers of the latter.

    Raises:
        RuntimeError: A logit differs.
    """
    expected = predict(model, x)
    packed, fused = pack(model), pack(model, fuse=True)
    check_equal(expected, predict(packed, x), "the packed model")
    check_equal(expected, predict(fused, x), "the fused model")
    return packed, fused, explain(fused)


def export_and_check(model: nn.Module, x: Tensor, path: Path) -> None:
    """Export a model for batches of any size, load the program again, and check that it computes the same logits.

    The process that loads the program needs no code of the model, only ``import bitorch_qlinear``.

    Args:
        model: The packed model.
        x: Images for which the logits are compared.
        path: The file that is written.

    Raises:
        RuntimeError: A logit differs.
    """
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    for images in (x, x[: len(x) // 2]):
        with torch.inference_mode():
            logits = loaded(images)
        check_equal(predict(model, images), logits, "the exported program")


def check_equal(expected: Tensor, got: Tensor, what: str) -> None:
    """Raise a RuntimeError if a model's logits are not those of the trained one."""
    if not torch.equal(expected, got):
        differing = int((expected != got).sum())
        raise RuntimeError(f"{what} differs from the trained one in {differing} of {got.numel()} logits")
