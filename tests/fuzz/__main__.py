"""Call every operator with hostile arguments in a separate process; test_fuzz.py and `make fuzz` run this program.

The seed determines a case. The process prints each seed before it runs the case, so that a crash can be attributed:

    PYTHONPATH=tests python -m fuzz --first 0 --cases 100000
    PYTHONPATH=tests python -m fuzz --first 4711 --cases 1     (repeats one case)
    PYTHONPATH=tests python -m fuzz --large                    (the hand-written cases in large.py)
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

BATCH = 10_000  # cases per process
MOST_FAILURES = 10
FAILED = 3  # the exit status after a failure; a traceback gives 1 and a usage error 2


def check_case(seed: int) -> bool:
    """Run one case.

    Returns:
        Whether the operator had to compute a result rather than refuse the arguments.

    Raises:
        AssertionError: If the outcome is wrong; the message describes the case.
    """
    case = arguments.make_case(seed)
    try:
        return oracle.check(case)
    except AssertionError as error:
        raise AssertionError(f"{arguments.describe(case)}\n  {error}") from error


def check_large(name: str) -> bool:
    """Run one case of large.py with the kernel that is chosen automatically."""
    _kernels.force_kernel(None)
    large.CHECKS[name]()
    return True


def work(labels: Iterator[str]) -> int:
    """Print each label (a seed or the name of a large case) and then run its case; report failures on stderr."""
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
    """Run this program with these options in a separate process.

    Returns:
        A description of what went wrong, or "", and the last line that the process printed.
    """
    # PYTHONPATH stays in effect: it may name a sanitized build of the package.
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
    parser = argparse.ArgumentParser(description="Call every operator with hostile arguments.")
    parser.add_argument("--first", type=int, default=0, help="the first case's seed (0)")
    parser.add_argument("--cases", type=int, default=BATCH, help=f"the number of cases ({BATCH})")
    parser.add_argument("--large", action="store_true", help="run the hand-written cases of many elements instead")
    parser.add_argument("--here", action="store_true", help="run in this process, and print each label")
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
