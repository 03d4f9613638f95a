"""x passes through the package's files in one direction; only the call of an autograd Function returns to a file."""

import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitorch_qlinear
from bitorch_qlinear import QLinear, pack

PACKAGE = Path(bitorch_qlinear.__file__).parent
K, N = 64, 40


def files_of(layer: torch.nn.Module, x: Tensor) -> list[str]:
    """Return the files whose functions get x as an argument, in the order of calls; repeated calls in a file once."""
    found = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            values = frame.f_locals.values()
            if any(each is x for value in values for each in (value if isinstance(value, tuple) else (value,))):
                found.append(path.relative_to(PACKAGE).as_posix())

    layer(x)  # the first call may prepare something, so only the second is recorded
    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return [file for file, _ in groupby(found)]


def returns(files: list[str]) -> int:
    return len(files) - len(set(files))


@pytest.mark.parametrize("convert", [lambda layer: layer, pack], ids=["QLinear", "PackedQLinear"])
def test_x_passes_through_the_files_in_one_direction(convert):
    layer = convert(QLinear(K, N, gradient_cancellation_threshold=1.0).eval())
    with torch.no_grad():
        inference = files_of(layer, torch.randn(3, K))
    assert 1 < len(inference) <= 5 and returns(inference) == 0, inference
    training = files_of(layer, torch.randn(3, K, requires_grad=True))
    assert 1 < len(training) <= 5 and returns(training) <= 1, training
