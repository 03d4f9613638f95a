"""Trains, packs and times a binarized classifier of handwritten digits: ``python -m examples.digits``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bitorch_qlinear import PackedQLinear, QLinear, Report, __version__, explain, info, pack

__all__ = ["main"]

HIDDEN_LAYERS = 3
CLASSES = 10
# What the process holds of each hidden weight at most: the float32 values, their gradients, both of AdamW's averages,
# and the float32 twin.
BYTES_A_WEIGHT = 5 * 4
TRAINING_BATCH = 128
LEARNING_RATE = 1e-3
# Worth about one percent of test accuracy here: ±1 weights are quick to be too sure of 1300 images.
LABEL_SMOOTHING = 0.1

BATCHES = (1, 256)
ROUNDS = 15
# Long enough that starting the clock costs nothing, short enough that a neighbour's noise hits every model alike.
BLOCK_SECONDS = 0.02

FLOAT32, QLINEAR, PACKED = "float32 nn.Linear", "QLinear (eval)", "PackedQLinear"
# Okabe and Ito's colours, which colour-blind readers tell apart: grey, orange, blue.
COLOURS = {FLOAT32: "#999999", QLINEAR: "#E69F00", PACKED: "#0072B2"}

Costs = dict[str, dict[str, float]]
"""For each model its bytes and latencies, by names that end in the unit."""


class Digits(NamedTuple):
    """The images, one a row and scaled to [-1, 1], and their labels."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Curve(NamedTuple):
    """How the training went: one value an epoch.

    Attributes:
        loss: Mean cross entropy of the training images.
        test_accuracy: Share of the test images that are recognized.
    """

    loss: list[float]
    test_accuracy: list[float]


# ---- data, model, training ----


def require(module: str, package: str) -> Any:
    """Import a module that only the demo needs.

    Raises:
        SystemExit: It is missing; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"The demo needs {package} ({error}): pip install 'bitorch_qlinear[demo]'") from error


def progress_bar(steps: int, what: str, unit: str) -> Any:
    """A range with tqdm's progress bar."""
    return require("tqdm", "tqdm").tqdm(range(steps), desc=what, unit=unit)


def load_digits(seed: int, device: torch.device) -> Digits:
    """scikit-learn's bundled 8×8 handwritten digits, a quarter of each class kept for the test.

    Args:
        seed: Decides which.
        device: Where the tensors are put.
    """
    x, y = require("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    split = require("sklearn.model_selection", "scikit-learn").train_test_split
    x_train, x_test, y_train, y_test = split(x / 8 - 1, y, test_size=0.25, stratify=y, random_state=seed)
    images = [torch.tensor(part, dtype=torch.float32, device=device) for part in (x_train, x_test)]
    labels = [torch.tensor(part, device=device) for part in (y_train, y_test)]
    return Digits(images[0], labels[0], images[1], labels[1])


def build_model(features: int, hidden: int, binary: bool = True) -> nn.Sequential:
    """A classifier with real-valued first and last layers and hidden layers between BatchNorms.

    The sign in front of each product is the network's nonlinearity. The float32 twin has none: only its cost is
    compared, and a nonlinearity would add to it.

    Args:
        features: Values an image.
        hidden: Width.
        binary: Whether the hidden layers are QLinear, or nn.Linear.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(first=nn.Linear(features, hidden, bias=False))
    layers["norm0"] = nn.BatchNorm1d(hidden)
    for i in range(1, HIDDEN_LAYERS + 1):
        # No bias: the BatchNorm behind has one.
        layers[f"hidden{i}"] = (
            QLinear(hidden, hidden, bias=False, gradient_cancellation_threshold=1.0)
            if binary
            else nn.Linear(hidden, hidden, bias=False)
        )
        layers[f"norm{i}"] = nn.BatchNorm1d(hidden)
    layers["last"] = nn.Linear(hidden, CLASSES)
    return nn.Sequential(layers)


def hidden_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that differ between the three models."""
    return nn.ModuleList(layer for name, layer in model.named_children() if name.startswith("hidden"))


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a model in eval mode."""
    with torch.inference_mode():
        logits: Tensor = model.eval()(x)
    return logits


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are recognized."""
    return (predict(model, x).argmax(1) == y).float().mean().item()


def train(model: nn.Module, digits: Digits, epochs: int) -> Curve:
    """Train a model with AdamW and a learning rate of one cycle, showing progress.

    The test accuracy is looked at, never chosen by: the model of the last epoch is the result.

    Args:
        model: Changed in place; in eval mode afterwards.
        digits: The images.
        epochs: Passes over the training images.
    """
    steps = epochs * -(-len(digits.x_train) // TRAINING_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    curve = Curve([], [])
    with progress_bar(epochs, "training", "epoch") as progress:
        for _ in progress:
            curve.loss.append(train_epoch(model, digits, optimizer, schedule))
            curve.test_accuracy.append(accuracy(model, digits.x_test, digits.y_test))
            progress.set_postfix(loss=f"{curve.loss[-1]:.3f}", test_accuracy=f"{curve.test_accuracy[-1]:.1%}")
    return curve


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
    """Pack a model and compare its outputs.

    Args:
        model: The trained model; it is in eval mode afterwards.
        x: The images that both are asked about.

    Returns:
        The packed model, and what computes its binary layers.

    Raises:
        RuntimeError: A logit is not identical.
    """
    packed = pack(model.eval())
    expected, got = predict(model, x), predict(packed, x)
    if not torch.equal(expected, got):
        differing = int((expected != got).sum())
        raise RuntimeError(f"the packed model differs from the trained one in {differing} of {got.numel()} logits")
    return packed, explain(packed)


# ---- measuring ----


def checkpoint_bytes(module: nn.Module, folder: Path) -> int:
    """The size of a module's state_dict on disk."""
    path = folder / "checkpoint.pt"
    torch.save(module.state_dict(), path)
    return path.stat().st_size


def resident_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters, buffers, and the prepared forms of packed weights."""
    tensors: list[Tensor | None] = [*module.parameters(), *module.buffers()]
    tensors += [layer.weight_prepared for layer in module.modules() if isinstance(layer, PackedQLinear)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_sizes(models: dict[str, nn.Module]) -> Costs:
    """The bytes of each model, on disk and in memory."""
    costs: Costs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            parts = {"hidden": hidden_layers(model), "model": model}
            costs[name] = {f"checkpoint_{part}_bytes": checkpoint_bytes(parts[part], Path(folder)) for part in parts}
            costs[name] |= {f"resident_{part}_bytes": resident_bytes(parts[part]) for part in parts}
    return costs


def measure_latencies(models: dict[str, nn.Module], images: Tensor, features: Tensor) -> Costs:
    """The median latency of one hidden layer and of the whole model, for each of `BATCHES`.

    Each round times all of them once, so that whatever else the machine does slows all of them alike. The median over
    the rounds leaves the outliers out.

    Args:
        models: By name, in eval mode.
        images: The models' input, at least as many as the largest batch.
        features: The layers' input, as many.
    """
    timers: dict[tuple[str, str], tuple[Timer, int]] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        # The table shows what this warns of.
        warnings.filterwarnings("ignore", message="bitorch_qlinear: a QLinear packs its weights")
        for batch in BATCHES:
            for name, model in models.items():
                layer = hidden_layers(model)[0]
                timers[name, f"latency_layer_batch{batch}_s"] = calibrated_timer(layer, features[:batch])
                timers[name, f"latency_model_batch{batch}_s"] = calibrated_timer(model, images[:batch])
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
        for _ in progress_bar(ROUNDS, "timing", "round"):
            for key, (timer, runs) in timers.items():
                seconds[key].append(timer.timeit(runs).median)
    costs: Costs = {name: {} for name in models}
    for (name, metric), values in seconds.items():
        costs[name][metric] = statistics.median(values)
    return costs


def calibrated_timer(module: nn.Module, x: Tensor) -> tuple[Timer, int]:
    """A timer of ``module(x)`` with torch's own number of threads, and how many runs make a block."""
    timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
    timer.timeit(1)  # what is prepared or allocated once
    return timer, max(1, round(BLOCK_SECONDS / timer.timeit(3).median))


def measure(model: nn.Module, packed: nn.Module, images: Tensor) -> Costs:
    """The bytes and latencies of the trained model, the packed one and a float32 twin.

    Args:
        model: The trained model, in eval mode.
        packed: The same, packed.
        images: At least as many as the largest of `BATCHES`.
    """
    hidden = hidden_layers(model)[0].in_features
    assert isinstance(hidden, int)
    twin = build_model(images.shape[1], hidden, binary=False).to(images.device).eval()
    models = {FLOAT32: twin, QLINEAR: model, PACKED: packed}
    features = torch.randn(len(images), hidden).to(images.device)
    sizes, latencies = measure_sizes(models), measure_latencies(models, images, features)
    return {name: sizes[name] | latencies[name] for name in models}


def processor_name() -> str:
    """The processor as the system names it, with its family and model: a virtual machine may hide the rest."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def kernel_name(device: torch.device) -> str:
    """The kernel that computes the packed products on a device."""
    kernel = {"cpu": info().kernel, "cuda": info().cuda_kernel}.get(device.type, "none")
    return "none, computed in float" if kernel == "none" else kernel


def environment(device: torch.device) -> dict[str, str | int]:
    """What a measurement depends on."""
    return {
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu_capability": info().cpu_capability,
        "kernel": kernel_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bitorch_qlinear": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# ---- reporting ----


def table(costs: Costs, columns: dict[str, str], unit: float) -> str:
    """A table of some costs, a row each model; in brackets how many times less than float32.

    Args:
        costs: All of them.
        columns: Header by name of the cost.
        unit: What one shown unit is in bytes or seconds.
    """

    def cell(model: str, metric: str) -> str:
        value, reference = costs[model][metric], costs[FLOAT32][metric]
        shown = f"{value / unit:,.0f}" if value >= 10 * unit else f"{value / unit:.1f}"
        return shown if model == FLOAT32 else f"{shown} ({reference / value:.3g}×)"

    rows = [[model, *(cell(model, metric) for metric in columns)] for model in costs]
    text: str = require("tabulate", "tabulate").tabulate(
        rows, headers=["", *columns.values()], disable_numparse=True, colalign=["left"] + ["right"] * len(columns)
    )
    return text


def report(costs: Costs, where: dict[str, str | int]) -> str:
    """Both tables, and where they were measured."""
    sizes = {
        f"{kind}_{part}_bytes": f"{kind}\n{name}\n[kB]"
        for kind in ("checkpoint", "resident")
        for part, name in (("hidden", "hidden layers"), ("model", "whole model"))
    }
    latencies = {
        f"latency_{part}_batch{batch}_s": f"{name}\nbatch {batch}\n[µs]"
        for part, name in (("layer", "one layer"), ("model", "whole model"))
        for batch in BATCHES
    }
    return (
        f"Size of the weights (×: times smaller than float32; 1 kB = 1000 bytes)\n\n{table(costs, sizes, 1e3)}\n\n"
        "Median latency of one hidden layer and of the whole model (×: times faster than float32)\n\n"
        f"{table(costs, latencies, 1e-6)}\n\n"
        f"{where['processor']}, {where['cpu_capability']}; kernel: {where['kernel']}; device: {where['device']}; "
        f"threads: {where['threads']}; torch {where['torch']}"
    )


def plot(path: Path, curve: Curve, costs: Costs, where: dict[str, str | int]) -> None:
    """Draw the training curve and the latencies into a PNG."""
    require("matplotlib", "matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot", "matplotlib")
    figure = pyplot.figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7], wspace=0.03)
    plot_curve(left, curve)
    plot_latencies(right, costs, f"{where['processor']}, kernel {where['kernel']}, {where['threads']} threads")
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def plot_curve(figure: Any, curve: Curve) -> None:
    """Loss above test accuracy: two scales want two axes."""
    figure.suptitle("Training", fontweight="bold")
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = range(1, len(curve.loss) + 1)
    percent = [100 * value for value in curve.test_accuracy]
    above.plot(epochs, curve.loss, "o-", color="#D55E00", markersize=4)
    above.set_ylabel("training loss")
    below.plot(epochs, percent, "o-", color=COLOURS[PACKED], markersize=4)
    below.set_ylabel("test accuracy [%]")
    below.set_xlabel("epoch")
    below.set_title(f"{percent[-1]:.1f} % after epoch {len(percent)}", fontsize=10, loc="right")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def plot_latencies(figure: Any, costs: Costs, subtitle: str) -> None:
    """Bars from zero, an axis for each pair of batch and part: their lengths compare as the times do."""
    figure.suptitle("Median latency (shorter is better)", fontweight="bold")
    grid = figure.subplots(2, len(BATCHES), sharey=True)
    for row, (part, title) in zip(grid, (("layer", "one hidden layer"), ("model", "whole model")), strict=True):
        for axes, batch in zip(row, BATCHES, strict=True):
            metric = f"latency_{part}_batch{batch}_s"
            values = {model: 1e3 * costs[model][metric] for model in costs}
            bars = axes.barh(list(values), list(values.values()), color=[COLOURS[model] for model in values])
            labels = [latency_label(value, values[FLOAT32]) for value in values.values()]
            axes.bar_label(bars, labels, padding=4)
            axes.set_title(f"{title}, batch {batch}", fontsize=10)
            axes.set_xlim(0, 1.35 * max(values.values()))  # room for the labels
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("ms")
    grid[0][0].invert_yaxis()  # shared: float32 on top everywhere
    figure.supxlabel(f"{subtitle}; ×: times faster than float32", fontsize=8)


def latency_label(value: float, reference: float) -> str:
    """A bar's milliseconds, and how they compare with float32's."""
    return f"{value:.3g} ms" + ("" if value == reference else f" ({reference / value:.3g}×)")


def write_json(
    arguments: argparse.Namespace, curve: Curve, seconds: float, costs: Costs, where: dict[str, str | int]
) -> None:
    """Write what was asked, what was measured, and where."""
    results = {
        "environment": where,
        "settings": {
            "epochs": arguments.epochs,
            "hidden": arguments.hidden,
            "hidden_layers": HIDDEN_LAYERS,
            "seed": arguments.seed,
        },
        "training": {**curve._asdict(), "seconds": seconds},
        "test_accuracy": curve.test_accuracy[-1],
        "identical_predictions": True,  # pack_and_check raises otherwise
        "models": costs,
    }
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")


# ---- command line ----


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what would fail only after the training."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a binarized classifier of handwritten digits, pack it, and compare size and speed with "
        "float32.",
    )
    parser.add_argument(
        "--epochs", type=positive, default=12, help="passes over the training images (default: %(default)s)"
    )
    parser.add_argument(
        "--hidden",
        type=positive,
        default=2048,
        help=f"width of the {HIDDEN_LAYERS} binarized layers (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="decides the split, the initialisation and the order (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train and measure (default: the GPU that torch can use, else the CPU; here %(default)s)",
    )
    parser.add_argument("--plot", type=writable, metavar="PATH", help="write training curve and latencies as a PNG")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write all measured numbers, and where from")
    arguments = parser.parse_args(argv)
    needed, there = HIDDEN_LAYERS * arguments.hidden**2 * BYTES_A_WEIGHT, memory_bytes(arguments.device)
    if needed > there:
        parser.error(
            f"argument --hidden: expected a width whose weights fit into memory, got {arguments.hidden}, which needs "
            f"about {needed / 1e9:,.0f} GB of the {there / 1e9:,.1f} GB of {arguments.device}"
        )
    return arguments


def memory_bytes(device: torch.device) -> int:
    """The memory of a device, whoever uses it now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def seed_number(text: str) -> int:
    """A seed that both torch and scikit-learn take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    """The path of a file whose folder exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a file in an existing folder, got {text!r}")
    return path


def usable_device(text: str) -> torch.device:
    """A device that computes here; torch's own errors fill a page."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} cannot compute on {text!r} here") from error
    return torch.device(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        argv: The command line's arguments; those of the process if None.

    Raises:
        SystemExit: A wrong argument, a missing package, or Ctrl-C.
        RuntimeError: The packed model computes something else.
    """
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None  # the shell's exit code of a program that Ctrl-C ended


def run(arguments: argparse.Namespace) -> None:
    """Train, pack, measure and report."""
    require("tabulate", "tabulate")
    require("tqdm", "tqdm")
    if arguments.plot:
        require("matplotlib", "matplotlib")

    digits = load_digits(arguments.seed, arguments.device)
    torch.manual_seed(arguments.seed)
    model = build_model(digits.x_train.shape[1], arguments.hidden).to(arguments.device)
    print(
        f"{len(digits.x_train)} training and {len(digits.x_test)} test images; "
        f"{HIDDEN_LAYERS} hidden QLinear of {arguments.hidden} x {arguments.hidden}\n"
    )
    start = time.perf_counter()
    curve = train(model, digits, arguments.epochs)
    seconds = time.perf_counter() - start
    print(f"test accuracy {curve.test_accuracy[-1]:.2%} after {seconds:.0f} s of training\n")

    packed, layers = pack_and_check(model, digits.x_test)
    print(f"{layers}\n\nThe packed model's logits are identical for all {len(digits.x_test)} test images.\n")

    costs = measure(model, packed, digits.x_test)
    where = environment(arguments.device)
    print(f"\n{report(costs, where)}")
    if arguments.plot:
        plot(arguments.plot, curve, costs, where)
    if arguments.json:
        write_json(arguments, curve, seconds, costs, where)


if __name__ == "__main__":
    main()
