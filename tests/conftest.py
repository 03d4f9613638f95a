"""Fixtures, the seed and the profile of hypothesis. None of it leaves the process, so tests can run in parallel."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import without_hypothesis

from bitorch_qlinear import kernels

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is first imported; no test uses the network

if importlib.util.find_spec("hypothesis") is None:
    without_hypothesis.install()

from hypothesis import HealthCheck, settings

# function_scoped_fixture is suppressed because all examples of a test may share the kernel that is forced once.
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("reproducible")

# Test processes share the cores: with more threads than cores, threads mostly wait for each other.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make check`."""
    parser.addoption("--quick", action="store_true", help="one case of each test; no slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick, keep one case of each test that is not marked slow.

    The name of the test decides which case, always the same one. Tests with the same parameters run different cases, so
    together they run every kernel and every dtype.
    """
    if not config.getoption("quick"):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = {id(each[zlib.crc32(name.encode()) % len(each)]) for name, each in cases.items()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=kernels.available())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each CPU kernel of this processor in turn, and check that it is and stays the active one."""
    with kernels.forced(request.param):
        assert kernels.active() == request.param
        yield request.param
        assert kernels.active() == request.param, "the test itself changed the kernel"


@pytest.fixture
def on_scalar(kernel: str) -> Callable[..., Any]:
    """Return a function that calls another one with the scalar kernel active, the kernel that all others must equal."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with kernels.forced("scalar"):
            return function(*args, **kwargs)

    return call


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let torch.compile forget what it compiled, before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
