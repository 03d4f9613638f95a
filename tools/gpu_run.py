"""All that wants a GPU, one part after the other: what ``make gpu`` runs once everything is built.

A part that fails or times out is reported and the next one starts; the exit code is 1 then. All parts end within 8
minutes of the start that is passed, which is the build's; parts that had no time are reported too.
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
SECONDS = 8 * 60 - 10  # of all, from make's start; some are for what a part that is stopped still says
GRACE = 5  # seconds between an interrupt, after which pytest says what has failed so far, and the end
SPARE = 15  # of its seconds, what a part that is told them keeps for what it does last
OUT_OF_TIME = 124  # exit code of a part that says so itself, as the command timeout has it


class Part(NamedTuple):
    """A command.

    Attributes:
        name: What it is called.
        command: Its arguments.
        seconds: After which it is interrupted.
        file: The file in the results' folder that gets what it prints.
        told: Whether it takes an option --seconds, to end in time by itself.
    """

    name: str
    command: list[str]
    seconds: float
    file: str
    told: bool = False


def parts(results: Path) -> list[Part]:
    """The whole run, the most wanted first: what remains is for the sanitizers."""
    python = sys.executable
    describe = (
        "import dataclasses, json, torch, bitorch_qlinear as b; "
        "print(json.dumps(dataclasses.asdict(b.info()), indent=1)); "
        "print(torch.__config__.show()); print(torch.cuda.get_device_properties(0))"
    )
    environment = f"{python} -c '{describe}'; nvidia-smi; nvcc --version; uname -sr; {python} --version"
    # Several processes: compiling and the CPU's side of the comparisons take most of the time.
    workers = ["-n", str(min(4, os.cpu_count() or 1))] if importable("xdist") else []
    # Of a lost context all that follows fails: the first failures tell.
    brief = ["-q", "-rfEs", "--tb=short", "--maxfail=40", "--durations=10", "-p", "no:cacheprovider"]
    pytest = [python, "-m", "pytest", *brief, *workers, "tests/gpu"]
    benchmarks = [python, "-m", "benchmarks", "gpu", "--results", str(results)]
    return [
        Part("environment", ["sh", "-c", environment], 30, "environment.txt"),
        Part("tests", pytest, 150, "tests.txt"),
        Part("benchmarks", benchmarks, 140, "gpu.txt", told=True),
        Part("sanitizers", [python, "-m", "tools.sanitize"], SECONDS, "sanitizer.txt", told=True),
    ]


def importable(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def run(part: Part, seconds: float, results: Path) -> int | None:
    """Run one part, its output shown and kept; its exit code, or None if it was stopped after so many seconds."""
    told = ["--seconds", f"{seconds - SPARE:.0f}"] if part.told else []
    # Python's output at once; inductor's compilers would be left behind by a process that compiled.
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
            start_new_session=True,  # so that all that it starts can be stopped with it
        )
        assert process.stdout is not None
        # In a thread: what a process leaves behind may hold the pipe open for ever.
        reader = threading.Thread(target=show_and_keep, args=(process.stdout, file), daemon=True)
        reader.start()
        code = wait(process, seconds)
        signal_all(process, signal.SIGKILL)  # what it left behind would disturb the next part's times
        reader.join(GRACE)
        if code is None:
            file.write(f"\nstopped after {seconds:.0f} s\n")
    return code


def show_and_keep(output: TextIO, file: TextIO) -> None:
    with contextlib.suppress(ValueError):  # the file is closed, and nobody waits any more
        for line in output:
            print(line, end="", flush=True)
            file.write(line)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """A process's exit code, or None where it had to be stopped: by an interrupt, then by force."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    for how in (signal.SIGINT, signal.SIGKILL):
        signal_all(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    return None


def signal_all(process: subprocess.Popen, how: signal.Signals) -> None:
    """To a process and all that it started; its number is its group's, and free once nobody is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def run_all(every: list[Part], results: Path, end: float) -> bool:
    """Run the parts in order, and end with a line each; whether all succeeded.

    Args:
        every: The parts.
        results: The folder.
        end: Of the last one, in seconds since the epoch.
    """
    lines, succeeded = [], True
    for part in every:
        print(f"\n==== {part.name} ====", flush=True)
        start = time.time()
        seconds = min(part.seconds, end - start)
        # A part that may take all of its own time is run, however little that is.
        too_late = seconds < min(part.seconds, 2 * SPARE)
        code = OUT_OF_TIME if too_late else run(part, seconds, results)
        succeeded &= code == 0
        said = {None: f"stopped after {seconds:.0f} s", 0: "done", OUT_OF_TIME: "out of time"}
        lines.append(f"{part.name:12} {time.time() - start:5.0f} s  {said.get(code, f'failed, exit code {code}')}")
    print("\n" + "\n".join(lines))
    return succeeded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="for at most 7 files")
    parser.add_argument("--start", type=float, default=time.time(), help="of the 8 minutes, in seconds since the epoch")
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if shutil.which("nvidia-smi") is None:
        print("nvidia-smi is not there: clocks are not noted.")
    if not run_all(parts(results), results, options.start + SECONDS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
