"""Times the CUDA kernels on the GPU that is here, against what torch has: ``python -m benchmarks gpu``.

CUDA events around replays of CUDA graphs, medians of many. A contestant is timed

cold   one call a replay, the graph's own start with it, behind a flush of the L2 cache, which is not timed
warm   many calls a replay, over the same data
chain  a replay of calls with weights of their own, together more than the L2 cache holds: a layer in a model

and all on the same random values, in one process. Before anything is timed the exact kernels are compared with each
other. Nothing has a bias; bf16 results, unless a name says int32. PackedQLinear passes no prepared weights to the
operators on CUDA, the other rows of ours do. Missing peers are listed; failures are reported at the end and make the
exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bitorch_qlinear import PackedQLinear, QLinear, _kernels, _library
from bitorch_qlinear import functional as F
from bitorch_qlinear.kernels import forced
from examples.digits.costs import environment

from .sanitize import find_tool

Call = Callable[[], Any]
Timer = Callable[[list[Call], bool], list[float]]  # of the calls of one graph, flushed or not: seconds of one call each

BF16, FP16 = "nn.Linear bf16", "nn.Linear fp16"
FP8, INT8 = "torch._scaled_mm fp8", "torch._int_mm int8, int32 out"
BITORCH = "bitorch QLinear bf16"
PACKED, PACKED_INT, PACKING = "packed x", "packed x, int32 out", "bf16 x, packed inside"
LAYER = "PackedQLinear, bf16 x"
COLD, WARM, CHAIN = "cold", "warm", "chain"


class Shape(NamedTuple):
    """y[m][n] of a product over k."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m} × {self.k} → {self.n}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k


LARGE, MEDIUM = Shape(8192, 8192, 8192), Shape(4096, 4096, 4096)
ROW, ROWS = Shape(1, 8192, 8192), Shape(16, 8192, 8192)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 512]
WEIGHTS = [(8192, 8192), (4096, 4096), (256, 65536), (4096, 4097)]  # the last two: split over k, and aligned nowhere
# Those of the targets first: where time runs out, the others are missing.
SHAPES = list(dict.fromkeys([LARGE, MEDIUM, ROW, ROWS, *(Shape(m, n, k) for n, k in WEIGHTS for m in BATCHES)]))


# ---- time ------------------------------------------------------------------------------------------


class GraphTimer:
    """Seconds of a call, by CUDA events around replays of a graph."""

    SECONDS = 0.04  # of replays for one median
    LEAST, MOST = 15, 200  # replays
    FLUSH = 3  # times the L2 cache

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.written, self.read = (torch.zeros(self.FLUSH * cache // 4, device="cuda") for _ in range(2))
        self.total = torch.zeros((), device="cuda")

    def flush(self) -> None:
        """Fill the L2 cache with what nobody needs, and last with lines that are read only.

        Of written ones, what is timed next would pay for the way to memory.
        """
        self.written.fill_(1.0)
        torch.sum(self.read, 0, out=self.total)

    def capture(self, calls: list[Call]) -> torch.cuda.CUDAGraph:
        """A graph of all calls, each called before: libraries make workspaces and choose algorithms then."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph, rounds: int, flush: bool) -> list[float]:
        """Seconds of each replay. The flush also lets the host run ahead, so that no launch is waited for."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in events:
            if flush:
                self.flush()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def __call__(self, calls: list[Call], flush: bool) -> list[float]:
        graph = self.capture(calls)
        pilot = statistics.median(self.replay(graph, 3, flush))
        rounds = min(self.MOST, max(self.LEAST, round(self.SECONDS / max(pilot, 1e-9))))
        return [seconds / len(calls) for seconds in self.replay(graph, rounds, flush)]


def quartiles(seconds: list[float]) -> list[float]:
    """The quartiles of one or more measurements: the median is in the middle."""
    return statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3


# ---- contestants -----------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """One way to compute a product.

    Attributes:
        name: Of the row.
        make: Makes operands of its own, and returns the call.
        bytes: The least that a call moves: operands read once, the result written once.
        weight_bytes: Those of the weights.
        kernel: The CUDA kernel that is forced, or None.
    """

    name: str
    make: Callable[[], Call]
    bytes: int
    weight_bytes: int
    kernel: str | None = None


def random_rows(rows: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, k, device=device, dtype=dtype)


def peers(shape: Shape, device: torch.device) -> list[Contestant]:
    """The contestants of torch and of others."""
    m, n, k = shape

    def linear(dtype: torch.dtype) -> Call:
        x, w = random_rows(m, k, device, dtype), random_rows(n, k, device, dtype)
        return lambda: torch.nn.functional.linear(x, w)

    def scaled() -> Call:
        x, w = (random_rows(rows, k, device).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device=device)
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, **options)

    def integer() -> Call:
        x, w = (random_rows(rows, k, device).sign().to(torch.int8) for rows in (m, n))
        return lambda: torch._int_mm(x, w.t())

    def bitorch() -> Call:
        from bitorch.layers import QLinear as BitorchQLinear

        layer = BitorchQLinear(k, n, bias=False).to(device, torch.bfloat16).eval()
        x = random_rows(m, k, device)
        return torch.no_grad()(lambda: layer(x))

    def moved(operand_bytes: int, result_bytes: int) -> int:
        return (m + n) * k * operand_bytes + m * n * result_bytes

    return [
        Contestant(BF16, lambda: linear(torch.bfloat16), moved(2, 2), 2 * n * k),
        Contestant(FP16, lambda: linear(torch.float16), moved(2, 2), 2 * n * k),
        Contestant(FP8, scaled, moved(1, 2), n * k),
        Contestant(INT8, integer, moved(1, 4), n * k),
        Contestant(BITORCH, bitorch, moved(2, 2), 2 * n * k),
    ]


def ours(shape: Shape, device: torch.device) -> list[Contestant]:
    """Packing inside and outside of the call, the automatic choice and every kernel that takes the shape."""
    m, n, k = shape
    row_bytes = 4 * math.ceil(k / 32)

    def weights() -> tuple[Tensor, Tensor]:
        words = F.pack_bits(random_rows(n, k, device))
        return words, F.prepare_weight(words, k)

    def packed(out: torch.dtype) -> Call:
        x, (words, prepared) = F.pack_bits(random_rows(m, k, device)), weights()
        return lambda: F.binary_linear(x, words, k, weight_prepared=prepared, out_dtype=out)

    def packing() -> Call:
        x, (words, prepared) = random_rows(m, k, device), weights()
        return lambda: F.linear(x, words, k, weight_prepared=prepared)

    def layer() -> Call:
        x, binary = random_rows(m, k, device), PackedQLinear(k, n, bias=False, device=device, dtype=torch.bfloat16)
        binary.weight.copy_(F.pack_bits(random_rows(n, k, device)))

        def call() -> Tensor:
            with torch.inference_mode():
                return binary(x)

        return call

    def bf16_out() -> Call:
        return packed(torch.bfloat16)

    weight_bytes, words_moved = n * row_bytes, (m + n) * row_bytes
    made = [
        Contestant(PACKED, bf16_out, words_moved + 2 * m * n, weight_bytes),
        Contestant(PACKED_INT, lambda: packed(torch.int32), words_moved + 4 * m * n, weight_bytes),
        Contestant(PACKING, packing, 2 * m * k + weight_bytes + 2 * m * n, weight_bytes),
        Contestant(LAYER, layer, 2 * m * k + weight_bytes + 2 * m * n, weight_bytes),
    ]
    for kernel in kernels(device):
        if m <= 16 or not kernel.startswith("skinny"):  # which takes no more rows
            made.append(Contestant(f"{PACKED}, {kernel}", bf16_out, words_moved + 2 * m * n, weight_bytes, kernel))
    return made


def kernels(device: torch.device) -> list[str]:
    """The CUDA kernels of a device; none for the CPU."""
    if device.type != "cuda":
        return []
    return _kernels.available_cuda_kernels(torch.cuda.get_device_capability(device))


def check(shape: Shape, device: torch.device) -> str:
    """Compare the exact results with each other; say what was compared.

    Raises:
        RuntimeError: They differ: no time of theirs means anything.
    """
    m, n, k = shape
    x, w = random_rows(m, k, device), random_rows(n, k, device)
    words, x_words = F.pack_bits(w), F.pack_bits(x)
    result = F.binary_linear(x_words, words, k, weight_prepared=F.prepare_weight(words, k), out_dtype=torch.int32)
    others = {"packing inside": F.linear(x, words, k, out_dtype=torch.int32)}
    for kernel in kernels(device):
        with forced(kernel):
            others[kernel] = F.binary_linear(x_words, words, k, out_dtype=torch.int32)
    with contextlib.suppress(RuntimeError):  # sizes or devices that it does not take
        signs = (F.unpack_bits(rows, k, torch.int8) for rows in (x_words, words))
        others["torch._int_mm"] = torch._int_mm(next(signs), next(signs).t())
    for name, other in others.items():
        if not torch.equal(result, other):
            at = (result != other).nonzero()[0].tolist()
            raise RuntimeError(f"{shape}: {name} and the chosen kernel differ, first at {at}")
    return ", ".join(others)


# ---- measurements ----------------------------------------------------------------------------------


class Figures(NamedTuple):
    """All that was measured, as it stands in the JSON file.

    Attributes:
        setting: What it depends on.
        products: One dict a shape, contestant and mode.
        packing: Bandwidths of packing and of a copy.
        training: One dict a layer.
        compared: By shape, which exact results were equal.
        absent: By contestant, why it is not there, the first reason.
        failed: What of ours failed, and how.
        skipped: What there was no time for.
    """

    setting: dict[str, Any]
    products: list[dict[str, Any]]
    packing: dict[str, Any]
    training: dict[str, dict[str, Any]]
    compared: dict[str, str]
    absent: dict[str, str]
    failed: dict[str, str]
    skipped: list[str]


def reason(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def modes(shape: Shape, contestant: Contestant, call: Call, timer: Timer, cache_bytes: int) -> dict[str, list[float]]:
    """Seconds in each mode."""
    cold = timer([call], True)
    # Enough calls a replay that the graph's own start, some microseconds, is little.
    repeats = min(200, max(1, math.ceil(3e-4 / max(statistics.median(cold), 1e-9))))
    found = {COLD: cold, WARM: timer([call] * repeats, False)}
    if shape in (ROW, ROWS):
        copies = max(2, math.ceil(3 * cache_bytes / contestant.weight_bytes))
        found[CHAIN] = timer([contestant.make() for _ in range(copies)], False)
    return found


def measure_shape(shape: Shape, device: torch.device, timer: Timer, cache_bytes: int, figures: Figures) -> None:
    """Times of every contestant that takes the shape, once the exact results are equal."""
    figures.compared[str(shape)] = check(shape, device)
    for contestant in [*peers(shape, device), *ours(shape, device)]:
        with forced(contestant.kernel):
            try:
                call = contestant.make()
                call()
                times = modes(shape, contestant, call, timer, cache_bytes)
            except Exception as error:
                if contestant.name.startswith((PACKED, PACKING, LAYER)):  # ours, which must be there
                    figures.failed[f"{shape}, {contestant.name}"] = reason(error)
                else:
                    figures.absent.setdefault(contestant.name, f"{reason(error)} ({shape})")
                continue
        figures.products.extend(row(shape, contestant, mode, seconds) for mode, seconds in times.items())


def row(shape: Shape, contestant: Contestant, mode: str, seconds: list[float]) -> dict[str, Any]:
    """The row of one contestant in one mode."""
    spread = quartiles(seconds)
    return {
        **shape._asdict(),
        "contestant": contestant.name,
        "mode": mode,
        "seconds_quartiles": spread,
        "replays": len(seconds),
        "tops": shape.operations / spread[1] / 1e12,
        "gb_s": contestant.bytes / spread[1] / 1e9,
    }


def measure_packing(rows: int, k: int, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Bytes read and written a second by packing, and by a copy of the same matrix.

    A graph holds several calls, because its start would count: each drives from the L2 cache what the last one left.
    """
    x = random_rows(rows, k, device)
    copy = torch.empty_like(x)
    words = F.pack_bits(x)
    found = {}
    for name, call, size in (
        ("copy", lambda: copy.copy_(x), 2 * x.nbytes),
        ("pack_bits", lambda: F.pack_bits(x), x.nbytes + words.nbytes),
    ):
        spread = quartiles(timer([call] * 8, False))
        found[name] = {"seconds_quartiles": spread, "gb_s": size / spread[1] / 1e9}
    return {"rows": rows, "k": k, **found}


def saved_bytes(layer: nn.Module, x: Tensor) -> dict[str, int]:
    """What a forward keeps for backward: of the input, and of the weights beside their parameters."""
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(x)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = [tensor.detach() for address, tensor in saved.items() if address not in parameters]
    words = F.pack_bits(layer.weight.detach())
    of_weights = [tensor for tensor in kept if tensor.shape == words.shape and torch.equal(tensor, words)]
    weights = sum(tensor.nbytes for tensor in of_weights)
    return {"activations": sum(tensor.nbytes for tensor in kept) - weights, "weights": weights}


def measure_training(size: int, device: torch.device, timer: Timer) -> dict[str, dict[str, Any]]:
    """Forward, and backward to x, weight and bias."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    layers = {
        "nn.Linear": nn.Linear(size, size, **options),
        "QLinear": QLinear(size, size, **options),
        "QLinear, threshold 1": QLinear(size, size, gradient_cancellation_threshold=1.0, **options),
    }
    x, g = random_rows(size, size, device).requires_grad_(), random_rows(size, size, device)
    found = {}
    for name, layer in layers.items():

        def step(layer: nn.Module = layer) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], g)

        found[name] = {
            "size": size,
            "seconds_quartiles": quartiles(timer([step], True)),
            "saved": saved_bytes(layer, x),
        }
    return found


def measure(
    shapes: list[Shape],
    size: int,
    device: torch.device,
    timer: Timer,
    cache_bytes: int,
    setting: dict[str, Any],
    seconds: float = math.inf,
    keep: Callable[[Figures], None] = lambda figures: None,
) -> Figures:
    """Everything, as far as the time goes; what fails is noted, and the rest goes on.

    Args:
        shapes: Of the products, the most wanted first.
        size: Of the matrices that are packed and trained with.
        device: Where.
        timer: How.
        cache_bytes: Of the L2 cache.
        setting: What it depends on.
        seconds: What would begin later is skipped; so is what an interrupt comes before.
        keep: Called with the figures so far, again and again.
    """
    end = time.monotonic() + seconds
    figures = Figures(setting, [], {}, {}, {}, {}, {}, [])
    steps: dict[str, Callable[[], None]] = {
        "packing": lambda: figures.packing.update(measure_packing(size, size, device, timer)),
        "training": lambda: figures.training.update(measure_training(size, device, timer)),
        **{str(shape): partial(measure_shape, shape, device, timer, cache_bytes, figures) for shape in shapes},
    }
    for name, step in steps.items():
        if time.monotonic() > end:
            figures.skipped.append(name)
            continue
        try:
            step()
        except KeyboardInterrupt:
            figures.failed[name] = "interrupted"
            end = -math.inf
        except Exception as error:
            figures.failed[name] = reason(error)
        keep(figures)
    return figures


# ---- targets ---------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A ratio that was aimed at.

    Attributes:
        what: In words.
        wanted: The bound, in words.
        measured: The ratio, or None where something was not measured.
        met: Whether the bound holds; None likewise.
    """

    what: str
    wanted: str
    measured: float | None
    met: bool | None


def median(figures: Figures, shape: Shape, contestant: str, mode: str) -> float | None:
    """Seconds of one product, or None."""
    for row in figures.products:
        if (row["m"], row["n"], row["k"]) == shape and row["contestant"] == contestant and row["mode"] == mode:
            seconds: float = row["seconds_quartiles"][1]
            return seconds
    return None


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def at_least(what: str, least: float, measured: float | None) -> Target:
    return Target(what, f"≥ {least:g} ×", measured, None if measured is None else measured >= least)


def targets(figures: Figures) -> list[Target]:
    """What the CUDA path aims at."""

    def faster(shape: Shape, contestant: str, peer: str, mode: str) -> float | None:
        return quotient(median(figures, shape, peer, mode), median(figures, shape, contestant, mode))

    bandwidth = {name: figures.packing.get(name, {}).get("gb_s") for name in ("pack_bits", "copy")}
    # With a threshold: it keeps and computes more.
    linear, binary = (figures.training.get(name, {}) for name in ("nn.Linear", "QLinear, threshold 1"))
    step = [layer.get("seconds_quartiles", [None] * 2)[1] for layer in (linear, binary)]
    saved = quotient(*(layer.get("saved", {}).get("activations") for layer in (binary, linear)))
    return [
        at_least("8192³, packed × packed, mma_sm80, against bf16", 3, faster(LARGE, f"{PACKED}, mma_sm80", BF16, COLD)),
        at_least("4096³, int32 out, against _int_mm", 2, faster(MEDIUM, PACKED_INT, INT8, COLD)),
        at_least("1 × 8192 → 8192, x bf16, in a graph of layers, against fp16", 6, faster(ROW, LAYER, FP16, CHAIN)),
        at_least("16 × 8192 → 8192, the same", 5, faster(ROWS, LAYER, FP16, CHAIN)),
        at_least("packing bf16 8192², against a copy", 0.85, quotient(bandwidth["pack_bits"], bandwidth["copy"])),
        at_least("training step 8192³ bf16, against nn.Linear", 1.2, quotient(*step)),
        Target("activations saved for it", "≤ 1/7", saved, None if saved is None else saved <= 1 / 7),
    ]


# ---- reports ---------------------------------------------------------------------------------------


def shown(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def product_rows(figures: Figures) -> list[list[str]]:
    """One row a shape and contestant: cold times, and the others' where there are any."""
    rows = []
    for row in figures.products:
        if row["mode"] != COLD:
            continue
        shape, name = Shape(row["m"], row["n"], row["k"]), row["contestant"]
        times = {mode: median(figures, shape, name, mode) for mode in (COLD, WARM, CHAIN)}
        against = {mode: quotient(median(figures, shape, BF16, mode), seconds) for mode, seconds in times.items()}
        micro = {mode: shown(None if seconds is None else 1e6 * seconds) for mode, seconds in times.items()}
        rates = [shown(row["tops"]), shown(row["gb_s"])]
        columns = [micro[COLD], *rates, shown(against[COLD]), micro[WARM], shown(against[WARM])]
        rows.append([str(shape), name, *columns, micro[CHAIN], shown(against[CHAIN])])
    return rows


PRODUCT_HEADERS = ["product", "computed by", "µs cold", "TOPS", "GB/s", "× bf16"]
PRODUCT_HEADERS += ["µs warm", "× bf16", "µs in a chain", "× bf16"]


def table(rows: list[list[str]], headers: list[str]) -> str:
    """A table in Markdown, with columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    words = [header in (headers[0], "computed by", "wanted", "verdict") for header in headers]  # the rest are numbers
    rule = ["-" * width if is_word else "-" * (width - 1) + ":" for width, is_word in zip(widths, words, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(cells, widths, words, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [headers, rule, *rows]))


def report(figures: Figures) -> str:
    """All tables, the targets last."""
    packing = [
        [name, shown(1e6 * figures.packing[name]["seconds_quartiles"][1]), shown(figures.packing[name]["gb_s"])]
        for name in ("copy", "pack_bits")
        if name in figures.packing
    ]
    training = [
        [name, shown(1e6 * row["seconds_quartiles"][1]), *(shown(row["saved"][of] / 1e6) for of in row["saved"])]
        for name, row in figures.training.items()
    ]
    verdicts = {True: "met", False: "not met", None: "not measured"}
    wanted = [[t.what, t.wanted, shown(t.measured), verdicts[t.met]] for t in targets(figures)]
    parts = [
        table(product_rows(figures), PRODUCT_HEADERS),
        "TOPS and GB/s of the cold times: 2mnk operations, operands read and results written once; "
        "a chain is a graph of layers with weights of their own.",
        *(f"absent: {name}: {why}" for name, why in figures.absent.items()),
        *(f"failed: {name}: {why}" for name, why in figures.failed.items()),
        *([f"not measured for lack of time: {', '.join(figures.skipped)}"] if figures.skipped else []),
        table(packing, ["bf16 matrix", "µs", "GB/s"]),
        table(training, ["training step", "µs", "MB of activations saved", "MB of packed weights saved"]),
        "\n".join(f"{name}: {value}" for name, value in figures.setting.items()),
        table(wanted, ["target", "wanted", "measured", "verdict"]),
    ]
    return "\n\n".join(parts)


def plot(path: Path, figures: Figures) -> None:
    """How many times faster than bf16, over the rows of x."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    weights = list(dict.fromkeys((row["n"], row["k"]) for row in figures.products))
    if not weights:
        return
    figure, grid = pyplot.subplots(2, len(weights), figsize=(4 * len(weights), 8), squeeze=False, layout="constrained")
    for column, (n, k) in enumerate(weights):
        batches = sorted({row["m"] for row in figures.products if (row["n"], row["k"]) == (n, k)})
        for axes, mode in zip(grid[:, column], (COLD, WARM), strict=True):
            for name in (PACKED, PACKING, FP16, FP8, INT8):
                times = [[median(figures, Shape(m, n, k), each, mode) for each in (BF16, name)] for m in batches]
                points = [(m, quotient(*pair)) for m, pair in zip(batches, times, strict=True) if None not in pair]
                axes.plot([m for m, _ in points], [ratio for _, ratio in points], "o-", label=name, markersize=4)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.set_title(f"{k} → {n}, {mode}", fontsize=10)
            axes.set_xlabel("rows of x")
    grid[0, 0].legend(fontsize=8)
    figure.supylabel("times as fast as nn.Linear bf16")
    figure.suptitle(str(figures.setting.get("device", "")), fontweight="bold")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def write(folder: Path, figures: Figures) -> None:
    """gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(as_json(figures))
    (folder / "gpu.md").write_text(report(figures) + "\n")


def as_json(figures: Figures) -> str:
    met = [target._asdict() for target in targets(figures)]
    return json.dumps({**figures._asdict(), "targets": met}, indent=1, ensure_ascii=False) + "\n"


# ---- setting ---------------------------------------------------------------------------------------

SMI_FIELDS = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"


def nvidia_smi() -> str:
    """Clocks and temperature as nvidia-smi reads them; nothing is set."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not there"
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {reason(error)}"
    return " | ".join((said.stdout or said.stderr).strip().splitlines())


def clocks_at_work() -> str:
    """What nvidia-smi reads while matrix products run."""
    a, b = (random_rows(8192, 8192, torch.device("cuda")) for _ in range(2))
    for _ in range(1000):  # about a second and a half of an H100, in the queue
        torch.mm(a, b)
    read = nvidia_smi()
    torch.cuda.synchronize()
    return read


RATE = Path(__file__).with_name("bmma_rate.cu")


def rate_of_the_instruction(capability: tuple[int, int], multiprocessors: int, out: Tensor) -> str:
    """Say how many operations a second the tensor cores' instruction for bits makes when nothing else is done.

    Args:
        capability: Of the device.
        multiprocessors: Of the device.
        out: 1024 int32 for each of them.
    """
    if not (8, 0) <= capability <= (9, 0):
        return f"{capability[0]}.{capability[1]} has no such instruction"
    with tempfile.TemporaryDirectory() as folder:
        target, library = "sm_{}{}".format(*capability), f"{folder}/rate.so"
        command = [
            find_tool("nvcc") or "nvcc",
            "-O3",
            "-std=c++17",
            f"-arch={target}",
            "-shared",
            "-Xcompiler",
            "-fPIC",
        ]
        try:
            subprocess.run([*command, "-o", library, str(RATE)], check=True, capture_output=True, timeout=60)
            function = ctypes.CDLL(library).bmma_rate
        except (OSError, subprocess.SubprocessError) as error:
            return f"not measured: {reason(error)}"
    function.restype = ctypes.c_double
    rate = function(ctypes.c_int(multiprocessors), ctypes.c_void_p(out.data_ptr()))
    return f"{shown(rate / 1e12)} TOPS" if rate else "not measured: CUDA reports an error"


def gpu_setting(timer: GraphTimer) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    kernel = environment(device) | {"kernel": "by each product's sizes"}
    one = torch.ones(1, device=device)
    return {
        **kernel,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "built_for": _library.build_info["cuda_targets"],
        "graph_of_one_element_us": round(1e6 * quartiles(timer([lambda: one + one], True))[1], 2),
        "bits_instruction_alone": rate_of_the_instruction(
            (properties.major, properties.minor),
            properties.multi_processor_count,
            torch.empty(1024 * properties.multi_processor_count, dtype=torch.int32, device=device),
        ),
        "clocks_idle": nvidia_smi(),
        "clocks_at_work": clocks_at_work(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write gpu.json, gpu.md and gpu.png there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    parser.add_argument("--seconds", type=float, default=110.0, help="begin nothing later than this (110)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: there is no NVIDIA GPU that this torch can use.")
    if not _library.has_cuda:
        raise SystemExit(f"benchmarks gpu: there are no CUDA operators: {_library.no_cuda_reason}.")
    start = time.monotonic()
    torch.manual_seed(0)
    timer = GraphTimer()
    setting = gpu_setting(timer)

    def keep(figures: Figures) -> None:
        if options.results:
            write(options.results, figures)
        print(f"{len(figures.compared)} of {len(SHAPES)} products", file=sys.stderr, flush=True)

    left = options.seconds - (time.monotonic() - start)
    figures = measure(SHAPES, LARGE.k, torch.device("cuda"), timer, setting["l2_bytes"], setting, left, keep)
    setting["clocks_after"] = nvidia_smi()
    print(as_json(figures) if options.json else report(figures), flush=True)
    if options.results:
        write(options.results, figures)
        try:
            plot(options.results / "gpu.png", figures)
        except ImportError as error:
            print(f"no plot: {error}")
    if figures.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
