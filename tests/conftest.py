"""The kernel fixture, seeds and hypothesis' profile. All of it is local to a process, so tests run in parallel."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import without_hypothesis

from bitorch_qlinear import kernels

if importlib.util.find_spec("hypothesis") is None:
    without_hypothesis.install()

from hypothesis import HealthCheck, settings

# function_scoped_fixture: forcing a kernel once serves all examples of a test.
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("reproducible")

# Test processes share the cores; more threads than cores wait for each other most of the time.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=kernels.available())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU kernel of this processor in turn: forced, and proven to be the active one."""
    with kernels.forced(request.param):
        assert kernels.active() == request.param
        yield request.param
        assert kernels.active() == request.param, "the test itself changed the kernel"


@pytest.fixture
def on_scalar(kernel: str) -> Callable[..., Any]:
    """Calls a function with the scalar twin active, and the kernel under test again afterwards."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with kernels.forced("scalar"):
            return function(*args, **kwargs)

    return call


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
