"""Serve a packed model from several threads and print latency percentiles: python -m examples.serving.

The program does what a server does around a model: it loads the file of a packed model, warms the model up, and lets
worker threads take single requests from a queue. All workers share the model. Each computes with one torch thread by
default, so that requests run side by side on cores of their own. More workers than cores wait for each other, which
shows in the highest percentiles. Python's lock is another limit, because only one worker at a time runs Python between
two operators, and those of a packed model are short. So the program also measures a single worker.
"""

from __future__ import annotations

import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bitorch_qlinear import binarize, pack
from examples.common import make_parser, setting, start
from examples.digits.model import check_equal, positive, predict
from examples.digits.report import tabulate

FEATURES, CLASSES = 256, 10
PERCENTILES = (50, 95, 99)


def build_classifier(hidden: int, layers: int) -> nn.Sequential:
    """Return a float network of random weights, whose running statistics fit its values."""
    modules: list[nn.Module] = [nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    for _ in range(layers):
        modules += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    model = nn.Sequential(*modules, nn.Linear(hidden, CLASSES))
    with torch.no_grad():
        for _ in range(20):  # in training mode this sets the running statistics
            model(torch.randn(64, FEATURES))
    return model.eval()


def load(path: Path) -> nn.Module:
    """Load a whole model from a file, without code that builds it and without running code from the file.

    torch.load accepts the classes of bitorch_qlinear once that is imported. It must be told of torch's own.
    """
    with torch.serialization.safe_globals([nn.BatchNorm1d, nn.Hardtanh, nn.Linear]):
        model: nn.Module = torch.load(path, weights_only=True)
    return model.eval()


def serve(model: nn.Module, requests: list[Tensor], workers: int) -> tuple[list[float], list[Tensor], float]:
    """Answer all requests.

    Args:
        model: The model, which all workers share.
        requests: Inputs, each of shape ``(1, features)``.
        workers: Number of threads.

    Returns:
        For each request the seconds from when a worker takes it to its answer, its output, and the seconds that all
        took together.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    latencies, outputs = [0.0] * len(requests), [torch.empty(0)] * len(requests)

    def work() -> None:
        with torch.inference_mode():  # the mode belongs to the thread
            while True:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                begin = time.perf_counter()
                outputs[number] = model(requests[number])
                latencies[number] = time.perf_counter() - begin

    threads = [threading.Thread(target=work) for _ in range(workers)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, outputs, time.perf_counter() - begin


def percentiles(latencies: list[float]) -> list[float]:
    """Return the `PERCENTILES` of latencies."""
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in PERCENTILES]


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    """Save, load and serve a packed model and its float twin.

    Args:
        argv: Arguments to use instead of the process's.

    Raises:
        RuntimeError: An output of the served model is not that of the model that was saved.
    """
    cores = len(os.sched_getaffinity(0))
    parser = make_parser("serving", "Serve a packed model from several threads, and print latency percentiles.")
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the layers (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=3, help="number of binary layers (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=2000, help="number of requests (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=min(2, cores), help="worker threads (default: %(default)s)")
    arguments = start(parser, argv)
    twin = build_classifier(arguments.hidden, arguments.layers)
    saved = pack(binarize(twin), fuse=True)  # a real program trains the binary model before it packs it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.pt"
        torch.save(saved, path)
        print(f"file of the packed model: {path.stat().st_size / 1e3:,.0f} kB")
        print(f"parameters in float32: {parameter_bytes(twin) / 1e3:,.0f} kB")
        packed = load(path)

    requests = list(torch.randn(arguments.requests, 1, FEATURES))
    print(f"{cores} cores, each worker: {setting()}; times in µs\n")
    rows = []
    for workers in sorted({1, arguments.workers}):
        measured = {}
        for name, served in (("float32", twin), ("packed", packed)):
            serve(served, requests[:50], workers)  # warms up: prepared forms, limits and memory
            latencies, outputs, seconds = serve(served, requests, workers)
            measured[name] = [*percentiles(latencies), seconds]
            shown = [f"{cut * 1e6:,.0f}" for cut in measured[name][:-1]]
            rows.append([f"{name}, {workers} worker{'s' * (workers > 1)}", *shown, f"{len(requests) / seconds:,.0f}"])
        ratios = [slow / fast for slow, fast in zip(measured["float32"], measured["packed"], strict=True)]
        rows.append(["packed against float32", *(f"{ratio:.1f} ×" for ratio in ratios)])
    headers = ["", *(f"p{percent}" for percent in PERCENTILES), "requests per second"]
    print(tabulate(rows, headers), end="\n\n")
    for request, output in zip(requests, outputs, strict=True):
        check_equal(predict(saved, request), output, "the served model")
    print("The served outputs are identical to those of the model that was saved.")


if __name__ == "__main__":
    main()
