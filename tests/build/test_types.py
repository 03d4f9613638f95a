"""A strict type checker, and so an editor, reports wrong calls of the interface, and accepts right ones."""

import inspect
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import bitorch_qlinear
from bitorch_qlinear import PackedQLinear, QLinear

api = pytest.importorskip("mypy.api", reason="mypy is not installed")

WRONG = """
from torch import nn
from bitorch_qlinear import QLinear, pack

QLinear("sixty-four", out=3)
QLinear(64, 32, bias="no")
QLinear(64, 32, True, None, None, "sign")
QLinear(64, 32, weight_scale="median")
QLinear.from_linear(nn.Linear(3, 4), input_quantisation="sign")
pack(nn.Linear(3, 4), report=True)
pack("model")
"""

RIGHT = """
from pathlib import Path

import torch
from torch import Tensor, nn
from bitorch_qlinear import PackedQLinear, QLinear, Report, explain, kernels, pack, unpack

layer = QLinear(64, 32, input_quantization="sign", gradient_cancellation_threshold=1.0, weight_quantization=nn.Tanh())
model = nn.Sequential(layer, nn.ReLU(), QLinear(32, 2, False, "cpu", torch.float16))
packed: nn.Sequential = pack(model)
first: nn.Module = packed[0]
alone: nn.Module = pack(layer)
again: nn.Module = unpack(packed, inplace=True)
report: Report = explain(model)
names: list[str] = [entry.name for entry in report]
with kernels.forced("scalar"):
    y: Tensor = model(torch.randn(3, 64))
converted: QLinear = QLinear.from_linear(nn.Linear(3, 4), gradient_cancellation_threshold=None)
words: Tensor = PackedQLinear(64, 32).weight
"""


@pytest.mark.slow
def test_calls(tmp_path, monkeypatch):
    programs = {"wrong.py": WRONG, "right.py": RIGHT}
    for name, program in programs.items():
        (tmp_path / name).write_text(program)
    monkeypatch.setenv("MYPYPATH", os.fspath(Path(bitorch_qlinear.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    said, failed, _ = api.run(["--strict", "--no-error-summary", "--no-incremental", *programs])
    assert not failed, failed
    errors = {tuple(line.split(":")[:2]) for line in said.splitlines() if "error:" in line}
    lines = [number for number, line in enumerate(WRONG.splitlines(), 1) if line.startswith(("QLinear", "pack("))]
    assert errors == {("wrong.py", str(number)) for number in lines}, said


def test_the_constructor_names_what_it_takes():
    """The arguments have the names and the order of nn.Linear's, and all others are keyword-only."""
    theirs = list(inspect.signature(nn.Linear).parameters)
    for cls in (QLinear, PackedQLinear):
        parameters = inspect.signature(cls).parameters
        ours = ["input_quantization", "gradient_cancellation_threshold", "weight_quantization", "weight_scale"]
        assert list(parameters) == [*theirs, *ours]
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
    assert QLinear(3, 4, True, "cpu", torch.float64).weight.dtype is torch.float64
