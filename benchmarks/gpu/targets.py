"""What the CUDA path aims at, and what it reached."""

from __future__ import annotations

from typing import NamedTuple

from ..measuring import Shape
from .contestants import BF16, FP16, INT8, LAYER, PACKED, PACKED_INT
from .measurements import CHAIN, COLD, Results
from .shapes import LARGE, MEDIUM, ROW, ROWS


class Outcome(NamedTuple):
    """A target and the ratio that was reached.

    Attributes:
        what: The target in words.
        wanted: Its bound in words.
        measured: The ratio, or None if a part of it was not measured.
        met: Whether the bound holds, or None if the ratio is missing.
    """

    what: str
    wanted: str
    measured: float | None
    met: bool | None


def median(figures: Results, shape: Shape, contestant: str, mode: str) -> float | None:
    """Return the median seconds of one product, or None if it was not measured."""
    for row in figures.products:
        if Shape.of(row) == shape and row["contestant"] == contestant and row["mode"] == mode:
            seconds: float = row["seconds_quartiles"][1]
            return seconds
    return None


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def at_least(what: str, least: float, measured: float | None) -> Outcome:
    return Outcome(what, f"≥ {least:g} ×", measured, None if measured is None else measured >= least)


def targets(figures: Results) -> list[Outcome]:
    """Compare each target of the CUDA path with what was measured."""

    def faster(shape: Shape, contestant: str, peer: str, mode: str) -> float | None:
        return quotient(median(figures, shape, peer, mode), median(figures, shape, contestant, mode))

    bandwidth = {name: figures.packing.get(name, {}).get("gb_s") for name in ("pack_bits", "copy")}
    # The QLinear has a threshold, with which it computes and keeps more than without.
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
        Outcome("activations saved for it", "≤ 1/7", saved, None if saved is None else saved <= 1 / 7),
    ]
