"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitorch_qlinear import _kernels, kernels


@pytest.fixture(autouse=True)
def _scalar_twin() -> Iterator[None]:
    """What the CPU computes in these tests comes from the scalar kernel: the twin of all others."""
    with kernels.forced("scalar"):
        yield


@pytest.fixture
def cuda_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CUDA kernel of this name, forced."""
    with kernels.forced(request.param):
        assert _kernels.forced_cuda_kernel() == request.param
        yield request.param
