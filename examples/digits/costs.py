"""What each model costs: bytes on disk and in memory, latencies, and the machine that they were measured on."""

from __future__ import annotations

import datetime
import platform
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from bitorch_qlinear import PackedQLinear, __version__, info

from .model import hidden_layers, progress_bar

__all__ = ["BATCHES", "FLOAT32", "FUSED", "PACKED", "QLINEAR", "Costs", "environment", "measure", "resident_bytes"]

BATCHES = (1, 256)
ROUNDS = 15
# A block this long hides the cost of starting the clock, and is short enough that a busy moment of the machine slows
# every model alike.
BLOCK_SECONDS = 0.02

FLOAT32, QLINEAR, PACKED, FUSED = "float32 nn.Linear", "QLinear (eval)", "PackedQLinear", "FusedSequential"

Costs = dict[str, dict[str, float]]
"""Bytes and latencies of each model. Their names end in the unit."""


def checkpoint_bytes(module: nn.Module, folder: Path) -> int:
    """Return the size of the file that torch.save makes of a module's state_dict; it is written into `folder`."""
    path = folder / "checkpoint.pt"
    torch.save(module.state_dict(), path)
    return path.stat().st_size


def resident_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, its buffers and the prepared forms of its packed weights.

    A fused model's limits and the record of what they were computed from are not counted: some 20 bytes for each output
    of a packed layer.
    """
    tensors: list[Tensor | None] = [*module.parameters(), *module.buffers()]
    tensors += [layer.weight_prepared for layer in module.modules() if isinstance(layer, PackedQLinear)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_sizes(models: dict[str, nn.Module]) -> Costs:
    """Return the bytes of each model and of its hidden layers, on disk and in memory."""
    costs: Costs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            parts = {"hidden": hidden_layers(model), "model": model}
            costs[name] = {f"checkpoint_{part}_bytes": checkpoint_bytes(parts[part], Path(folder)) for part in parts}
            costs[name] |= {f"resident_{part}_bytes": resident_bytes(parts[part]) for part in parts}
    return costs


def measure_latencies(models: dict[str, nn.Module], images: Tensor, features: Tensor) -> Costs:
    """Return the median latency of one hidden layer (not of the fused model) and of each model, for each of `BATCHES`.

    Each round times every model once, so that other work on the machine slows all of them alike. The median over the
    rounds ignores outliers.

    Args:
        models: The models by name, in eval mode.
        images: Input of the models; at least as many rows as the largest batch.
        features: Input of the hidden layers; at least as many rows as the largest batch.
    """
    timers: dict[tuple[str, str], tuple[Timer, int]] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        # A QLinear that packs its weights in every call is one of the things that are timed here.
        warnings.filterwarnings("ignore", message="bitorch_qlinear: a QLinear packs its weights")
        for batch in BATCHES:
            for name, model in models.items():
                if name != FUSED:  # a single layer of a fused model is a PackedQLinear
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
    """Return a timer of ``module(x)`` with torch's own number of threads, and the number of runs in a block."""
    timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
    timer.timeit(2)  # the first calls prepare weights, compute limits and allocate memory
    return timer, max(1, round(BLOCK_SECONDS / timer.timeit(3).median))


def measure(twin: nn.Module, model: nn.Module, packed: nn.Module, fused: nn.Module, images: Tensor) -> Costs:
    """Return the bytes and latencies of the float32 twin, the binary model and its packed forms.

    Args:
        twin: The float32 network, in eval mode.
        model: The binary network, in eval mode.
        packed: The packed binary network.
        fused: The same, packed with ``fuse=True``.
        images: At least as many images as the largest of `BATCHES`.
    """
    models = {FLOAT32: twin, QLINEAR: model, PACKED: packed, FUSED: fused}
    hidden = hidden_layers(model)[0].in_features
    assert isinstance(hidden, int)
    features = torch.randn(len(images), hidden).to(images.device)
    sizes, latencies = measure_sizes(models), measure_latencies(models, images, features)
    return {name: sizes[name] | latencies[name] for name in models}


def processor_name() -> str:
    """Return the processor's name as the system gives it, with family and model where /proc/cpuinfo has them.

    The name alone is not enough because a virtual machine may hide the exact processor behind a general name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def kernel_name(device: torch.device) -> str:
    """Return the name of the kernel that computes packed products on a device."""
    kernel = {"cpu": info().kernel, "cuda": info().cuda_kernel}.get(device.type, "none")
    return "none, computed in float" if kernel == "none" else kernel


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what a measurement depends on: processor, device, kernel, threads, versions and date."""
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
