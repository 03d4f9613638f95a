"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitorch_qlinear import _library


@pytest.fixture(autouse=True)
def _scalar_twin() -> Iterator[None]:
    """What the CPU computes in these tests comes from the scalar kernel: the twin of all others."""
    _library.force_kernel("scalar")
    yield
    _library.force_kernel(None)


@pytest.fixture
def cuda_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CUDA kernel of this name, forced."""
    from .device import forced  # skips where there is no GPU

    with forced(request.param):
        yield request.param
