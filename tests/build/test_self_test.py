"""``python -m bitorch_qlinear`` prints a verdict for each kernel, and notices a kernel that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitorch_qlinear
from bitorch_qlinear import __main__ as program
from bitorch_qlinear import _kernels, _library, functional, info, kernels

CPU = torch.device("cpu")
KERNELS = kernels.available()


def run(*arguments):
    root = Path(bitorch_qlinear.__file__).parents[1]
    command = [sys.executable, "-m", "bitorch_qlinear", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)


def verdicts(output):
    """Return the verdict of each kernel by its name."""
    lines = output[output.index("\nself-test") :].strip().splitlines()[1:]
    return {line.rpartition("  ")[0].strip() or line: line.rpartition("  ")[2] for line in lines}


@pytest.mark.slow
def test_all_kernels_compute_the_right_results():
    result = run()
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(f"{info()}\n")
    said = verdicts(result.stdout)
    assert set(KERNELS) <= set(said) and set(said.values()) == {"ok"}


@pytest.mark.slow
def test_help_and_unknown_arguments():
    help_text = run("--help")
    assert help_text.returncode == 0 and help_text.stdout.startswith("usage: python -m bitorch_qlinear")
    unknown = run("--fast")
    assert unknown.returncode == 2 and "unrecognized arguments: --fast" in unknown.stderr


def one_bit_wrong(function, kernel):
    """Return the operator with one bit of its last value wrong while this kernel is active."""

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if kernels.active() == kernel:
            first = result[0] if isinstance(result, tuple) else result
            first.view(torch.uint8).view(-1)[-1] ^= 1
        return result

    return call


OPERATORS = ["pack_bits", "unpack_bits", "binary_linear", "linear_train", "multiply_signs", "dorefa_linear"]
CALLS = [(kernel, operator) for kernel in KERNELS if kernel != "scalar" for operator in OPERATORS]
CALLS += [
    ("scalar", "unpack_bits"),
    ("scalar", "binary_linear"),
    ("scalar", "dorefa_linear"),
]  # torch computes these exactly, too


@pytest.mark.parametrize(("kernel", "operator"), CALLS)
def test_one_wrong_bit_is_found(monkeypatch, capsys, kernel, operator):
    monkeypatch.setattr(functional, operator, one_bit_wrong(getattr(functional, operator), kernel))
    before = kernels.active()
    assert program.main([]) == 1
    said = verdicts(capsys.readouterr().out)
    assert kernels.active() == before
    assert "expected" in said[kernel] and "got" in said[kernel]
    if kernel != "scalar":  # otherwise all other kernels differ from it
        assert {name for name in said if said[name] != "ok"} == {kernel}


def test_a_wrong_dtype_or_shape_is_a_difference():
    want = {"y": torch.zeros(2, 3)}
    assert program.difference(want, want) is None
    assert "torch.float64" in program.difference({"y": torch.zeros(2, 3).double()}, want)
    assert "(3, 2)" in program.difference({"y": torch.zeros(3, 2)}, want)
    negative = torch.zeros(2, 3)
    negative[1, 2] = -0.0
    assert program.difference({"y": negative}, want) == "y: expected 0.0 at (1, 2), got -0.0"


def test_an_error_of_a_kernel_is_its_verdict(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("out of breath\nat some line")

    expected = [program.compute(case, CPU) for case in program.CASES]
    monkeypatch.setattr(functional, "linear_train", fail)
    assert program.check(KERNELS[0], CPU, expected) == "1 × 1 → 1, float32: out of breath"


def test_every_cuda_kernel_of_every_device_is_checked(monkeypatch, capsys):
    """The test makes up two devices, whose results come from the CPU."""
    forced = []
    compute = program.compute
    monkeypatch.setattr(_library, "has_cuda", True)
    monkeypatch.setattr(_kernels, "forced_cuda_kernel", lambda: "")
    monkeypatch.setattr(_kernels, "force_cuda_kernel", forced.append)
    monkeypatch.setattr(_kernels, "device_cuda_kernels", lambda device: ["popc", "skinny"][: 1 + device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def on_cpu(case, device):
        results = compute(case, CPU)
        if device.type == "cuda":
            results = {name: y for name, y in results.items() if not name.startswith(program._ON_CPU_ONLY)}
            if (device.index, forced[-1]) == (1, "popc"):
                results["linear"][-1] += 1
        return results

    monkeypatch.setattr(program, "compute", on_cpu)
    assert not program.self_test()
    said = verdicts("\nself-test\n" + capsys.readouterr().out)
    assert [name for name in said if said[name] != "ok"] == ["cuda:1 popc"]
    assert list(said)[len(KERNELS) :] == ["cuda:0 popc", "cuda:1 popc", "cuda:1 skinny"]
