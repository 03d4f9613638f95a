"""The rates of the parts that bound the kernels, each measured alone by the program rates.cu."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.sanitize import find_tool

from .measurements import reason
from .tables import shown

PROGRAM = Path(__file__).with_name("rates.cu")
ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "csrc"
SECONDS = 60.0  # of the process that measures; nvcc needs some 10 of them
MATRIX = 1 << 24  # bytes; x and weights of 8192 x 8192 x 8192 as words

Capability = tuple[int, int]


class Measured(ctypes.Structure):
    """Multiply-adds or bytes: of all multiprocessors in a second, and of one in a clock."""

    _fields_ = (("a_second", ctypes.c_double), ("a_clock", ctypes.c_double))


class Part(NamedTuple):
    """A part that is measured.

    Attributes:
        name: The name in the tables.
        function: The function of the program.
        arguments: Its arguments before the result.
        lowest: The lowest compute capability that has the part.
        highest: The highest one.
    """

    name: str
    function: str
    arguments: tuple[ctypes.c_int | ctypes.c_int64 | ctypes.c_bool, ...] = ()
    lowest: Capability = (9, 0)
    highest: Capability = (9, 0)


def _l2(way: str, boxes: bool) -> list[Part]:
    sharers = {"each its own": 1, "two the same": 2, "all the same": 0}
    bounds = () if boxes else ((0, 0), (99, 9))
    return [
        Part(
            f"16 MB from L2 by {way}, {which}",
            "measure_l2",
            (ctypes.c_int64(MATRIX), ctypes.c_int(count), ctypes.c_bool(boxes)),
            *bounds,
        )
        for which, count in sharers.items()
    ]


PARTS = [
    Part("mma.sync of bits alone", "measure_warps", lowest=(8, 0)),
    *(Part(f"wgmma of bits alone, {n} columns", "measure_warpgroups", (ctypes.c_int(n),)) for n in (192, 128)),
    *_l2("boxes", True),
    *_l2("loads", False),
]
"""The parts in the order in which they are measured; those of L2 say how many multiprocessors read the same bytes."""


def in_words(part: Part, measured: Measured) -> str:
    """Return a result as text; a multiply-add is two operations."""
    if part.function == "measure_l2":
        return f"{shown(measured.a_second / 1e12)} TB/s, {shown(measured.a_clock)} bytes a clock and multiprocessor"
    tops = shown(2 * measured.a_second / 1e12)
    return f"{tops} TOPS, {shown(measured.a_clock)} multiply-adds a clock and multiprocessor"


def measure_rates(capability: Capability, show: Callable[[str, str], None] = lambda name, text: None) -> dict[str, str]:
    """Compile the program, measure all parts that a device has, and return the results as text, by name.

    What cannot be measured has the reason instead.

    Args:
        capability: The compute capability of the current device.
        show: Called with each name and text as soon as they exist.
    """
    found = {}

    def add(name: str, text: str) -> None:
        found[name] = text
        show(name, text)

    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/rates.so"
        target = "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")
        command = [find_tool("nvcc") or "nvcc", "-O3", "-std=c++20", f"-arch={target}", f"-I{HEADERS}"]
        command += ["-shared", "-Xcompiler", "-fPIC", "-o", library, str(PROGRAM)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            program = ctypes.CDLL(library)
        except subprocess.CalledProcessError as error:
            errors = [line for line in error.stderr.splitlines() if re.search("error|fatal", line)]
            add("rates", f"not measured: {(errors or [f'nvcc ended with {error.returncode}'])[0]}")
            return found
        except (OSError, subprocess.SubprocessError) as error:
            add("rates", f"not measured: {reason(error)}")
            return found
        for part in PARTS:
            if not part.lowest <= capability <= part.highest:
                continue
            function, measured = getattr(program, part.function), Measured()
            function.restype = ctypes.c_char_p
            error = function(*part.arguments, ctypes.byref(measured)).decode()
            add(part.name, f"not measured: {error}" if error else in_words(part, measured))
    return found


def rates_of_the_gpu(command: list[str] | None = None, seconds: float = SECONDS) -> dict[str, str]:
    """Measure in a process of its own, because a kernel that hangs or fails would take the benchmarks with it.

    Returns:
        The results that the process printed before its end, and the reason if it did not reach the last one.
    """
    command = command or [sys.executable, "-m", "benchmarks.gpu.rates"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds)
        output = done.stdout
        lines = [f"exit code {done.returncode}", *done.stderr.decode(errors="replace").strip().splitlines()]
        failure = lines[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output, failure = error.stdout or b"", f"stopped after {seconds:.0f} s"
    found: dict[str, str] = dict(json.loads(line) for line in output.splitlines())
    return found | ({"rates": f"not measured to the end: {failure}"} if failure else {})


def main() -> None:
    """Print a line of JSON for each result as soon as it exists."""
    import torch

    measure_rates(torch.cuda.get_device_capability(), lambda *result: print(json.dumps(result), flush=True))


if __name__ == "__main__":
    main()
