"""Times all products, packing and training steps; what fails is noted and the rest goes on."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bitorch_qlinear import functional as F
from bitorch_qlinear._kernels import forced_tile
from bitorch_qlinear.kernels import forced

from ..measuring import Shape
from .contestants import LAYER, PACKED, PACKING, Contestant, ours, peers, random_rows
from .correctness import check
from .shapes import FEW
from .timing import Call, Timer, quartiles
from .training import measure_training

COLD, WARM, CHAIN = "cold", "warm", "chain"


class Results(NamedTuple):
    """All results of a run, in the form of the JSON file.

    Attributes:
        setting: The machine and the versions that the results depend on.
        products: One dict for each shape, contestant and mode.
        packing: The bandwidths of packing and of a copy.
        training: One dict for each layer.
        compared: The names of the exact results that were equal, by shape.
        absent: The first reason why a peer is missing, by contestant.
        failed: The error of each of our own parts that failed.
        skipped: The parts that there was no time for.
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
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def modes(shape: Shape, contestant: Contestant, call: Call, timer: Timer, cache_bytes: int) -> dict[str, list[float]]:
    """Time a contestant in each mode; the chain of layers only for a few rows."""
    cold = timer([call], True)
    # A replay has so many calls that the graph's own start of some microseconds hardly counts.
    repeats = min(200, max(1, math.ceil(3e-4 / max(statistics.median(cold), 1e-9))))
    found = {COLD: cold, WARM: timer([call] * repeats, False)}
    if shape in FEW:
        copies = max(2, math.ceil(3 * cache_bytes / contestant.weight_bytes))
        found[CHAIN] = timer([contestant.make() for _ in range(copies)], False)
    return found


def measure_shape(shape: Shape, device: torch.device, timer: Timer, cache_bytes: int, figures: Results) -> None:
    """Add the times of all contestants that take the shape, after a check that the exact results are equal."""
    figures.compared[str(shape)] = check(shape, device)
    for contestant in [*peers(shape, device), *ours(shape, device)]:
        with forced(contestant.kernel), forced_tile(contestant.tile):
            try:
                call = contestant.make()
                call()
                times = modes(shape, contestant, call, timer, cache_bytes)
            except Exception as error:
                if contestant.name.startswith((PACKED, PACKING, LAYER)):  # Ours must run.
                    figures.failed[f"{shape}, {contestant.name}"] = reason(error)
                else:
                    figures.absent.setdefault(contestant.name, f"{reason(error)} ({shape})")
                continue
        figures.products.extend(row(shape, contestant, mode, seconds) for mode, seconds in times.items())


def row(shape: Shape, contestant: Contestant, mode: str, seconds: list[float]) -> dict[str, Any]:
    """Make the dict of one contestant in one mode."""
    spread = quartiles(seconds)
    return {
        **shape.fields(),
        "contestant": contestant.name,
        "mode": mode,
        "seconds_quartiles": spread,
        "replays": len(seconds),
        "tops": 2 * shape.multiply_adds / spread[1] / 1e12,
        "gb_s": contestant.bytes / spread[1] / 1e9,
    }


def measure_packing(rows: int, k: int, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Measure the bytes a second that packing and a copy of the same matrix read and write.

    A graph holds several calls so that its start hardly counts. Each call evicts the last one's data from the L2 cache.
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


def measure(
    shapes: list[Shape],
    size: int,
    device: torch.device,
    timer: Timer,
    cache_bytes: int,
    setting: dict[str, Any],
    seconds: float = math.inf,
    keep: Callable[[Results], None] = lambda figures: None,
) -> Results:
    """Measure as much as there is time for. A part that fails is noted, and the next one starts.

    Args:
        shapes: The products, the most important first.
        size: The edge of the square matrices that are packed and trained with.
        device: The device that computes.
        timer: Times the calls; tests pass one that makes times up.
        cache_bytes: The size of the L2 cache.
        setting: The machine and the versions, to be kept with the results.
        seconds: Parts that would begin later than this are skipped, as are those after an interrupt.
        keep: Called with the results so far after each part.
    """
    end = time.monotonic() + seconds
    figures = Results(setting, [], {}, {}, {}, {}, {}, [])
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
