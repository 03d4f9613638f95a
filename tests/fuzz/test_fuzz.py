"""Hostile arguments never crash an operator or reach outside memory: it raises a clear error or returns the result."""

import ctypes
import faulthandler
import os
import signal

import pytest
import torch

from bitorch_qlinear import _kernels

from . import __main__ as fuzz
from . import arguments, large, oracle
from .memory import guarded

CASES = 10_000
BATCHES = 4


@pytest.fixture(autouse=True)
def _automatic_kernel():
    """Reset the kernel after the test, because each case forces one."""
    yield
    _kernels.force_kernel(None)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_hostile_arguments(batch):
    size = CASES // BATCHES
    errors, last = fuzz.run(["--first", str(batch * size), "--cases", str(size)], timeout=600)
    assert not errors, errors
    assert int(last.split()[0]) > size / 5, f"too few valid calls: {last}"


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    errors, last = fuzz.run(["--large"], timeout=600)
    assert not errors, errors
    assert len(large.CHECKS) == 20 and last.startswith("20 carried out"), last


def test_the_seed_determines_the_case():
    for seed in range(50):
        first, second = (arguments.describe(arguments.make_case(seed)) for _ in range(2))
        assert first == second


def test_cases_include_valid_and_wrong_calls_of_every_operator():
    outcomes = {(c.operator, bool(oracle.find_faults(c))) for c in map(arguments.make_case, range(500))}
    assert outcomes == {(name, refused) for name in arguments.OPERATORS for refused in (False, True)}


def signal_of(function):
    """Return the signal that ends a child process which calls the function, or 0 if it ends by itself."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        function()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("size", [1, 64, 4096, 5000])
def test_guarded_memory(at_end, misaligned, size):
    content = torch.randint(0, 256, (size,), dtype=torch.uint8)
    tensor = guarded(content, at_end, misaligned)
    assert torch.equal(tensor, content)
    assert tensor.untyped_storage().nbytes() == size
    beside = tensor.data_ptr() + (size + misaligned if at_end else -1 - misaligned)
    assert signal_of(lambda: ctypes.string_at(tensor.data_ptr(), size)) == 0
    assert signal_of(lambda: ctypes.string_at(beside, 1)) == signal.SIGSEGV
    assert signal_of(lambda: ctypes.memset(tensor.data_ptr(), 0, 1)) == signal.SIGSEGV
