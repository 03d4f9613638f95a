"""Prints what is installed and checks every kernel that can run here: ``python -m bitorch_qlinear``.

``python -m bitorch_qlinear convert --help`` describes the other command, which packs layers of a checkpoint file.

Each CPU kernel, and each CUDA kernel of each device, computes some odd shapes in all dtypes: packing, products, and on
the CPU also real values × signs. The results must equal those of the scalar kernel bit for bit, and those of the scalar
kernel must equal plain torch's. The exit code is 0 if they do, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import _kernels, _library, functional, kernels
from ._info import info
from .convert.files import OPTIONS, convert_file

SCALAR = "scalar"


class Case(NamedTuple):
    """The sizes of a small product and the dtype of its input.

    Attributes:
        rows: Rows of x.
        outputs: Rows of the weight.
        k: Values in a row of x and of the weight.
        dtype: Dtype of x and of the result.
    """

    rows: int
    outputs: int
    k: int
    dtype: torch.dtype


# Kernels compute one row, a few rows and many rows in different ways. They use tables from 58 rows and 512 outputs on,
# and sums of 16 bits up to 65,520 values. Their loops end at different multiples of k.
CASES = (
    Case(1, 1, 1, torch.float32),
    Case(1, 67, 129, torch.bfloat16),
    Case(3, 130, 31, torch.float64),
    Case(5, 64, 1009, torch.float32),
    Case(17, 257, 288, torch.float16),
    Case(33, 131, 320, torch.float32),
    Case(66, 513, 801, torch.bfloat16),
    Case(2, 17, 65_521, torch.float32),
)

Results = dict[str, Tensor]


class Inputs(NamedTuple):
    """Random operands of a case, and among them values that are easily treated wrongly.

    Attributes:
        x: Shape ``(rows, k)``, with gaps between its rows in memory; it contains ±0, infinities and NaN.
        weight: Shape ``(outputs, k)``.
        bias: Shape ``(outputs,)``.
        scale: Shape ``(outputs,)``.
        reals: Shape ``(rows, outputs)``, finite.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    reals: Tensor


_ON_CPU_ONLY = ("multiply_signs", "dorefa_linear")


@functools.cache
def inputs(case: Case) -> Inputs:
    """Return the operands of a case, which are made once and are the same in every run."""
    generator = torch.Generator().manual_seed(case.rows + case.outputs + case.k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(case.rows, case.k + 3).to(case.dtype)[:, 1 : 1 + case.k]
    special = torch.tensor([-0.0, math.nan, 0.0, -math.inf, math.inf, 1.0, -1.0], dtype=case.dtype)
    x[-1, -len(special) :] = special[: case.k]
    weight, bias, scale = normal(case.outputs, case.k), normal(case.outputs), normal(case.outputs)
    return Inputs(x, weight, bias, scale, normal(case.rows, case.outputs).to(case.dtype))


def compute(case: Case, device: torch.device) -> Results:
    """Compute a case on a device with all operators and the kernel that is active there; return CPU tensors."""
    x, weight, bias, scale, reals = (operand.to(device) for operand in inputs(case))
    words = functional.pack_bits(weight)
    prepared = functional.prepare_weight(words, case.k)
    y, x_words, in_range_words = functional.linear_train(
        x, words, case.k, bias, weight_prepared=prepared, scale=scale, threshold=1.0
    )
    results = {
        "pack_bits": x_words,
        "pack_bits, strict": functional.pack_bits(x, strict=True),
        "in-range bits": in_range_words,
        "unpack_bits": functional.unpack_bits(x_words, case.k, torch.int8),
        "binary_linear": functional.binary_linear(x_words, words, case.k, out_dtype=torch.int32),
        "linear": y,
    }
    if device.type == "cpu":
        few = slice(0, 11)  # the scalar kernel would take a tenth of a second for all rows of the largest case
        finite = x[few].nan_to_num(0, 1, -1)
        results["multiply_signs"] = functional.multiply_signs(reals[few], words, case.k)
        results["multiply_signs, transposed"] = functional.multiply_signs(finite, words, case.k, True)
        results["dorefa_linear"] = functional.dorefa_linear(
            x[few].nan_to_num(0), words, case.k, bits=2, weight_prepared=prepared, out_dtype=torch.float32
        )
    return {name: result.cpu() for name, result in results.items()}


def compute_by_torch(case: Case) -> Results:
    """Return the results that plain torch can compute exactly, as the reference for the scalar kernel."""
    x, weight, *_ = inputs(case)
    x_signs, weight_signs = (torch.where(values < 0, -1.0, 1.0) for values in (x, weight))
    levels = torch.round(x[:11].nan_to_num(0).clamp(0, 1) * 3).to(torch.float32)
    return {
        "unpack_bits": x_signs.to(torch.int8),
        # A sum of at most 2²⁴ terms ±1 is exact in float32, in any order.
        "binary_linear": (x_signs @ weight_signs.T).to(torch.int32),
        "dorefa_linear": (levels @ weight_signs.T + 0.0) * torch.tensor(1 / 3),
    }


def difference(actual: Results, expected: Results) -> str | None:
    """Return the first result that differs from the expected one in any bit, in words, or None if none does."""
    for name, want in expected.items():
        got = actual[name]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"{name}: expected {want.dtype} of shape {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}"
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
        wrong = (got.contiguous().view(bits) != want.contiguous().view(bits)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            return f"{name}: expected {want[at].item()!r} at {at}, got {got[at].item()!r}"
    return None


def check(kernel: str, device: torch.device, expected: Sequence[Results]) -> str | None:
    """Compare one kernel's results of all cases with the expected ones.

    Args:
        kernel: The name of a CPU or CUDA kernel.
        device: Where it computes.
        expected: The results of each of ``CASES``.

    Returns:
        None, or the first mismatch or error in words.
    """
    for case, want in zip(CASES, expected, strict=True):
        with kernels.forced(kernel):
            try:
                wrong = difference(compute(case, device), want)
            except RuntimeError as error:  # for example of a device; the other kernels are still checked
                wrong = str(error).partition("\n")[0]
        if wrong:
            return f"{case.rows} × {case.k} → {case.outputs}, {str(case.dtype).removeprefix('torch.')}: {wrong}"
    return None


def self_test() -> bool:
    """Check all kernels of this machine and print a line for each.

    Returns:
        Whether all kernels are right.
    """
    cpu = torch.device("cpu")
    with kernels.forced(SCALAR):
        expected = [compute(case, cpu) for case in CASES]
    wrong = {SCALAR: check(SCALAR, cpu, [compute_by_torch(case) for case in CASES])}
    for name in kernels.available():
        if name != SCALAR:
            wrong[name] = check(name, cpu, expected)
    for device in _cuda_devices():
        on_cuda = [
            {name: want for name, want in results.items() if not name.startswith(_ON_CPU_ONLY)} for results in expected
        ]
        for name in _kernels.device_cuda_kernels(device):
            wrong[f"{device} {name}"] = check(name, device, on_cuda)
    width = max(map(len, wrong)) + 2
    for name, text in wrong.items():
        print(f"{name:<{width}}{text or 'ok'}")
    return not any(wrong.values())


def _cuda_devices() -> list[torch.device]:
    if not _library.has_cuda:
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


CONVERT = """Packs named linear layers of a state dict, without the model.

The weights of the layers become bits, and all other entries stay. The result loads into pack(model), where the model
has QLinear layers of the same names, quantizations and scales. Nothing is written unless every layer can be packed.
A file does not tell the quantizations, and only one of torch.save tells that a layer had weight_scale="mean".
"""


def convert(arguments: argparse.Namespace) -> int:
    """Pack layers of a checkpoint file and print a report.

    Args:
        arguments: The command line's arguments.

    Returns:
        The exit code: 0, or 2 if nothing was written because of an error, which is printed.
    """
    options = {name: getattr(arguments, name) for name in OPTIONS}
    try:
        report = convert_file(
            arguments.source,
            arguments.target,
            arguments.layers,
            options,
            force=arguments.force,
            dry_run=arguments.dry_run,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    print("nothing was written (--dry-run)" if arguments.dry_run else f"wrote {arguments.target}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print :func:`bitorch_qlinear.info` and check the kernels, or run the command ``convert``.

    Args:
        arguments: The command line's arguments, by default those of the process.

    Returns:
        The exit code, which is 0 if all went well.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bitorch_qlinear", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="")
    command = commands.add_parser("convert", help="pack layers of a file", description=CONVERT, formatter_class=raw)
    command.add_argument("source", type=Path, help="a state dict: .pt, .pth or .bin of torch.save, or .safetensors")
    command.add_argument("target", type=Path, help="the file to write, with one of the same extensions")
    command.add_argument(
        "--layers",
        action="append",
        required=True,
        metavar="REGEX",
        help="matches the whole names of layers to pack, such as 'blocks\\.[0-9]+\\.fc[12]'; may be given repeatedly",
    )
    for name in OPTIONS:
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, metavar="NAME", help=f"the layers' {name} (default: that of QLinear)")
    command.add_argument("--dry-run", action="store_true", help="check everything and report, but write nothing")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    parsed = parser.parse_args(arguments)
    if parsed.command == "convert":
        return convert(parsed)
    print(info())
    print(f"\nself-test of each kernel against {SCALAR}, and of {SCALAR} against torch:")
    return 0 if self_test() else 1


if __name__ == "__main__":
    sys.exit(main())
