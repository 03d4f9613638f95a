"""Calls every operator with hostile arguments, in a process of its own; test_fuzz.py and `make fuzz` run it.

A case follows from its seed. The process says each seed before it begins, so that a crash has a name too:

    PYTHONPATH=tests python -m fuzz --first 0 --cases 100000
    PYTHONPATH=tests python -m fuzz --first 4711 --cases 1     (one case again)
    PYTHONPATH=tests python -m fuzz --large                    (the hand-chosen ones of large.py)
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bitorch_qlinear import _kernels

from . import arguments, large, oracle

BATCH = 10_000  # cases a process
MOST_FAILURES = 10
FAILED = 3  # the process' exit status: neither that of a traceback nor of a usage error


def check_case(seed: int) -> bool:
    """Raises AssertionError, which describes the case, where its outcome is wrong; whether it was carried out."""
    case = arguments.make_case(seed)
    try:
        return oracle.check(case)
    except AssertionError as error:
        raise AssertionError(f"{arguments.describe(case)}\n  {error}") from error


def check_large(name: str) -> bool:
    """Likewise of large.py."""
    _kernels.force_kernel(None)
    large.CHECKS[name]()
    return True


def work(labels: Iterator[str]) -> int:
    """Prints each label (a seed or a name) and then checks it; says what is wrong on stderr."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    carried_out = failures = 0
    for label in labels:
        print(label, flush=True)
        try:
            carried_out += check_case(int(label)) if label.isdigit() else check_large(label)
        except (AssertionError, RuntimeError) as error:
            print(f"{label}: {error}", file=sys.stderr, flush=True)
            failures += 1
            if failures == MOST_FAILURES:
                break
    print(f"{carried_out} carried out, the others refused")
    return FAILED if failures else 0


def run(options: list[str], timeout: float | None = None) -> tuple[str, str]:
    """Those of this script, in a process of its own.

    Returns:
        What went wrong, or ""; and the last line that the process said.
    """
    # Other paths come after, such as that of a sanitized build of the package.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", "-m", "fuzz", "--here", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said, errors = child.communicate(timeout=timeout)
        end = f"ended with {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        said, errors = child.communicate()
        end = f"had not ended after {timeout} s"
    last = said.strip().rpartition("\n")[2]
    if child.returncode in (0, FAILED):
        return errors, last
    what = arguments.describe(arguments.make_case(int(last))) if last.isdigit() else ""
    return f"{errors}\n{last}: the process {end}: {what}", last


def main() -> int:
    parser = argparse.ArgumentParser(description="Calls every operator with hostile arguments.")
    parser.add_argument("--first", type=int, default=0, help="the first case's seed (0)")
    parser.add_argument("--cases", type=int, default=BATCH, help=f"how many ({BATCH})")
    parser.add_argument("--large", action="store_true", help="the hand-chosen ones of many elements")
    parser.add_argument("--here", action="store_true", help="in this process, each label said")
    options = parser.parse_args()
    end = options.first + options.cases
    if options.here:
        return work(iter(large.CHECKS) if options.large else map(str, range(options.first, end)))
    batches = [["--large"]]
    if not options.large:
        firsts = range(options.first, end, BATCH)
        batches = [["--first", str(first), "--cases", str(min(BATCH, end - first))] for first in firsts]
    failed = 0
    for batch in batches:
        errors, last = run(batch)
        print(" ".join(batch), errors or last, flush=True)
        failed += bool(errors)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
