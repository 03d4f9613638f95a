"""Run everything that needs a GPU, one part after the other; ``make gpu`` calls this once everything is built.

A part that fails or times out is reported, the next one starts, and the exit code is 1 in the end; but if a kernel
hangs in its first products, nothing else starts. All parts end within 8 minutes of the start of the build, which
``--start`` gives; parts that had no time are reported too.
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
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
# The time of all parts from the start of make. The last 10 of the 480 seconds are left for what a stopped part prints.
SECONDS = 8 * 60 - 10
GRACE = 5  # seconds from the interrupt to the kill, in which pytest reports what has failed so far
SPARE = 15  # seconds that a part with a time limit of its own keeps for its last steps
OUT_OF_TIME = 124  # the exit code of a part that reports by itself that its time ran out, as the command timeout has it


class Part(NamedTuple):
    """A command.

    Attributes:
        name: The name in the report.
        command: The program and its arguments.
        seconds: The time after which the part is interrupted.
        file: The file in the folder of results that receives the output.
        told: Whether the command takes an option --seconds and ends in time by itself.
        needed: Whether the parts behind it are not started if it runs out of time.
    """

    name: str
    command: list[str]
    seconds: float
    file: str
    told: bool = False
    needed: bool = False


def parts(results: Path) -> list[Part]:
    """Return all parts, the most important first; the sanitizers get the time that remains."""
    python = sys.executable
    describe = (
        "import dataclasses, json, torch, bitorch_qlinear as b; "
        "print(json.dumps(dataclasses.asdict(b.info()), indent=1)); "
        "print(torch.__config__.show()); print(torch.cuda.get_device_properties(0))"
    )
    environment = f"{python} -c '{describe}'; nvidia-smi; nvcc --version; uname -sr; {python} --version"
    # Several processes help: most of the time goes to compiling and to the references on the CPU.
    workers = ["-n", str(min(4, os.cpu_count() or 1))] if importable("xdist") else []
    # Once a CUDA context is lost every later test fails, so the first failures are enough.
    brief = ["-q", "-rfEs", "--tb=short", "--maxfail=40", "--durations=10", "-p", "no:cacheprovider"]
    pytest = [python, "-m", "pytest", *brief, *workers, "tests/gpu"]
    benchmarks = [python, "-m", "benchmarks", "gpu", "--results", str(results)]
    return [
        Part("environment", ["sh", "-c", environment], 16, "environment.txt"),
        Part("kernels", [python, "-m", "tools.gpu_first"], 54, "kernels.txt", needed=True),
        Part("tests", pytest, 150, "tests.txt"),
        Part("benchmarks", benchmarks, 160, "gpu.txt", told=True),
        Part("sanitizers", [python, "-m", "tools.sanitize"], SECONDS, "sanitizer.txt", told=True),
    ]


def importable(module: str) -> bool:
    """Return whether a fresh process can import a module."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def run(part: Part, seconds: float, results: Path) -> int | None:
    """Run one part, print and keep its output, and return its exit code; None if its time ran out."""
    told = ["--seconds", f"{seconds - SPARE:.0f}"] if part.told else []
    # Output is not buffered. Inductor compiles in the process itself, because its worker processes could outlive it.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with (results / part.file).open("w") as file:
        process = subprocess.Popen(
            [*part.command, *told],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # its children can be stopped with it
        )
        assert process.stdout is not None
        # A thread reads, because a child that stays behind may hold the pipe open for ever.
        reader = threading.Thread(target=show_and_keep, args=(process.stdout, file), daemon=True)
        reader.start()
        code = wait(process, seconds)
        signal_all(process, signal.SIGKILL)  # children that stay behind would disturb the times of the next part
        reader.join(GRACE)
        if code is None:
            file.write(f"\nstopped after {seconds:.0f} s\n")
    return code


def show_and_keep(output: TextIO, file: TextIO) -> None:
    """Print each line and write it to a file."""
    with contextlib.suppress(ValueError):  # the file is closed once nobody waits for this thread
        for line in output:
            print(line, end="", flush=True)
            file.write(line)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code of a process, or None if it had to be stopped: by an interrupt, then by a kill."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    for how in (signal.SIGINT, signal.SIGKILL):
        signal_all(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    return None


def signal_all(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal to a process and its children, which are one process group with the number of the process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def run_all(every: list[Part], results: Path, end: float) -> bool:
    """Run the parts in order, print a line for each at the end, and return whether all succeeded.

    Args:
        every: The parts.
        results: The folder that receives the output of each part.
        end: The time at which the last part is stopped, in seconds since the epoch.
    """
    lines, succeeded = [], True
    for part in every:
        print(f"\n==== {part.name} ====", flush=True)
        start = time.time()
        seconds = min(part.seconds, end - start)
        # A part starts if it has at least 2 * SPARE seconds, or all of its own time if that is shorter.
        too_late = seconds < min(part.seconds, 2 * SPARE)
        code = OUT_OF_TIME if too_late else run(part, seconds, results)
        succeeded &= code == 0
        said = {None: f"stopped after {seconds:.0f} s", 0: "done", OUT_OF_TIME: "out of time"}
        lines.append(f"{part.name:12} {time.time() - start:5.0f} s  {said.get(code, f'failed, exit code {code}')}")
        if part.needed and code in (None, OUT_OF_TIME):
            lines.append("the other parts were not started")
            break
    print("\n" + "\n".join(lines))
    return succeeded


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="the folder for at most 8 files")
    parser.add_argument(
        "--start", type=float, default=time.time(), help="the start of the 8 minutes, in seconds since the epoch"
    )
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if shutil.which("nvidia-smi") is None:
        print("nvidia-smi was not found: clocks are not recorded.")
    if not run_all(parts(results), results, options.start + SECONDS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
