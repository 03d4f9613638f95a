"""The command line: ``python -m examples.digits``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from . import report
from .costs import environment, measure
from .model import (
    HIDDEN_LAYERS,
    Digits,
    Training,
    build_model,
    export_and_check,
    load_digits,
    pack_and_check,
    positive,
    require,
    train,
)

__all__ = ["main"]

# The process holds at most this much of each hidden weight: the float32 value, its gradient and AdamW's two averages of
# the network in training, and the float32 value of the other network.
BYTES_A_WEIGHT = 5 * 4


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and reject now what would otherwise fail only after the training."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a binary classifier of handwritten digits and its float32 twin, pack and export the binary "
        "one, and compare accuracy, size and speed.",
    )
    parser.add_argument(
        "--epochs", type=positive, default=12, help="passes over the training images (default: %(default)s)"
    )
    parser.add_argument(
        "--hidden",
        type=positive,
        default=2048,
        help=f"width of the {HIDDEN_LAYERS} hidden layers (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="decides the split of the images, the initial weights and the batches (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train and measure (default: the GPU that torch can use, else the CPU; here %(default)s)",
    )
    parser.add_argument("--plot", type=writable, metavar="PATH", help="draw training and latencies into a PNG")
    parser.add_argument("--export", type=writable, metavar="PATH", help="keep the exported program of the packed model")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write all measured numbers, and the machine")
    arguments = parser.parse_args(argv)
    needed, available = HIDDEN_LAYERS * arguments.hidden**2 * BYTES_A_WEIGHT, memory_bytes(arguments.device)
    if needed > available:
        parser.error(
            f"argument --hidden: expected a width whose weights fit into memory, got {arguments.hidden}, which needs "
            f"about {needed / 1e9:,.0f} GB of the {available / 1e9:,.1f} GB of {arguments.device}"
        )
    return arguments


def memory_bytes(device: torch.device) -> int:
    """Return the total memory of a device, including what is in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def seed_number(text: str) -> int:
    """Parse a seed that both torch and scikit-learn accept."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    """Parse the path of a file in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a file in an existing folder, got {text!r}")
    return path


def usable_device(text: str) -> torch.device:
    """Parse the name of a device and try it, because torch's own errors fill a page."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} cannot compute on {text!r} here") from error
    return torch.device(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        argv: Arguments to use instead of the process's.

    Raises:
        SystemExit: An argument is wrong, a package is missing, or Ctrl-C was pressed.
        RuntimeError: A packed model or the exported program computes different logits.
    """
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # the shell's exit code of a program that Ctrl-C ended


def train_from_seed(binary: bool, digits: Digits, arguments: argparse.Namespace) -> tuple[nn.Module, Training]:
    """Train one of the two networks; from the same seed both have the same initial weights and the same batches.

    Args:
        binary: Whether the network is the binary one, or its float32 twin.
        digits: The images.
        arguments: The command line.

    Returns:
        The trained network in eval mode, and how its training went.
    """
    torch.manual_seed(arguments.seed)
    model = build_model(digits.x_train.shape[1], arguments.hidden, binary).to(arguments.device)
    name = report.BINARY if binary else report.FLOAT
    training = train(model, digits, arguments.epochs, f"training ({name})")
    print(
        f"{name}: test accuracy {training.test_accuracy[-1]:.2%} after {sum(training.epoch_seconds):.1f} s of training",
        flush=True,
    )
    return model, training


def run(arguments: argparse.Namespace) -> None:
    """Train, pack, export, measure and report."""
    require("tabulate", "tabulate")
    require("tqdm", "tqdm")
    if arguments.plot:
        require("matplotlib", "matplotlib")

    digits = load_digits(arguments.seed, arguments.device)
    test_images = len(digits.x_test)
    print(
        f"{len(digits.x_train)} training and {test_images} test images; "
        f"{HIDDEN_LAYERS} hidden layers of {arguments.hidden} x {arguments.hidden}",
        flush=True,
    )
    model, binary_training = train_from_seed(True, digits, arguments)
    twin, float_training = train_from_seed(False, digits, arguments)

    packed, fused, layers = pack_and_check(model, digits.x_test)
    print(f"\n{layers}\n\nThe packed model's logits are identical for all {test_images} test images.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.export or Path(folder) / "packed.pt2"
        export_and_check(packed, digits.x_test, path)
        print(f"So are those of the exported program, a file of {path.stat().st_size / 1e3:,.0f} kB.\n", flush=True)

    settings = {
        "epochs": arguments.epochs,
        "hidden": arguments.hidden,
        "hidden_layers": HIDDEN_LAYERS,
        "seed": arguments.seed,
    }
    training = {report.BINARY: binary_training, report.FLOAT: float_training}
    costs = measure(twin, model, packed, fused, digits.x_test)
    results = report.collect(settings, training, test_images, costs, environment(arguments.device))
    print(report.text(results))
    if arguments.plot:
        report.plot(arguments.plot, results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
