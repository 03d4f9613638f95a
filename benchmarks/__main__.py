"""Times QLinear and PackedQLinear against nn.Linear (and bitorch's QLinear where it is installed).

All layers compute float32 in and out with bias; packing of the input is inside the time, that of the weights is not
(eval mode caches it). The layers take turns, so that a busy neighbour hits all alike; ratios are of medians.

``python -m benchmarks gpu`` times the CUDA kernels instead (see benchmarks/gpu.py).
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from bitorch_qlinear import PackedQLinear, QLinear
from bitorch_qlinear.demo import environment

HERE = Path(__file__).parent
# By the first word of the command line; without one, the layers on the CPU.
OTHERS = {"gpu": "benchmarks.gpu", "gpu-model": "benchmarks.gpu_model"}


def layers(k: int, n: int) -> dict[str, nn.Module]:
    """The contestants at one size, all in eval mode and with the same weights; nn.Linear is the baseline."""
    linear = nn.Linear(k, n)
    binary = QLinear.from_linear(linear)
    made = {"nn.Linear": linear, "QLinear": binary, "PackedQLinear": PackedQLinear.from_float(binary)}
    try:
        from bitorch.layers import QLinear as BitorchQLinear
    except ImportError:
        print("absent: bitorch")
    else:
        made["bitorch QLinear"] = BitorchQLinear(k, n)
    return {name: layer.eval() for name, layer in made.items()}


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, measured in turns after a warm-up."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in contestants.items()}
    # Enough calls a turn for the clock, and no more: about 2 ms.
    calls = {name: max(1, round(2e-3 / timer.timeit(3).mean)) for name, timer in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(calls[name]).mean)
    return seconds


def evaluation(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def training(layer: nn.Module, x: Tensor, grad: Tensor, backward: bool) -> Callable[[], object]:
    """A forward with gradients, or a whole step: forward and all gradients."""
    x = x.clone().requires_grad_()

    def call() -> None:
        y = layer(x)
        if backward:
            torch.autograd.grad(y, [x, *layer.parameters()], grad)

    return call


def measure(m: int, k: int, n: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Quartiles of the seconds a call, by mode and layer."""
    made, x, grad = layers(k, n), torch.randn(m, k), torch.randn(m, n)
    trained = {name: layer for name, layer in made.items() if name != "PackedQLinear"}
    modes = {
        "eval": interleaved({name: evaluation(layer, x) for name, layer in made.items()}, rounds),
        "training forward": interleaved(
            {name: training(layer.train(), x, grad, False) for name, layer in trained.items()}, rounds
        ),
        "training step": interleaved(
            {name: training(layer.train(), x, grad, True) for name, layer in trained.items()}, rounds
        ),
    }
    return {
        mode: {name: statistics.quantiles(seconds, n=4) for name, seconds in times.items()}
        for mode, times in modes.items()
    }


def main() -> None:
    if other := OTHERS.get("".join(sys.argv[1:2])):
        importlib.import_module(other).main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each layer (15)")
    with (HERE / "shapes.csv").open() as file:
        shapes = list(csv.DictReader(file))
    parser.add_argument("--only", choices=[shape["name"] for shape in shapes], help="one shape of shapes.csv")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    shapes = [shape for shape in shapes if options.only in (None, shape["name"])]
    results = []
    for shape in tqdm(shapes, leave=False):
        m, k, n = int(shape["m"]), int(shape["k"]), int(shape["n"])
        quartiles = measure(m, k, n, options.rounds)
        results.append({"name": shape["name"], "m": m, "k": k, "n": n, "seconds_quartiles": quartiles})
    setting = environment(torch.device("cpu"))
    print_table(results)
    print(", ".join(f"{name}: {value}" for name, value in setting.items()))
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")


def print_table(results: list[dict]) -> None:
    """Medians in microseconds, and how many times faster than nn.Linear each layer is."""
    names = ["nn.Linear", "QLinear", "PackedQLinear", "bitorch QLinear"]
    rows = []
    for result in results:
        for mode, times in result["seconds_quartiles"].items():
            median = {name: quartiles[1] for name, quartiles in times.items()}
            cells = [
                f"{median[name] * 1e6:.1f} ({median['nn.Linear'] / median[name]:.2f} x)" if name in median else ""
                for name in names
            ]
            rows.append([f"{result['m']} x {result['k']} -> {result['n']}", mode, *cells])
    print(tabulate(rows, headers=["shape", "mode", *(f"{name}, us" for name in names)], disable_numparse=True))


if __name__ == "__main__":
    main()
