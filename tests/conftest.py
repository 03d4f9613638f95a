"""Fixtures, the seed and the profile of hypothesis. None of it leaves the process, so tests can run in parallel."""

from __future__ import annotations

import importlib.util
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
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
    """Add the options that leave out cases."""
    parser.addoption("--quick", action="store_true", help="one case of each test; no slow tests")
    parser.addoption("--share", type=int, default=1, metavar="N", help="one of N cases of each test, at least one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the cases of each test that --quick or --share asks for.

    The name of the test decides which cases, always the same ones. Tests with the same parameters run different cases,
    so together they run every kernel and every dtype.
    """
    quick, share = config.getoption("quick"), config.getoption("share")
    if not quick and share <= 1:
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not quick or item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        id(item)
        for name, each in cases.items()
        for item in Random(name).sample(each, 1 if quick else math.ceil(len(each) / share))
    }
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
