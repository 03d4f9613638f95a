"""What the CUDA path aims at, and what it reached."""

from __future__ import annotations

from typing import NamedTuple

from ..measuring import Shape
from .contestants import BF16, FP16, INT8, LAYER, PACKED, PACKED_INT
from .measurements import CHAIN, COLD, WARM, Results
from .shapes import FEW, LARGE, MEDIUM, NARROW, ROW, ROWS

LATENCY = {4096: 3.2, 8192: 5.3}
"""The most microseconds that up to 16 rows should take, by k = n."""


class Outcome(NamedTuple):
    """A target and what was reached.

    Attributes:
        what: The target in words.
        wanted: The bound that must hold, in words.
        goal: The bound that is hoped for, or "" if there is none.
        measured: A ratio, or microseconds if the bound is in microseconds; None if a part of it was not measured.
        verdict: "goal met", "pass", "missed" or "not measured".
    """

    what: str
    wanted: str
    goal: str
    measured: float | None
    verdict: str


def median(figures: Results, shape: Shape, contestant: str, mode: str) -> float | None:
    """Return the median seconds of one product, or None if it was not measured."""
    for row in figures.products:
        if Shape.of(row) == shape and row["contestant"] == contestant and row["mode"] == mode:
            seconds: float = row["seconds_quartiles"][1]
            return seconds
    return None


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def at_least(what: str, measured: float | None, wanted: float, goal: float | None = None) -> Outcome:
    """Return the outcome of a ratio that should be high."""
    bounds = [f"≥ {bound:g} ×" if bound is not None else "" for bound in (wanted, goal)]
    if measured is None:
        verdict = "not measured"
    else:
        verdict = "missed" if measured < wanted else "goal met" if goal is not None and measured >= goal else "pass"
    return Outcome(what, *bounds, measured, verdict)


def at_most(what: str, measured: float | None, bound: float, words: str) -> Outcome:
    """Return the outcome of a number that should be low."""
    verdict = "not measured" if measured is None else "pass" if measured <= bound else "missed"
    return Outcome(what, words, "", measured, verdict)


def latencies(figures: Results) -> list[Outcome]:
    """Compare the latencies of few rows with their bounds."""
    found = []
    for shape in FEW:
        seconds, bound = median(figures, shape, LAYER, CHAIN), LATENCY[shape.k]
        micros = None if seconds is None else 1e6 * seconds
        found.append(at_most(f"{shape}, x bf16, in a graph of layers", micros, bound, f"≤ {bound:g} µs"))
    return found


def targets(figures: Results) -> list[Outcome]:
    """Compare each target of the CUDA path, which is about an H100 or H200, with what was measured."""

    def faster(shape: Shape, contestant: str, peer: str, mode: str) -> float | None:
        return quotient(median(figures, shape, peer, mode), median(figures, shape, contestant, mode))

    bandwidth = {name: figures.packing.get(name, {}).get("gb_s") for name in ("pack_bits", "copy")}
    # The QLinear has a threshold, with which it computes and keeps more than without.
    linear, binary = (figures.training.get(name, {}) for name in ("nn.Linear", "QLinear, threshold 1"))
    step = [layer.get("seconds_quartiles", [None] * 2)[1] for layer in (linear, binary)]
    saved = quotient(*(layer.get("saved", {}).get("activations") for layer in (binary, linear)))
    mma = f"{PACKED}, mma_sm80"
    return [
        at_least("8192³, packed × packed, against bf16", faster(LARGE, PACKED, BF16, COLD), 7, 10),
        at_least("8192³, x bf16, against bf16", faster(LARGE, LAYER, BF16, COLD), 4.5, 7),
        at_least("4096³, packed × packed, against mma_sm80", faster(MEDIUM, PACKED, mma, COLD), 1.7, 2.3),
        at_least("4096³, int32 out, against _int_mm", faster(MEDIUM, PACKED_INT, INT8, COLD), 3, 5),
        at_least(f"{ROW}, x bf16, in a graph of layers, against fp16", faster(ROW, LAYER, FP16, CHAIN), 9, 11),
        # A model of such layers lies in the L2 cache.
        at_least(f"{NARROW}, x bf16, in a graph, against bf16", faster(NARROW, LAYER, BF16, WARM), 1, 1.5),
        *latencies(figures),
        at_least(f"{ROWS}, x bf16, in a graph of layers, against fp16", faster(ROWS, LAYER, FP16, CHAIN), 5),
        at_least("8192³, packed × packed, mma_sm80, against bf16", faster(LARGE, mma, BF16, COLD), 3),
        at_least("packing bf16 8192², against a copy", quotient(bandwidth["pack_bits"], bandwidth["copy"]), 0.85),
        at_least("training step 8192³ bf16, against nn.Linear", quotient(*step), 1.2),
        at_most("activations saved for it", saved, 1 / 7, "≤ 1/7"),
    ]
