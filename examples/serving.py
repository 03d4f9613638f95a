"""Serve a packed model from several threads and print latency percentiles: python -m examples.serving.

The program does what a server does around a model: it loads a checkpoint, warms the model up, and lets worker threads
take single requests from a queue. Each worker computes with one torch thread, so that requests run side by side.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bitorch_qlinear import binarize, kernels, pack

FEATURES, CLASSES = 256, 10


def classifier(hidden: int, layers: int) -> nn.Sequential:
    """Build a float network of random weights, whose statistics fit its values."""
    modules: list[nn.Module] = [nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    for _ in range(layers):
        modules += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    model = nn.Sequential(*modules, nn.Linear(hidden, CLASSES))
    with torch.no_grad():
        for _ in range(20):  # in training mode this sets the running statistics
            model(torch.randn(64, FEATURES))
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    """Write a checkpoint of a packed model."""
    torch.save(model.state_dict(), path)


def load(path: Path, hidden: int, layers: int) -> nn.Module:
    """Build the packed model and load its checkpoint, as a process that has no float weights does."""
    model = pack(binarize(classifier(hidden, layers)), fuse=True)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def serve(model: nn.Module, requests: list[Tensor], workers: int) -> tuple[list[float], list[Tensor], float]:
    """Answer all requests.

    Args:
        model: The model, which all workers share.
        requests: Inputs, each of shape ``(1, features)``.
        workers: Number of threads.

    Returns:
        The latency of each request in seconds, its output, and the seconds that all took together.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    latencies, outputs = [0.0] * len(requests), [torch.empty(0)] * len(requests)

    def work() -> None:
        with torch.inference_mode():
            while True:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                start = time.perf_counter()
                outputs[number] = model(requests[number])
                latencies[number] = time.perf_counter() - start

    threads = [threading.Thread(target=work) for _ in range(workers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, outputs, time.perf_counter() - start


def percentiles(latencies: list[float]) -> str:
    """Return the 50th, 95th and 99th percentile in words."""
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return ", ".join(f"p{percent} {cuts[percent - 1] * 1e6:.0f} µs" for percent in (50, 95, 99))


def main(argv: Sequence[str] | None = None) -> None:
    """Save, load and serve a packed model and its float twin.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width of the layers (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="number of binary layers (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="number of requests (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of threads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    twin = classifier(arguments.hidden, arguments.layers)
    packed = pack(binarize(twin), fuse=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.pt"
        save(packed, path)
        print(f"checkpoint: {path.stat().st_size / 1000:.0f} kB, of {parameter_bytes(twin) / 1000:.0f} kB of float32")
        served = load(path, arguments.hidden, arguments.layers)

    requests = list(torch.randn(arguments.requests, 1, FEATURES))
    with torch.inference_mode():
        expected = [packed(request) for request in requests]
    for name, model in (("float32", twin), ("packed", served)):
        serve(model, requests[:50], arguments.workers)  # warm up: forms, limits and memory
        latencies, outputs, seconds = serve(model, requests, arguments.workers)
        rate = len(requests) / seconds
        print(f"{name}: {percentiles(latencies)}; {rate:.0f} requests a second with {arguments.workers} threads")
    same = all(map(torch.equal, outputs, expected))
    print(f"The served outputs are {'identical' if same else 'different'} (kernel {kernels.active()}).")


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


if __name__ == "__main__":
    main()
