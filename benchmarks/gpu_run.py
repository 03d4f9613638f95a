"""All that wants a GPU, one part after the other: what ``make gpu`` runs once everything is built.

A part that fails or takes too long is said so, and the next one begins; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GRACE = 5  # seconds between an interrupt, after which pytest says what has failed so far, and the end


class Part(NamedTuple):
    """A command.

    Attributes:
        name: What it is called.
        command: Its arguments.
        seconds: After which it is interrupted.
        file: Of the results' folder, for what it prints.
    """

    name: str
    command: list[str]
    seconds: float
    file: str


def parts(results: Path) -> list[Part]:
    """The whole run: seven minutes at most, and the build before it."""
    python = sys.executable
    describe = (
        "import json, torch, bitorch_qlinear as b; print(json.dumps(b.info(), indent=1)); "
        "print(torch.__config__.show()); print(torch.cuda.get_device_properties(0))"
    )
    environment = f"{python} -c '{describe}'; nvidia-smi; nvcc --version; uname -sr; {python} --version"
    # Several processes: compiling and the CPU's side of the comparisons take most of the time.
    workers = ["-n", str(min(4, os.cpu_count() or 1))] if importable("xdist") else []
    # Of a lost context all that follows fails: the first failures tell.
    brief = ["-q", "-rfEs", "--tb=short", "--maxfail=40", "--durations=10", "-p", "no:cacheprovider"]
    pytest = [python, "-m", "pytest", *brief, *workers, "tests/gpu"]
    return [
        Part("environment", ["sh", "-c", environment], 30, "environment.txt"),
        Part("tests", pytest, 150, "tests.txt"),
        Part("sanitizers", [python, "-m", "benchmarks.sanitize", "--seconds", "80"], 90, "sanitizer.txt"),
        Part("benchmarks", [python, "-m", "benchmarks", "gpu", "--results", str(results)], 150, "gpu.txt"),
    ]


def importable(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def run(part: Part, results: Path) -> int | None:
    """Run one part, its output shown and kept; its exit code, or None if it was stopped."""
    with (results / part.file).open("w") as file:
        process = subprocess.Popen(
            part.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that all that it starts can be stopped with it
        )
        stopped = threading.Event()

        def stop(how: signal.Signals) -> None:
            stopped.set()
            signal_all(process, how)

        timers = [
            threading.Timer(part.seconds + wait, stop, [how])
            for wait, how in ((0, signal.SIGINT), (GRACE, signal.SIGKILL))
        ]
        for timer in timers:
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        code = process.wait()
        for timer in timers:
            timer.cancel()
        signal_all(process, signal.SIGKILL)  # what it left behind would disturb the next part's times
        if stopped.is_set():
            file.write(f"\nstopped after {part.seconds:.0f} s\n")
            return None
        return code


def signal_all(process: subprocess.Popen, how: signal.Signals) -> None:
    """To a process and all that it started; its number is its group's, and free once nobody is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def run_all(every: list[Part], results: Path) -> bool:
    """Run the parts in order, and end with a line each; whether all succeeded."""
    lines, succeeded = [], True
    for part in every:
        print(f"\n==== {part.name} ====", flush=True)
        start = time.monotonic()
        code = run(part, results)
        succeeded &= code == 0
        said = {None: f"stopped after {part.seconds:.0f} s", 0: "done"}.get(code, f"failed, exit code {code}")
        lines.append(f"{part.name:12} {time.monotonic() - start:5.0f} s  {said}")
    print("\n" + "\n".join(lines))
    return succeeded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="for at most 7 files")
    results = parser.parse_args().results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if shutil.which("nvidia-smi") is None:
        print("nvidia-smi is not there: clocks are not noted.")
    if not run_all(parts(results), results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
