"""Compares the committed figures with a fresh run: ``python -m benchmarks.check`` (``make benchmark-check``).

On the processor and with the kernel that the figures name, it is an error if QLinear lost more than 30 % of its ratio
to nn.Linear at any shape; elsewhere both are printed.
"""

from __future__ import annotations

import json
from typing import Any

from tabulate import tabulate

from .cpu import measure
from .measuring import RESULTS, Shape, describe, prepare, ratio, setting
from .peers import LINEAR, QLINEAR

TOLERANCE = 0.3


def compare(committed: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, committed and fresh ratio of each shape."""
    pairs = zip(committed, fresh, strict=True)
    return [
        (old["name"], *(ratio(each["seconds_quartiles"], LINEAR, QLINEAR) for each in (old, new))) for old, new in pairs
    ]


def fallen(rows: list[tuple[str, float, float]]) -> list[str]:
    """The shapes that lost more than the tolerance."""
    return [name for name, old, new in rows if new < old * (1 - TOLERANCE)]


def main() -> None:
    committed = json.loads((RESULTS / "cpu.json").read_text())
    prepare(1)
    shapes = [Shape(*(result[field] for field in Shape._fields)) for result in committed["results"]]
    fresh = measure(shapes, ["float32"], [1], rounds=9)["results"]
    rows, here = compare(committed["results"], fresh), setting()
    print(tabulate(rows, headers=["QLinear, × nn.Linear", "committed", "now"], floatfmt=".2f"))
    print(f"committed: {describe(committed['setting'])}\nnow: {describe(here)}")
    if any(here[key] != committed["setting"][key] for key in ("processor", "kernel")):
        print("Another processor or kernel: nothing is judged.")
    elif lost := fallen(rows):
        raise SystemExit(f"more than {TOLERANCE:.0%} slower than committed: {', '.join(lost)}")


if __name__ == "__main__":
    main()
