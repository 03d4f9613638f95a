"""The tables of a run, and its files gpu.json and gpu.md."""

from __future__ import annotations

import json
from pathlib import Path

from ..measuring import Shape
from .contestants import BF16
from .measurements import CHAIN, COLD, WARM, Results
from .targets import median, quotient, targets


def shown(value: float | None, digits: int = 3) -> str:
    """Format a number with so many significant digits and without an exponent, and None as nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def product_rows(figures: Results) -> list[list[str]]:
    """Return a row for each shape and contestant: the cold time, and those of the other modes if they were measured."""
    rows = []
    for row in figures.products:
        if row["mode"] != COLD:
            continue
        shape, name = Shape.of(row), row["contestant"]
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
    """Format a Markdown table whose columns are as narrow as possible."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    words = [
        header in (headers[0], "computed by", "pass", "goal", "verdict") for header in headers
    ]  # The others are numbers.
    rule = ["-" * width if is_word else "-" * (width - 1) + ":" for width, is_word in zip(widths, words, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(cells, widths, words, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [headers, rule, *rows]))


def report(figures: Results) -> str:
    """Return all tables as Markdown, with the targets last."""
    packing = [
        [name, shown(1e6 * figures.packing[name]["seconds_quartiles"][1]), shown(figures.packing[name]["gb_s"])]
        for name in ("copy", "pack_bits")
        if name in figures.packing
    ]
    training = [
        [name, shown(1e6 * row["seconds_quartiles"][1]), *(shown(row["saved"][of] / 1e6) for of in row["saved"])]
        for name, row in figures.training.items()
    ]
    wanted = [[t.what, t.wanted, t.goal, shown(t.measured), t.verdict] for t in targets(figures)]
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
        table(wanted, ["target", "pass", "goal", "measured", "verdict"]),
    ]
    return "\n\n".join(parts)


def write(folder: Path, figures: Results) -> None:
    """Write gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(as_json(figures))
    (folder / "gpu.md").write_text(report(figures) + "\n")


def read(path: Path) -> Results:
    """Read the results of a run from its gpu.json."""
    figures = json.loads(path.read_text())
    return Results(**{name: figures[name] for name in Results._fields})


def as_json(figures: Results) -> str:
    """Return the results and the targets as JSON."""
    met = [target._asdict() for target in targets(figures)]
    return json.dumps({**figures._asdict(), "targets": met}, indent=1, ensure_ascii=False) + "\n"
