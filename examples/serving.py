"""Serve a packed model from threads and from processes, and print latency percentiles: python -m examples.serving.

The program does what a server does around a model: it loads the file of a packed model, warms the model up, and lets
worker threads take single requests from a queue. All workers share the model. Each computes with one torch thread by
default, so that requests run side by side on cores of their own. More workers than cores wait for each other, which
shows in the highest percentiles. Python's lock is another limit: torch releases it in each operator, those of a packed
model take microseconds, and to hand the lock from thread to thread takes longer. So the program also measures a single
worker, and as many processes with a worker each.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor, nn

from bitorch_qlinear import binarize, pack
from examples.common import make_parser, setting, start
from examples.digits.model import check_equal, positive, predict
from examples.digits.report import tabulate

FEATURES, CLASSES = 256, 10
PERCENTILES = (50, 95, 99)
WARM_UP = 50
# A process that takes longer than this to import torch and to load the model has failed.
START_SECONDS = 300


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


def serve_alone(path: Path, threads: int, ready: Barrier, answers: SimpleQueue[list[float]]) -> None:
    """Load a packed model in a process of its own, and answer all requests by one worker when all are ready.

    Args:
        path: The file of the model, beside ``requests.pt``.
        threads: Number of torch's threads.
        ready: What the process waits at before it begins.
        answers: Gets the latencies.
    """
    torch.set_num_threads(threads)
    model, requests = load(path), list(torch.load(path.with_name("requests.pt")).split(1))
    serve(model, requests[:WARM_UP], 1)
    ready.wait(START_SECONDS)
    answers.put(serve(model, requests, 1)[0])


def serve_from_processes(path: Path, requests: list[Tensor], processes: int) -> tuple[list[float], float]:
    """Answer all requests in each of several processes, which load the same file.

    Args:
        path: The file of a packed model; ``requests.pt`` is written beside it.
        requests: Inputs, each of shape ``(1, features)``.
        processes: Number of processes.

    Returns:
        The latencies of all answers, and the seconds that they took together.
    """
    torch.save(torch.cat(requests), path.with_name("requests.pt"))
    # A forked process would share the state of torch's threads.
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(processes + 1), context.SimpleQueue()
    arguments = (path, torch.get_num_threads(), ready, answers)
    started = [context.Process(target=serve_alone, args=arguments, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    ready.wait(START_SECONDS)
    begin = time.perf_counter()
    latencies = [latency for _ in started for latency in answers.get()]
    seconds = time.perf_counter() - begin
    for process in started:
        process.join()
    return latencies, seconds


def percentiles(latencies: list[float]) -> list[float]:
    """Return the `PERCENTILES` of latencies."""
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in PERCENTILES]


def row(name: str, count: int, kind: str, latencies: list[float], rate: float) -> list[str]:
    """Return the printed row of a model that `count` workers or processes served.

    Args:
        name: Name of the model.
        count: Number of workers or processes.
        kind: "worker" or "process".
        latencies: The seconds of each answer.
        rate: Answers per second.
    """
    plural = {"worker": "workers", "process": "processes"}[kind] if count > 1 else kind
    return [f"{name}, {count} {plural}", *(f"{cut * 1e6:,.0f}" for cut in percentiles(latencies)), f"{rate:,.0f}"]


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
    parser = make_parser("serving", "Serve a packed model from threads and processes, and print latency percentiles.")
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the layers (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=3, help="number of binary layers (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=2000, help="number of requests (default: %(default)s)")
    parser.add_argument(
        "--workers", type=positive, default=min(2, cores), help="worker threads, then processes (default: %(default)s)"
    )
    arguments = start(parser, argv)
    twin = build_classifier(arguments.hidden, arguments.layers)
    saved = pack(binarize(twin), fuse=True)  # a real program trains the binary model before it packs it
    requests = list(torch.randn(arguments.requests, 1, FEATURES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.pt"
        torch.save(saved, path)
        print(f"file of the packed model: {path.stat().st_size / 1e3:,.0f} kB")
        print(f"parameters in float32: {parameter_bytes(twin) / 1e3:,.0f} kB")
        packed = load(path)
        print(f"{cores} cores, each worker: {setting()}; times in µs\n")
        rows = []
        for workers in sorted({1, arguments.workers}):
            measured = {}
            for name, served in (("float32", twin), ("packed", packed)):
                serve(served, requests[:WARM_UP], workers)  # makes prepared forms, limits and memory
                latencies, outputs, seconds = serve(served, requests, workers)
                measured[name] = [*percentiles(latencies), seconds]
                rows.append(row(name, workers, "worker", latencies, len(requests) / seconds))
            ratios = [slow / fast for slow, fast in zip(measured["float32"], measured["packed"], strict=True)]
            rows.append(["packed against float32", *(f"{ratio:.1f} ×" for ratio in ratios)])
        if arguments.workers > 1:
            latencies, seconds = serve_from_processes(path, requests, arguments.workers)
            rows.append(row("packed", arguments.workers, "process", latencies, len(latencies) / seconds))
    headers = ["", *(f"p{percent}" for percent in PERCENTILES), "requests per second"]
    print(tabulate(rows, headers), end="\n\n")
    for request, output in zip(requests, outputs, strict=True):
        check_equal(predict(saved, request), output, "the served model")
    print("The served outputs are identical to those of the model that was saved.")


if __name__ == "__main__":
    main()
