"""What the CPU benchmarks share: shapes, interleaved times, the setting that goes with every figure, and its file."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import statistics
import subprocess
import timeit
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.benchmark import Timer, set_torch_threads

from examples.digits.costs import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"

Call = Callable[[], object]
Quartiles = list[float]
Times = dict[str, Quartiles]
"""Quartiles of the seconds a call, by contestant: the median is in the middle."""

Key = TypeVar("Key", bound=Hashable)

# Turns of a contestant, unless it is asked for another number.
ROUNDS = 15
# A turn of a contestant: long enough for the clock, short enough that a busy neighbour hits all alike.
TURN_SECONDS = 2e-3
# torch's Timer makes two calls more to warm up in each turn. A call as long as this one needs none.
LONG_SECONDS = 5e-2


class Shape(NamedTuple):
    """y[m][n] of a product over k, and what the figures call it."""

    name: str
    group: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m} × {self.k} → {self.n}"

    @property
    def multiply_adds(self) -> int:
        return self.m * self.k * self.n


def load_shapes(quick: bool = False) -> list[Shape]:
    """The shapes of ``shapes.csv``, or those of the quick selection."""
    with (HERE / "shapes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quick"] or not quick]
    return [Shape(row["name"], row["group"], int(row["m"]), int(row["k"]), int(row["n"])) for row in rows]


def named(names: Iterable[str]) -> list[Shape]:
    """The shapes of these names, in the list's order."""
    wanted = set(names)
    return [shape for shape in load_shapes() if shape.name in wanted]


class Turns:
    """One contestant, which warms up when it is made."""

    def __init__(self, call: Call, threads: int) -> None:
        self.call, self.threads = call, threads
        self.timer = Timer("call()", globals={"call": call}, num_threads=threads)
        once = self.timer.timeit(1).mean
        self.long, self.calls = once > LONG_SECONDS, max(1, round(TURN_SECONDS / once))

    def take(self) -> float:
        """The seconds a call of one turn."""
        if not self.long:
            return self.timer.timeit(self.calls).mean
        with set_torch_threads(self.threads):
            return timeit.timeit(self.call, number=1)


def interleaved(
    contestants: Mapping[Key, Call], rounds: int, threads: Mapping[Key, int] | None = None
) -> dict[Key, Quartiles]:
    """Time the contestants in turns, with torch's present number of threads or their own."""
    own = threads or dict.fromkeys(contestants, torch.get_num_threads())
    turns = {name: Turns(call, own[name]) for name, call in contestants.items()}
    seconds: dict[Key, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in turns.items():
            seconds[name].append(contestant.take())
    return {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}


def median(times: Times, name: str) -> float:
    return times[name][1]


def ratio(times: Times, baseline: str, name: str) -> float:
    """How many times as fast as the baseline, by medians."""
    return median(times, baseline) / median(times, name)


def spread(times: Times, name: str) -> str:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = times[name]
    return f"± {50 * (high - low) / middle:.1f}%"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit that was measured, with a + where files differ from it; not those that measuring writes."""
    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "README.md")]
    try:
        differ = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
        return git("rev-parse", "--short", "HEAD") + ("+" if differ else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of Python and of the installed peers; torch's is among the demo's own figures."""
    found = {"python": platform.python_version()}
    for peer in ("bitorch", "bnn-lab"):
        try:
            found[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def setting() -> dict[str, str | int]:
    """What the figures depend on: processor, capability, kernel, threads, versions, commit, date."""
    return environment(torch.device("cpu")) | versions() | {"commit": commit()}


def describe(where: Mapping[str, str | int]) -> str:
    """The setting in a line."""
    return (
        f"{where['processor']}, capability {where['cpu_capability']}, kernel {where['kernel']}, "
        f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}, torch {where['torch']}, "
        f"commit {where['commit']}, {str(where['date'])[:10]}"
    )


def prepare(threads: int) -> None:
    """Pin the threads and the seed. (A kernel is chosen by ``bitorch_qlinear.kernels.forced``.)"""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # The tables show what this warns of.
    warnings.filterwarnings("ignore", message="bitorch_qlinear: a QLinear packs its weights")


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of a command line's argument that is a whole number."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


THREADS, TURNS = at_least(1), at_least(2)
"""The types of ``--threads`` and ``--rounds``; quartiles need two turns."""


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"
