"""The common parts of the CPU benchmarks: shapes, interleaved times, the machine's description, JSON files."""

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
# A benchmark writes these paths of the repository.
WRITTEN = ("benchmarks/results", "README.md", "docs/benchmarks.md", "docs/examples.md")

Call = Callable[[], object]
Quartiles = list[float]
Times = dict[str, Quartiles]
"""Quartiles of the seconds a call, by contestant, with the median in the middle."""

Figures = dict[str, Any]
"""The results of one benchmark, or of one shape in it, in the form of its JSON file."""

Key = TypeVar("Key", bound=Hashable)

# By default a contestant takes so many turns.
ROUNDS = 15
# A turn lasts about this long: enough for the clock's resolution, and so short that other load on the machine slows all
# contestants alike.
TURN_SECONDS = 2e-3
# torch's Timer makes two more calls in each turn to warm up. A call of at least this length is timed without them.
LONG_SECONDS = 5e-2


class Shape(NamedTuple):
    """The sizes of a product, m × k by k × n, and the name that results give it."""

    m: int
    k: int
    n: int
    name: str = ""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Shape:
        """Return the shape of a result that was read from a JSON file."""
        return cls(result["m"], result["k"], result["n"], result.get("name", ""))

    def fields(self) -> dict[str, Any]:
        """Return what a JSON file says of the shape: :meth:`of` reads it."""
        return ({"name": self.name} if self.name else {}) | {"m": self.m, "k": self.k, "n": self.n}

    def __str__(self) -> str:
        return f"{self.m} × {self.k} → {self.n}"

    @property
    def multiply_adds(self) -> int:
        return self.m * self.k * self.n


def load_shapes(quick: bool = False) -> list[Shape]:
    """Return the shapes of ``shapes.csv``, or only those of the quick selection."""
    with (HERE / "shapes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quick"] or not quick]
    return [Shape(int(row["m"]), int(row["k"]), int(row["n"]), row["name"]) for row in rows]


def named(names: Iterable[str]) -> list[Shape]:
    """Return the shapes of these names, in the order of ``shapes.csv``."""
    wanted = set(names)
    return [shape for shape in load_shapes() if shape.name in wanted]


class Turns:
    """One contestant. Its call is made once here, to warm up and to choose the calls of a turn."""

    def __init__(self, call: Call, threads: int) -> None:
        self.call, self.threads = call, threads
        self.timer = Timer("call()", globals={"call": call}, num_threads=threads)
        once = self.timer.timeit(1).mean
        self.long, self.calls = once > LONG_SECONDS, max(1, round(TURN_SECONDS / once))

    def take(self) -> float:
        """Take one turn, and return its seconds a call."""
        if not self.long:
            return self.timer.timeit(self.calls).mean
        with set_torch_threads(self.threads):
            return timeit.timeit(self.call, number=1)


def interleaved(
    contestants: Mapping[Key, Call], rounds: int, threads: Mapping[Key, int] | None = None
) -> dict[Key, Quartiles]:
    """Time the contestants in turns and return the quartiles of each one's seconds a call.

    Args:
        contestants: The calls, by any key.
        rounds: The number of turns.
        threads: The number of threads of each contestant; by default all have torch's present number.
    """
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
    """Return how many times as fast as the baseline a contestant is, by medians."""
    return median(times, baseline) / median(times, name)


def spread(times: Times, name: str) -> str:
    """Return half the distance between the quartiles, as a share of the median, in words."""
    low, middle, high = times[name]
    return f"± {50 * (high - low) / middle:.1f}%"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """Return the commit that is measured, with a + if other files differ from it than those that a benchmark writes."""
    written = [f":(top,exclude){path}" for path in WRITTEN]
    try:
        differ = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
        return git("rev-parse", "--short", "HEAD") + ("+" if differ else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed peers. (``environment`` has torch's.)"""
    found = {"python": platform.python_version()}
    for peer in ("bitorch", "bnn-lab"):
        try:
            found[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def setting() -> dict[str, str | int]:
    """Return what results depend on: processor, capability, kernel, threads, versions, commit and date."""
    return environment(torch.device("cpu")) | versions() | {"commit": commit()}


def describe(where: Mapping[str, str | int]) -> str:
    """Return the setting in one line."""
    return (
        f"{where['processor']}, capability {where['cpu_capability']}, kernel {where['kernel']}, "
        f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}, torch {where['torch']}, "
        f"commit {where['commit']}, {str(where['date'])[:10]}"
    )


def prepare(threads: int) -> None:
    """Set the number of threads and the seed, and silence a warning."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # The warning says that packing in every call is slow, which the tables show.
    warnings.filterwarnings("ignore", message="bitorch_qlinear: a QLinear packs its weights")


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of a command-line option that is a whole number of at least ``least``."""

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
