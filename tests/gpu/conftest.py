"""Fixtures for the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitorch_qlinear import _kernels, kernels


@pytest.fixture(autouse=True)
def _scalar_twin() -> Iterator[None]:
    """Let the scalar kernel, which all others must equal, compute the CPU's results in these tests."""
    with kernels.forced("scalar"):
        yield


@pytest.fixture
def cuda_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the CUDA kernel of this name."""
    with kernels.forced(request.param):
        assert _kernels.forced_cuda_kernel() == request.param
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with captures that are the first call of a process: what they find concerns all graphs that follow."""
    items.sort(key=lambda item: "first_call_of_a_process" not in item.name)
