"""Times training on the CPU: ``python -m benchmarks train``.

A step is a forward and all gradients of a float32 layer with bias. QLinear has a gradient threshold of 1.0, like
bitorch's layer. The saved bytes are what the forward keeps for the backward, without the parameters. ``--run`` trains a
wide version of the demo's network instead, once with QLinear and once with bitorch's, until each recognizes a given
share of the test images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from bitorch_qlinear import QLinear
from examples.digits import model as demo

from .measuring import (
    ROUNDS,
    THREADS,
    TURNS,
    Call,
    Shape,
    Times,
    at_least,
    describe,
    interleaved,
    median,
    microseconds,
    named,
    prepare,
    ratio,
    setting,
    spread,
    write_json,
)
from .peers import BITORCH, LINEAR, QLINEAR, bitorch_layer

NAMES = [LINEAR, QLINEAR, BITORCH]
# The names of shapes in shapes.csv.
STEPS = ["large batch", "medium batch", "small batch", "one row", "odd sizes", "64 cubed", "BERT-base attention"]
QUICK = ["large batch", "medium batch", "small batch", "one row", "64 cubed"]
MOST_EPOCHS = 12


def layers(shape: Shape, names: Collection[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return layers in training mode, and why others are absent."""
    linear = nn.Linear(shape.k, shape.n)
    made: dict[str, nn.Module] = {
        LINEAR: linear,
        QLINEAR: QLinear.from_linear(linear, gradient_cancellation_threshold=1.0),
    }
    absent = {}
    try:
        made[BITORCH] = bitorch_layer(shape, torch.float32)
    except ImportError as error:
        absent[BITORCH] = str(error)
    return {name: made[name].train() for name in names if name in made}, absent


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Call:
    """Return a call that computes a forward and all gradients."""
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


def step_times(shape: Shape, rounds: int, names: Collection[str]) -> tuple[Times, dict[str, str]]:
    made, absent = layers(shape, names)
    x, gradient = torch.randn(shape.m, shape.k), torch.randn(shape.m, shape.n)
    return interleaved({name: step(layer, x, gradient) for name, layer in made.items()}, rounds), absent


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes that a forward keeps for the backward, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x.clone().requires_grad_())
    del y
    return sum(kept.values())


def measure(shapes: list[Shape], rounds: int, names: Collection[str] = tuple(NAMES)) -> dict[str, Any]:
    """Time a step and count the saved bytes for each shape and layer."""
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for shape in tqdm(shapes, leave=False, unit="shape"):
        times, missing = step_times(shape, rounds, names)
        absent |= missing
        made, _ = layers(shape, names)
        saved = {name: saved_bytes(layer, torch.randn(shape.m, shape.k)) for name, layer in made.items()}
        results.append({**shape.fields(), "seconds_quartiles": times, "saved_bytes": saved})
    return {"results": results, "absent": absent}


# ---- a whole run -----------------------------------------------------------------------------------


def network(features: int, hidden: int, name: str) -> nn.Module:
    """Return the demo's network with hidden layers of one kind or the other, initialized with the same numbers."""
    torch.manual_seed(0)
    model = demo.build_model(features, hidden)
    if name == BITORCH:
        from bitorch.layers import QLinear as BitorchQLinear

        for child, layer in list(model.named_children()):
            if isinstance(layer, QLinear):
                other = BitorchQLinear(hidden, hidden, bias=False, gradient_cancellation_threshold=1.0)
                other.load_state_dict(layer.state_dict())
                setattr(model, child, other)
    torch.manual_seed(0)  # bitorch's layers drew numbers; this gives both runs the same batches.
    return model


def train_until(name: str, hidden: int, accuracy: float, most_epochs: int) -> dict[str, Any]:
    """Train until the accuracy is reached; return the seconds (evaluations included), the epochs and the accuracy."""
    digits = demo.load_digits(0, torch.device("cpu"))
    model = network(digits.x_train.shape[1], hidden, name)
    batches = -(-len(digits.x_train) // demo.TRAINING_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, demo.LEARNING_RATE, total_steps=most_epochs * batches)
    start, reached, epochs = time.perf_counter(), 0.0, 0
    for _ in tqdm(range(most_epochs), desc=name, leave=False, unit="epoch"):
        demo.train_epoch(model, digits, optimizer, schedule)
        epochs, reached = epochs + 1, demo.accuracy(model, digits.x_test, digits.y_test)
        if reached >= accuracy:
            break
    return {"seconds": time.perf_counter() - start, "epochs": epochs, "test_accuracy": reached}


def train_both(hidden: int, accuracy: float) -> dict[str, Any]:
    """Train with each of the two layers, one run after the other."""
    runs: dict[str, Any] = {}
    for name in (QLINEAR, BITORCH):
        try:
            runs[name] = train_until(name, hidden, accuracy, MOST_EPOCHS)
        except ImportError as error:
            runs[name] = {"absent": str(error)}
    return {"hidden": hidden, "wanted_accuracy": accuracy, "runs": runs}


# ---- report ----------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], style: str = "simple") -> str:
    """Return a table of nn.Linear's times, the others' ratios and the bytes saved by all."""
    present = [name for name in NAMES if any(name in result["seconds_quartiles"] for result in results)]
    rows = []
    for result in results:
        times, saved = result["seconds_quartiles"], result["saved_bytes"]
        cells = [f"{microseconds(median(times, LINEAR))} {spread(times, LINEAR)}"]
        cells += [f"{ratio(times, LINEAR, name):.2f} {spread(times, name)}" for name in present[1:]]
        rows.append([str(Shape.of(result)), *cells, *(f"{saved[name] / 1000:,.1f}" for name in present)])
    headers = ["training step", f"{LINEAR}, µs", *(f"{name}, ×" for name in present[1:])]
    headers += [f"{name}, kB saved" for name in present]
    text: str = tabulate(
        rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )
    return text


def report(figures: dict[str, Any]) -> str:
    """Return the results of the steps, as text."""
    absent = [f"absent: {name}: {why}" for name, why in figures["absent"].items()]
    return "\n".join([table(figures["results"]), *absent])


def run_table(run: dict[str, Any], style: str = "simple") -> str:
    """Return a table of both runs to the same accuracy."""
    rows = []
    for name, result in run["runs"].items():
        if "absent" in result:
            rows.append([name, f"absent: {result['absent']}", "", ""])
            continue
        missed = "" if result["test_accuracy"] >= run["wanted_accuracy"] else ", not reached"
        rows.append(
            [name, f"{result['seconds']:.1f} s", str(result["epochs"]), f"{result['test_accuracy']:.2%}{missed}"]
        )
    headers = [f"the demo's network, {run['hidden']} wide", "training", "epochs", "test accuracy"]
    text: str = tabulate(
        rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=["left"] + ["right"] * 3
    )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=THREADS, default=1, help="torch's threads (1)")
    parser.add_argument("--rounds", type=TURNS, default=ROUNDS, help=f"the turns of each layer ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="time a selection of the shapes")
    parser.add_argument("--only", choices=STEPS, metavar="NAME", help="time one shape of shapes.csv")
    parser.add_argument("--run", action="store_true", help="train the demo's network instead, which takes minutes")
    parser.add_argument("--hidden", type=at_least(1), default=4096, help="its width (4096)")
    parser.add_argument(
        "--accuracy", type=float, default=0.97, help="the share of the test images at which a run ends (0.97)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(options.threads)
    where = setting()
    if options.run:
        figures = {"run": train_both(options.hidden, options.accuracy)}
        print(run_table(figures["run"]))
    else:
        figures = measure(named([options.only] if options.only else QUICK if options.quick else STEPS), options.rounds)
        print(report(figures))
    print(describe(where))
    if options.json:
        write_json(options.json, figures | {"setting": where})
