"""What the examples share: their options, training on the digits, parity, and times as ratios inside one run."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import explain, kernels, pack
from examples.digits.model import Digits, check_equal, positive, predict

__all__ = [
    "accuracy",
    "check_parity",
    "make_parser",
    "median_seconds",
    "pack_and_compare",
    "print_speed",
    "setting",
    "start",
    "train",
]

TRAINING_BATCH = 64


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have.

    Args:
        name: Name of the example's module.
        description: One sentence.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=description)
    parser.add_argument(
        "--threads", type=positive, default=1, help="threads of torch and of the kernels (default: %(default)s)"
    )
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, set the number of threads, and seed torch.

    Args:
        parser: A parser of `make_parser`.
        argv: Arguments to use instead of the process's.
    """
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def train(
    model: nn.Module, digits: Digits, epochs: int, learning_rate: float, frozen: Sequence[nn.Module] = ()
) -> nn.Module:
    """Train the parameters that require a gradient, with AdamW and a learning rate of one cycle.

    Args:
        model: Changed in place; in eval mode afterwards.
        digits: The images.
        epochs: Number of passes over the training images.
        learning_rate: The highest one. It is larger for a binary network, because only steps that carry a weight across
            0 have an effect.
        frozen: Modules inside that stay in eval mode, so that their running statistics do not change.

    Returns:
        The model.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = -(-len(digits.x_train) // TRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
    model.train()
    for module in frozen:
        module.eval()
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.x_train)).split(TRAINING_BATCH):
            loss = F.cross_entropy(model(digits.x_train[chosen]), digits.y_train[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of test images that a model recognizes; the model stays in eval mode."""
    return float((predict(model, digits.x_test).argmax(1) == digits.y_test).float().mean())


def check_parity(model: nn.Module, packed: nn.Module, x: Tensor) -> None:
    """Check that a packed model computes what the trained one does, bit for bit, and print it.

    Args:
        model: The trained model.
        packed: The packed one.
        x: Images for which the logits are compared.

    Raises:
        RuntimeError: A logit differs.
    """
    expected = predict(model, x)
    for _ in range(2):  # the second call of a fused model computes with limits even if the first one did not
        check_equal(expected, predict(packed, x), "the packed model")
    print(f"The packed model's logits are identical for all {len(x)} test images.")


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return the median time of each call, in seconds; the calls take turns, so that all meet the same conditions.

    Args:
        calls: The functions by name.
        rounds: Number of turns.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn > 1:  # the first turns warm up
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in times.items()}


def print_speed(twin: nn.Module, packed: nn.Module, x: Tensor, batches: Sequence[int]) -> None:
    """Print how many times as fast as its float twin a packed model is.

    Args:
        twin: The float32 model, in eval mode.
        packed: The packed model.
        x: At least as many images as the largest batch.
        batches: The batch sizes.
    """
    shown = []
    with torch.inference_mode():
        for batch in batches:
            calls = {name: functools.partial(model, x[:batch]) for name, model in (("twin", twin), ("packed", packed))}
            seconds = median_seconds(calls)
            shown.append(f"{seconds['twin'] / seconds['packed']:.1f} × at batch {batch}")
    print(f"The packed model against float32: {', '.join(shown)} ({setting()})")


def pack_and_compare(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Pack a trained model, print what became of its layers, and compare it with the model and with its float twin.

    Args:
        model: The trained model.
        twin: The float32 model, in eval mode.
        x: Test images, at least 256.
    """
    packed = pack(model, fuse=True)
    print(f"\n{explain(packed)}\n")
    check_parity(model, packed, x)
    print_speed(twin, packed, x, (16, 64, 256))


def setting() -> str:
    """Return the kernel and the number of threads, which times depend on, in words."""
    threads = torch.get_num_threads()
    return f"kernel {kernels.active()}, {threads} thread{'s' if threads > 1 else ''}"
